/* The epilogue of products that cuBLAS has computed: y (T, count * PAIR) float32, the sums of the units from `first` on.
 * Their order within a row is that of the weights: wq, wk and wv one after the other, or gate and then up. With NARROW
 * GATE_UP's out is of the weights' type, not float32. A thread has UNITS neighbours; grid: (count / (UNITS * THREADS), T),
 * rounded up. */
#include "common.cuh"
#include "epilogue.cuh"

#define THREADS 256

INLINE void load4(float (&f)[4], const float *from) {
    const float4 a = *(const float4 *)from;
    f[0] = a.x, f[1] = a.y, f[2] = a.z, f[3] = a.w;
}

#if EPILOGUE == QKV

INLINE uint2 halves(const float (&f)[4]) {
    return make_uint2(pack_half2(clamp_half(f[0]), clamp_half(f[1])), pack_half2(clamp_half(f[2]), clamp_half(f[3])));
}

/* Four channels and the four that they are turned with, of one head: 16 bytes of each row that is read or written. */
KERNEL __launch_bounds__(THREADS) finish(const float *y, i32 first, i32 count, EPILOGUE_PARAMETERS) {
    const i32 at = (blockIdx.x * THREADS + threadIdx.x) * UNITS;
    const i64 token = blockIdx.y;
    if (at >= count) return;
    const i32 unit = first + at, head = unit / HALF, channel = unit % HALF, position = positions[token], slot = slots[token];
    if ((u32)position >= (u32)P || (u32)slot >= (u32)S) {
        *fault = BAD_INDEX;
        return;
    }
    const bool turned = head < H + G;
    const i32 local = head < H ? head : (head - H) % G;
    const float *const bias = head < H ? bq : turned ? bk : bv, *const sums = y + token * count * PAIR + at / HALF * D + channel;
    float a[UNITS], b[UNITS], c[UNITS], s[UNITS];
    load4(a, sums), load4(b, sums + HALF);
    load4(c, cosines + (i64)position * HALF + channel), load4(s, sines + (i64)position * HALF + channel);
#pragma unroll
    for (i32 i = 0; i < UNITS; i++) {
        const float low = biased(a[i], bias, local * D + channel + i), high = biased(b[i], bias, local * D + channel + HALF + i);
        a[i] = turned ? low * c[i] - high * s[i] : low, b[i] = turned ? high * c[i] + low * s[i] : high;
    }
    if (head < H) {
        float *const to = q + (token * H + head) * D + channel;
        *(float4 *)to = make_float4(a[0], a[1], a[2], a[3]), *(float4 *)(to + HALF) = make_float4(b[0], b[1], b[2], b[3]);
    } else {
        u16 *const to = (turned ? k : v) + ((i64)local * S + slot) * D + channel;
        *(uint2 *)to = halves(a), *(uint2 *)(to + HALF) = halves(b);
    }
}

#elif EPILOGUE == GATE_UP && NARROW

KERNEL __launch_bounds__(THREADS) finish(const float *y, i32 first, i32 count, EPILOGUE_PARAMETERS) {
    const Epilogue epilogue = EPILOGUE_ARGUMENTS;
    const i32 at = (blockIdx.x * THREADS + threadIdx.x) * UNITS;
    const i64 token = blockIdx.y;
    if (at >= count) return;
    const float *const sums = y + token * count * PAIR + at;
    float g[UNITS], u[UNITS];
    load4(g, sums), load4(u, sums + count);
#pragma unroll
    for (i32 i = 0; i < UNITS; i++) g[i] = epilogue.value(first + at + i, {g[i], u[i]});
    *(uint2 *)((u16 *)out + token * units + first + at) = make_uint2(pack2(g[0], g[1]), pack2(g[2], g[3]));
}

#else

KERNEL __launch_bounds__(THREADS) finish(const float *y, i32 first, i32 count, EPILOGUE_PARAMETERS) {
    const Epilogue epilogue = EPILOGUE_ARGUMENTS;
    const i32 at = blockIdx.x * THREADS + threadIdx.x, token = blockIdx.y;
    if (at >= count) return;
    float sums[PAIR];
    for (i32 p = 0; p < PAIR; p++) sums[p] = y ? y[((i64)token * PAIR + p) * count + at] : 0.f;
    epilogue.finish(first + at, token, sums);
}

#endif
