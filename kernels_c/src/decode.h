/* Decode attention: one token's query over the spans and the tail of one layer's cache, with one running softmax.
 *
 * A task is one KV head; up to GROUP query heads share its read of K and V, in register blocks of HEADS. Scores are in
 * base 2 (the query carries log2(e) / sqrt(D)) and the running maximum is a whole number, so that rescaling what was
 * summed so far multiplies by an exact power of two.
 *
 * Codes that stand for code * scale + zero are summed as they are (coded.h). K with scales per channel: per chunk the query's
 * channels take the scales and the zeros become one number, so that a score is a plain sum of codes, lanes = tokens. V: the
 * probability takes the token's scale, lanes = channels, and the zeros become one number. The rotated formats do this with a
 * query that is rotated once, and their sum is rotated back at the end. Other blocks are decoded first (decoded.h).
 *
 * FP16 K and V: a key's score is the same function of q and k wherever it lies, and maximum, denominator and output
 * advance key by key. An all-FP16 plan in document order therefore gives the bits that one dense tail gives. */

/* One chunk, or a few slots of the tail; tokens first .. n - 1 are visible. */
typedef struct {
    const uint8_t *k, *k_meta, *v, *v_meta, *v_shared;
    int k_family, v_family, k_bits, v_bits;
    int64_t position; /* of token 0 */
    int64_t first, n;
} block;

/* n halves as floats, and zeros up to a whole vector. */
static void load_halves(float *to, const uint8_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        uint16_t lanes[VL] = {0};
        if (i + VL > n) memcpy(lanes, from + 2 * i, 2 * (n - i));
        vf_store(to + i, vf_from_half(vh_load(i + VL > n ? (const void *)lanes : from + 2 * i)));
    }
}

/* Scales and zeros (P,) of a K block's channels. */
static void rotated_lines(const attention *a, const uint8_t *meta, float *scales, float *zeros) {
    int64_t D = a->D, P = a->P;
    uint16_t bases[2];
    memcpy(bases, meta + 2 * D, 4);
    float scale_step = bf16_value(bases[0]) / 255, zero_step = bf16_value(bases[1]) / 127;
    uint8_t whole[2 * MAX_HEAD_DIM];
    if (P != D) meta = pad(whole, meta, 2, D, P);
    for (int64_t d = 0; d < P; d += VL) {
        vf_store(scales + d, vf_from_u8(meta + d) * scale_step);
        vf_store(zeros + d, vf_from_i8(meta + P + d) * zero_step);
    }
}

/* Scales and offsets (C,) of a token's whole head, with which it is code * scale + offset. */
static void atom_lines(const attention *a, const uint8_t *meta, float *scales, float *offsets) {
    load_halves(scales, meta, a->C);
    load_halves(offsets, meta + 2 * a->C, a->C);
    for (int64_t t = 0; t < a->C; t += VL) vf_store(offsets + t, -vf_load(offsets + t) * vf_load(scales + t));
}

static void block_scores(const attention *a, const block *b) {
    int64_t D = a->D, P = a->P, C = a->C, T = a->T;
    if (b->k_family == HALF) {
        const uint16_t *k = P == D ? (const void *)b->k : pad(a->padded, b->k, b->n, 2 * D, 2 * P);
#define CALL(h, H) half_scores(a, k, b->n, h, H)
        BY_HEADS(a->n, CALL)
#undef CALL
        return;
    }
    const uint8_t *words = b->k;
    if (round_up(C) != C) words = pad(a->padded, words, (D * b->k_bits + 31) / 32, 4 * C, 4 * round_up(C));
    float scales[MAX(MAX_CHUNK, MAX_HEAD_DIM)], offsets[MAX(MAX_CHUNK, MAX_HEAD_DIM)];
    switch (b->k_family) {
    case ROTATED:
        rotated_lines(a, b->k_meta, scales, offsets);
        scores_of_codes(a, a->rotated_q, words, scales, offsets, b->k_bits);
        return;
    case KIVI:
        load_halves(scales, b->k_meta, D);
        load_halves(offsets, b->k_meta + 2 * D, D);
        scores_of_codes(a, a->q, words, scales, offsets, b->k_bits);
        return;
    case ATOM:
        atom_lines(a, b->k_meta, scales, offsets);
        decode_streams(a->decoded, T, words, round_up(C), D, NULL, scales, offsets, 4);
        break;
    default:
        decode_levels(a->decoded, T, words, round_up(C), D, levels_of(a->data->k_levels, b->k_bits), a->data->k_half + a->g * D,
                      a->data->k_centre + a->g * D, b->k_bits);
        scatter_outliers(a->decoded, 1, T, D, b->k_meta);
    }
#define CALL(h, H) turned_scores(a, b->position, h, H)
    BY_HEADS(a->n, CALL)
#undef CALL
}

/* Make head h's running maximum a whole number not below `score`. */
static void raise_maximum(attention *a, int h, float score) {
    float maximum = ceilf(score), step = a->max[h] - maximum, factor = ldexpf(1, (int)MAX(step, -1000.0f));
    a->max[h] = maximum;
    a->sum[h] *= factor, a->sums[h] *= factor;
    for (int64_t d = h * a->P; d < (h + 1) * a->P; d++) a->out[d] *= factor, a->rotated[d] *= factor;
}

/* FP16: cut the block wherever a key raises a maximum, for what is summed must not depend on where blocks begin. */
static void half_values(attention *a, const block *b) {
    int64_t n = round_up(b->n), T = a->T;
    const uint16_t *v = a->P == a->D ? (const void *)b->v : pad(a->padded, b->v, b->n, 2 * a->D, 2 * a->P);
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
#define CALL(h, H) half_sums(a, begin, end, h, H), row_values(a, v, F16, begin, end, h, H)
        BY_HEADS(a->n, CALL)
#undef CALL
    }
}

/* weights = shares * scales; bias: what the tokens' offsets add to every channel. */
static void weigh(const attention *a, const float *scales, const float *offsets, float *bias) {
    int64_t T = a->T;
    for (int h = 0; h < a->n; h++) {
        vf sum = vf_set1(0);
        for (int64_t t = 0; t < round_up(a->C); t += VL) {
            vf share = vf_load(a->shares + h * T + t);
            vf_store(a->weights + h * T + t, share * vf_load(scales + t));
            sum = vf_fma(share, vf_load(offsets + t), sum);
        }
        bias[h] = vf_sum(sum);
    }
}

static void block_values(attention *a, const block *b) {
    if (b->v_family == HALF) {
        half_values(a, b);
        return;
    }
    int64_t D = a->D, P = a->P, C = a->C, T = a->T, n = round_up(b->n);
    for (int h = 0; h < a->n; h++) {
        const float *scores = a->scores + h * T;
        vf largest = vf_load(scores), sum = vf_set1(0);
        for (int64_t t = VL; t < n; t += VL) largest = vf_max(largest, vf_load(scores + t));
        if (vf_any(largest > vf_set1(a->max[h]))) raise_maximum(a, h, vf_hmax(largest));
        for (int64_t t = 0; t < n; t += VL) {
            vf share = vf_exp2(vf_load(scores + t) - vf_set1(a->max[h]));
            vf_store(a->shares + h * T + t, share);
            sum += share;
        }
        a->sums[h] += sum;
    }
    const uint8_t *words = b->v;
    if (P != D) words = pad(a->padded, words, (C * b->v_bits + 31) / 32, 4 * D, 4 * P);
    float scales[MAX_CHUNK], offsets[MAX_CHUNK], bias[GROUP];
    switch (b->v_family) {
    case ROTATED:
        for (int64_t t = 0; t < C; t += VL) {
            uint16_t lanes[VL] = {0};
            if (t + VL > C) memcpy(lanes, b->v_meta + 2 * t, 2 * (C - t));
            vf scale = vf_from_bfloat(vh_load(t + VL > C ? (const void *)lanes : b->v_meta + 2 * t));
            vf_store(scales + t, scale);
            vf_store(offsets + t, scale * (((1 << b->v_bits) - 1) * -0.5f)); /* levels are around zero */
        }
        weigh(a, scales, offsets, bias);
        values_of_codes(a, a->rotated, bias, words, 0, P, b->v_bits);
        return;
    case KIVI:
        for (int64_t d = 0; d < D; d += KIVI_GROUP) {
            const uint8_t *meta = b->v_meta + 2 * C * (d / KIVI_GROUP);
            load_halves(scales, meta, C);
            load_halves(offsets, meta + 2 * C * ((D + KIVI_GROUP - 1) / KIVI_GROUP), C);
            weigh(a, scales, offsets, bias);
            values_of_codes(a, a->out, bias, words, d, MIN(d + KIVI_GROUP, P), b->v_bits);
        }
        return;
    case ATOM:
        atom_lines(a, b->v_meta, scales, offsets);
        weigh(a, scales, offsets, bias);
        values_of_codes(a, a->out, bias, words, 0, P, b->v_bits);
        return;
    default:
        load_halves(offsets, b->v_shared, C);
        load_halves(scales, b->v_shared + 2 * C, C);
        decode_levels(a->decoded, P, words, P, C, levels_of(a->data->v_levels, b->v_bits), scales, offsets, b->v_bits);
        scatter_outliers(a->decoded, P, 1, D, b->v_meta);
        memcpy(a->weights, a->shares, 4 * a->n * T);
#define CALL(h, H) row_values(a, a->decoded, F32, b->first, b->n, h, H)
        BY_HEADS(a->n, CALL)
#undef CALL
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
        if (visible) attend_block(a, &(block){.k = k + 2 * t * c->D, .v = v + 2 * t * c->D, .n = n});
    }
}

/* The span's first n chunks. */
static int attend_span(attention *a, const span *s, int64_t n, int64_t oldest) {
    const region *k = &s->k, *v = &s->v;
    bool turns = k->family == ATOM || k->family == KVQUANT;
    for (int64_t c = 0; c < n; c++) {
        int64_t first = MAX(oldest - s->positions[c], 0);
        if (first >= a->C) continue;
        if (turns && !has_tile(a->data, s->positions[c], a->C)) return BAD_INDEX;
        attend_block(a, &(block){
            .k = k->codes + a->g * k->codes_stride + c * k->codes_bytes,
            .k_meta = k->meta + a->g * k->meta_stride + c * k->meta_bytes,
            .v = v->codes + a->g * v->codes_stride + c * v->codes_bytes,
            .v_meta = v->meta + a->g * v->meta_stride + c * v->meta_bytes,
            .v_shared = v->shared + c * v->shared_bytes,
            .k_family = k->family, .v_family = v->family, .k_bits = k->bits, .v_bits = v->bits,
            .position = s->positions[c], .first = first, .n = a->C});
    }
    return OK;
}

typedef struct {
    const float *q;
    const cache *const *caches; /* (B,): row b of q, state and out belongs to the b-th */
    const int32_t *state;
    float *out;
    _Atomic int status;
} decoding;

INLINE bool is_rotated(const span *s) { return s && (s->k.family == ROTATED || s->v.family == ROTATED); }

/* KV head i % G of sequence i / G. */
static void attend_head(void *ctx, int64_t i) {
    decoding *x = ctx;
    int64_t b = i / x->caches[0]->G, g = i % x->caches[0]->G;
    const cache *c = x->caches[b];
    const int32_t *state = x->state + b * STATE_SIZE;
    const float *q_HD = x->q + b * c->H * c->D;
    float *out_HD = x->out + b * c->H * c->D;
    int64_t D = c->D, P = round_up(D), T = round_up(MAX(c->C, TAIL_BLOCK)), group = c->H / c->G;
    int64_t position = state[0], visible = state[1] + 1, flushed = state[4], head = MIN(c->head, visible);
    int64_t oldest = position - c->window + 1;
    bool rotates = is_rotated(c->flushed);
    for (int64_t s = 0; s < c->n_spans; s++) rotates |= is_rotated(c->spans + s);

    int64_t n = MIN(group, GROUP);
    float *work = scratch(SCRATCH_TASK, 4 * (5 * n * P + 3 * n * T + T * P) + 2 * T * P);
    if (!work) {
        x->status = NO_MEMORY;
        return;
    }
    float scale = 1.4426950408889634 / sqrt(D);
    for (int64_t h = 0; h < group; h += n) {
        attention a = {.D = D, .P = P, .C = c->C, .T = T, .g = g, .n = MIN(group - h, n), .q = work, .data = c->data};
        a.rotated_q = a.q + n * P, a.folded = a.rotated_q + n * P, a.out = a.folded + n * P, a.rotated = a.out + n * P;
        a.scores = a.rotated + n * P, a.shares = a.scores + n * T, a.weights = a.shares + n * T;
        a.decoded = a.weights + n * T, a.padded = (uint8_t *)(a.decoded + T * P);
        memset(work, 0, 4 * 5 * n * P);
        for (int64_t m = 0; m < a.n; m++) {
            const float *q = q_HD + (g * group + h + m) * D;
            for (int64_t d = 0; d < D; d++) a.q[m * P + d] = q[d] * scale;
            a.max[m] = -INFINITY;
        }
        if (rotates) {
            memcpy(a.rotated_q, a.q, 4 * a.n * P);
            for (int64_t m = 0; m < a.n; m++) hadamard(a.rotated_q + m * P, P, rotation_block(D));
        }
        attend_tail(&a, c, g, 0, head, oldest);
        int status = OK;
        for (int64_t s = 0; s < c->n_spans; s++) status |= attend_span(&a, c->spans + s, c->spans[s].n, oldest);
        if (flushed) status |= attend_span(&a, c->flushed, flushed, oldest);
        if (status) x->status = BAD_INDEX;
        attend_tail(&a, c, g, head + flushed * c->C, visible, oldest);
        for (int64_t m = 0; m < a.n; m++) {
            float *out = out_HD + (g * group + h + m) * D, *rotated = a.rotated + m * P;
            float sum = a.sum[m] + vf_sum(a.sums[m]);
            if (rotates) hadamard(rotated, P, rotation_block(D));
            for (int64_t d = 0; d < D; d++)
                out[d] = (rotates ? a.out[m * P + d] + rotated[d] : a.out[m * P + d]) / sum;
        }
    }
}

int FN(decode_attention)(const float *q, const cache *const *caches, const int32_t *state, float *out, int64_t B) {
    for (int64_t b = 0; b < B; b++) {
        const cache *c = caches[b];
        int64_t slot = state[b * STATE_SIZE + 1], flushed = state[b * STATE_SIZE + 4];
        if (slot < 0 || slot >= c->capacity) return BAD_INDEX;
        if (flushed < 0 || flushed > (c->flushed ? c->flushed->n : 0)) return BAD_INDEX;
        if (flushed && c->head + flushed * c->C > slot + 1) return BAD_INDEX;
    }
    decoding x = {q, caches, state, out, OK};
    pool_run(attend_head, &x, B * caches[0]->G);
    return x.status;
}
