/* Two to sixteen rows of activations times weights, on tensor cores, every weight read once.
 *
 * The weights are the 16-row operand of m16n8k16 and the tokens its 8 columns. A lane's 16-byte loads are its operands of
 * two instructions as they come: the order of k within 32 is free as long as both operands have the same. With PAIR 2 the
 * two rows of a unit are rows g and g + 8 of one instruction. The warps of a block share its 16 weight rows and split K;
 * their parts are added through shared memory in a fixed order. The weights of a warp's next AHEAD steps are on their way,
 * the first of them before the kernels that this one follows have ended, since weights depend on none. x is (COLUMNS or
 * fewer, K) in the weights' type. */
#include "common.cuh"
#include "epilogue.cuh"

#define STEP 64           /* values of K that a warp takes at a time: 128 bytes of each row */
#define UNITS (16 / PAIR) /* of a block */
#define COLUMNS (8 * COLUMN_TILES)

KERNEL __launch_bounds__(WARPS *WARP) panel(const u16 *x, i32 T, i32 K, EPILOGUE_PARAMETERS) {
    __shared__ float parts[WARPS][16][COLUMNS + 1];
    const Epilogue epilogue = EPILOGUE_ARGUMENTS;
    const i32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, quarter = lane % 4;
    const i32 base = blockIdx.x * UNITS;
    const u8 *rows[2];
#pragma unroll
    for (i32 half = 0; half < 2; half++)
        rows[half] = epilogue.row(min(base + g + (PAIR == 1 ? 8 * half : 0), units - 1), half % PAIR, K);

    const uint4 nothing = make_uint4(0, 0, 0, 0);
    uint4 w[AHEAD][2][2];
    auto load = [&](i32 start, uint4 (&to)[2][2]) {
#pragma unroll
        for (i32 part = 0; part < 2; part++) {
            const i32 k = start + part * 32 + quarter * 8;
#pragma unroll
            for (i32 half = 0; half < 2; half++) to[half][part] = k < K ? load_stream(rows[half] + 2 * k) : nothing;
        }
    };
#pragma unroll
    for (i32 i = 0; i < AHEAD; i++) load((warp + i * WARPS) * STEP, w[i]);
    wait_for_predecessor();
    start_successor();

    float c[COLUMN_TILES][4] = {};
#pragma unroll 1
    for (i32 round = warp * STEP; round < K; round += AHEAD * WARPS * STEP) {
#pragma unroll
        for (i32 i = 0; i < AHEAD; i++) {
            const i32 start = round + i * WARPS * STEP;
            if (start >= K) break;
            uint4 b[COLUMN_TILES][2];
#pragma unroll
            for (i32 n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                for (i32 part = 0; part < 2; part++) {
                    const i32 k = start + part * 32 + quarter * 8;
                    b[n][part] = k < K && n * 8 + g < T ? *(const uint4 *)(x + (i64)(n * 8 + g) * K + k) : nothing;
                }
#pragma unroll
            for (i32 part = 0; part < 2; part++) {
                const uint4 low = w[i][0][part], high = w[i][1][part];
                const u32 one[4] = {low.x, high.x, low.y, high.y}, two[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
                for (i32 n = 0; n < COLUMN_TILES; n++) {
                    mma_weight(c[n], one, b[n][part].x, b[n][part].y);
                    mma_weight(c[n], two, b[n][part].z, b[n][part].w);
                }
            }
            load(start + AHEAD * WARPS * STEP, w[i]);
        }
    }
#pragma unroll
    for (i32 n = 0; n < COLUMN_TILES; n++)
#pragma unroll
        for (i32 i = 0; i < 4; i++) parts[warp][g + i / 2 * 8][n * 8 + quarter * 2 + i % 2] = c[n][i];
    __syncthreads();
    for (i32 i = threadIdx.x; i < UNITS * T; i += WARPS * WARP) {
        const i32 local = i % UNITS, token = i / UNITS, unit = base + local;
        if (unit >= units) continue;
        float y[PAIR];
#pragma unroll
        for (i32 p = 0; p < PAIR; p++) {
            y[p] = 0;
            for (i32 w = 0; w < WARPS; w++) y[p] += parts[w][local + p * 8][token];
        }
        epilogue.finish(unit, token, y);
    }
}
