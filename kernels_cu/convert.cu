/* Activations (T, K) float32, with NORM root-mean-square normed, in the weights' type for a matrix product.
 * Values beyond FP16 become +-65504. One block per row. */
#include "common.cuh"
#include "weights.cuh"

KERNEL __launch_bounds__(256) convert(const float *x, const float *norm, float eps, i32 K, void *out) {
    __shared__ float scratch[8];
    const float4 *row = (const float4 *)(x + (i64)blockIdx.x * K);
    float scale = 1;
    if (NORM) {
        float square = 0;
        for (i32 i = threadIdx.x; i < K / 4; i += 256) {
            const float4 a = row[i];
            square += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
        }
        scale = 1 / sqrtf(block_sum(square, scratch) / K + eps);
    }
    for (i32 i = threadIdx.x; i < K / 4; i += 256) {
        float4 a = row[i];
        if (NORM) {
            const float4 n = ((const float4 *)norm)[i];
            a.x *= scale * n.x, a.y *= scale * n.y, a.z *= scale * n.z, a.w *= scale * n.w;
        }
#if WEIGHT == F32
        ((float4 *)out)[(i64)blockIdx.x * (K / 4) + i] = a;
#else
        ((uint2 *)out)[(i64)blockIdx.x * (K / 4) + i] = make_uint2(pack2(a.x, a.y), pack2(a.z, a.w));
#endif
    }
}
