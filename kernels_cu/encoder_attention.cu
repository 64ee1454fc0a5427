/* Attention of every row to all rows of its own sequence. qkv (T, 3 * H * D) halves without their bias (3 * H * D) float32;
 * rows of sequence b: starts[b] up to starts[b + 1]; out (T, H * D) halves. A block has one head and QUERIES rows of one
 * sequence, a warp 16 of them; keys pass by KEYS at a time under one running softmax. Grid: (H * tiles, B). */
#include "common.cuh"
#include "asm.cuh"

#define THREADS 128
#define KEYS 64
#define QUERIES KEYS
#define PITCH (D + 8) /* halves from row to row: eight rows of a matrix lie in different banks */
#define LOG2E 1.44269504f

/* Rows first.. of a sequence's q, k or v plus bias, times scale; zeros from `end` on. */
INLINE void load_rows(u16 *shared, const u16 *from, const float *bias, i32 first, i32 end, i32 stride, float scale) {
    for (i32 i = threadIdx.x; i < KEYS * (D / 8); i += THREADS) {
        const i32 row = i / (D / 8), at = i % (D / 8) * 8;
        u32 words[4] = {0, 0, 0, 0};
        if (first + row < end) {
            const uint4 read = *(const uint4 *)(from + (i64)(first + row) * stride + at);
            const u32 halves[4] = {read.x, read.y, read.z, read.w};
#pragma unroll
            for (i32 j = 0; j < 4; j++) {
                const float2 two = unpack_half2(halves[j]);
                words[j] = pack_half2((two.x + bias[at + 2 * j]) * scale, (two.y + bias[at + 2 * j + 1]) * scale);
            }
        }
        *(uint4 *)(shared + row * PITCH + at) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

KERNEL __launch_bounds__(THREADS) encoder_attention(const u16 *qkv, const float *bias, const i32 *starts, i32 H, u16 *out) {
    __shared__ __align__(16) u16 keys[KEYS * PITCH]; /* before them the queries, on their way to registers */
    __shared__ __align__(16) u16 values[KEYS * PITCH];
    const i32 head = blockIdx.x % H, begin = starts[blockIdx.y], end = starts[blockIdx.y + 1], E = H * D;
    const i32 first = begin + blockIdx.x / H * QUERIES;
    if (first >= end) return;
    const i32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const bool idle = first + 16 * warp >= end; /* it still loads */
    const u16 *const q = qkv + head * D;
    load_rows(keys, q, bias + head * D, first, end, 3 * E, LOG2E / sqrtf((float)D));
    __syncthreads();

    /* Lane l passes the address of row l % 16, columns 8 * (l / 16): a 16 x 16 matrix as four of 8 x 8. */
    u32 a[D / 16][4];
#pragma unroll
    for (i32 d = 0; d < D / 16; d++)
        load_matrix(a[d], shared_address(keys + (16 * warp + lane % 16) * PITCH + 16 * d + lane / 16 * 8));
    float o[D / 8][4] = {}, maximum[2] = {-INFINITE, -INFINITE}, sum[2] = {0, 0};

    for (i32 key = begin; key < end; key += KEYS) {
        __syncthreads();
        load_rows(keys, q + E, bias + E + head * D, key, end, 3 * E, 1);
        load_rows(values, q + 2 * E, bias + 2 * E + head * D, key, end, 3 * E, 1);
        __syncthreads();
        if (idle) continue;
        const i32 n = min(KEYS, end - key);
        float s[KEYS / 8][4];
        float top[2] = {maximum[0], maximum[1]};
#pragma unroll
        for (i32 j = 0; j < KEYS / 16; j++) {
#pragma unroll
            for (i32 i = 0; i < 4; i++) s[2 * j][i] = s[2 * j + 1][i] = 0;
            if (16 * j < n) {
#pragma unroll
                for (i32 d = 0; d < D / 16; d++) {
                    u32 b[4]; /* keys 0-7 and 8-15 of the group, channels 0-7 and 8-15 of each */
                    const i32 row = 16 * j + lane / 16 * 8 + lane % 8;
                    load_matrix(b, shared_address(keys + row * PITCH + 16 * d + lane / 8 % 2 * 8));
                    mma_half(s[2 * j], a[d], b[0], b[1]);
                    mma_half(s[2 * j + 1], a[d], b[2], b[3]);
                }
            }
#pragma unroll
            for (i32 i = 0; i < 8; i++) { /* columns 2 * (lane % 4) + {0, 1} of rows lane / 4 and lane / 4 + 8 */
                float &score = s[2 * j + i / 4][i % 4];
                if (16 * j + i / 4 * 8 + lane % 4 * 2 + i % 2 >= n) score = -INFINITE;
                top[i % 4 / 2] = fmaxf(top[i % 4 / 2], score);
            }
        }
        float rescale[2];
#pragma unroll
        for (i32 r = 0; r < 2; r++) { /* the four lanes of a row */
            top[r] = fmaxf(top[r], __shfl_xor_sync(FULL, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(FULL, top[r], 2));
            rescale[r] = exp2_fast(maximum[r] - top[r]);
            maximum[r] = top[r], sum[r] *= rescale[r];
        }
#pragma unroll
        for (i32 d = 0; d < D / 8; d++)
#pragma unroll
            for (i32 i = 0; i < 4; i++) o[d][i] *= rescale[i / 2];
#pragma unroll
        for (i32 j = 0; j < KEYS / 16; j++) {
            if (16 * j >= n) continue;
#pragma unroll
            for (i32 i = 0; i < 8; i++) {
                float &score = s[2 * j + i / 4][i % 4];
                score = exp2_fast(score - maximum[i % 4 / 2]);
                sum[i % 4 / 2] += score;
            }
            const u32 p[4] = {pack_half2(s[2 * j][0], s[2 * j][1]), pack_half2(s[2 * j][2], s[2 * j][3]),
                              pack_half2(s[2 * j + 1][0], s[2 * j + 1][1]), pack_half2(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
            for (i32 d = 0; d < D / 16; d++) {
                u32 b[4]; /* channels 0-7 and 8-15 of the group, keys 0-7 and 8-15 of each */
                load_matrix_transposed(b, shared_address(values + (16 * j + lane % 16) * PITCH + 16 * d + lane / 16 * 8));
                mma_half(o[2 * d], p, b[0], b[1]);
                mma_half(o[2 * d + 1], p, b[2], b[3]);
            }
        }
    }
    if (idle) return;
#pragma unroll
    for (i32 r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(FULL, sum[r], 1);
        sum[r] += __shfl_xor_sync(FULL, sum[r], 2);
        const i32 row = first + 16 * warp + 8 * r + lane / 4;
        if (row >= end) continue;
        const float scale = 1 / sum[r];
        u16 *to = out + (i64)row * E + head * D + lane % 4 * 2;
#pragma unroll
        for (i32 d = 0; d < D / 8; d++) *(u32 *)(to + 8 * d) = pack_half2(o[d][2 * r] * scale, o[d][2 * r + 1] * scale);
    }
}
