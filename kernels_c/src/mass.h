/* How much of the query rows' attention falls on each chunk of keys, by prefill.h's blocks: a first pass finds every row's
 * maximum and sum of powers, a second computes the same scores again and adds the probabilities up. A task is a KV head and
 * a block of query tokens; its masses are added to the others' in the tasks' order. */

typedef struct {
    prefill_call rows;
    int64_t first, chunk, N;
    float *masses; /* (G * tasks_per_head, N) */
} mass_call;

/* Maximum (whole, as in softmax_row) and sum of one row brought forward by a block of scores. */
static void mass_maximum(const prefill_work *work, int64_t m) {
    const float *row = work->scores + m * KEYS;
    vf top = vf_load(row);
    for (int64_t j = VL; j < KEYS; j += VL) top = vf_max(top, vf_load(row + j));
    float before = work->maximum[m], maximum = MAX(before, ceilf(vf_hmax(top)));
    vf sum = {0}, shift = vf_set1(maximum);
    for (int64_t j = 0; j < KEYS; j += VL) sum += vf_exp2(vf_load(row + j) - shift);
    work->sum[m] = work->sum[m] * vf_exp2(vf_set1(before - maximum))[0] + vf_sum(sum);
    work->maximum[m] = maximum;
}

/* Scores against the keys key.. that load_keys put into the scratch; -infinity where hidden from the row. */
static void mass_scores(const prefill_call *call, const prefill_work *work, int64_t first, int64_t tokens, int64_t key) {
    int64_t D = call->D, group = call->H / call->G;
    for (int64_t m = 0; m < work->M; m += MR)
        for (int64_t j = 0; j < KEYS; j += NR)
            micro(D, work->q + m * D, 1, MR, work->k + j * D, NR, work->scores + m * KEYS + j, KEYS, NV, false);
    for (int64_t m = 0; m < tokens * group; m++) {
        int64_t position = first + m / group, low = position - call->window + 1 - key, high = position + 1 - key;
        float *row = work->scores + m * KEYS;
        for (int64_t j = 0; j < KEYS; j += VL) {
            vi lane = vi_iota() + (int32_t)j;
            vi visible = (lane >= (int32_t)MAX(low, 0)) & (lane < (int32_t)MIN(high, KEYS));
            vf_store(row + j, vf_select(visible, vf_load(row + j), vf_set1(-INFINITY)));
        }
    }
}

static void mass_task(void *ctx, int64_t i) {
    mass_call *call = ctx;
    prefill_call *rows = &call->rows;
    int64_t g = i / rows->tasks_per_head, first = i % rows->tasks_per_head * rows->task_tokens;
    int64_t tokens = MIN(rows->task_tokens, rows->T - first), M = tokens * (rows->H / rows->G);
    float *masses = call->masses + i * call->N;
    prefill_work work;
    if (!prefill_scratch(&work, M, rows->D)) {
        rows->failed = true;
        return;
    }
    load_queries(rows, &work, g, first, tokens);
    for (int64_t m = 0; m < work.M; m++) work.maximum[m] = NO_MAXIMUM, work.sum[m] = 0;
    memset(masses, 0, sizeof(float) * call->N);
    int64_t position = rows->start + first, end = position + tokens;
    int64_t begin = MAX(0, position - rows->window + 1) / KEYS * KEYS;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t key = begin; key < end; key += KEYS) {
            load_keys(rows, &work, g, key, MIN(KEYS, end - key));
            mass_scores(rows, &work, position, tokens, key);
            if (pass == 0) {
                for (int64_t m = 0; m < M; m++) mass_maximum(&work, m);
                continue;
            }
            float sums[KEYS];
            for (int64_t j = 0; j < KEYS; j += VL) {
                vf sum = {0};
                for (int64_t m = 0; m < M; m++)
                    sum += vf_exp2(vf_load(work.scores + m * KEYS + j) - vf_set1(work.maximum[m])) *
                           vf_set1(1 / work.sum[m]);
                vf_store(sums + j, sum);
            }
            for (int64_t j = 0; j < KEYS; j++) {
                int64_t at = key + j - call->first;
                if (at >= 0 && at < call->N * call->chunk) masses[at / call->chunk] += sums[j];
            }
        }
}

/* out: (G, N); chunk n holds the keys first + n * chunk on. */
int FN(attention_mass)(const float *q, const uint16_t *k, float *out, int64_t T, int64_t H, int64_t G, int64_t D,
                       int64_t S, int64_t start, int64_t window, int64_t first, int64_t chunk, int64_t N) {
    int64_t tokens = MAX(1, TASK_ROWS / (H / G)), per_head = (T + tokens - 1) / tokens;
    mass_call call = {.rows = {.q = q, .k = k, .T = T, .H = H, .G = G, .D = D, .S = S, .start = start,
                               .window = window, .task_tokens = tokens, .tasks_per_head = per_head},
                      .first = first, .chunk = chunk, .N = N};
    call.masses = scratch(SCRATCH_CALL, sizeof(float) * G * per_head * N);
    if (!call.masses) return NO_MEMORY;
    pool_run(mass_task, &call, G * per_head);
    if (call.rows.failed) return NO_MEMORY;
    for (int64_t g = 0; g < G; g++)
        for (int64_t n = 0; n < N; n++) {
            float sum = 0;
            for (int64_t i = 0; i < per_head; i++) sum += call.masses[(g * per_head + i) * N + n];
            out[g * N + n] = sum;
        }
    return OK;
}
