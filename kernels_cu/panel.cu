/* Two to sixteen rows of activations times weights, on tensor cores, every weight read once.
 *
 * The weights are the 16-row operand of m16n8k16 and the tokens its 8 columns. A lane's 16-byte loads are its operands of
 * two instructions as they come: the order of k within 32 is free as long as both operands have the same. With PAIR 2 the
 * two rows of a unit are rows g and g + 8 of one instruction. The warps of a block share its TILES * 16 weight rows and
 * split K; their parts are added through shared memory in a fixed order. x is (COLUMNS or fewer, K) in the weights' type. */
#include "common.cuh"
#include "epilogue.cuh"

#define STEP 64                     /* values of K that a warp takes at a time: 128 bytes of each row */
#define TILE_UNITS (16 / PAIR)      /* units of one 16-row operand */
#define BLOCK_UNITS (TILES * TILE_UNITS)
#define COLUMNS (8 * COLUMN_TILES)

INLINE uint4 load_words(const void *p, bool valid) { return valid ? *(const uint4 *)p : make_uint4(0, 0, 0, 0); }

KERNEL __launch_bounds__(WARPS *WARP) panel(const u16 *x, i32 T, i32 K, EPILOGUE_PARAMETERS) {
    __shared__ float parts[WARPS][TILES * 16][COLUMNS + 1];
    const Epilogue epilogue = EPILOGUE_ARGUMENTS;
    const i32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, quarter = lane % 4;
    const i32 base = blockIdx.x * BLOCK_UNITS;

    const u8 *rows[TILES][2];
#pragma unroll
    for (i32 tile = 0; tile < TILES; tile++)
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            const i32 unit = base + tile * TILE_UNITS + g + (PAIR == 1 ? 8 * half : 0);
            rows[tile][half] = epilogue.row(min(unit, units - 1), half % PAIR, K);
        }

    wait_for_predecessor();
    start_successor();
    float c[TILES][COLUMN_TILES][4] = {};
#pragma unroll 2
    for (i32 start = warp * STEP; start < K; start += WARPS * STEP) {
        uint4 w[TILES][2][2], b[COLUMN_TILES][2];
#pragma unroll
        for (i32 part = 0; part < 2; part++) {
            const i32 k = start + part * 32 + quarter * 8;
#pragma unroll
            for (i32 tile = 0; tile < TILES; tile++)
#pragma unroll
                for (i32 half = 0; half < 2; half++)
                    w[tile][half][part] = k < K ? load_stream(rows[tile][half] + 2 * k) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (i32 n = 0; n < COLUMN_TILES; n++)
                b[n][part] = load_words(x + (i64)(n * 8 + g) * K + k, k < K && n * 8 + g < T);
        }
#pragma unroll
        for (i32 part = 0; part < 2; part++)
#pragma unroll
            for (i32 tile = 0; tile < TILES; tile++) {
                const uint4 low = w[tile][0][part], high = w[tile][1][part];
                const u32 one[4] = {low.x, high.x, low.y, high.y}, two[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
                for (i32 n = 0; n < COLUMN_TILES; n++) {
                    mma_weight(c[tile][n], one, b[n][part].x, b[n][part].y);
                    mma_weight(c[tile][n], two, b[n][part].z, b[n][part].w);
                }
            }
    }
#pragma unroll
    for (i32 tile = 0; tile < TILES; tile++)
#pragma unroll
        for (i32 n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (i32 i = 0; i < 4; i++)
                parts[warp][tile * 16 + g + (i / 2) * 8][n * 8 + quarter * 2 + i % 2] = c[tile][n][i];
    __syncthreads();
    for (i32 i = threadIdx.x; i < BLOCK_UNITS * T; i += WARPS * WARP) {
        const i32 local = i % BLOCK_UNITS, token = i / BLOCK_UNITS, unit = base + local;
        if (unit >= units) continue;
        float y[PAIR];
#pragma unroll
        for (i32 p = 0; p < PAIR; p++) {
            const i32 row = local / TILE_UNITS * 16 + local % TILE_UNITS + p * 8;
            y[p] = 0;
            for (i32 w = 0; w < WARPS; w++) y[p] += parts[w][row][token];
        }
        epilogue.finish(unit, token, y);
    }
}
