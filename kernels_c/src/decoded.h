/* Scores and weighted sums of blocks whose values are decoded first, once for all query heads: K kept as it was before RoPE
 * has to be turned, and a sparse store has to replace some of the values. */

/* levels[code], the code in the low `bits` of each lane; bits is 2, 3 or 4. */
INLINE vf look_up(vu x, UNUSED const int bits, const float *levels) {
#if defined(ISA_AVX512)
    vf table = vf_load(levels);
    return (vf)_mm512_permutexvar_ps((__m512i)x, (__m512)table);
#elif defined(ISA_AVX2)
    __m256 low = _mm256_permutevar8x32_ps((__m256)vf_load(levels), (__m256i)x);
    if (bits < 4) return (vf)low;
    __m256 high = _mm256_permutevar8x32_ps((__m256)vf_load(levels + 8), (__m256i)x);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(x << 28)); /* by the sign, which is the code's highest bit */
#else
    vf y;
    for (int i = 0; i < VL; i++) y[i] = levels[x[i] & ((1 << bits) - 1)];
    return y;
#endif
}

/* out (steps, stride) = code * scale + offset, these per lane, or with levels (16, repeated to fill it)
 * levels[code] * scale + offset, these per step. N vectors of lanes, of streams of `steps` codes. */
INLINE void decode_lanes(float *out, int64_t stride, const uint8_t *words, int64_t lanes, int64_t steps,
                         const float *levels, const float *scales, const float *offsets, const int bits, const int N) {
    const int per = bits == 3 ? 32 : 32 / bits;
    vf scale[2], offset[2];
    for (int n = 0; n < N && !levels; n++) scale[n] = vf_load(scales + n * VL), offset[n] = vf_load(offsets + n * VL);
#define STEP(c)                                                                                                        \
    for (int n = 0; n < N; n++) {                                                                                      \
        vu x = stream_bits(words + 4 * n * VL, 4 * lanes, c, bits);                                                    \
        vf m = levels ? vf_set1(scales[step + c]) : scale[n], a = levels ? vf_set1(offsets[step + c]) : offset[n];     \
        vf_store(out + (step + c) * stride + n * VL, vf_fma(levels ? look_up(x, bits, levels) : expand(x, bits), m, a)); \
    }
    int64_t step = 0;
    for (; step + per <= steps; step += per, words += per * bits / 32 * 4 * lanes) {
#pragma GCC unroll 32
        for (int c = 0; c < per; c++) STEP(c)
    }
    for (int c = 0; step + c < steps; c++) STEP(c)
#undef STEP
}

/* The same of all `lanes`, a multiple of VL. */
INLINE void decode_streams(float *out, int64_t stride, const uint8_t *words, int64_t lanes, int64_t steps,
                           const float *levels, const float *scales, const float *offsets, const int bits) {
    int64_t i = 0;
    for (; i + 2 * VL <= lanes; i += 2 * VL)
        decode_lanes(out + i, stride, words + 4 * i, lanes, steps, levels, levels ? scales : scales + i,
                     levels ? offsets : offsets + i, bits, 2);
    for (; i < lanes; i += VL)
        decode_lanes(out + i, stride, words + 4 * i, lanes, steps, levels, levels ? scales : scales + i,
                     levels ? offsets : offsets + i, bits, 1);
}

/* kvquant: as decode_streams with the 2^bits levels of a layer. */
static void decode_levels(float *out, int64_t stride, const uint8_t *words, int64_t lanes, int64_t steps,
                          const float *levels, const float *scales, const float *offsets, int bits) {
    float table[16];
    for (int i = 0; i < 16; i++) table[i] = levels[i & ((1 << bits) - 1)];
    switch (bits) {
    case 2: decode_streams(out, stride, words, lanes, steps, table, scales, offsets, 2); break;
    case 3: decode_streams(out, stride, words, lanes, steps, table, scales, offsets, 3); break;
    default: decode_streams(out, stride, words, lanes, steps, table, scales, offsets, 4);
    }
}

/* Put a block's outliers where its decoded values are: token t's channel d at out[t * token + d * channel]. */
static void scatter_outliers(float *out, int64_t token, int64_t channel, int64_t D, const uint8_t *meta) {
    uint16_t kept, entry[2];
    memcpy(&kept, meta, 2);
    for (uint32_t i = 0; i < kept; i++) {
        memcpy(entry, meta + 4 + 4 * i, 4);
        uint32_t t = entry[0] / (uint32_t)D, d = entry[0] - t * D;
        out[t * token + d * channel] = half_to_float(entry[1]);
    }
}

/* Scores of N vectors of tokens of decoded K (D, T), turned to their positions: turns (D / 2, 2, row), of each pair of
 * channels the tokens' cosines and sines. */
INLINE void turned_tokens(const attention *a, const float *keys, const float *turns, int64_t row, const int N,
                          float *scores, int h, const int H) {
    int64_t T = a->T, half = a->D / 2;
    const float *q = a->q + h * a->P;
    vf sum[2][HEADS][2]; /* of the channels' first and second half */
    for (int m = 0; m < H; m++)
        for (int n = 0; n < N; n++) sum[0][m][n] = sum[1][m][n] = vf_set1(0);
    for (int64_t i = 0; i < half; i++, turns += 2 * row) {
        vf x[2], y[2];
        for (int n = 0; n < N; n++) {
            vf first = vf_load(keys + i * T + n * VL), second = vf_load(keys + (half + i) * T + n * VL);
            vf c = vf_load(turns + n * VL), s = vf_load(turns + row + n * VL);
            x[n] = vf_fma(first, c, -(second * s)), y[n] = vf_fma(second, c, first * s);
        }
        for (int m = 0; m < H; m++) {
            vf q0 = vf_set1(q[m * a->P + i]), q1 = vf_set1(q[m * a->P + half + i]);
            for (int n = 0; n < N; n++) {
                sum[0][m][n] = vf_fma(q0, x[n], sum[0][m][n]);
                sum[1][m][n] = vf_fma(q1, y[n], sum[1][m][n]);
            }
        }
    }
    for (int m = 0; m < H; m++)
        for (int n = 0; n < N; n++) vf_store(scores + m * T + n * VL, sum[0][m][n] + sum[1][m][n]);
}

INLINE void turned_scores(const attention *a, int64_t position, int h, const int H) {
    enum { N = VL >= 16 ? 2 : 1 }; /* registers */
    int64_t row = a->data->row, tile = (position - a->data->first) / a->C, t = 0, C = round_up(a->C);
    const float *turns = a->data->turns + tile * a->D * row;
    float *scores = a->scores + h * a->T;
    for (; t + N * VL <= C; t += N * VL) turned_tokens(a, a->decoded + t, turns + t, row, N, scores + t, h, H);
    for (; t < C; t += VL) turned_tokens(a, a->decoded + t, turns + t, row, 1, scores + t, h, H);
}

/* Whether the chunk's positions are those of a tile of turns. */
INLINE bool has_tile(const format_data *data, int64_t position, int64_t C) {
    int64_t after = position - data->first;
    return after >= 0 && after % C == 0 && after / C < data->tiles;
}
