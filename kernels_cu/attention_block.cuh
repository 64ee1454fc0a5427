/* One block of T tokens in a slot: scores, running softmax, values; here what the families of formats share, each one's
 * own in its header (FAMILY). s[r][n][h] is the score of token 8 * r + g under head 8 * n + 2 * t + h, where
 * lane = 4 * g + t. */
#include "attention_queue.cuh"

/* A lane's N words: vectors of four, two and one, lanes side by side. */
template <int N> INLINE void load_words(u32 (&w)[N > 0 ? N : 1], const u8 *from, i32 lane) {
#pragma unroll
    for (i32 i = 0; i < N / 4; i++) {
        const uint4 v = ((const uint4 *)from)[i * WARP + lane];
        w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
    from += N / 4 * 16 * WARP;
    if (N % 4 >= 2) {
        const uint2 v = ((const uint2 *)from)[lane];
        w[N / 4 * 4] = v.x, w[N / 4 * 4 + 1] = v.y;
        from += 8 * WARP;
    }
    if (N % 2) w[N - 1] = ((const u32 *)from)[lane];
}

template <class C> INLINE u32 pair_at(const u32 *w, const u8 *codes, int pair, i32 lane) {
    return pair < C::IN_UNITS ? C::extract(w + pair / C::UNIT * C::UNIT_WORDS, pair % C::UNIT)
                              : C::extract_rest(codes, pair - C::IN_UNITS, lane);
}

/* Where a lane points ldmatrix to, so that it loads 16 x 16 of operand A: 8 rows further down and 8 channels further
 * to the right, each for two of the four matrices (lane / 8). Rows of which there are `rows`. */
INLINE u32 matrix_address(const u8 *slot, i32 down, i32 right, i32 rows, i32 lane) {
    const i32 row = (down ? 8 : 0) + lane % 8;
    return shared_address(slot) + (row < rows ? row : row - 8) * ROW_BYTES + (right ? 16 : 0);
}

template <int T> INLINE void block_scores_half(float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, i32 lane) {
    constexpr int R = T / 8;
    const i32 t = lane % 4;
    float c[(R + 1) / 2][TILES][4] = {};
#pragma unroll
    for (i32 m = 0; m < (R + 1) / 2; m++) {
        const u32 rows = matrix_address(slot + m * 16 * ROW_BYTES, lane & 8, lane & 16, T - 16 * m, lane);
#pragma unroll
        for (i32 step = 0; step < D / 16; step++) {
            u32 a[4];
            load_matrix(a, rows + 32 * step);
#pragma unroll
            for (i32 n = 0; n < TILES; n++) {
                const uint2 b = query.fragments[step][n][lane];
                mma_half(c[m][n], a, b.x, b.y);
            }
        }
    }
#pragma unroll
    for (i32 n = 0; n < TILES; n++)
#pragma unroll
        for (i32 h = 0; h < LANE_HEADS; h++) {
            const float unit = query.unit[8 * n + 2 * t + h];
#pragma unroll
            for (i32 r = 0; r < R; r++) s[r][n][h] = c[r / 2][n][r % 2 * 2 + h] * unit;
        }
}

/* Raise maximum and v_top above `top` (this lane's largest scores) and `scale` (its largest V scale) where needed. */
INLINE void raise(Running &x, float (&top)[TILES][LANE_HEADS], float scale) {
    float v_factor = 1;
#pragma unroll
    for (i32 lane = 4; lane < WARP; lane *= 2) scale = fmaxf(scale, __shfl_xor_sync(FULL, scale, lane));
    if (scale > x.v_top) {
        const float v_top = 4 * __int_as_float((__float_as_int(scale) + 0x7fffff) & 0x7f800000);
        v_factor = x.v_top * inverse_power(v_top);
        x.v_top = v_top;
    }
#pragma unroll
    for (i32 n = 0; n < TILES; n++)
#pragma unroll
        for (i32 h = 0; h < LANE_HEADS; h++) {
#pragma unroll
            for (i32 lane = 4; lane < WARP; lane *= 2)
                top[n][h] = fmaxf(top[n][h], __shfl_xor_sync(FULL, top[n][h], lane));
            float factor = 1;
            if (top[n][h] > x.maximum[n][h]) {
                const float maximum = ceilf(top[n][h]) + SLACK;
                factor = rescale_factor(x.maximum[n][h] - maximum);
                x.maximum[n][h] = maximum;
            }
            x.sum[n][h] *= factor;
            x.centre[n][h] *= FAMILY == KIVI ? factor : factor * v_factor;
#pragma unroll
            for (i32 m = 0; m < D / 16; m++)
                x.out[m][n][h] *= factor * v_factor, x.out[m][n][h + 2] *= factor * v_factor;
        }
}

/* Raise what must be above these scores and V's scales, of which this lane's largest is `largest`. */
template <int T> INLINE void raise_to(Running &x, const float (&s)[T / 8][TILES][LANE_HEADS], float largest) {
    float top[TILES][LANE_HEADS];
    bool higher = largest > x.v_top;
#pragma unroll
    for (i32 n = 0; n < TILES; n++)
#pragma unroll
        for (i32 h = 0; h < LANE_HEADS; h++) {
            top[n][h] = s[0][n][h];
#pragma unroll
            for (i32 r = 1; r < T / 8; r++) top[n][h] = fmaxf(top[n][h], s[r][n][h]);
            higher |= top[n][h] > x.maximum[n][h];
        }
    if (__any_sync(FULL, higher)) raise(x, top, largest);
}

/* The i-th N halves from `from` on, which is a multiple of 16. */
template <int N> INLINE void load_halves(u16 (&h)[N], const u8 *from, i32 i) {
    if (N % 4 == 0)
#pragma unroll
        for (i32 k = 0; k < N / 4; k++) {
            const uint2 four = ((const uint2 *)from)[i * (N / 4) + k];
            h[4 * k] = (u16)four.x, h[4 * k + 1] = (u16)(four.x >> 16);
            h[4 * k + 2] = (u16)four.y, h[4 * k + 3] = (u16)(four.y >> 16);
        }
    else
#pragma unroll
        for (i32 k = 0; k < N; k++) h[k] = ((const u16 *)from)[i * N + k];
}

/* Scores to probabilities p (operand B of V: token octet r, head tile n), times V's scales where V has one per token. */
template <int V_BITS, int T>
INLINE void block_softmax(Running &x, float (&s)[T / 8][TILES][LANE_HEADS], u32 (&p)[(T / 8 + 1) / 2 * 2][TILES],
                          const u8 *v_meta, i32 lane) {
    constexpr int R = T / 8;
    float scale[R], largest = 0;
    if (V_BITS < 16) {
        u16 stored[R];
        load_halves(stored, v_meta, lane / 4);
#pragma unroll
        for (i32 r = 0; r < R; r++) {
            scale[r] = FAMILY == ROTATED ? bf16_to_float(stored[r]) : half_to_float(stored[r]);
            largest = fmaxf(largest, scale[r]);
        }
    }
    raise_to<T>(x, s, largest);
    if (V_BITS < 16) {
        const float inverse = inverse_power(x.v_top);
#pragma unroll
        for (i32 r = 0; r < R; r++)
            scale[r] *= inverse * power_of_two(-Codes<false, V_BITS < 16 ? V_BITS : 2, T>::bit(r));
    }
#pragma unroll
    for (i32 r = 0; r < R; r++)
#pragma unroll
        for (i32 n = 0; n < TILES; n++) {
            float w[2] = {};
#pragma unroll
            for (i32 h = 0; h < LANE_HEADS; h++) {
                const float probability = exp2_fast(s[r][n][h] - (x.maximum[n][h] - HEADROOM));
                x.sum[n][h] += probability;
                w[h] = V_BITS < 16 ? probability * scale[r] : probability;
            }
            p[r][n] = transpose(pack_half2(w[0], w[1]));
        }
    if (R % 2)
#pragma unroll
        for (i32 n = 0; n < TILES; n++) p[R][n] = 0;
}

/* V with a scale per token. zeros: each token's, halves in order, or NULL where a code's centre is the same for all. */
template <int BITS, int T>
INLINE void block_values(Running &x, const u32 (&p)[(T / 8 + 1) / 2 * 2][TILES], const u8 *slot, const u8 *zeros,
                         i32 lane) {
    typedef Codes<false, BITS, T> C;
    constexpr int R = T / 8;
    u32 words[C::WORDS > 0 ? C::WORDS : 1];
    load_words<C::WORDS>(words, slot, lane);
#pragma unroll
    for (i32 k = 0; k < (R + 1) / 2; k++) {
        u32 first = 0x00010001u << C::bit(2 * k), second = 2 * k + 1 < R ? 0x00010001u << C::bit(2 * k + 1) : 0;
        if (zeros) {
            first = mul_half2(((const u32 *)zeros)[8 * k + lane % 4], first);
            if (2 * k + 1 < R) second = mul_half2(((const u32 *)zeros)[8 * k + 4 + lane % 4], second);
        }
        const u32 ones[4] = {first, first, second, second};
#pragma unroll
        for (i32 n = 0; n < TILES; n++) mma_half(x.centre[n], ones, p[2 * k][n], p[2 * k + 1][n]);
#pragma unroll
        for (i32 m = 0; m < D / 16; m++) {
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

/* tokens: how many rows of the slot there are; what is behind them may be anything. */
template <int T>
INLINE void block_values_half(Running &x, const u32 (&p)[(T / 8 + 1) / 2 * 2][TILES], u8 *slot, i32 tokens, i32 lane) {
    constexpr int R = T / 8;
    if (tokens < T) { /* 0 * V must be 0 */
        for (i32 i = tokens * (ROW_BYTES / 16) + lane; i < T * (ROW_BYTES / 16); i += WARP)
            ((uint4 *)slot)[i] = make_uint4(0, 0, 0, 0);
        __syncwarp();
    }
#pragma unroll
    for (i32 k = 0; k < (R + 1) / 2; k++) {
        const u32 rows = matrix_address(slot + k * 16 * ROW_BYTES, lane & 16, lane & 8, T - 16 * k, lane);
#pragma unroll
        for (i32 m = 0; m < D / 16; m++) {
            u32 a[4];
            load_matrix_transposed(a, rows + 32 * m);
#pragma unroll
            for (i32 n = 0; n < TILES; n++) mma_half(x.out[m][n], a, p[2 * k][n], p[2 * k + 1][n]);
        }
    }
}

/* At the end of a segment: out -= centre * x.centre, which begins anew. */
INLINE void subtract_centre(Running &x, float centre) {
#pragma unroll
    for (i32 n = 0; n < TILES; n++) {
#pragma unroll
        for (i32 m = 0; m < D / 16; m++)
#pragma unroll
            for (i32 i = 0; i < 4; i++) x.out[m][n][i] -= centre * x.centre[n][i % 2];
#pragma unroll
        for (i32 i = 0; i < 4; i++) x.centre[n][i] = 0;
    }
}
