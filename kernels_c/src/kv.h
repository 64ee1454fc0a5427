/* Scores of one block of keys, and weighted sums of its values: FP16 or quantized, for up to GROUP query heads that
 * share the read, in register blocks of HEADS. What for, and in which order: decode.h. Layout of the codes: pack.h.
 *
 * Rows of a work array hold P floats, D rounded up to whole vectors, or T scores, a block's tokens likewise. Codes or
 * FP16 rows that do not fill whole vectors are first copied to `padded`. */

enum { GROUP = 16, HEADS = 4, TAIL_BLOCK = 32, COLUMNS = VL >= 16 ? 4 : 2 };

typedef struct {
    int64_t D, P, C, T;
    int n;                 /* query heads */
    float *q, *rotated_q;  /* (n, P) */
    float *folded;         /* (n, P): rotated_q times one chunk's scales */
    float *out, *rotated;  /* (n, P): sums of weighted FP16 values, and of weighted codes */
    float *scores;         /* (n, T); -infinity hides a token */
    float *weights;        /* (n, T): what values are multiplied by */
    uint8_t *padded;
    float max[GROUP], sum[GROUP]; /* sum: the denominator's part of FP16 values */
    vf sums[GROUP];               /* and that of quantized ones, to be summed over the lanes */
} attention;

/* call(h, H) for blocks of H query heads from h on; H is a constant in each call, so accumulators stay in registers. */
#define BY_HEADS(n, call)                                                                                              \
    for (int h = 0; h < (n); h += HEADS) switch (MIN((n) - h, HEADS)) {                                                \
        case 1: call(h, 1); break;                                                                                     \
        case 2: call(h, 2); break;                                                                                     \
        case 3: call(h, 3); break;                                                                                     \
        default: call(h, 4);                                                                                           \
    }

/* `rows` of `nbytes` at stride `to` bytes, the rest zero. */
static const void *pad(uint8_t *padded, const uint8_t *from, int64_t rows, int64_t nbytes, int64_t to) {
    memset(padded, 0, rows * to);
    for (int64_t row = 0; row < rows; row++) memcpy(padded + row * to, from + row * nbytes, nbytes);
    return padded;
}

/* FP16 K and V -------------------------------------------------------------------------------------------------- */

INLINE void half_scores(const attention *a, const uint16_t *k, int64_t n, int h, const int H) {
    int64_t P = a->P;
    for (int64_t t = 0; t < n; t += VL) {
        vf partial[HEADS][VL];
        for (int u = 0; u < VL; u += 4) {
            const uint16_t *row[4];
            for (int i = 0; i < 4; i++) row[i] = k + MIN(t + u + i, n - 1) * P;
            vf sum[HEADS][4] = {0};
            for (int64_t d = 0; d < P; d += VL) {
                vf x[4];
                for (int i = 0; i < 4; i++) x[i] = vf_from_half(vh_load(row[i] + d));
                for (int m = 0; m < H; m++) {
                    vf q = vf_load(a->q + (h + m) * P + d);
                    for (int i = 0; i < 4; i++) sum[m][i] = vf_fma(q, x[i], sum[m][i]);
                }
            }
            for (int m = 0; m < H; m++)
                for (int i = 0; i < 4; i++) partial[m][u + i] = sum[m][i];
        }
        for (int m = 0; m < H; m++) vf_store(a->scores + (h + m) * a->T + t, lanes_sums(partial[m]));
    }
}

/* Channels d .. d + J * VL - 1 of tokens begin .. end - 1, one after another. */
INLINE void half_columns(const attention *a, const uint16_t *v, int64_t begin, int64_t end, int64_t d, const int J,
                         int h, const int H) {
    vf sum[HEADS][COLUMNS];
    for (int m = 0; m < H; m++)
        for (int j = 0; j < J; j++) sum[m][j] = vf_load(a->out + (h + m) * a->P + d + j * VL);
    for (int64_t t = begin; t < end; t++) {
        vf x[COLUMNS];
        for (int j = 0; j < J; j++) x[j] = vf_from_half(vh_load(v + t * a->P + d + j * VL));
        for (int m = 0; m < H; m++) {
            vf weight = vf_set1(a->weights[(h + m) * a->T + t]);
            for (int j = 0; j < J; j++) sum[m][j] = vf_fma(weight, x[j], sum[m][j]);
        }
    }
    for (int m = 0; m < H; m++)
        for (int j = 0; j < J; j++) vf_store(a->out + (h + m) * a->P + d + j * VL, sum[m][j]);
}

/* The denominators, key by key; with the heads side by side their additions need not wait for one another. */
INLINE void half_sums(attention *a, int64_t begin, int64_t end, int h, const int H) {
    float sum[HEADS];
    for (int m = 0; m < H; m++) sum[m] = a->sum[h + m];
    for (int64_t t = begin; t < end; t++)
        for (int m = 0; m < H; m++) sum[m] += a->weights[(h + m) * a->T + t];
    for (int m = 0; m < H; m++) a->sum[h + m] = sum[m];
}

INLINE void half_values(const attention *a, const uint16_t *v, int64_t begin, int64_t end, int h, const int H) {
    int64_t d = 0;
    for (; d + COLUMNS * VL <= a->P; d += COLUMNS * VL) half_columns(a, v, begin, end, d, COLUMNS, h, H);
    for (; d < a->P; d += VL) half_columns(a, v, begin, end, d, 1, h, H);
}

/* Quantized K and V --------------------------------------------------------------------------------------------- */

INLINE vu vu_load(const void *p) { return (vu)vi_load(p); }

/* The low `bits` of each lane as a float, less `centre`. A permutation reads only the lane number's low bits of its
 * index, so a table of codes that repeats needs neither a mask nor a conversion. */
INLINE vf expand(vu x, const int bits, const float centre) {
    const int mask = (1 << bits) - 1;
#if defined(ISA_AVX512)
    vf table = __builtin_convertvector(vi_iota() & mask, vf) - centre;
    if (bits <= 4) return (vf)_mm512_permutexvar_ps((__m512i)x, (__m512)table);
#elif defined(ISA_AVX2)
    vf table = __builtin_convertvector(vi_iota() & mask, vf) - centre;
    if (bits <= 3) return (vf)_mm256_permutevar8x32_ps((__m256)table, (__m256i)x);
#endif
    return __builtin_convertvector((vi)x & mask, vf) - centre;
}

/* Code i of VL bit streams; word w of lane 0 is at words + w * stride bytes. */
INLINE vf code(const uint8_t *words, int64_t stride, int64_t i, const int bits, const float centre) {
    int shift = i * bits % 32;
    words += i * bits / 32 * stride;
    vu x = vu_load(words) >> shift;
    if (shift + bits > 32) x |= vu_load(words + stride) << (32 - shift);
    return expand(x, bits, centre);
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
            for (int i = 0; i < N; i++) x[i] = code(words + 4 * VL * i, stride, c, bits, 0);
            for (int m = 0; m < H; m++) {
                vf q = vf_set1(folded[m * P + d + c]);
                for (int i = 0; i < N; i++) sum[c % chains][m][i] = vf_fma(q, x[i], sum[c % chains][m][i]);
            }
        }
    }
    for (int c = 0; d + c < D; c++)
        for (int m = 0; m < H; m++)
            for (int i = 0; i < N; i++)
                sum[0][m][i] = vf_fma(vf_set1(folded[m * P + d + c]), code(words + 4 * VL * i, stride, c, bits, 0),
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

/* scales and zeros: P bytes each. */
INLINE void coded_scores(const attention *a, const uint8_t *words, const uint8_t *scales, const uint8_t *zeros,
                         float scale_step, float zero_step, const int bits, int h, const int H) {
    int64_t P = a->P, C = round_up(a->C), t = 0;
    float *folded = a->folded + h * P, *scores = a->scores + h * a->T, bias[HEADS];
    vf total[HEADS] = {0};
    for (int64_t d = 0; d < P; d += VL) {
        vf scale = vf_from_u8(scales + d) * scale_step, zero = vf_from_i8(zeros + d) * zero_step;
        for (int m = 0; m < H; m++) {
            vf q = vf_load(a->rotated_q + (h + m) * P + d);
            vf_store(folded + m * P + d, q * scale);
            total[m] = vf_fma(q, zero, total[m]);
        }
    }
    for (int m = 0; m < H; m++) bias[m] = vf_sum(total[m]);
    for (; t + 2 * VL <= C; t += 2 * VL)
        coded_tokens(folded, P, bias, words + 4 * t, 4 * C, a->D, bits, 2, scores + t, a->T, H);
    for (; t < C; t += VL) coded_tokens(folded, P, bias, words + 4 * t, 4 * C, a->D, bits, 1, scores + t, a->T, H);
}

INLINE void coded_columns(const attention *a, const uint8_t *words, const int bits, int64_t d, const int J, int h,
                          const int H) {
    const int per = bits == 3 ? 32 : 32 / bits;
    const float centre = ((1 << bits) - 1) * 0.5f;
    int64_t stride = 4 * a->P, t = 0;
    const float *weights = a->weights + h * a->T;
    vf sum[HEADS][COLUMNS];
    words += 4 * d;
    for (int m = 0; m < H; m++)
        for (int j = 0; j < J; j++) sum[m][j] = vf_load(a->rotated + (h + m) * a->P + d + j * VL);
    for (; t + per <= a->C; t += per, words += per * bits / 32 * stride) {
#pragma GCC unroll 32
        for (int c = 0; c < per; c++) {
            vf x[COLUMNS];
            for (int j = 0; j < J; j++) x[j] = code(words + 4 * VL * j, stride, c, bits, centre);
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
                                   code(words + 4 * VL * j, stride, c, bits, centre), sum[m][j]);
    for (int m = 0; m < H; m++)
        for (int j = 0; j < J; j++) vf_store(a->rotated + (h + m) * a->P + d + j * VL, sum[m][j]);
}

INLINE void coded_values(const attention *a, const uint8_t *words, const int bits, int h, const int H) {
    int64_t d = 0;
    for (; d + COLUMNS * VL <= a->P; d += COLUMNS * VL) coded_columns(a, words, bits, d, COLUMNS, h, H);
    for (; d < a->P; d += VL) coded_columns(a, words, bits, d, 1, h, H);
}

INLINE void scores_of_width(const attention *a, const uint8_t *words, const uint8_t *scales, const uint8_t *zeros,
                            float scale_step, float zero_step, const int bits) {
#define CALL(h, H) coded_scores(a, words, scales, zeros, scale_step, zero_step, bits, h, H)
    BY_HEADS(a->n, CALL)
#undef CALL
}

INLINE void values_of_width(const attention *a, const uint8_t *words, const int bits) {
#define CALL(h, H) coded_values(a, words, bits, h, H)
    BY_HEADS(a->n, CALL)
#undef CALL
}
