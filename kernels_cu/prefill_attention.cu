/* Causal attention of T query rows over FP16 K and V, on tensor cores, with a running softmax (flash attention).
 *
 * A block of four warps takes ROWS queries of one head and walks over the visible keys, KEYS at a time. Each warp has
 * ROWS / 4 queries; K and V of a step go through shared memory, the one on its way while the other is used. Rows in
 * shared memory are padded by 16 bytes, which keeps ldmatrix free of bank conflicts for every D. Q carries
 * D^-1/2 * log2(e), so that probabilities are powers of two. WEIGHT is the type of out. */
#include "common.cuh"
#include "weights.cuh"

#define WARPS 4
#define THREADS (WARPS * WARP)
#define TILES (ROWS / WARPS / 16) /* 16-row operands of a warp */
#define STRIDE (D + 8)            /* halves of a row in shared memory */
#define LOG2_E 1.44269504f
#define NO_MAXIMUM -1e30f /* finite, so that subtracting it from a masked score is not NaN */

/* 2^x, to two units in the last place; 0 for -infinity. */
INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* KEYS rows of K or V from row `first` on, zeros from row `end` on (0 * V must stay 0). */
INLINE void load_rows(u16 *shared, const u16 *global, i32 first, i32 end) {
#pragma unroll 1 /* the scores are live: no registers for the addresses of several copies */
    for (i32 i = threadIdx.x; i < KEYS * (D / 8); i += THREADS) {
        const i32 row = i / (D / 8), chunk = i % (D / 8);
        const bool valid = first + row < end;
        copy_async(shared + row * STRIDE + chunk * 8, global + (i64)(valid ? first + row : 0) * D + chunk * 8, valid);
    }
    copy_commit();
}

INLINE void load_queries(u16 *shared, const float *q, i32 rows, i32 row_stride) {
    const float scale = LOG2_E / sqrtf((float)D);
    for (i32 i = threadIdx.x; i < ROWS * (D / 4); i += THREADS) {
        const i32 row = i / (D / 4), at = i % (D / 4) * 4;
        float4 a = make_float4(0, 0, 0, 0);
        if (row < rows) a = *(const float4 *)(q + (i64)row * row_stride + at);
        *(uint2 *)(shared + row * STRIDE + at) =
            make_uint2(pack_half2(clamp_half(a.x * scale), clamp_half(a.y * scale)),
                       pack_half2(clamp_half(a.z * scale), clamp_half(a.w * scale)));
    }
}

KERNEL __launch_bounds__(THREADS, BLOCKS)
    prefill_attention(const float *q, const u16 *k, const u16 *v, void *out, i32 T, i32 H, i32 G, i32 S, i32 start,
                      i32 window) {
    extern __shared__ u16 shared[];
    u16 *const shared_q = shared, *const shared_k = shared_q + ROWS * STRIDE, *const shared_v = shared_k + KEYS * STRIDE;
    const i32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const i32 head = blockIdx.x, row0 = (gridDim.y - 1 - blockIdx.y) * ROWS; /* the longest rows first */
    const i32 end = start + min(row0 + ROWS, T);                             /* keys that any row of the block sees */
    const i32 begin = max(0, start + row0 - window + 1) / KEYS * KEYS;
    const i32 my_row = row0 + warp * TILES * 16, my_first = start + my_row, my_last = my_first + TILES * 16 - 1;
    k += (i64)(head / (H / G)) * S * D;
    v += (i64)(head / (H / G)) * S * D;

    load_rows(shared_k, k, begin, end);
    load_queries(shared_q, q + ((i64)row0 * H + head) * D, T - row0, H * D);

    float o[TILES][D / 8][4] = {}, maximum[TILES][2], sum[TILES][2] = {};
#pragma unroll
    for (i32 m = 0; m < TILES; m++) maximum[m][0] = maximum[m][1] = NO_MAXIMUM;
    const u32 address_q = shared_address(shared_q + (warp * TILES * 16 + lane % 16) * STRIDE + lane / 16 * 8);
    const u32 address_k = shared_address(shared_k + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8);
    const u32 address_v = shared_address(shared_v + (lane / 8 % 2 * 8 + lane % 8) * STRIDE + lane / 16 * 8);

    for (i32 key = begin; key < end; key += KEYS) {
        const bool visible = key <= my_last && key + KEYS - 1 > my_first - window;
        float s[TILES][KEYS / 8][4] = {};
        copy_wait<0>();
        __syncthreads(); /* K is there; nobody reads the V before any more */
        load_rows(shared_v, v, key, end);
        if (visible)
#pragma unroll
            for (i32 d = 0; d < D; d += 16) {
                u32 a[TILES][4];
#pragma unroll
                for (i32 m = 0; m < TILES; m++) load_matrix(a[m], address_q + 2 * (m * 16 * STRIDE + d));
#pragma unroll
                for (i32 n = 0; n < KEYS / 8; n += 2) {
                    u32 b[4];
                    load_matrix(b, address_k + 2 * (n * 8 * STRIDE + d));
#pragma unroll
                    for (i32 m = 0; m < TILES; m++) {
                        mma_half(s[m][n], a[m], b[0], b[1]);
                        mma_half(s[m][n + 1], a[m], b[2], b[3]);
                    }
                }
            }
        copy_wait<0>();
        __syncthreads(); /* V is there; nobody reads K any more */
        if (key + KEYS < end) load_rows(shared_k, k, key + KEYS, end);
        if (!visible) continue;

        if (key + KEYS - 1 > my_first || key <= my_last - window) {
#pragma unroll
            for (i32 m = 0; m < TILES; m++)
#pragma unroll
                for (i32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (i32 i = 0; i < 4; i++) {
                        const i32 age = my_first + m * 16 + lane / 4 + i / 2 * 8 - (key + n * 8 + lane % 4 * 2 + i % 2);
                        if (age < 0 || age >= window) s[m][n][i] = -INFINITE;
                    }
        }
#pragma unroll
        for (i32 m = 0; m < TILES; m++)
#pragma unroll
            for (i32 half = 0; half < 2; half++) { /* rows lane / 4 and lane / 4 + 8 */
                float top = maximum[m][half];
#pragma unroll
                for (i32 n = 0; n < KEYS / 8; n++) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
                top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
                const float rescale = exp2_fast(maximum[m][half] - top);
                maximum[m][half] = top;
                float part = 0;
#pragma unroll
                for (i32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (i32 i = 2 * half; i < 2 * half + 2; i++) part += s[m][n][i] = exp2_fast(s[m][n][i] - top);
                sum[m][half] = sum[m][half] * rescale + part;
#pragma unroll
                for (i32 n = 0; n < D / 8; n++) o[m][n][2 * half] *= rescale, o[m][n][2 * half + 1] *= rescale;
            }
#pragma unroll
        for (i32 n = 0; n < KEYS / 8; n += 2) {
            u32 p[TILES][4];
#pragma unroll
            for (i32 m = 0; m < TILES; m++)
#pragma unroll
                for (i32 i = 0; i < 4; i++)
                    p[m][i] = pack_half2(s[m][n + i / 2][i % 2 * 2], s[m][n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (i32 d = 0; d < D / 8; d += 2) {
                u32 b[4];
                load_matrix_transposed(b, address_v + 2 * (n * 8 * STRIDE + d * 8));
#pragma unroll
                for (i32 m = 0; m < TILES; m++) {
                    mma_half(o[m][d], p[m], b[0], b[1]);
                    mma_half(o[m][d + 1], p[m], b[2], b[3]);
                }
            }
        }
    }

#pragma unroll
    for (i32 m = 0; m < TILES; m++)
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            float total = sum[m][half];
            total += __shfl_xor_sync(FULL, total, 1);
            total += __shfl_xor_sync(FULL, total, 2);
            const i32 row = my_row + m * 16 + lane / 4 + half * 8;
            if (row >= T) continue; /* the whole quad leaves or stays */
            const i64 to = ((i64)row * H + head) * D + lane % 4 * 2;
#pragma unroll
            for (i32 n = 0; n < D / 8; n++)
                store2(out, to + n * 8, o[m][n][2 * half] / total, o[m][n][2 * half + 1] / total);
        }
}
