/* The layers of a bidirectional encoder (BERT) over packed sequences: the rows of sequence b are starts[b] up to
 * starts[b + 1], so that no row is padding. Letters: B sequences, T rows, E hidden, H heads, D head_dim. */

#define NORM_ROWS 16 /* rows per task */

typedef struct {
    const float *weight, *bias;
    float eps;
    float *x; /* (T, E), in place */
    int64_t T, E;
} norm_call;

/* Mean and variance in two passes over the row: the difference of two large sums would lose the variance. */
static void layer_norm_row(const norm_call *call, float *x) {
    const int64_t E = call->E;
    vf sums = {0}, squares = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + VL <= E; i += VL) sums += vf_load(x + i);
    for (; i < E; i++) rest += x[i];
    const float mean = (vf_sum(sums) + rest) / (float)E;
    rest = 0;
    for (i = 0; i + VL <= E; i += VL) {
        vf d = vf_load(x + i) - mean;
        squares = vf_fma(d, d, squares);
    }
    for (; i < E; i++) rest += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / sqrtf((vf_sum(squares) + rest) / (float)E + call->eps);
    for (i = 0; i + VL <= E; i += VL)
        vf_store(x + i, vf_fma((vf_load(x + i) - mean) * scale, vf_load(call->weight + i), vf_load(call->bias + i)));
    for (; i < E; i++) x[i] = (x[i] - mean) * scale * call->weight[i] + call->bias[i];
}

static void layer_norm_task(void *ctx, int64_t i) {
    const norm_call *call = ctx;
    for (int64_t t = i * NORM_ROWS; t < MIN(call->T, (i + 1) * NORM_ROWS); t++) layer_norm_row(call, call->x + t * call->E);
}

static void layer_norm(float *x, const float *weight, const float *bias, float eps, int64_t T, int64_t E) {
    norm_call call = {.weight = weight, .bias = bias, .eps = eps, .x = x, .T = T, .E = E};
    pool_run(layer_norm_task, &call, (T + NORM_ROWS - 1) / NORM_ROWS);
}

/* out[t] = LayerNorm(words[ids[t]] + places[positions[t]]); places: positions and token type 0 in one table. */
int FN(encoder_embed)(const int32_t *ids, const int32_t *positions, const matrix *words, const float *places, int64_t P,
                      const float *norm, const float *norm_bias, float eps, float *out, int64_t T) {
    const int64_t E = words->cols;
    for (int64_t t = 0; t < T; t++) {
        if (ids[t] < 0 || ids[t] >= words->rows || positions[t] < 0 || positions[t] >= P) return BAD_INDEX;
        const void *row = matrix_row(words, ids[t]);
        const float *place = places + positions[t] * E;
        float *to = out + t * E;
        int64_t i = 0;
        for (; i + VL <= E; i += VL) vf_store(to + i, vf_weights(row, i, words->dtype) + vf_load(place + i));
        for (; i < E; i++) to[i] = weight(row, i, words->dtype) + place[i];
    }
    layer_norm(out, norm, norm_bias, eps, T, E);
    return OK;
}

/* x = LayerNorm(x + h @ weight.T + bias): how each half of a layer ends. */
int FN(encoder_add)(const float *h, const matrix *weight, const float *bias, const float *norm, const float *norm_bias,
                    float eps, float *x, int64_t T) {
    linear job = {.mode = ADD, .weight = weight, .bias = bias, .out = x};
    const int status = linear_run(&job, 1, h, NULL, 0, T);
    if (status == OK) layer_norm(x, norm, norm_bias, eps, T, weight->rows);
    return status;
}

/* out = gelu(x @ weight.T + bias). */
int FN(encoder_gelu)(const float *x, const matrix *weight, const float *bias, float *out, int64_t T) {
    linear job = {.mode = GELU, .weight = weight, .bias = bias, .out = out};
    return linear_run(&job, 1, x, NULL, 0, T);
}

/* --- attention --- */
typedef struct {
    const float *q, *k, *v; /* (T, H * D) each */
    const int32_t *starts;  /* (B + 1,) */
    float *out;             /* (T, H * D) */
    int64_t H, D;
    _Atomic bool failed;
} encoder_call;

/* One row's n scores to probabilities; up to `padded`, a multiple of VL, they become 0. Scores carry log2(e). */
static void softmax_all(float *row, int64_t n, int64_t padded) {
    for (int64_t j = n; j < padded; j++) row[j] = -INFINITY;
    vf top = vf_load(row), sum = {0};
    for (int64_t j = VL; j < padded; j += VL) top = vf_max(top, vf_load(row + j));
    const float maximum = vf_hmax(top);
    for (int64_t j = 0; j < padded; j += VL) {
        vf p = vf_exp2(vf_load(row + j) - maximum);
        vf_store(row + j, p);
        sum += p;
    }
    const float scale = 1 / vf_sum(sum);
    for (int64_t j = 0; j < padded; j += VL) vf_store(row + j, vf_load(row + j) * scale);
}

/* One head of one sequence: MR rows at a time see all of its keys, so nothing runs and nothing is rescaled. */
static void encoder_attention_task(void *ctx, int64_t i) {
    encoder_call *call = ctx;
    const int64_t H = call->H, D = call->D, E = H * D, first = call->starts[i / H], n = call->starts[i / H + 1] - first;
    const int64_t keys = (n + NR - 1) / NR * NR, width = (D + NR - 1) / NR * NR, at = first * E + i % H * D;
    float *k = scratch(SCRATCH_TASK, sizeof(float) * (keys * D + n * width + (MR * D + VL) + MR * keys + MR * width));
    if (!k) {
        call->failed = true;
        return;
    }
    float *v = k + keys * D, *scores = v + n * width, *out = scores + MR * keys, *q = out + MR * width;
    for (int64_t j = 0; j < keys; j += VL) {
        const int rows = (int)MAX(0, MIN(VL, n - j));
        pack_transposed(call->k + at + (rows ? j * E : 0), E, rows, F32, 0, D, k + j / NR * NR * D + j % NR, NR);
    }
    for (int64_t j = 0; j < n; j++) {
        memcpy(v + j * width, call->v + at + j * E, sizeof(float) * D);
        memset(v + j * width + D, 0, sizeof(float) * (width - D));
    }
    const float scale = 1.44269504f / sqrtf((float)D);
    for (int64_t m = 0; m < n; m += MR) {
        const int rows = (int)MIN(MR, n - m);
        pack_transposed(call->q + at + m * E, E, rows, F32, 0, D, q, MR);
        for (int64_t d = 0; d < MR * D; d++) q[d] *= scale;
        for (int64_t j = 0; j < keys; j += NR) micro(D, q, 1, MR, k + j * D, NR, scores + j, keys, NV, false);
        for (int r = 0; r < rows; r++) softmax_all(scores + r * keys, n, keys);
        for (int64_t d = 0; d < width; d += NR) micro(n, scores, keys, 1, v + d, width, out + d, width, NV, false);
        for (int r = 0; r < rows; r++) memcpy(call->out + at + (m + r) * E, out + r * width, sizeof(float) * D);
    }
}

/* out = softmax(q k^T / sqrt(D)) v over each sequence and head; q, k and v are x @ weights.T + bias (3 * E,). */
int FN(encoder_attention)(const float *x, const matrix *wq, const matrix *wk, const matrix *wv, const float *bias,
                          const int32_t *starts, int64_t B, int64_t H, float *out, int64_t T) {
    const int64_t E = wq->rows;
    for (int64_t b = 0; b < B; b++)
        if (starts[b] < 0 || starts[b + 1] <= starts[b] || starts[b + 1] > T) return BAD_INDEX;
    float *rows = scratch(SCRATCH_ROWS, sizeof(float) * 3 * T * E);
    if (!rows) return NO_MEMORY;
    const matrix *weights[] = {wq, wk, wv};
    linear jobs[3];
    for (int i = 0; i < 3; i++)
        jobs[i] = (linear){.mode = STORE, .weight = weights[i], .bias = bias + i * E, .out = rows + i * T * E};
    const int status = linear_run(jobs, 3, x, NULL, 0, T);
    if (status != OK) return status;
    encoder_call call = {.q = rows, .k = rows + T * E, .v = rows + 2 * T * E, .starts = starts, .out = out, .H = H,
                         .D = E / H};
    pool_run(encoder_attention_task, &call, B * H);
    return call.failed ? NO_MEMORY : OK;
}

/* out (B, E): the mean of each sequence's rows, or its first row. */
int FN(encoder_pool)(const float *x, const int32_t *starts, int64_t B, int64_t E, int64_t T, int32_t mean, float *out) {
    for (int64_t b = 0; b < B; b++, out += E) {
        if (starts[b] < 0 || starts[b + 1] <= starts[b] || starts[b + 1] > T) return BAD_INDEX;
        const int64_t last = mean ? starts[b + 1] : starts[b] + 1;
        const float scale = 1 / (float)(last - starts[b]);
        memset(out, 0, sizeof(float) * E);
        for (int64_t t = starts[b]; t < last; t++)
            for (int64_t i = 0; i < E; i++) out[i] += x[t * E + i];
        for (int64_t i = 0; i < E; i++) out[i] *= scale;
    }
    return OK;
}
