/* Scores and weighted sums straight from codes that stand for code * scale + zero: what is constant along the sum folds
 * into the query (K: per channel) or the probability (V: per token). Lanes are a K block's tokens and a V block's channels. */

INLINE vu vu_load(const void *p) { return (vu)vi_load(p); }

/* The low `bits` of each lane as a float. A permutation reads only the lane number's low bits of its index, so a table
 * of codes that repeats needs neither a mask nor a conversion. */
INLINE vf expand(vu x, const int bits) {
    const int mask = (1 << bits) - 1;
#if defined(ISA_AVX512)
    vf table = __builtin_convertvector(vi_iota() & mask, vf);
    if (bits <= 4) return (vf)_mm512_permutexvar_ps((__m512i)x, (__m512)table);
#elif defined(ISA_AVX2)
    vf table = __builtin_convertvector(vi_iota() & mask, vf);
    if (bits <= 3) return (vf)_mm256_permutevar8x32_ps((__m256)table, (__m256i)x);
#endif
    return __builtin_convertvector((vi)x & mask, vf);
}

/* Code i of VL bit streams, not yet masked; word w of lane 0 is at words + w * stride bytes. */
INLINE vu stream_bits(const uint8_t *words, int64_t stride, int64_t i, const int bits) {
    int shift = i * bits % 32;
    words += i * bits / 32 * stride;
    vu x = vu_load(words) >> shift;
    if (shift + bits > 32) x |= vu_load(words + stride) << (32 - shift);
    return x;
}
INLINE vf code(const uint8_t *words, int64_t stride, int64_t i, const int bits) {
    return expand(stream_bits(words, stride, i, bits), bits);
}

/* N vectors of tokens; bias and folded belong to H query heads. The unrolled loop's shifts are constants. */
INLINE void coded_tokens(const float *folded, int64_t P, const float *bias, const uint8_t *words, int64_t stride,
                         int64_t D, const int bits, const int N, float *scores, int64_t T, const int H) {
    enum { CHAINS = 2 }; /* even and odd channels apart keep the FMA units busy, where there are registers for it */
    const int chains = VL >= 16 || H <= 2 ? 2 : 1, per = bits == 3 ? 32 : 32 / bits;
    vf sum[CHAINS][HEADS][2];
    for (int m = 0; m < H; m++)
        for (int i = 0; i < N; i++) sum[0][m][i] = sum[1][m][i] = vf_set1(0);
    int64_t d = 0;
    for (; d + per <= D; d += per, words += per * bits / 32 * stride) {
#pragma GCC unroll 32
        for (int c = 0; c < per; c++) {
            vf x[2];
            for (int i = 0; i < N; i++) x[i] = code(words + 4 * VL * i, stride, c, bits);
            for (int m = 0; m < H; m++) {
                vf q = vf_set1(folded[m * P + d + c]);
                for (int i = 0; i < N; i++) sum[c % chains][m][i] = vf_fma(q, x[i], sum[c % chains][m][i]);
            }
        }
    }
    for (int c = 0; d + c < D; c++)
        for (int m = 0; m < H; m++)
            for (int i = 0; i < N; i++)
                sum[0][m][i] = vf_fma(vf_set1(folded[m * P + d + c]), code(words + 4 * VL * i, stride, c, bits),
                                      sum[0][m][i]);
    for (int m = 0; m < H; m++)
        for (int i = 0; i < N; i++) vf_store(scores + m * T + i * VL, sum[0][m][i] + sum[1][m][i] + bias[m]);
}

/* VL bytes as floats; compilers take the generic conversion apart lane by lane. */
INLINE vf vf_from_u8(const uint8_t *p) {
#if defined(ISA_AVX512)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(ISA_AVX2)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vb x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(__builtin_convertvector(x, vi), vf);
#endif
}
/* The same of signed bytes: flipping the sign bit adds 128. */
INLINE vf vf_from_i8(const uint8_t *p) {
#if defined(ISA_AVX512)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(ISA_AVX2)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vb x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(__builtin_convertvector(x ^ 0x80, vi) - 128, vf);
#endif
}

/* Scores of q (n, P) with codes whose channels have these scales and zeros (P,). */
INLINE void coded_scores(const attention *a, const float *q, const uint8_t *words, const float *scales,
                         const float *zeros, const int bits, int h, const int H) {
    int64_t P = a->P, C = round_up(a->C), t = 0;
    float *folded = a->folded + h * P, *scores = a->scores + h * a->T, bias[HEADS];
    vf total[HEADS] = {0};
    for (int64_t d = 0; d < P; d += VL) {
        vf scale = vf_load(scales + d), zero = vf_load(zeros + d);
        for (int m = 0; m < H; m++) {
            vf x = vf_load(q + (h + m) * P + d);
            vf_store(folded + m * P + d, x * scale);
            total[m] = vf_fma(x, zero, total[m]);
        }
    }
    for (int m = 0; m < H; m++) bias[m] = vf_sum(total[m]);
    for (; t + 2 * VL <= C; t += 2 * VL)
        coded_tokens(folded, P, bias, words + 4 * t, 4 * C, a->D, bits, 2, scores + t, a->T, H);
    for (; t < C; t += VL) coded_tokens(folded, P, bias, words + 4 * t, 4 * C, a->D, bits, 1, scores + t, a->T, H);
}

INLINE void coded_columns(const attention *a, float *out, const float *bias, const uint8_t *words, const int bits,
                          int64_t d, const int J, int h, const int H) {
    const int per = bits == 3 ? 32 : 32 / bits;
    int64_t stride = 4 * a->P, t = 0;
    const float *weights = a->weights + h * a->T;
    vf sum[HEADS][COLUMNS];
    words += 4 * d;
    for (int m = 0; m < H; m++)
        for (int j = 0; j < J; j++) sum[m][j] = vf_load(out + (h + m) * a->P + d + j * VL) + bias[h + m];
    for (; t + per <= a->C; t += per, words += per * bits / 32 * stride) {
#pragma GCC unroll 32
        for (int c = 0; c < per; c++) {
            vf x[COLUMNS];
            for (int j = 0; j < J; j++) x[j] = code(words + 4 * VL * j, stride, c, bits);
            for (int m = 0; m < H; m++) {
                vf weight = vf_set1(weights[m * a->T + t + c]);
                for (int j = 0; j < J; j++) sum[m][j] = vf_fma(weight, x[j], sum[m][j]);
            }
        }
    }
    for (int c = 0; t + c < a->C; c++)
        for (int m = 0; m < H; m++)
            for (int j = 0; j < J; j++)
                sum[m][j] = vf_fma(vf_set1(weights[m * a->T + t + c]),
                                   code(words + 4 * VL * j, stride, c, bits), sum[m][j]);
    for (int m = 0; m < H; m++)
        for (int j = 0; j < J; j++) vf_store(out + (h + m) * a->P + d + j * VL, sum[m][j]);
}

/* out (n, P) += weights times the codes of channels begin .. end - 1, and bias (n,). */
INLINE void coded_values(const attention *a, float *out, const float *bias, const uint8_t *words, const int bits,
                         int64_t begin, int64_t end, int h, const int H) {
    int64_t d = begin;
    for (; d + COLUMNS * VL <= end; d += COLUMNS * VL) coded_columns(a, out, bias, words, bits, d, COLUMNS, h, H);
    for (; d + 2 * VL <= end; d += 2 * VL) coded_columns(a, out, bias, words, bits, d, 2, h, H);
    for (; d < end; d += VL) coded_columns(a, out, bias, words, bits, d, 1, h, H);
}

/* FOR_BITS(bits, call): call(b) with b a constant. */
#define FOR_BITS(bits, call)                                                                                           \
    switch (bits) {                                                                                                    \
        case 2: call(2); break;                                                                                        \
        case 3: call(3); break;                                                                                        \
        case 4: call(4); break;                                                                                        \
        default: call(8);                                                                                              \
    }

static void scores_of_codes(const attention *a, const float *q, const uint8_t *words, const float *scales,
                            const float *zeros, int bits) {
#define HEADS_OF(h, H) coded_scores(a, q, words, scales, zeros, width, h, H)
#define CALL(b) do { enum { width = b }; BY_HEADS(a->n, HEADS_OF) } while (0)
    FOR_BITS(bits, CALL)
#undef CALL
#undef HEADS_OF
}

static void values_of_codes(const attention *a, float *out, const float *bias, const uint8_t *words, int64_t begin,
                            int64_t end, int bits) {
#define HEADS_OF(h, H) coded_values(a, out, bias, words, width, begin, end, h, H)
#define CALL(b) do { enum { width = b }; BY_HEADS(a->n, HEADS_OF) } while (0)
    FOR_BITS(bits, CALL)
#undef CALL
#undef HEADS_OF
}
