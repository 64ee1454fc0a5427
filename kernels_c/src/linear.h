/* Linear layers: out = or += x @ weight.T + bias, or gelu of it, or silu(gate) * up, reading each weight once per call.
 *
 * Up to GEMV_ROWS rows take dot products along the weights' rows: what a row gets does not depend on how many share the
 * call, to the last bit, so that sequences may decode together. More take a blocked product: x is packed once per call into panels of MR rows, each task packs a block of weights, converted to float32, into
 * panels of NR columns, and `micro` multiplies panel by panel. A task owns whole outputs, so threads change nothing. */

#define GEMV_ROWS 16
#define GEMV_BLOCK (VL / 4)   /* rows of weights that meet four rows of x at a time */
#define GEMV_TASK_BYTES 65536 /* of weights */
#define AHEAD_BYTES 8192      /* two pages: hardware prefetchers stop at each page's end; 5 to 10% faster */
#define BLOCK_COLUMNS 64      /* outputs of a task; with silu half are gate's and half are up's */
#define BLOCK_DEPTH 1024      /* so that a block of packed weights (256 KiB) stays in the second-level cache */

enum linear_mode { STORE, ADD, GELU, SILU_MUL };

typedef struct {
    enum linear_mode mode;
    const matrix *weight, *up; /* up: only for SILU_MUL, where `weight` is the gate */
    const float *bias, *up_bias;
    float *out; /* (T, weight->rows) */
} linear;

typedef struct {
    const linear *jobs;
    const float *x; /* (T, K), or panels (T / MR, K, MR) */
    int64_t T, K;
    int64_t task_columns; /* outputs per task */
    _Atomic bool failed;
} linear_call;

typedef struct {
    const float *x; /* (T, K) */
    float *panels;
    int64_t T, K;
} pack_call;

/* Floats from one panel of x to the next; pack_transposed spills up to VL - MR floats past a panel's end. */
INLINE int64_t panel_pitch(int64_t K) { return MR * K + (MR < VL ? VL : 0); }

INLINE vf silu_mul(vf gate, vf up) { return gate / (vf_exp(-gate) + 1) * up; }

INLINE float silu_mul_1(float gate, float up) { return silu_mul(vf_set1(gate), vf_set1(up))[0]; }

/* x * Phi(x), exact to 2e-7 of |x|: with erfc(z) = t P(t) exp(-z^2), t = 1 / (1 + pz), of Abramowitz and Stegun, 7.1.26. */
INLINE vf gelu(vf x) {
    vf z = (vf)((vi)x & 0x7fffffff) * 0.70710678f, t = 1 / vf_fma(z, vf_set1(0.3275911f), vf_set1(1));
    vf p = vf_fma(t, vf_set1(1.061405429f), vf_set1(-1.453152027f));
    p = vf_fma(p, t, vf_set1(1.421413741f));
    p = vf_fma(p, t, vf_set1(-0.284496736f));
    p = vf_fma(p, t, vf_set1(0.254829592f));
    vf outside = x * 0.5f * p * t * vf_exp(-z * z); /* x times the mass beyond |x|: exact where it is small */
    return vf_select(x > 0, x - outside, outside);
}

enum { UNROLL = 4 }; /* chains of additions of a dot product */

/* y[t] = x[t] . row for t < T, T a constant. */
INLINE void dots(const void *row, const float *x, int64_t K, const int T, const int dtype, float *y) {
    const int64_t size = dtype == F32 ? 4 : 2;
    vf acc[4][UNROLL] = {0};
    int64_t i = 0;
    for (; i + UNROLL * VL <= K; i += UNROLL * VL)
        for (int u = 0; u < UNROLL; u++) {
            if (u * VL * size % 64 == 0) __builtin_prefetch((const char *)row + (i + u * VL) * size + AHEAD_BYTES);
            vf w = vf_weights(row, i + u * VL, dtype);
            for (int t = 0; t < T; t++) acc[t][u] = vf_fma(w, vf_load(x + t * K + i + u * VL), acc[t][u]);
        }
    for (; i + VL <= K; i += VL) {
        vf w = vf_weights(row, i, dtype);
        for (int t = 0; t < T; t++) acc[t][0] = vf_fma(w, vf_load(x + t * K + i), acc[t][0]);
    }
    for (int t = 0; t < T; t++) y[t] = vf_sum((acc[t][0] + acc[t][1]) + (acc[t][2] + acc[t][3]));
    for (; i < K; i++)
        for (int t = 0; t < T; t++) y[t] += weight(row, i, dtype) * x[t * K + i];
}

INLINE void dots_typed(const void *row, const float *x, int64_t K, const int T, int dtype, float *y) {
    if (dtype == F16) dots(row, x, K, T, F16, y);
    else if (dtype == BF16) dots(row, x, K, T, BF16, y);
    else dots(row, x, K, T, F32, y);
}

/* acc[r * 4 + t] += rows[r][i..] * x[t][i..], a vector of each. */
INLINE void block_step(const char *rows, const float *x, int64_t K, int64_t i, const int dtype, vf *acc) {
    const int64_t size = dtype == F32 ? 4 : 2;
    vf w[GEMV_BLOCK];
    for (int r = 0; r < GEMV_BLOCK; r++) w[r] = vf_weights(rows + r * K * size, i, dtype);
    for (int t = 0; t < 4; t++) {
        vf column = vf_load(x + t * K + i);
        for (int r = 0; r < GEMV_BLOCK; r++) acc[r * 4 + t] = vf_fma(w[r], column, acc[r * 4 + t]);
    }
}

/* y[r * 4 + t] = x[t] . row r for r < GEMV_BLOCK and t < 4: the additions of `dots` in their order. Its chains run one
 * after another here, so that the registers hold a chain of every product and a load serves four of them. */
INLINE void block_dots(const char *rows, const float *x, int64_t K, const int dtype, float *y) {
    const int64_t size = dtype == F32 ? 4 : 2, step = UNROLL * VL, whole = K / step * step, end = K / VL * VL;
    vf pairs[2][VL];
    for (int u = 0; u < UNROLL; u++) {
        vf acc[VL] = {0};
        for (int64_t i = u * VL; i < whole; i += step) block_step(rows, x, K, i, dtype, acc);
        for (int64_t i = u ? end : whole; i < end; i += VL) block_step(rows, x, K, i, dtype, acc);
        for (int j = 0; j < VL; j++) pairs[u / 2][j] = u % 2 ? pairs[u / 2][j] + acc[j] : acc[j];
    }
    vf sums[VL];
    for (int j = 0; j < VL; j++) sums[j] = pairs[0][j] + pairs[1][j];
    transpose(sums); /* [lane][product]: the sums of all products are taken together */
    for (int width = VL / 2; width; width /= 2)
        for (int j = 0; j < width; j++) sums[j] += sums[j + width]; /* the tree of vf_sum */
    vf_store(y, sums[0]);
    for (int64_t i = end; i < K; i++)
        for (int j = 0; j < VL; j++) y[j] += weight(rows + j / 4 * K * size, i, dtype) * x[j % 4 * K + i];
}

INLINE void block_dots_typed(const void *rows, const float *x, int64_t K, int dtype, float *y) {
    if (dtype == F16) block_dots(rows, x, K, F16, y);
    else if (dtype == BF16) block_dots(rows, x, K, BF16, y);
    else block_dots(rows, x, K, F32, y);
}

INLINE void finish(const linear *job, float *out, int64_t n, float value, float up) {
    if (job->bias) value += job->bias[n];
    if (job->up_bias) up += job->up_bias[n];
    switch (job->mode) {
    case STORE: *out = value; break;
    case ADD: *out += value; break;
    case GELU: *out = gelu(vf_set1(value))[0]; break;
    case SILU_MUL: *out = silu_mul_1(value, up); break;
    }
}

/* Outputs first..last of rows t..t+T-1, T a constant. */
INLINE void gemv_rows(const linear_call *call, const linear *job, int64_t t, const int T, int64_t first, int64_t last) {
    const float *x = call->x + t * call->K;
    for (int64_t n = first; n < last; n++) {
        float y[4], up[4] = {0};
        dots_typed(matrix_row(job->weight, n), x, call->K, T, job->weight->dtype, y);
        if (job->mode == SILU_MUL) dots_typed(matrix_row(job->up, n), x, call->K, T, job->up->dtype, up);
        for (int s = 0; s < T; s++) finish(job, job->out + (t + s) * job->weight->rows + n, n, y[s], up[s]);
    }
}

/* The same for four rows, of weights that are in the cache. */
static void gemv_four_rows(const linear_call *call, const linear *job, int64_t t, int64_t first, int64_t last) {
    const float *x = call->x + t * call->K;
    int64_t n = first, N = job->weight->rows;
    for (; n + GEMV_BLOCK <= last; n += GEMV_BLOCK) {
        float y[VL], up[VL];
        block_dots_typed(matrix_row(job->weight, n), x, call->K, job->weight->dtype, y);
        if (job->mode != SILU_MUL) {
            for (int j = 0; j < VL; j++) finish(job, job->out + (t + j % 4) * N + n + j / 4, n + j / 4, y[j], 0);
            continue;
        }
        block_dots_typed(matrix_row(job->up, n), x, call->K, job->up->dtype, up);
        for (int j = 0; job->bias && j < VL; j++) y[j] += job->bias[n + j / 4];
        for (int j = 0; job->up_bias && j < VL; j++) up[j] += job->up_bias[n + j / 4];
        vf_store(y, silu_mul(vf_load(y), vf_load(up)));
        for (int j = 0; j < VL; j++) job->out[(t + j % 4) * N + n + j / 4] = y[j];
    }
    gemv_rows(call, job, t, 4, n, last);
}

static void gemv_block(linear_call *call, const linear *job, int64_t first, int64_t last) {
    int64_t t = 0;
    if (call->T >= 4) gemv_rows(call, job, t, 4, first, last), t = 4; /* streams the task's weights, row by row */
    for (; t + 4 <= call->T; t += 4) gemv_four_rows(call, job, t, first, last);
    for (; t + 2 <= call->T; t += 2) gemv_rows(call, job, t, 2, first, last);
    for (; t < call->T; t++) gemv_rows(call, job, t, 1, first, last);
}

/* Panels of NR columns: with silu, VL of gate beside the same VL of up; otherwise NR consecutive outputs. */
static void pack_weights(const linear *job, int64_t first, int64_t last, int64_t k, int64_t depth, float *out) {
    int64_t width = job->mode == SILU_MUL ? VL : NR;
    for (int64_t n = first; n < last; n += width, out += depth * NR)
        for (int v = 0; v < NV; v++) {
            const matrix *w = job->mode == SILU_MUL && v ? job->up : job->weight;
            int64_t row = job->mode == SILU_MUL ? n : n + v * VL;
            int rows = (int)MAX(0, MIN(VL, last - row));
            const void *data = matrix_row(w, row);
            if (w->dtype == F16) pack_transposed(data, w->cols, rows, F16, k, depth, out + v * VL, NR);
            else if (w->dtype == BF16) pack_transposed(data, w->cols, rows, BF16, k, depth, out + v * VL, NR);
            else pack_transposed(data, w->cols, rows, F32, k, depth, out + v * VL, NR);
        }
}

/* Rows t.. (at most MR, inside T) of one finished panel, whose first output is n. */
static void finish_tile(const linear_call *call, const linear *job, int64_t t, int64_t n, int64_t last,
                        const float *c, int64_t c_row) {
    int64_t rows = MIN(MR, call->T - t), N = job->weight->rows, width = job->mode == SILU_MUL ? VL : NR;
    for (int64_t r = 0; r < rows; r++, c += c_row) {
        float *out = job->out + (t + r) * N + n;
        if (n + width > last) {
            for (int64_t j = 0; j < last - n; j++) finish(job, out + j, n + j, c[j], c[MIN(j + VL, NR - 1)]);
            continue;
        }
        for (int v = 0; v < (job->mode == SILU_MUL ? 1 : NV); v++) {
            vf value = vf_load(c + v * VL), up = vf_load(c + VL);
            if (job->bias) value += vf_load(job->bias + n + v * VL);
            if (job->up_bias) up += vf_load(job->up_bias + n);
            if (job->mode == ADD) value += vf_load(out + v * VL);
            else if (job->mode == GELU) value = gelu(value);
            else if (job->mode == SILU_MUL) value = silu_mul(value, up);
            vf_store(out + v * VL, value);
        }
    }
}

static void gemm_block(linear_call *call, const linear *job, int64_t first, int64_t last) {
    int64_t T = call->T, K = call->K, width = job->mode == SILU_MUL ? VL : NR;
    int64_t panels = (T + MR - 1) / MR, pitch = panel_pitch(K);
    float *weights = scratch(SCRATCH_TASK, sizeof(float) * BLOCK_COLUMNS * (BLOCK_DEPTH + panels * MR));
    if (!weights) {
        call->failed = true;
        return;
    }
    float *sums = weights + BLOCK_COLUMNS * BLOCK_DEPTH; /* (panels * MR, BLOCK_COLUMNS) */
    for (int64_t k = 0; k < K; k += BLOCK_DEPTH) {
        int64_t depth = MIN(BLOCK_DEPTH, K - k);
        pack_weights(job, first, last, k, depth, weights);
        for (int64_t p = 0; p < panels; p++) {
            const float *b = weights;
            float *c = sums + p * MR * BLOCK_COLUMNS;
            for (int64_t n = first; n < last; n += width, b += depth * NR, c += NR) {
                micro(depth, call->x + p * pitch + k * MR, 1, MR, b, NR, c, BLOCK_COLUMNS, NV, k > 0);
                if (k + depth == K) finish_tile(call, job, p * MR, n, last, c, BLOCK_COLUMNS);
            }
        }
    }
}

/* Task i of all jobs' tasks, in order. */
static void linear_task(void *ctx, int64_t i) {
    linear_call *call = ctx;
    for (const linear *job = call->jobs;; job++) {
        int64_t tasks = (job->weight->rows + call->task_columns - 1) / call->task_columns;
        if (i >= tasks) {
            i -= tasks;
            continue;
        }
        int64_t first = i * call->task_columns, last = MIN(job->weight->rows, first + call->task_columns);
        if (call->T <= GEMV_ROWS) gemv_block(call, job, first, last);
        else gemm_block(call, job, first, last);
        return;
    }
}

/* Rows p * MR.. of x as panel p, (K, MR), rows beyond T zero. */
static void pack_panel_task(void *ctx, int64_t p) {
    const pack_call *call = ctx;
    const float *rows = call->x + p * MR * call->K;
    int n_rows = (int)MIN(MR, call->T - p * MR);
    pack_transposed(rows, call->K, n_rows, F32, 0, call->K, call->panels + p * panel_pitch(call->K), MR);
}

/* All jobs (of one mode, with K inputs) on x (T, K), normalized first if norm is given. */
static int linear_run(const linear *jobs, int n_jobs, const float *x, const float *norm, float eps, int64_t T) {
    int64_t K = jobs->weight->cols, panels = T <= GEMV_ROWS ? 0 : (T + MR - 1) / MR;
    linear_call call = {.jobs = jobs, .x = x, .T = T, .K = K};
    float *work = scratch(SCRATCH_CALL, sizeof(float) * (panels * panel_pitch(K) + (norm ? T * K : 0)));
    if (!work) return NO_MEMORY;
    if (norm) {
        float *normed = work + panels * panel_pitch(K);
        rms_norm(x, norm, eps, normed, T, K);
        call.x = normed;
    }
    if (panels) {
        pack_call pack = {.x = call.x, .panels = work, .T = T, .K = K};
        pool_run(pack_panel_task, &pack, panels);
        call.x = work;
        call.task_columns = jobs->mode == SILU_MUL ? BLOCK_COLUMNS / NV : BLOCK_COLUMNS;
    } else {
        call.task_columns = MAX(4, GEMV_TASK_BYTES / (K * (jobs->weight->dtype == F32 ? 4 : 2)));
    }
    int64_t tasks = 0;
    for (int j = 0; j < n_jobs; j++) tasks += (jobs[j].weight->rows + call.task_columns - 1) / call.task_columns;
    (panels ? pool_run : pool_stream)(linear_task, &call, tasks);
    return call.failed ? NO_MEMORY : OK;
}

int FN(linear_add)(const float *h, const matrix *weight, const float *bias, float *x, int64_t T) {
    linear job = {.mode = ADD, .weight = weight, .bias = bias, .out = x};
    return linear_run(&job, 1, h, NULL, 0, T);
}

int FN(gate_up)(const float *x, const float *norm, float eps, const matrix *gate, const matrix *up,
                const float *gate_bias, const float *up_bias, float *out, int64_t T) {
    linear job = {.mode = SILU_MUL, .weight = gate, .up = up, .bias = gate_bias, .up_bias = up_bias, .out = out};
    return linear_run(&job, 1, x, norm, eps, T);
}

int FN(logits)(const float *x, const float *norm, float eps, const matrix *head, float *out, int64_t T) {
    linear job = {.mode = STORE, .weight = head, .out = out};
    return linear_run(&job, 1, x, norm, eps, T);
}
