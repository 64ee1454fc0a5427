/* Packing for the family "kvquant": the bits are those of runtime/formats/kvquant.py, the same operations, one rounding
 * each. Where they lie: attention_kvquant.cuh.
 *
 * Macros: D head_dim, CHUNK tokens, FAMILY, PACKS_K, WIDTH (2, 3, 4); TOKEN_VALUES, for `ranges`: values of a token a
 * thread holds. */
#include "common.cuh"
#include "families.cuh"
#include "formats.cuh"
#define ROWS_FIRST 1 /* V's codes too lie in K's order */
#include "pack.cuh"
#include "turn_back.cuh"

#define WARPS (THREADS / WARP)
#define LEVELS (1 << WIDTH)
#define CAPACITY ((CHUNK * D + 79) / 80)
#define LARGEST 65504.f

/* Halves in the order of integers: negative ones below, -0 below +0. */
INLINE u32 ordered(u16 h) { return h & 0x8000 ? 0xffff & ~h : h | 0x8000; }
INLINE u16 unordered(u32 o) { return (u16)(o & 0x8000 ? o ^ 0x8000 : ~o); }

INLINE i32 block_count(i32 n, i32 *scratch) {
    n = __reduce_add_sync(FULL, n);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = n;
    __syncthreads();
    n = 0;
    for (i32 w = 0; w < WARPS; w++) n += scratch[w];
    return n;
}

#ifdef TOKEN_VALUES
/* grid (chunks, CHUNK): a token each. v (G, S, D); limits (chunks, CHUNK): lo, hi; shared (chunks, ...): centres and half
 * ranges. The (k + 1)-th largest value is the greatest that at least k + 1 values are not below: found bit by bit. */
KERNEL __launch_bounds__(THREADS)
    ranges(const u16 *v, i64 S, i32 G, const i32 *starts, float2 *limits, u8 *shared) {
    __shared__ i32 scratch[WARPS];
    const i64 chunk = blockIdx.x, token = blockIdx.y, row = starts[chunk] + token;
    const i32 n = G * D, rank = max(1, (n + 100) / 200) + 1;
    u32 x[TOKEN_VALUES];
#pragma unroll
    for (i32 i = 0; i < TOKEN_VALUES; i++) {
        const i32 at = i * THREADS + threadIdx.x;
        x[i] = at < n ? ordered(v[(at / D * S + row) * D + at % D]) : 0x10000;
    }
    float found[2];
    for (i32 side = 0; side < 2; side++) { /* smallest, largest */
        u32 best = 0;
        for (u32 bit = 0x8000; bit; bit >>= 1) {
            i32 count = 0;
#pragma unroll
            for (i32 i = 0; i < TOKEN_VALUES; i++)
                count += x[i] <= 0xffff && (side ? x[i] : 0xffff - x[i]) >= (best | bit);
            if (block_count(count, scratch) >= rank) best |= bit;
        }
        found[side] = add(half_to_float(unordered(side ? best : 0xffff - best)), 0.f);
    }
    if (threadIdx.x) return;
    limits[chunk * CHUNK + token] = make_float2(found[0], found[1]);
    const i32 begin = token / BLOCK_TOKENS * BLOCK_TOKENS, tokens = min(CHUNK - begin, BLOCK_TOKENS);
    u16 *const to = (u16 *)shared + chunk * 2 * CHUNK + 2 * begin + token % 8 * (tokens / 8) + (token - begin) / 8;
    to[0] = float_to_half(mul(add(found[1], found[0]), 0.5f));
    to[tokens] = float_to_half(mul(sub(found[1], found[0]), 0.5f));
}
#else
/* grid (chunks, KV heads). x (G, S, D) FP16; chunk i begins at row starts[i], whose position is positions[i]; cos, sin
 * (P, D / 2), levels (LEVELS); K: centre and half (G, D); V: limits (chunks, CHUNK), what `ranges` found. */
KERNEL __launch_bounds__(THREADS)
    pack(const u16 *x, i64 S, const i32 *starts, const i32 *positions, const float *cos, const float *sin,
         const float *levels, const float *centre, const float *half, const float2 *limits, u8 *codes, i64 codes_stride,
         u8 *meta, i64 meta_stride) {
    extern __shared__ __align__(16) float y[]; /* (CHUNK, STRIDE), then u8 codes (CHUNK, D) */
    __shared__ float middle[LEVELS];
    __shared__ i32 outliers[WARPS];
    u8 *const bytes = (u8 *)(y + CHUNK * STRIDE);
    const i64 chunk = blockIdx.x, g = blockIdx.y;
    const i32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (threadIdx.x < LEVELS - 1) middle[threadIdx.x] = mul(add(levels[threadIdx.x], levels[threadIdx.x + 1]), 0.5f);
    load_rows(x + (g * S + starts[chunk]) * D, y, PACKS_K, positions[chunk], cos, sin);
    meta += g * meta_stride + chunk * (4 + 4 * CAPACITY);
    i32 found = 0; /* outliers before this round's values, which are in the order of their index */
    for (i32 i = threadIdx.x; i < CHUNK * D; i += THREADS) { /* CHUNK * D is a multiple of THREADS */
        const i32 token = i / D, d = i % D;
        const float value = y[token * STRIDE + d];
        float from, by;
        bool outlier;
        if (PACKS_K)
            from = centre[g * D + d], by = half[g * D + d];
        else {
            const float2 limit = limits[chunk * CHUNK + token];
            from = half_to_float(float_to_half(mul(add(limit.y, limit.x), 0.5f)));
            by = half_to_float(float_to_half(mul(sub(limit.y, limit.x), 0.5f)));
            outlier = value > limit.y || value < limit.x;
        }
        const float normal = by > 0 ? __fdiv_rn(sub(value, from), by) : 0.f;
        if (PACKS_K) outlier = fabsf(normal) > 1;
        i32 code = 0;
#pragma unroll
        for (i32 l = 0; l < LEVELS - 1; l++) code += middle[l] < normal;
        bytes[i] = (u8)code;

        const u32 ballot = __ballot_sync(FULL, outlier);
        if (lane == 0) outliers[warp] = __popc(ballot);
        __syncthreads();
        i32 at = found + __popc(ballot & (1u << lane) - 1);
        for (i32 w = 0; w < WARPS; w++) {
            if (w < warp) at += outliers[w];
            found += outliers[w];
        }
        if (outlier && at < CAPACITY)
            ((u32 *)meta)[1 + at] = i | (u32)float_to_half(clip(value, -LARGEST, LARGEST)) << 16;
        __syncthreads();
    }
    const i32 kept = min(found, CAPACITY);
    for (i32 at = kept + threadIdx.x; at < CAPACITY; at += THREADS) ((u32 *)meta)[1 + at] = 0;
    if (threadIdx.x == 0) *(u32 *)meta = kept | (u32)(found - kept) << 16;
    store_codes(bytes, codes + g * codes_stride, chunk);
}
#endif
