/* Activations (T, K) float32, with NORM root-mean-square normed, in the weights' type for a matrix product.
 * Values beyond FP16 become +-65504. One block per row; its first HELD * 4 * THREADS values are read once. */
#include "common.cuh"
#include "weights.cuh"

#define THREADS 256

KERNEL __launch_bounds__(THREADS) convert(const float *x, const float *norm, float eps, i32 K, void *out) {
    __shared__ float scratch[THREADS / WARP];
    wait_for_predecessor();
    start_successor();
    const float4 *row = (const float4 *)(x + (i64)blockIdx.x * K);
    float4 held[HELD];
#pragma unroll
    for (i32 i = 0; i < HELD; i++) {
        const i32 at = i * THREADS + threadIdx.x;
        held[i] = at < K / 4 ? row[at] : make_float4(0, 0, 0, 0);
    }
    float scale = 1;
    if (NORM) {
        float square = 0;
        const auto add = [&](float4 a) { square += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w; };
#pragma unroll
        for (i32 i = 0; i < HELD; i++) add(held[i]);
        for (i32 at = HELD * THREADS + threadIdx.x; at < K / 4; at += THREADS) add(row[at]);
        scale = 1 / sqrtf(block_sum(square, scratch) / K + eps);
    }
    const auto store = [&](i32 at, float4 a) {
        if (NORM) {
            const float4 n = ((const float4 *)norm)[at];
            a.x *= scale * n.x, a.y *= scale * n.y, a.z *= scale * n.z, a.w *= scale * n.w;
        }
#if WEIGHT == F32
        ((float4 *)out)[(i64)blockIdx.x * (K / 4) + at] = a;
#else
        ((uint2 *)out)[(i64)blockIdx.x * (K / 4) + at] = make_uint2(pack2(a.x, a.y), pack2(a.z, a.w));
#endif
    };
#pragma unroll
    for (i32 i = 0; i < HELD; i++) {
        const i32 at = i * THREADS + threadIdx.x;
        if (at < K / 4) store(at, held[i]);
    }
    for (i32 at = HELD * THREADS + threadIdx.x; at < K / 4; at += THREADS) store(at, row[at]);
}
