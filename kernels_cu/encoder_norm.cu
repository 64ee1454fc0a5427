/* LayerNorm where an encoder needs it: of its embeddings, and of what a product adds to the rows. A warp has a row:
 * HELD times four values per lane, E at most 128 * HELD. Rows are halves, everything in between is float32. */
#include "common.cuh"

#define THREADS 256
#define ROWS (THREADS / WARP)

struct Row {
    float4 held[HELD];

    /* x, y, z, w of number i, which are values 4 * (i * WARP + lane) and the next three. */
    template <typename F> INLINE void each(i32 E, F f) {
#pragma unroll
        for (i32 i = 0; i < HELD; i++) {
            const i32 at = 4 * (i * WARP + (i32)threadIdx.x % WARP);
            if (at < E) f(at, held[i]);
        }
    }

    /* Mean and variance in two passes: the difference of two large sums would lose the variance. */
    INLINE void norm_to(u16 *out, const float *weight, const float *bias, float eps, i32 E) {
        float sum = 0, squares = 0;
        each(E, [&](i32, float4 &v) { sum += v.x + v.y + v.z + v.w; });
        const float mean = warp_sum(sum) / E;
        each(E, [&](i32, float4 &v) {
            v.x -= mean, v.y -= mean, v.z -= mean, v.w -= mean;
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        });
        const float scale = 1 / sqrtf(warp_sum(squares) / E + eps);
        each(E, [&](i32 at, float4 &v) {
            const float4 w = *(const float4 *)(weight + at), b = *(const float4 *)(bias + at);
            *(uint2 *)(out + at) = make_uint2(pack_half2(v.x * scale * w.x + b.x, v.y * scale * w.y + b.y),
                                              pack_half2(v.z * scale * w.z + b.z, v.w * scale * w.w + b.w));
        });
    }
};

INLINE float4 four_halves(const u16 *from) {
    const uint2 two = *(const uint2 *)from;
    const float2 low = unpack_half2(two.x), high = unpack_half2(two.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

/* x (T, E) = LayerNorm(words[ids] + places[positions]); the host has checked ids and positions. */
KERNEL __launch_bounds__(THREADS) encoder_embed(const i32 *ids, const i32 *positions, const u16 *words, const float *places,
                                                const float *norm, const float *norm_bias, float eps, i32 T, i32 E, u16 *x) {
    const i32 t = blockIdx.x * ROWS + threadIdx.x / WARP;
    if (t >= T) return;
    const u16 *word = words + (i64)ids[t] * E;
    const float *place = places + (i64)positions[t] * E;
    Row row;
    row.each(E, [&](i32 at, float4 &v) {
        const float4 w = four_halves(word + at), p = *(const float4 *)(place + at);
        v = make_float4(w.x + p.x, w.y + p.y, w.z + p.z, w.w + p.w);
    });
    row.norm_to(x + (i64)t * E, norm, norm_bias, eps, E);
}

/* x (T, E) = LayerNorm(x + sums + bias); sums (T, E) float32, as cuBLAS left them. */
KERNEL __launch_bounds__(THREADS, 1) encoder_add(const float *sums, const float *bias, const float *norm, const float *norm_bias,
                                              float eps, i32 T, i32 E, u16 *x) {
    const i32 t = blockIdx.x * ROWS + threadIdx.x / WARP;
    if (t >= T) return;
    u16 *to = x + (i64)t * E;
    const float *sum = sums + (i64)t * E;
    Row row;
    row.each(E, [&](i32 at, float4 &v) {
        const float4 a = four_halves(to + at), s = *(const float4 *)(sum + at), b = *(const float4 *)(bias + at);
        v = make_float4(a.x + s.x + b.x, a.y + s.y + b.y, a.z + s.z + b.z, a.w + s.w + b.w);
    });
    row.norm_to(to, norm, norm_bias, eps, E);
}
