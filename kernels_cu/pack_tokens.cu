/* Packing for the families "kivi" and "atom": one chunk of one KV head per block, FP16 K or V to codes and metadata. The
 * bits are those of runtime/formats/kivi.py and atom.py: the same operations, one rounding each. Stored zeros are made +0
 * by adding 0: the sign of the least of +0 and -0 is nobody's to know. Where the metadata lies: attention_kivi.cuh,
 * attention_atom.cuh.
 *
 * Macros: D head_dim, CHUNK tokens, FAMILY, PACKS_K, WIDTH (2, 3, 4, 8). */
#include "common.cuh"
#include "families.cuh"
#include "formats.cuh"
#include "pack.cuh"
#include "turn_back.cuh"

#define WARPS (THREADS / WARP)

INLINE float warp_min(float x) { return -warp_max(-x); }

/* Where a token's number lies within its block of 32, in the order of operand A's rows. */
struct Place {
    i32 begin, tokens, at; /* of the block: its first token, its tokens; the token's place there */

    INLINE Place(i32 token) {
        begin = token / BLOCK_TOKENS * BLOCK_TOKENS, tokens = min(CHUNK - begin, BLOCK_TOKENS);
        at = token % 8 * (tokens / 8) + (token - begin) / 8;
    }
};

/* --- kivi: value = code * scale + zero -------------------------------------------------------------------------------- */
struct Line {
    u16 scale, zero;

    INLINE Line(float low, float high) {
        scale = float_to_half(add(__fdiv_rn(sub(high, low), TOP), 0.f));
        zero = float_to_half(add(low, 0.f));
    }

    INLINE u8 code(float x) const {
        const float s = half_to_float(scale);
        return s == 0 ? 0 : (u8)clip(rintf(__fdiv_rn(sub(x, half_to_float(zero)), s)), 0, TOP);
    }
};

INLINE void encode_channels(const float *y, u8 *codes, u8 *meta) {
    for (i32 d = threadIdx.x; d < D; d += THREADS) {
        float low = y[d], high = y[d];
        for (i32 token = 1; token < CHUNK; token++) {
            low = fminf(low, y[token * STRIDE + d]), high = fmaxf(high, y[token * STRIDE + d]);
        }
        const Line line(low, high);
        u16 *const to = (u16 *)(meta + (d / 16 * 4 + d / 2 % 4) * 16 + d / 8 % 2 * 4 + d % 2 * 2);
        to[0] = line.scale, to[4] = line.zero;
        for (i32 token = 0; token < CHUNK; token++) codes[token * D + d] = line.code(y[token * STRIDE + d]);
    }
}

INLINE void encode_groups(const float *y, u8 *codes, u8 *meta) {
    constexpr i32 GROUPS = (D + WARP - 1) / WARP; /* of 32 channels, one per lane */
    const i32 lane = threadIdx.x % WARP;
    for (i32 i = threadIdx.x / WARP; i < CHUNK * GROUPS; i += WARPS) {
        const i32 token = i / GROUPS, group = i % GROUPS, d = group * WARP + lane;
        const float x = y[token * STRIDE + min(d, D - 1)];
        const Line line(warp_min(x), warp_max(x));
        if (d < D) codes[token * D + d] = line.code(x);
        const Place place(token);
        u16 *const block = (u16 *)(meta + place.begin * 4 * GROUPS);
        if (lane == 0) {
            block[place.at * GROUPS + group] = line.scale;
            block[place.tokens * GROUPS + group * place.tokens + token - place.begin] = line.zero;
        }
    }
}

/* --- atom: value = (code - zero) * scale, per token ------------------------------------------------------------------- */
INLINE void encode_tokens(const float *y, u8 *codes, u8 *meta) {
    const i32 lane = threadIdx.x % WARP;
    for (i32 token = threadIdx.x / WARP; token < CHUNK; token += WARPS) {
        const float *const row = y + token * STRIDE;
        float low = row[min(lane, D - 1)], high = low;
        for (i32 d = lane; d < D; d += WARP) low = fminf(low, row[d]), high = fmaxf(high, row[d]);
        low = warp_min(low), high = warp_max(high);
        const u16 scale = float_to_half(__fdiv_rn(fmaxf(sub(high, low), 1e-5f), TOP));
        const float s = half_to_float(scale), zero = add(clip(rintf(__fdiv_rn(-low, s)), 0, TOP), 0.f);
        for (i32 d = lane; d < D; d += WARP)
            codes[token * D + d] = (u8)clip(add(rintf(__fdiv_rn(row[d], s)), zero), 0, TOP);
        const Place place(token);
        u16 *const block = (u16 *)(meta + place.begin * 4);
        if (lane == 0) {
            block[place.at] = scale;
            block[place.tokens + (PACKS_K ? place.at : token - place.begin)] = float_to_half(zero);
        }
    }
}

/* grid (chunks, KV heads). x (G, S, D) FP16; chunk i begins at row starts[i], whose position is positions[i]; cos, sin
 * (P, D / 2) turn K back in families that keep it as it was before RoPE; codes and meta are those of KV head 0. */
KERNEL __launch_bounds__(THREADS)
    pack(const u16 *x, i64 S, const i32 *starts, const i32 *positions, const float *cos, const float *sin, u8 *codes,
         i64 codes_stride, u8 *meta, i64 meta_stride) {
    extern __shared__ __align__(16) float y[]; /* (CHUNK, STRIDE), then u8 codes (CHUNK, D) */
    u8 *const bytes = (u8 *)(y + CHUNK * STRIDE);
    const i64 chunk = blockIdx.x, g = blockIdx.y;
    load_rows(x + (g * S + starts[chunk]) * D, y, PACKS_K && TURNED, positions[chunk], cos, sin);
    meta += g * meta_stride;
    if (FAMILY == ATOM)
        encode_tokens(y, bytes, meta + chunk * 4 * CHUNK);
    else if (PACKS_K)
        encode_channels(y, bytes, meta + chunk * 4 * D);
    else
        encode_groups(y, bytes, meta + chunk * 4 * CHUNK * ((D + WARP - 1) / WARP));
    __syncthreads();
    store_codes(bytes, codes + g * codes_stride, chunk);
}
