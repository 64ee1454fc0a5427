/* Decode attention: one token's query over the spans and the tail of one layer's cache, with one running softmax.
 *
 * A task is one KV head; up to GROUP query heads share its read of K and V, in register blocks of HEADS. Scores are in
 * base 2 (the query carries log2(e) / sqrt(D)) and the running maximum is a whole number, so that rescaling what was
 * summed so far multiplies by an exact power of two.
 *
 * Quantized K: the query is rotated once; per chunk its channels take the scales and the zeros become one number, so
 * that a score is a plain sum of codes, lanes = tokens. Quantized V: the probability takes the token's scale, lanes =
 * channels; codes count from the levels' centre, and the sum is rotated back at the end.
 *
 * FP16 K and V: a key's score is the same function of q and k wherever it lies, and maximum, denominator and output
 * advance key by key. An all-FP16 plan in document order therefore gives the bits that one dense tail gives. */

/* One chunk, or a few slots of the tail; tokens first .. n - 1 are visible. */
typedef struct {
    const uint8_t *k, *k_meta, *v, *v_meta;
    int k_bits, v_bits;
    int64_t first, n;
} block;

static void block_scores(const attention *a, const block *b) {
    int64_t D = a->D, P = a->P, C = a->C;
    if (b->k_bits == 16) {
        const uint16_t *k = P == D ? (const void *)b->k : pad(a->padded, b->k, b->n, 2 * D, 2 * P);
#define CALL(h, H) half_scores(a, k, b->n, h, H)
        BY_HEADS(a->n, CALL)
#undef CALL
        return;
    }
    uint16_t bases[2];
    memcpy(bases, b->k_meta + 2 * D, 4);
    float scale_step = bf16_value(bases[0]) / 255, zero_step = bf16_value(bases[1]) / 127;
    const uint8_t *words = b->k, *scales = b->k_meta, *zeros = scales + D;
    uint8_t whole[2 * MAX_HEAD_DIM];
    if (P != D) scales = pad(whole, scales, 2, D, P), zeros = scales + P;
    if (round_up(C) != C) words = pad(a->padded, words, (D * b->k_bits + 31) / 32, 4 * C, 4 * round_up(C));
    switch (b->k_bits) {
    case 2: scores_of_width(a, words, scales, zeros, scale_step, zero_step, 2); break;
    case 3: scores_of_width(a, words, scales, zeros, scale_step, zero_step, 3); break;
    case 4: scores_of_width(a, words, scales, zeros, scale_step, zero_step, 4); break;
    default: scores_of_width(a, words, scales, zeros, scale_step, zero_step, 8);
    }
}

/* Make head h's running maximum a whole number not below `score`. */
static void raise_maximum(attention *a, int h, float score) {
    float maximum = ceilf(score), step = a->max[h] - maximum, factor = ldexpf(1, (int)MAX(step, -1000.0f));
    a->max[h] = maximum;
    a->sum[h] *= factor, a->sums[h] *= factor;
    for (int64_t d = h * a->P; d < (h + 1) * a->P; d++) a->out[d] *= factor, a->rotated[d] *= factor;
}

static void block_values(attention *a, const block *b) {
    int64_t n = round_up(b->n), T = a->T;
    if (b->v_bits == 16) {
        const uint16_t *v = a->P == a->D ? (const void *)b->v : pad(a->padded, b->v, b->n, 2 * a->D, 2 * a->P);
        /* Cut the block wherever a key raises a maximum: what is summed must not depend on where blocks begin. */
        for (int64_t begin = b->first, end; begin < b->n; begin = end) {
            end = b->n;
            for (int h = 0; h < a->n; h++) {
                const float *scores = a->scores + h * T;
                if (scores[begin] > a->max[h]) raise_maximum(a, h, scores[begin]);
                vf largest = vf_load(scores + begin / VL * VL);
                for (int64_t t = begin / VL * VL + VL; t < n; t += VL) largest = vf_max(largest, vf_load(scores + t));
                if (vf_hmax(largest) > a->max[h])
                    for (int64_t t = begin + 1; t < end; t++)
                        if (scores[t] > a->max[h]) end = t;
            }
            for (int h = 0; h < a->n; h++) {
                float *weights = a->weights + h * T;
                vf maximum = vf_set1(a->max[h]);
                for (int64_t t = begin / VL * VL; t < end; t += VL)
                    vf_store(weights + t, vf_exp2(vf_load(a->scores + h * T + t) - maximum));
            }
#define CALL(h, H) half_sums(a, begin, end, h, H), half_values(a, v, begin, end, h, H)
            BY_HEADS(a->n, CALL)
#undef CALL
        }
        return;
    }
    float scales[MAX_CHUNK];
    for (int64_t t = 0; t < n; t += VL) {
        uint16_t lanes[VL] = {0};
        if (t + VL > b->n) memcpy(lanes, b->v_meta + 2 * t, 2 * (b->n - t));
        vf_store(scales + t, vf_from_bfloat(vh_load(t + VL > b->n ? (const void *)lanes : b->v_meta + 2 * t)));
    }
    for (int h = 0; h < a->n; h++) {
        const float *scores = a->scores + h * T;
        vf largest = vf_load(scores), sum = vf_set1(0);
        for (int64_t t = VL; t < n; t += VL) largest = vf_max(largest, vf_load(scores + t));
        if (vf_any(largest > vf_set1(a->max[h]))) raise_maximum(a, h, vf_hmax(largest));
        for (int64_t t = 0; t < n; t += VL) {
            vf p = vf_exp2(vf_load(scores + t) - vf_set1(a->max[h]));
            vf_store(a->weights + h * T + t, p * vf_load(scales + t));
            sum += p;
        }
        a->sums[h] += sum;
    }
    const uint8_t *words = b->v;
    if (a->P != a->D) words = pad(a->padded, words, (a->C * b->v_bits + 31) / 32, 4 * a->D, 4 * a->P);
    switch (b->v_bits) {
    case 2: values_of_width(a, words, 2); break;
    case 3: values_of_width(a, words, 3); break;
    case 4: values_of_width(a, words, 4); break;
    default: values_of_width(a, words, 8);
    }
}

static void attend_block(attention *a, const block *b) {
    block_scores(a, b);
    for (int h = 0; h < a->n; h++) {
        float *scores = a->scores + h * a->T;
        for (int64_t t = 0; t < b->first; t++) scores[t] = -INFINITY;
        for (int64_t t = b->n; t < round_up(b->n); t++) scores[t] = -INFINITY;
    }
    block_values(a, b);
}

/* Keys from position `oldest` on are visible. */
static void attend_tail(attention *a, const cache *c, int64_t g, int64_t begin, int64_t end, int64_t oldest) {
    const uint8_t *k = (const uint8_t *)(c->tail_k + g * c->capacity * c->D);
    const uint8_t *v = (const uint8_t *)(c->tail_v + g * c->capacity * c->D);
    const int32_t *positions = c->tail_positions;
    for (int64_t t = begin, n; t < end; t += n) {
        bool visible = positions[t] >= oldest;
        for (n = 1; n < TAIL_BLOCK && t + n < end && (positions[t + n] >= oldest) == visible; n++) {}
        if (visible) attend_block(a, &(block){k + 2 * t * c->D, NULL, v + 2 * t * c->D, NULL, 16, 16, 0, n});
    }
}

static void attend_span(attention *a, const span *s, int64_t g, int64_t oldest) {
    const uint8_t *k = s->k.codes + g * s->k.codes_stride, *k_meta = s->k.meta + g * s->k.meta_stride;
    const uint8_t *v = s->v.codes + g * s->v.codes_stride, *v_meta = s->v.meta + g * s->v.meta_stride;
    for (int64_t c = 0; c < s->n; c++) {
        int64_t first = MAX(oldest - s->positions[c], 0);
        if (first >= a->C) continue;
        attend_block(a, &(block){k + c * s->k.codes_bytes, k_meta + c * s->k.meta_bytes, v + c * s->v.codes_bytes,
                                 v_meta + c * s->v.meta_bytes, s->k.bits, s->v.bits, first, a->C});
    }
}

typedef struct {
    const float *q;
    const cache *cache;
    const int32_t *state;
    float *out;
    _Atomic bool no_memory;
} decoding;

/* KV head g. */
static void attend_head(void *ctx, int64_t g) {
    decoding *x = ctx;
    const cache *c = x->cache;
    int64_t D = c->D, P = round_up(D), T = round_up(MAX(c->C, TAIL_BLOCK)), group = c->H / c->G;
    int64_t position = x->state[0], visible = x->state[1] + 1, head = MIN(c->head, visible);
    int64_t oldest = position - c->window + 1;
    bool rotates = false;
    for (int64_t s = 0; s < c->n_spans; s++) rotates |= c->spans[s].k.bits < 16 || c->spans[s].v.bits < 16;

    int64_t n = MIN(group, GROUP);
    float *work = scratch(SCRATCH_TASK, 4 * (5 * n * P + 2 * n * T) + 2 * T * P);
    if (!work) {
        x->no_memory = true;
        return;
    }
    float scale = 1.4426950408889634 / sqrt(D);
    for (int64_t h = 0; h < group; h += n) {
        attention a = {.D = D, .P = P, .C = c->C, .T = T, .n = MIN(group - h, n), .q = work};
        a.rotated_q = a.q + n * P, a.folded = a.rotated_q + n * P, a.out = a.folded + n * P, a.rotated = a.out + n * P;
        a.scores = a.rotated + n * P, a.weights = a.scores + n * T, a.padded = (uint8_t *)(a.weights + n * T);
        memset(work, 0, 4 * 5 * n * P);
        for (int64_t m = 0; m < a.n; m++) {
            const float *q = x->q + (g * group + h + m) * D;
            for (int64_t d = 0; d < D; d++) a.q[m * P + d] = q[d] * scale;
            a.max[m] = -INFINITY;
        }
        if (rotates) {
            memcpy(a.rotated_q, a.q, 4 * a.n * P);
            for (int64_t m = 0; m < a.n; m++) hadamard(a.rotated_q + m * P, P, rotation_block(D));
        }
        attend_tail(&a, c, g, 0, head, oldest);
        for (int64_t s = 0; s < c->n_spans; s++) attend_span(&a, c->spans + s, g, oldest);
        attend_tail(&a, c, g, head, visible, oldest);
        for (int64_t m = 0; m < a.n; m++) {
            float *out = x->out + (g * group + h + m) * D, *rotated = a.rotated + m * P;
            float sum = a.sum[m] + vf_sum(a.sums[m]);
            if (rotates) hadamard(rotated, P, rotation_block(D));
            for (int64_t d = 0; d < D; d++)
                out[d] = (rotates ? a.out[m * P + d] + rotated[d] : a.out[m * P + d]) / sum;
        }
    }
}

int FN(decode_attention)(const float *q, const cache *c, const int32_t *state, float *out) {
    if (state[1] < 0 || state[1] >= c->capacity) return BAD_INDEX;
    decoding x = {q, c, state, out, false};
    pool_run(attend_head, &x, c->G);
    return x.no_memory ? NO_MEMORY : OK;
}
