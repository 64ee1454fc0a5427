/* Scores of one block of keys, and weighted sums of its values, for up to GROUP query heads that share the read, in
 * register blocks of HEADS: here FP16, in coded.h straight from codes, in decoded.h by way of decoded values. What for, and
 * in which order: decode.h. Layout of the codes: streams.h.
 *
 * Rows of a work array hold P floats, D rounded up to whole vectors, or T scores, a block's tokens likewise. Codes or
 * FP16 rows that do not fill whole vectors are first copied to `padded`. */

enum { GROUP = 16, HEADS = 4, TAIL_BLOCK = 32, COLUMNS = VL >= 16 ? 4 : 2 };

typedef struct {
    int64_t D, P, C, T;
    int64_t g;             /* KV head */
    int n;                 /* query heads */
    float *q, *rotated_q;  /* (n, P) */
    float *folded;         /* (n, P): the query times one chunk's scales */
    float *out, *rotated;  /* (n, P): sums of weighted values, and of weighted codes of rotated ones */
    float *scores;         /* (n, T); -infinity hides a token */
    float *shares;         /* (n, T): powers of two of the scores */
    float *weights;        /* (n, T): what values are multiplied by */
    float *decoded;        /* (D, T) keys or (C, P) values of one block */
    uint8_t *padded;
    const format_data *data;
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

/* Channels d .. d + J * VL - 1 of tokens begin .. end - 1, one after another; v (tokens, P) F16 or F32. */
INLINE void row_columns(const attention *a, const void *v, const int dtype, int64_t begin, int64_t end, int64_t d,
                        const int J, int h, const int H) {
    vf sum[HEADS][COLUMNS];
    for (int m = 0; m < H; m++)
        for (int j = 0; j < J; j++) sum[m][j] = vf_load(a->out + (h + m) * a->P + d + j * VL);
    for (int64_t t = begin; t < end; t++) {
        vf x[COLUMNS];
        for (int j = 0; j < J; j++) x[j] = vf_weights(v, t * a->P + d + j * VL, dtype);
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

INLINE void row_values(const attention *a, const void *v, const int dtype, int64_t begin, int64_t end, int h,
                       const int H) {
    int64_t d = 0;
    for (; d + COLUMNS * VL <= a->P; d += COLUMNS * VL) row_columns(a, v, dtype, begin, end, d, COLUMNS, h, H);
    for (; d < a->P; d += VL) row_columns(a, v, dtype, begin, end, d, 1, h, H);
}
