/* y (T, width) = gelu(y + bias), halves, in place: x * Phi(x) by the error function. A thread has eight neighbours. */
#include "common.cuh"

#define THREADS 256

INLINE float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678f)); }

KERNEL __launch_bounds__(THREADS) encoder_gelu(u16 *y, const float *bias, i32 T, i32 width) {
    const i64 at = 8 * ((i64)blockIdx.x * THREADS + threadIdx.x);
    if (at >= (i64)T * width) return;
    const float *b = bias + at % width;
    const uint4 read = *(const uint4 *)(y + at);
    u32 words[4] = {read.x, read.y, read.z, read.w};
#pragma unroll
    for (i32 i = 0; i < 4; i++) {
        const float2 two = unpack_half2(words[i]);
        words[i] = pack_half2(gelu(two.x + b[2 * i]), gelu(two.y + b[2 * i + 1]));
    }
    *(uint4 *)(y + at) = make_uint4(words[0], words[1], words[2], words[3]);
}
