/* How much of the query tokens' attention falls on each chunk: causal softmax over all visible keys, probabilities added
 * up over query rows and heads. They are never kept: two passes over K compute the same scores.
 *
 * A row is a query token and a head of the block's KV head; a block takes COLUMNS rows at a time. mass_rows finds every
 * row's maximum and sum of powers over its block's span of keys; mass_chunks merges the spans and adds up the
 * probabilities of one chunk per warp.
 *
 * Keys are the M side of the matrix instruction and rows the N side, so that one chunk is one warp's sum and K goes from
 * global memory straight to registers, 16 bytes a lane: the order of the channels in a dot product is free, and lane c of a
 * quad takes channels 8c..8c+7 of every 32, of K as of Q. Q carries D^-1/2 * log2(e): probabilities are powers of two. */
#include "common.cuh"
#include "asm.cuh"

#define WARPS 4
#define THREADS (WARPS * WARP)
#define KEYS 16 /* of a warp's step */
#define PIECES (D / 32)
#define REST (D % 32) /* 0, or 16 channels in 8-byte pieces */
#define STRIDE ((D / 8 + 3) / 8 * 64 + 32) /* halves of a row of Q: an odd multiple of 64 bytes spreads rows over banks */
#define NO_MAXIMUM -1e30f /* finite, so that subtracting it from a masked score is not NaN */

typedef struct {
    uint4 piece[PIECES][2]; /* of keys lane / 4 and lane / 4 + 8 */
    uint2 rest[2];
} keys;

/* 16 keys from row `key` on; beyond the last row of K its last one, which the mask hides. */
INLINE void load_keys(keys &x, const u16 *k, i32 key, i32 S) {
    const i32 lane = threadIdx.x % WARP;
#pragma unroll
    for (i32 i = 0; i < 2; i++) {
        const u16 *row = k + (i64)min(key + lane / 4 + 8 * i, S - 1) * D;
#pragma unroll
        for (i32 p = 0; p < PIECES; p++) x.piece[p][i] = *(const uint4 *)(row + 32 * p + lane % 4 * 8);
        if (REST) x.rest[i] = *(const uint2 *)(row + 32 * PIECES + lane % 4 * 4);
    }
}

/* Rows first_row.. of one KV head as FP16; zeros beyond the last. */
INLINE void load_queries(u16 *shared, const float *q, i32 first_row, i32 rows, i32 group, i32 H) {
    const float scale = 1.44269504f / sqrtf((float)D);
    for (i32 i = threadIdx.x; i < COLUMNS * (D / 4); i += THREADS) {
        const i32 row = first_row + i / (D / 4), at = i % (D / 4) * 4;
        float4 x = make_float4(0, 0, 0, 0);
        if (row < rows) x = *(const float4 *)(q + ((i64)(row / group) * H + row % group) * D + at);
        *(uint2 *)(shared + i / (D / 4) * STRIDE + at) =
            make_uint2(pack_half2(clamp_half(x.x * scale), clamp_half(x.y * scale)),
                       pack_half2(clamp_half(x.z * scale), clamp_half(x.w * scale)));
    }
}

/* c: keys lane / 4 and lane / 4 + 8 against rows 8 * tile + lane % 4 * 2 + {0, 1}. */
INLINE void scores(float (&c)[4], const keys &x, const u16 *shared_q, i32 tile) {
    const i32 lane = threadIdx.x % WARP;
    const u16 *row = shared_q + (8 * tile + lane / 4) * STRIDE;
#pragma unroll
    for (i32 p = 0; p < PIECES; p++) {
        const uint4 b = *(const uint4 *)(row + 32 * p + lane % 4 * 8), *a = x.piece[p];
        const u32 low[4] = {a[0].x, a[1].x, a[0].y, a[1].y}, high[4] = {a[0].z, a[1].z, a[0].w, a[1].w};
        mma_half(c, low, b.x, b.y);
        mma_half(c, high, b.z, b.w);
    }
    if (REST) {
        const uint2 b = *(const uint2 *)(row + 32 * PIECES + lane % 4 * 4);
        const u32 a[4] = {x.rest[0].x, x.rest[1].x, x.rest[0].y, x.rest[1].y};
        mma_half(c, a, b.x, b.y);
    }
}

/* Scores of keys that a row does not see, or from `end` on, become -infinity. (A row beyond the last would see keys that do
 * not exist yet; 0 * NaN is no 0.) */
INLINE void hide(float (&c)[4], i32 key, i32 end, i32 first_row, i32 group, i32 start, i32 window) {
    const i32 lane = threadIdx.x % WARP;
#pragma unroll
    for (i32 i = 0; i < 4; i++) {
        const i32 at = key + lane / 4 + i / 2 * 8, age = start + (first_row + lane % 4 * 2 + i % 2) / group - at;
        if (age < 0 || age >= window || at >= end) c[i] = -INFINITE;
    }
}

/* Maximum and sum of powers below it, of two parts. */
INLINE float2 merge(float2 a, float2 b) {
    const float top = fmaxf(a.x, b.x);
    return make_float2(top, a.y * exp2_fast(a.x - top) + b.y * exp2_fast(b.x - top));
}

/* softmax: (G, splits, rows rounded up to COLUMNS), maximum and sum of each row over the keys of each split. */
KERNEL __launch_bounds__(THREADS, BLOCKS)
    mass_rows(const float *q, const u16 *k, float2 *softmax, i32 T, i32 H, i32 G, i32 S, i32 start, i32 window,
              i32 span) {
    __shared__ __align__(16) u16 shared_q[COLUMNS * STRIDE];
    __shared__ float2 found[WARPS][COLUMNS];
    const i32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = H / G, rows = T * group;
    const i32 first = max(0, start - window + 1) + blockIdx.x * span, end = min(first + span, start + T);
    const i32 padded = (rows + COLUMNS - 1) / COLUMNS * COLUMNS;
    k += (i64)blockIdx.y * S * D;
    q += (i64)blockIdx.y * group * D;
    softmax += ((i64)blockIdx.y * gridDim.x + blockIdx.x) * padded;
    for (i32 row = 0; row < rows; row += COLUMNS) {
        __syncthreads(); /* the tile before is done with shared memory */
        load_queries(shared_q, q, row, rows, group, H);
        __syncthreads();
        float2 best[COLUMNS / 8][2];
#pragma unroll
        for (i32 n = 0; n < COLUMNS / 8; n++) best[n][0] = best[n][1] = make_float2(NO_MAXIMUM, 0);
        keys now, next;
        load_keys(next, k, first + warp * KEYS, S);
        for (i32 key = first + warp * KEYS; key < end; key += WARPS * KEYS) {
            now = next;
            load_keys(next, k, key + WARPS * KEYS, S);
            const bool whole = key + KEYS - 1 <= start && key > start + T - 1 - window && key + KEYS <= end;
#pragma unroll
            for (i32 n = 0; n < COLUMNS / 8; n++) {
                float c[4] = {};
                scores(c, now, shared_q, n);
                if (!whole) hide(c, key, end, row + 8 * n, group, start, window);
#pragma unroll
                for (i32 i = 0; i < 2; i++) {
                    const float top = fmaxf(best[n][i].x, fmaxf(c[i], c[i + 2]));
                    best[n][i].y = best[n][i].y * exp2_fast(best[n][i].x - top) + exp2_fast(c[i] - top) +
                                   exp2_fast(c[i + 2] - top);
                    best[n][i].x = top;
                }
            }
        }
#pragma unroll
        for (i32 n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (i32 i = 0; i < 2; i++) {
                float2 x = best[n][i];
#pragma unroll
                for (i32 distance = 4; distance < WARP; distance *= 2)
                    x = merge(x, make_float2(__shfl_xor_sync(FULL, x.x, distance), __shfl_xor_sync(FULL, x.y, distance)));
                if (lane < 4) found[warp][8 * n + 2 * lane + i] = x;
            }
        __syncthreads();
        if (threadIdx.x < COLUMNS) {
            float2 x = found[0][threadIdx.x];
            for (i32 w = 1; w < WARPS; w++) x = merge(x, found[w][threadIdx.x]);
            softmax[row + threadIdx.x] = x;
        }
    }
}

/* out: (G, N); chunk n holds the keys first + n * chunk on. A block takes `share` chunks. */
KERNEL __launch_bounds__(THREADS, BLOCKS)
    mass_chunks(const float *q, const u16 *k, const float2 *softmax, float *out, i32 T, i32 H, i32 G, i32 S, i32 start,
                i32 window, i32 splits, i32 first, i32 chunk, i32 N, i32 share) {
    __shared__ __align__(16) u16 shared_q[COLUMNS * STRIDE];
    __shared__ float total[COLUMNS]; /* log2 of each row's sum of powers */
    const i32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = H / G, rows = T * group;
    const i32 padded = (rows + COLUMNS - 1) / COLUMNS * COLUMNS;
    const i32 begin = blockIdx.x * share + warp, end = min((i32)(blockIdx.x + 1) * share, N);
    k += (i64)blockIdx.y * S * D;
    q += (i64)blockIdx.y * group * D;
    softmax += (i64)blockIdx.y * splits * padded;
    out += (i64)blockIdx.y * N;
    for (i32 row = 0; row < rows; row += COLUMNS) {
        __syncthreads();
        load_queries(shared_q, q, row, rows, group, H);
        if (threadIdx.x < COLUMNS) {
            float2 x = make_float2(NO_MAXIMUM, 0);
            for (i32 i = 0; i < splits; i++) x = merge(x, softmax[(i64)i * padded + row + threadIdx.x]);
            total[threadIdx.x] = row + (i32)threadIdx.x < rows ? x.x + log2f(x.y) : INFINITE; /* no such row: no power */
        }
        __syncthreads();
        keys now, next;
        float mass = 0;
        i32 n = begin, key = first + begin * chunk;
        if (n < end) load_keys(next, k, key, S);
        while (n < end) {
            const i32 last = first + (n + 1) * chunk, this_n = n, this_key = key;
            key += KEYS;
            if (key >= last) n += WARPS, key = first + n * chunk;
            now = next;
            if (n < end) load_keys(next, k, key, S);
            const bool whole =
                this_key + KEYS - 1 <= start && this_key > start + T - 1 - window && this_key + KEYS <= last;
#pragma unroll
            for (i32 tile = 0; tile < COLUMNS / 8; tile++) {
                float c[4] = {};
                scores(c, now, shared_q, tile);
                if (!whole) hide(c, this_key, min(last, start + T), row + 8 * tile, group, start, window);
                const float2 t = *(const float2 *)(total + 8 * tile + lane % 4 * 2);
                mass += exp2_fast(c[0] - t.x) + exp2_fast(c[2] - t.x) + exp2_fast(c[1] - t.y) + exp2_fast(c[3] - t.y);
            }
            if (n == this_n) continue;
            mass = warp_sum(mass);
            if (lane == 0) out[this_n] = row ? out[this_n] + mass : mass;
            mass = 0;
        }
    }
}
