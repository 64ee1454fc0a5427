/* Causal attention of a tile of queries over one layer's FP16 K and V, blockwise with a running softmax.
 *
 * A task takes one KV head and a block of query tokens; all query heads of that KV head (the group) are rows of one
 * matrix, so K and V are read and converted once for all of them. Per block of KEYS keys: S = Q K^T with `micro`, the
 * softmax's maximum and sum brought forward, O = O * rescale + P V with `micro`. Q carries D^-1/2 * log2(e), and the
 * running maximum is rounded up to a whole number, so that every rescale is an exact power of two. */

#define KEYS 128      /* keys per block: a multiple of NR */
#define TASK_ROWS 192 /* rows (tokens * group) per task, about: a multiple of MR */
#define NO_MAXIMUM -FLT_MAX /* finite, so that subtracting it from a masked score is not NaN */

typedef struct {
    const float *q; /* (T, H, D) */
    const uint16_t *k, *v; /* (G, S, D) */
    float *out; /* (T, H * D) */
    int64_t T, H, G, D, S, start, window; /* window: keys visible to a query, itself included */
    int64_t task_tokens, tasks_per_head;
    _Atomic bool failed;
} prefill_call;

/* What a task works on, all float32 in its scratch; M rows, padded to MR. */
typedef struct {
    float *q;      /* panels (M / MR, D, MR), scaled */
    float *k;      /* panels (KEYS / NR, D, NR) */
    float *v;      /* (KEYS, D padded to NR) */
    float *scores; /* (M, KEYS) */
    float *out;    /* (M, D padded to NR) */
    float *maximum, *sum; /* (M,) */
    int64_t M, width;
} prefill_work;

static bool prefill_scratch(prefill_work *work, int64_t M, int64_t D) {
    work->M = (M + MR - 1) / MR * MR;
    work->width = (D + NR - 1) / NR * NR;
    int64_t sizes[] = {work->M * D + VL, KEYS * D, KEYS * work->width, work->M * KEYS, work->M * work->width,
                       work->M, work->M};
    float **parts[] = {&work->q, &work->k, &work->v, &work->scores, &work->out, &work->maximum, &work->sum};
    int64_t total = 0;
    for (int i = 0; i < 7; i++) total += (sizes[i] + 15) / 16 * 16;
    float *next = scratch(SCRATCH_TASK, sizeof(float) * total);
    if (!next) return false;
    for (int i = 0; i < 7; i++) {
        *parts[i] = next;
        next += (sizes[i] + 15) / 16 * 16;
    }
    return true;
}

/* Row m = token * group + head of the group; panels as micro wants them, zero beyond the last row. */
static void load_queries(const prefill_call *call, const prefill_work *work, int64_t g, int64_t first, int64_t tokens) {
    int64_t group = call->H / call->G, D = call->D;
    float scale = 1.44269504f / sqrtf((float)D);
    for (int64_t m = 0; m < work->M; m++) {
        float *column = work->q + m / MR * MR * D + m % MR;
        const float *row = call->q + ((first + m / group) * call->H + g * group + m % group) * D;
        for (int64_t d = 0; d < D; d++) column[d * MR] = m < tokens * group ? row[d] * scale : 0;
    }
}

/* Keys key.. (n of them, at most KEYS) as float32; zero beyond n. */
static void load_keys(const prefill_call *call, const prefill_work *work, int64_t g, int64_t key, int64_t n) {
    int64_t D = call->D;
    const uint16_t *k = call->k + (g * call->S + key) * D;
    for (int64_t j = 0; j < KEYS; j += VL) {
        int rows = (int)MAX(0, MIN(VL, n - j));
        pack_transposed(k + (rows ? j * D : 0), D, rows, F16, 0, D, work->k + j / NR * NR * D + j % NR, NR);
    }
}

/* The values; zero beyond n, so that 0 * V stays 0. */
static void load_values(const prefill_call *call, const prefill_work *work, int64_t g, int64_t key, int64_t n) {
    int64_t D = call->D;
    const uint16_t *v = call->v + (g * call->S + key) * D;
    for (int64_t j = 0; j < KEYS; j++) {
        float *row = work->v + j * work->width;
        int64_t d = 0;
        if (j < n) {
            for (; d + VL <= D; d += VL) vf_store(row + d, vf_from_half(vh_load(v + j * D + d)));
            for (; d < D; d++) row[d] = half_to_float(v[j * D + d]);
        }
        for (; d < work->width; d++) row[d] = 0;
    }
}

/* Scores of one row to probabilities relative to the row's running maximum, keys first..last - 1 of the block visible. */
static void softmax_row(const prefill_work *work, int64_t m, int64_t first, int64_t last) {
    float *row = work->scores + m * KEYS;
    if (first > 0 || last < KEYS)
        for (int64_t j = 0; j < KEYS; j += VL) {
            vi lane = vi_iota() + (int32_t)j;
            vi visible = (lane >= (int32_t)first) & (lane < (int32_t)last);
            vf_store(row + j, vf_select(visible, vf_load(row + j), vf_set1(-INFINITY)));
        }
    vf top = vf_load(row);
    for (int64_t j = VL; j < KEYS; j += VL) top = vf_max(top, vf_load(row + j));
    float before = work->maximum[m], maximum = MAX(before, ceilf(vf_hmax(top)));
    vf sum = {0}, shift = vf_set1(maximum);
    for (int64_t j = 0; j < KEYS; j += VL) {
        vf p = vf_exp2(vf_load(row + j) - shift);
        vf_store(row + j, p);
        sum += p;
    }
    if (maximum > before) {
        vf rescale = vf_exp2(vf_set1(before - maximum));
        float *out = work->out + m * work->width;
        for (int64_t d = 0; d < work->width; d += VL) vf_store(out + d, vf_load(out + d) * rescale);
        work->sum[m] *= rescale[0];
        work->maximum[m] = maximum;
    }
    work->sum[m] += vf_sum(sum);
}

static void prefill_block(const prefill_call *call, const prefill_work *work, int64_t first_token, int64_t tokens,
                          int64_t key) {
    int64_t D = call->D, group = call->H / call->G, last_token = first_token + tokens - 1;
    for (int64_t m = 0; m < work->M; m += MR) {
        int64_t query = MIN(first_token + m / group, last_token), final = MIN(first_token + (m + MR - 1) / group, last_token);
        if (key > final || key + KEYS <= query - call->window + 1) continue; /* nothing visible to these rows */
        float *scores = work->scores + m * KEYS;
        for (int64_t j = 0; j < KEYS; j += NR)
            micro(D, work->q + m * D, 1, MR, work->k + j * D, NR, scores + j, KEYS, NV, false);
        for (int64_t r = m; r < m + MR; r++) {
            int64_t position = MIN(first_token + r / group, last_token);
            softmax_row(work, r, position - call->window + 1 - key, position + 1 - key);
        }
        for (int64_t d = 0; d < D; d += NR) {
            float *out = work->out + m * work->width + d;
            if (D - d > VL) micro(KEYS, scores, KEYS, 1, work->v + d, work->width, out, work->width, NV, true);
            else micro(KEYS, scores, KEYS, 1, work->v + d, work->width, out, work->width, 1, true);
        }
    }
}

static void prefill_task(void *ctx, int64_t i) {
    prefill_call *call = ctx;
    int64_t g = i / call->tasks_per_head, first = i % call->tasks_per_head * call->task_tokens;
    int64_t tokens = MIN(call->task_tokens, call->T - first), group = call->H / call->G, D = call->D;
    prefill_work work;
    if (!prefill_scratch(&work, tokens * group, D)) {
        call->failed = true;
        return;
    }
    load_queries(call, &work, g, first, tokens);
    memset(work.out, 0, sizeof(float) * work.M * work.width);
    for (int64_t m = 0; m < work.M; m++) work.maximum[m] = NO_MAXIMUM, work.sum[m] = 0;
    int64_t position = call->start + first, end = position + tokens;
    for (int64_t key = MAX(0, position - call->window + 1) / KEYS * KEYS; key < end; key += KEYS) {
        load_keys(call, &work, g, key, MIN(KEYS, end - key));
        load_values(call, &work, g, key, MIN(KEYS, end - key));
        prefill_block(call, &work, position, tokens, key);
    }
    for (int64_t m = 0; m < tokens * group; m++) {
        float *out = call->out + ((first + m / group) * call->H + g * group + m % group) * D;
        for (int64_t d = 0; d < D; d++) out[d] = work.out[m * work.width + d] / work.sum[m];
    }
}

/* window is at least 1; no window is one as long as the sequence. */
int FN(prefill_attention)(const float *q, const uint16_t *k, const uint16_t *v, float *out, int64_t T, int64_t H,
                          int64_t G, int64_t D, int64_t S, int64_t start, int64_t window) {
    int64_t tokens = MAX(1, TASK_ROWS / (H / G)), per_head = (T + tokens - 1) / tokens;
    prefill_call call = {.q = q, .k = k, .v = v, .out = out, .T = T, .H = H, .G = G, .D = D, .S = S, .start = start,
                         .window = window, .task_tokens = tokens, .tasks_per_head = per_head};
    pool_run(prefill_task, &call, G * per_head);
    return call.failed ? NO_MEMORY : OK;
}
