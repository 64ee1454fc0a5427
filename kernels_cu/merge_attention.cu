/* The partial results of decode_attention to its output, one block per query head. A KV head's results are neighbours,
 * those of quantized V (whose output is rotated) first: out = (H * sum of the rotated + sum of the others) / sum of p.
 *
 * Macros: D head_dim, THREADS. */
#include "common.cuh"
#include "rotation.cuh"

#define COLUMNS (D / 4)             /* threads side by side on one result */
#define SLICES (THREADS / COLUMNS)  /* results at a time */

/* sum = sum * keep + x * f */
INLINE void add_scaled(float4 &sum, float keep, float4 x, float f) {
    sum.x = sum.x * keep + x.x * f, sum.y = sum.y * keep + x.y * f;
    sum.z = sum.z * keep + x.z * f, sum.w = sum.w * keep + x.w * f;
}

struct Results {
    i32 first, rotated, n; /* of one KV head of one sequence */
};

/* grid (query heads, sequences). partial (results, group, D), softmax (results, group): maximum and sum;
 * out (sequences, H, D). */
KERNEL __launch_bounds__(THREADS)
    merge_attention(const float *partial, const float2 *softmax, const Results *results, i32 group, float *out) {
    __shared__ __align__(16) float sums[2][SLICES][D];
    __shared__ float maxima[SLICES], totals[SLICES];
    const i32 head = blockIdx.y * gridDim.x + blockIdx.x, slice = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
    const Results mine = results[head / group];               /* no kernel writes these */
    const i64 first = (i64)mine.first * group + head % group; /* results are `group` rows apart */
    start_successor();
    wait_for_predecessor();
    if (slice < SLICES) {
        float4 sum[2] = {};
        float maximum = -1e30f, total = 0;
#pragma unroll 8
        for (i32 i = slice; i < mine.n; i += SLICES) {
            const i64 row = first + (i64)i * group;
            const float2 s = softmax[row];
            const float4 x = ((const float4 *)partial)[row * COLUMNS + column];
            const float top = fmaxf(maximum, s.x), keep = exp2f(maximum - top), f = exp2f(s.x - top); /* whole numbers */
            maximum = top;
            total = total * keep + s.y * f;
            add_scaled(sum[0], keep, x, i < mine.rotated ? f : 0.f);
            add_scaled(sum[1], keep, x, i < mine.rotated ? 0.f : f);
        }
        *(float4 *)&sums[0][slice][4 * column] = sum[0];
        *(float4 *)&sums[1][slice][4 * column] = sum[1];
        if (column == 0) maxima[slice] = maximum, totals[slice] = total;
    }
    __syncthreads();

    float maximum = maxima[0], total = 0;
    for (i32 s = 1; s < SLICES; s++) maximum = fmaxf(maximum, maxima[s]);
    for (i32 s = 0; s < SLICES; s++) total += totals[s] * exp2f(maxima[s] - maximum);
    for (i32 i = threadIdx.x; i < 2 * D; i += THREADS) {
        float *const to = &sums[i / D][0][i % D], x = 0;
        for (i32 s = 0; s < SLICES; s++) x += to[s * D] * exp2f(maxima[s] - maximum);
        *to = x;
    }
    __syncthreads();
    if (threadIdx.x >= WARP) return;
    float x[LANE_CHANNELS];
#pragma unroll
    for (i32 i = 0; i < LANE_CHANNELS; i++) {
        const i32 d = threadIdx.x * LANE_CHANNELS + i;
        x[i] = d < D ? sums[0][0][d] : 0.f;
    }
    rotate_head(x, threadIdx.x);
#pragma unroll
    for (i32 i = 0; i < LANE_CHANNELS; i++) {
        const i32 d = threadIdx.x * LANE_CHANNELS + i;
        if (d < D) out[(i64)head * D + d] = (x[i] + sums[1][0][d]) / total;
    }
}
