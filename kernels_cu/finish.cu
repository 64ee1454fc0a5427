/* The epilogue of products that cuBLAS has computed: y (T, units * PAIR) float32. Their order within a row is that of
 * the weights: wq, wk and wv one after the other, or gate and then up. Grid: (units / threads, T). */
#include "common.cuh"
#include "epilogue.cuh"

INLINE i32 column(i32 unit, i32 which, i32 units) {
#if EPILOGUE == QKV
    return unit / HALF * D + unit % HALF + which * HALF;
#else
    return unit + which * units;
#endif
}

KERNEL __launch_bounds__(256) finish(const float *y, EPILOGUE_PARAMETERS) {
    const Epilogue epilogue = EPILOGUE_ARGUMENTS;
    const i32 unit = blockIdx.x * 256 + threadIdx.x, token = blockIdx.y;
    if (unit >= units) return;
    float sums[PAIR];
    for (i32 p = 0; p < PAIR; p++) sums[p] = y ? y[(i64)token * units * PAIR + column(unit, p, units)] : 0.f;
    epilogue.finish(unit, token, sums);
}
