/* The "kivi" family (runtime/formats/kivi.py): K post-RoPE with an FP16 scale and zero per channel of a chunk, V with one
 * per token and group of 32 channels. A K chunk's metadata: for every 16 channels and every t the scales, then the zeros
 * of the channels 16 * step + {0, 1, 8, 9} + 2 * t. A V block's: scales, token 8 * i + g of group c at
 * (g * (T / 8) + i) * GROUPS + c; then zeros, group by group. */

#define V_GROUP 32
#define GROUPS ((D + V_GROUP - 1) / V_GROUP)

struct Family {
    static constexpr int K_WHOLE = 4 * D, K_TOKEN = 0, V_WHOLE = 0, V_TOKEN = 4 * GROUPS, V_SHARED = 0;
};

/* The largest of a chunk's K scales, as bits: they are not negative. */
INLINE u32 largest_scale(const u8 *meta, i32 lane) {
    u32 top = 0;
#pragma unroll
    for (i32 i = 0; i < (D / 4 + WARP - 1) / WARP; i++)
        if (i * WARP + lane < D / 4) {
            const uint2 four = ((const uint2 *)meta)[2 * (i * WARP + lane)];
            top = max_half2(top, max_half2(four.x, four.y));
        }
    return __reduce_max_sync(FULL, max(top & 0xffff, top >> 16));
}

/* q times the scales is operand B. A power of two brings the largest scale to 2^8 .. 2^9, so that no product overflows
 * (q is below 32) and only those far below the largest lose bits; q times the zeros is one more row of K. */
template <int BITS, int T>
INLINE void block_scores(float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, const u8 *meta, i32 lane) {
    typedef Codes<true, BITS, T> C;
    constexpr int R = T / 8;
    const i32 t = lane % 4;
    float c[(R + 1) / 2][TILES][4] = {}, zeros[TILES][4] = {};
    u32 words[C::WORDS > 0 ? C::WORDS : 1];
    load_words<C::WORDS>(words, slot, lane);
    const i32 exponent = min(15, 23 - (i32)(largest_scale(meta, lane) >> 10)); /* -7 .. 15; largest scale < 2^(9 - it) */
    const u32 unit_scale = (u32)(exponent + 15) * 0x04000400;
#pragma unroll
    for (i32 step = 0; step < D / 16; step++) {
        const uint4 four = ((const uint4 *)meta)[4 * step + t];
        const u32 scale[2] = {mul_half2(four.x, unit_scale - C::bit(2 * step) * 0x04000400),
                              mul_half2(four.y, unit_scale - C::bit(2 * step + 1) * 0x04000400)};
        const u32 zero[4] = {four.z, any_register(), four.w, any_register()}; /* rows 8 to 15 are not read */
        u32 a[(R + 1) / 2][4];
#pragma unroll
        for (i32 r = 0; r < (R + 1) / 2 * 2; r++)
#pragma unroll
            for (i32 i = 0; i < 2; i++)
                a[r / 2][r % 2 + 2 * i] = r < R ? pair_at<C>(words, slot, C::pair(2 * step + i, r), lane) : 0;
#pragma unroll
        for (i32 n = 0; n < TILES; n++) {
            const uint2 b = query.fragments[step][n][lane];
            const u32 b0 = mul_half2(b.x, scale[0]), b1 = mul_half2(b.y, scale[1]);
            mma_half(zeros[n], zero, b.x, b.y);
#pragma unroll
            for (i32 m = 0; m < (R + 1) / 2; m++) mma_half(c[m][n], a[m], b0, b1);
        }
    }
    const float code_unit = SUBNORMAL_UNIT * power_of_two(-exponent);
#pragma unroll
    for (i32 n = 0; n < TILES; n++)
#pragma unroll
        for (i32 h = 0; h < LANE_HEADS; h++) {
            const float unit = query.unit[8 * n + 2 * t + h], zero = zeros[n][h] * unit;
#pragma unroll
            for (i32 r = 0; r < R; r++) s[r][n][h] = c[r / 2][n][r % 2 * 2 + h] * (code_unit * unit) + zero;
        }
}

/* A group's scales go into the probabilities: its channels have an operand B of their own. The zeros' share, the same
 * for a group's channels, is one matrix instruction more, whose row g is group g: x.centre. */
template <int BITS, int T>
INLINE void add_values(Running &x, float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, const u8 *meta, i32 lane) {
    typedef Codes<false, BITS, T> C;
    constexpr int R = T / 8, K = (R + 1) / 2;
    const i32 g = lane / 4, t = lane % 4;
    u16 stored[R * GROUPS];
    load_halves(stored, meta, g);
    u32 largest = 0;
#pragma unroll
    for (i32 i = 0; i < R * GROUPS; i++) largest = max(largest, (u32)stored[i]);
    raise_to<T>(x, s, half_to_float((u16)largest));

    u32 p[2 * K][TILES], words[C::WORDS > 0 ? C::WORDS : 1];
    load_words<C::WORDS>(words, slot, lane);
#pragma unroll
    for (i32 r = 0; r < R; r++)
#pragma unroll
        for (i32 n = 0; n < TILES; n++) {
#pragma unroll
            for (i32 h = 0; h < LANE_HEADS; h++) {
                s[r][n][h] = exp2_fast(s[r][n][h] - (x.maximum[n][h] - HEADROOM));
                x.sum[n][h] += s[r][n][h];
            }
            p[r][n] = transpose(pack_half2(s[r][n][0], LANE_HEADS == 2 ? s[r][n][LANE_HEADS - 1] : 0.f));
        }
    if (R % 2)
#pragma unroll
        for (i32 n = 0; n < TILES; n++) p[R][n] = 0;
    const u32 *const zeros = (const u32 *)(meta + 2 * T * GROUPS) + min(g, GROUPS - 1) * (T / 2) + t;
#pragma unroll
    for (i32 k = 0; k < K; k++) {
        const u32 zero[4] = {zeros[8 * k], any_register(), 2 * k + 1 < R ? zeros[8 * k + 4] : 0, any_register()};
#pragma unroll
        for (i32 n = 0; n < TILES; n++) mma_half(x.centre[n], zero, p[2 * k][n], p[2 * k + 1][n]);
    }
    const float inverse = inverse_power(x.v_top);
#pragma unroll
    for (i32 group = 0; group < GROUPS; group++) {
#pragma unroll
        for (i32 r = 0; r < R; r++) {
            const float scale = half_to_float(stored[r * GROUPS + group]) * (inverse * power_of_two(-C::bit(r)));
#pragma unroll
            for (i32 n = 0; n < TILES; n++)
                p[r][n] = transpose(pack_half2(s[r][n][0] * scale, LANE_HEADS == 2 ? s[r][n][LANE_HEADS - 1] * scale : 0.f));
        }
#pragma unroll
        for (i32 k = 0; k < K; k++)
#pragma unroll
            for (i32 m = group * (V_GROUP / 16); m < min((group + 1) * (V_GROUP / 16), D / 16); m++) {
                u32 a[4];
#pragma unroll
                for (i32 i = 0; i < 2; i++)
#pragma unroll
                    for (i32 o = 0; o < 2; o++)
                        a[o + 2 * i] = 2 * k + i < R ? pair_at<C>(words, slot, C::pair(2 * m + o, 2 * k + i), lane) : 0;
#pragma unroll
                for (i32 n = 0; n < TILES; n++) mma_half(x.out[m][n], a, p[2 * k][n], p[2 * k + 1][n]);
            }
    }
}

/* At the end of a segment the zeros' share goes to the channels, in the codes' unit. */
template <int V_BITS> INLINE void finish_segment(Running &x, i32 lane) {
    const float unit = inverse_power(x.v_top) * (1 / SUBNORMAL_UNIT);
#pragma unroll
    for (i32 n = 0; n < TILES; n++)
#pragma unroll
        for (i32 h = 0; h < LANE_HEADS; h++) {
#pragma unroll
            for (i32 m = 0; m < D / 16; m++) {
                const float zero = __shfl_sync(FULL, x.centre[n][h], m * 16 / V_GROUP * 4 + lane % 4) * unit;
                x.out[m][n][h] += zero, x.out[m][n][2 + h] += zero;
            }
            x.centre[n][h] = 0;
        }
}
