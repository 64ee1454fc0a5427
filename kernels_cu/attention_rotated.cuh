/* The "rotated" family (runtime/formats/rotated.py): K with 8-bit scales and zeros per channel, V with a scale per token. */

/* Bytes of metadata: of a chunk as a whole and of each token, of K and of V; V_SHARED: of a token of V, for all heads. */
struct Family {
    static constexpr int K_WHOLE = 2 * D + 4, K_TOKEN = 0, V_WHOLE = 0, V_TOKEN = 2, V_SHARED = 0;
};

/* Quantized K; meta: its chunk's scales, zeros and bases. */
template <int BITS, int T>
INLINE void block_scores(float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, const u8 *meta, i32 lane) {
    typedef Codes<true, BITS, T> C;
    constexpr int R = T / 8;
    const i32 t = lane % 4;
    float c[(R + 1) / 2][TILES][4] = {}, zeros[TILES][4];
    u32 words[C::WORDS > 0 ? C::WORDS : 1];
    load_words<C::WORDS>(words, slot, lane);
#pragma unroll
    for (i32 n = 0; n < TILES; n++) /* zeros are stored plus 128 */
        zeros[n][0] = query.total[8 * n + 2 * t] * (-128 / SUBNORMAL_UNIT),
        zeros[n][1] = query.total[8 * n + 2 * t + 1] * (-128 / SUBNORMAL_UNIT),
        zeros[n][2] = zeros[n][3] = __uint_as_float(any_register()); /* rows 8 to 15 are not read */
#pragma unroll
    for (i32 step = 0; step < D / 16; step++) {
        const u32 scales = ((const u32 *)meta)[8 * step + 2 * t], offsets = ((const u32 *)meta)[8 * step + 2 * t + 1];
        u32 scale[2], zero[4];
#pragma unroll
        for (i32 i = 0; i < 2; i++) { /* bytes to halves: 0x6400 + s is 1024 + s */
            const u32 fold = 0x3c003c00 - C::bit(2 * step + i) * 0x04000400; /* 2^-bit */
            const u32 minus_1024 = 0xe400e400 - C::bit(2 * step + i) * 0x04000400;
            scale[i] = fma_half2(__byte_perm(scales, 0x64646464, i ? 0x4342 : 0x4140), fold, minus_1024);
            zero[2 * i] = __byte_perm(offsets, 0, i ? 0x4342 : 0x4140), zero[2 * i + 1] = any_register();
        }
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
    const u32 bases = *(const u32 *)(meta + 2 * D);
    const float scale_step = __uint_as_float(bases << 16) * (SUBNORMAL_UNIT / 255);
    const float zero_step = __uint_as_float(bases & 0xffff0000) * (SUBNORMAL_UNIT / 127);
#pragma unroll
    for (i32 n = 0; n < TILES; n++)
#pragma unroll
        for (i32 h = 0; h < LANE_HEADS; h++) {
            const float unit = query.unit[8 * n + 2 * t + h], zero = zeros[n][h] * (zero_step * unit);
#pragma unroll
            for (i32 r = 0; r < R; r++) s[r][n][h] = c[r / 2][n][r % 2 * 2 + h] * (scale_step * unit) + zero;
        }
}

template <int BITS, int T>
INLINE void add_values(Running &x, float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, const u8 *meta, i32 lane) {
    u32 p[(T / 8 + 1) / 2 * 2][TILES];
    block_softmax<BITS, T>(x, s, p, meta, lane);
    block_values<BITS, T>(x, p, slot, 0, lane);
}

/* Codes to values less their centre, which the next segment may have elsewhere. */
template <int V_BITS> INLINE void finish_segment(Running &x, i32 lane) {
    subtract_centre(x, ((1 << V_BITS) - 1) * 0.5f);
}
