/* The "atom" family (runtime/formats/atom.py): value = (code - zero) * scale per token, K as it was before RoPE. Metadata of
 * a block of T tokens: FP16 scales, token 8 * i + g at g * (T / 8) + i; then the zeros as FP16, K's in the same order,
 * V's in the tokens'. */

struct Family {
    static constexpr int K_WHOLE = 0, K_TOKEN = 4, V_WHOLE = 0, V_TOKEN = 4, V_SHARED = 0;
};

#define ATOM_EXPONENT 9 /* codes less zeros are operands at 2^-9, far from the ends of FP16's range */

template <int BITS, int T>
INLINE void block_scores(float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, const u8 *meta, i32 lane) {
    typedef Codes<true, BITS, T> C;
    constexpr int R = T / 8;
    u32 words[C::WORDS > 0 ? C::WORDS : 1], zero[R];
    u16 scales[R], zeros[R];
    load_words<C::WORDS>(words, slot, lane);
    load_halves(scales, meta, lane / 4);
    load_halves(zeros, meta + 2 * T, lane / 4);
#pragma unroll
    for (i32 r = 0; r < R; r++)
        zero[r] = mul_half2(zeros[r] * 0x00010001u, 0x80008000 + (15 - ATOM_EXPONENT) * 0x04000400); /* times -2^-9 */
    const auto pair = [&](i32 r, i32 octet) { /* a code at bit `bit` is code * 2^(bit - 24) */
        const u32 up = (15 + 24 - ATOM_EXPONENT - C::bit(octet)) * 0x04000400;
        return fma_half2(pair_at<C>(words, slot, C::pair(octet, r), lane), up, zero[r]);
    };
    turned_scores<T>(s, lane, pair, [&](i32 r) { return half_to_float(scales[r]) * (1 << ATOM_EXPONENT); });
}

template <int BITS, int T>
INLINE void add_values(Running &x, float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, const u8 *meta, i32 lane) {
    u32 p[(T / 8 + 1) / 2 * 2][TILES];
    block_softmax<BITS, T>(x, s, p, meta, lane);
    block_values<BITS, T>(x, p, slot, meta + 2 * T, lane);
}

/* The zeros' share, which x.centre has. */
template <int V_BITS> INLINE void finish_segment(Running &x, i32 lane) { subtract_centre(x, 1); }
