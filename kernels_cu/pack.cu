/* Packing: one chunk of one KV head per block, FP16 K or V to codes and metadata. The bits are those of
 * runtime/formats/rotated.py: every floating-point operation below happens there in the same order, one rounding each. Where they lie:
 * formats.cuh.
 *
 * Macros: D head_dim, CHUNK tokens, PACKS_K, WIDTH (2, 3, 4, 8; 16 copies). */
#include "common.cuh"
#include "formats.cuh"
#include "pack.cuh"

#define WARPS (THREADS / WARP)
#define ROTATION (D & -D)
#define HELD (CHUNK <= 32 ? CHUNK : 1)     /* tokens of a channel that a thread has room for */
#define UNROLL (CHUNK <= 32 ? CHUNK : 8)
#define LANES 8 /* of a warp, for each token of V */

INLINE float inverse_or_zero(float x) { return x > 0 ? __fdiv_rn(1.f, x) : 0.f; }

/* The bits of the least BF16 not below x >= 0. */
INLINE u32 bf16_up(float x) { return (__float_as_uint(x) + 0xffff) >> 16; }
INLINE float bf16_to_float(u32 bits) { return __uint_as_float(bits << 16); }

/* --- rotation ------------------------------------------------------------------------------------------------------ */
/* Butterflies of distance 1, 2, ... N / 2. */
template <int N> INLINE void butterflies(float (&x)[N]) {
#pragma unroll
    for (i32 distance = 1; distance < N; distance *= 2)
#pragma unroll
        for (i32 i = 0; i < N; i++)
            if (!(i & distance)) {
                const float a = x[i], b = x[i + distance];
                x[i] = add(a, b), x[i + distance] = sub(a, b);
            }
}

/* y (CHUNK, STRIDE) = formats.rotate(x (CHUNK, D)): distances 1 to 4 on eight neighbours, then the others. */
INLINE void rotate(const u16 *x, float *y) {
    for (i32 i = threadIdx.x; i < CHUNK * D / 8; i += THREADS) {
        const uint4 v = ((const uint4 *)x)[i];
        const u32 pairs[4] = {v.x, v.y, v.z, v.w};
        float f[8];
#pragma unroll
        for (i32 k = 0; k < 8; k++) f[k] = half_to_float((u16)(pairs[k / 2] >> k % 2 * 16));
        butterflies(f);
        float *to = y + i / (D / 8) * STRIDE + i % (D / 8) * 8;
#pragma unroll
        for (i32 k = 0; k < 8; k++) to[k] = f[k];
    }
    __syncthreads();
    constexpr int N = ROTATION / 8;
    for (i32 i = threadIdx.x; i < CHUNK * D / N; i += THREADS) {
        const i32 low = i % 8, token = i / 8 % CHUNK, part = i / 8 / CHUNK;
        float *const at = y + token * STRIDE + part * ROTATION + low;
        float f[N];
#pragma unroll
        for (i32 k = 0; k < N; k++) f[k] = at[8 * k];
        butterflies(f);
#pragma unroll
        for (i32 k = 0; k < N; k++) at[8 * k] = mul(f[k], 1.f / ROTATION);
    }
    __syncthreads();
}

/* The largest x of the block, x >= 0. */
INLINE float block_max(float x, float *scratch) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    for (i32 w = 0; w < WARPS; w++) x = fmaxf(x, scratch[w]);
    return x;
}

/* --- K: a line per channel ----------------------------------------------------------------------------------------- */
INLINE float quantize_k(float y, float zero, float inverse) {
    return clip(rintf(mul(sub(y, zero), inverse)), 0, TOP);
}

/* Scale and zero of the channel whose tokens are y[0], y[STRIDE], ..., before they are rounded to 8 bits. */
INLINE void fit_k(const float *y, float &best_scale, float &best_zero) {
    const float tokens = CHUNK;
    float held[HELD], codes[HELD];
    if (CHUNK == HELD)
#pragma unroll
        for (i32 t = 0; t < HELD; t++) held[t] = y[t * STRIDE];
    const auto value = [&](i32 t) { return CHUNK == HELD ? held[t] : y[t * STRIDE]; };
    float low = value(0), high = value(0), mean = value(0);
#pragma unroll UNROLL
    for (i32 t = 1; t < CHUNK; t++) {
        const float a = value(t);
        low = fminf(low, a), high = fmaxf(high, a), mean = add(mean, a);
    }
    const float middle = mul(add(low, high), 0.5f), half = mul(sub(high, low), 0.5f);
    mean = __fdiv_rn(mean, tokens);
    float best = INFINITE;
#pragma unroll 1
    for (i32 attempt = 0; attempt < (WIDTH == 8 ? 1 : 3); attempt++) {
        const float share = attempt == 0 ? 1.f : attempt == 1 ? 0.85f : 0.7f;
        const float limit = mul(half, share);
        float s = mul(limit, 2.f / TOP), z = sub(middle, limit), inverse = inverse_or_zero(s);
        if (WIDTH == 8) {
            best_scale = s, best_zero = z;
            return;
        }
        float code_mean = 0; /* whole numbers: exact */
#pragma unroll UNROLL
        for (i32 t = 0; t < CHUNK; t++) {
            const float code = quantize_k(value(t), z, inverse);
            if (CHUNK == HELD) codes[t] = code;
            code_mean += code;
        }
        code_mean = __fdiv_rn(code_mean, tokens);
        float covariance = 0, variance = 0;
#pragma unroll UNROLL
        for (i32 t = 0; t < CHUNK; t++) {
            const float a = value(t), code = CHUNK == HELD ? codes[t] : quantize_k(a, z, inverse);
            const float deviation = sub(code, code_mean);
            covariance = add(covariance, mul(deviation, sub(a, mean)));
            variance = add(variance, mul(deviation, deviation));
        }
        if (variance > 0) s = __fdiv_rn(covariance, variance);
        z = sub(mean, mul(s, code_mean));
        inverse = inverse_or_zero(s);
        float error = 0;
#pragma unroll UNROLL
        for (i32 t = 0; t < CHUNK; t++) {
            const float a = value(t), e = sub(a, add(mul(quantize_k(a, z, inverse), s), z));
            error = add(error, mul(e, e));
        }
        if (attempt == 0 || error < best) best = error, best_scale = s, best_zero = z;
    }
}

/* y to codes (CHUNK, D) and the chunk's metadata. scales, zeros: D floats of scratch. */
INLINE void encode_k(const float *y, u8 *codes, u8 *meta, float *scales, float *zeros, float *scratch) {
    const float centre = TOP * 0.5f;
    float largest = 0;
    for (i32 d = threadIdx.x; d < D; d += THREADS) {
        float s, z;
        fit_k(y + d, s, z);
        scales[d] = s, zeros[d] = z;
        largest = fmaxf(largest, s);
    }
    const u32 scale_base = bf16_up(block_max(largest, scratch));
    const float step = __fdiv_rn(bf16_to_float(scale_base), 255.f);
    largest = 0;
    for (i32 d = threadIdx.x; d < D; d += THREADS) {
        const float s = scales[d], units = step > 0 ? __fdiv_rn(s, step) : 0.f;
        const float rounded = clip(WIDTH == 8 ? ceilf(units) : rintf(units), 0, 255);
        const float zero = sub(add(zeros[d], mul(s, centre)), mul(mul(rounded, step), centre));
        scales[d] = rounded, zeros[d] = zero;
        largest = fmaxf(largest, fabsf(zero));
    }
    const u32 zero_base = bf16_up(block_max(largest, scratch));
    const float zero_step = __fdiv_rn(bf16_to_float(zero_base), 127.f);
    for (i32 d = threadIdx.x; d < D; d += THREADS) {
        const float units = zero_step > 0 ? __fdiv_rn(zeros[d], zero_step) : 0.f;
        const float rounded = clip(rintf(units), -127, 127);
        const float zero = mul(rounded, zero_step), inverse = inverse_or_zero(mul(scales[d], step));
        u8 *const to = meta + (d / 16 * 4 + d / 2 % 4) * 8 + d / 8 % 2 * 2 + d % 2;
        to[0] = (u8)scales[d], to[4] = (u8)((i32)rounded + 128);
#pragma unroll 8
        for (i32 token = 0; token < CHUNK; token++)
            codes[token * D + d] = (u8)quantize_k(y[token * STRIDE + d], zero, inverse);
    }
    if (threadIdx.x == 0) *(u32 *)(meta + 2 * D) = scale_base | zero_base << 16;
}

/* --- V: levels per token --------------------------------------------------------------------------------------------- */
INLINE float quantize_v(float y, float inverse) {
    return clip(add(floorf(mul(y, inverse)), 1 << (WIDTH - 1)), 0, TOP);
}

/* x[i] += x[i + n], then the same with half of n, down to 1. */
template <int n, int N> INLINE void fold(float (&x)[N]) {
#pragma unroll
    for (i32 i = 0; i < n; i++) x[i] = add(x[i], x[i + n]);
    if constexpr (n > 1) fold<n / 2>(x);
}

/* The same sum as formats._sum_channels over x[i] = channel LANES * i + lane, in every lane; x is used up. */
template <int N> INLINE float sum_channels(float (&x)[N]) {
    fold<N / 2>(x);
    for (i32 lane = LANES / 2; lane; lane /= 2) x[0] = add(x[0], __shfl_xor_sync(FULL, x[0], lane));
    return x[0];
}

/* y to codes (CHUNK, D) and the chunk's metadata; a warp has WARP / LANES tokens at a time, all of them or none. */
INLINE void encode_v(const float *y, u8 *codes, u8 *meta) {
    constexpr int N = (D <= 64 ? 64 : D <= 128 ? 128 : 256) / LANES; /* channels of a lane, D to a power of two */
    const i32 lane = threadIdx.x % LANES;
    for (i32 token = threadIdx.x / LANES; token < CHUNK; token += THREADS / LANES) {
        float x[N], limit = 0;
#pragma unroll
        for (i32 i = 0; i < N; i++) {
            x[i] = LANES * i + lane < D ? y[token * STRIDE + LANES * i + lane] : 0.f;
            limit = fmaxf(limit, fabsf(x[i]));
        }
        for (i32 other = LANES / 2; other; other /= 2) limit = fmaxf(limit, __shfl_xor_sync(FULL, limit, other));
        u32 scale = 0;
        float best = INFINITE;
#pragma unroll
        for (i32 attempt = 0; attempt < (WIDTH == 8 ? 1 : 7); attempt++) {
            const float shares[7] = {1.f, 0.9f, 0.8f, 0.7f, 0.6f, 0.5f, 0.4f};
            const u32 candidate = bf16_up(mul(mul(limit, shares[attempt]), 2.f / TOP));
            const float s = bf16_to_float(candidate), inverse = inverse_or_zero(s);
            float squares[N];
#pragma unroll
            for (i32 i = 0; i < N; i++) {
                const float e = sub(x[i], mul(sub(quantize_v(x[i], inverse), TOP * 0.5f), s));
                squares[i] = LANES * i + lane < D ? mul(e, e) : 0.f;
            }
            const float error = sum_channels(squares);
            if (attempt == 0 || error < best) best = error, scale = candidate;
        }
        const float inverse = inverse_or_zero(bf16_to_float(scale));
#pragma unroll
        for (i32 i = 0; i < N; i++)
            if (LANES * i + lane < D) codes[token * D + LANES * i + lane] = (u8)quantize_v(x[i], inverse);
        const i32 begin = token / BLOCK_TOKENS * BLOCK_TOKENS, octets = min(CHUNK - begin, BLOCK_TOKENS) / 8;
        if (lane == 0) ((u16 *)meta)[begin + token % 8 * octets + (token - begin) / 8] = (u16)scale;
    }
}

/* grid (chunks, KV heads). x (G, S, D) FP16; chunk i begins at row starts[i]; codes and meta are those of KV head 0. */
KERNEL __launch_bounds__(THREADS)
    pack(const u16 *x, i64 S, const i32 *starts, u8 *codes, i64 codes_stride, u8 *meta, i64 meta_stride) {
    const i64 chunk = blockIdx.x, g = blockIdx.y;
    x += (g * S + starts[chunk]) * D;
    codes += g * codes_stride;
    meta += g * meta_stride;
#if WIDTH == 16
    uint4 *const to = (uint4 *)(codes + chunk * 2 * CHUNK * D);
    for (i32 i = threadIdx.x; i < CHUNK * D / 8; i += THREADS) to[i] = ((const uint4 *)x)[i];
#else
    extern __shared__ __align__(16) float y[]; /* (CHUNK, STRIDE), then scales and zeros (D), then u8 codes (CHUNK, D) */
    __shared__ float scratch[WARPS];
    float *const scales = y + CHUNK * STRIDE, *const zeros = scales + D;
    u8 *const bytes = (u8 *)(zeros + D);
    rotate(x, y);
    if (PACKS_K)
        encode_k(y, bytes, meta + chunk * (2 * D + 4), scales, zeros, scratch);
    else
        encode_v(y, bytes, meta + chunk * 2 * CHUNK);
    __syncthreads();
    store_codes(bytes, codes, chunk);
#endif
}
