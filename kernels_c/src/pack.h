/* Packing FP16 chunks of K and V. The bits are those of runtime/formats: every float operation happens there in the same
 * order, one rounding each (the build forbids contraction). A block is K or V of one chunk and KV head: its values become
 * codes in place (rotated.h, baselines.h), which are then stored (streams.h). */

typedef struct {
    const uint16_t *k, *v;
    const span *to;
    const int32_t *starts, *positions;
    const format_data *data;
    int64_t S, G, D, C;
    float *lows, *highs; /* (n, C), of kvquant's V */
    _Atomic bool no_memory;
} packing;

/* What kvquant's V needs of all heads of a chunk: each token's thresholds, and the centre and half that are stored. */
static void pack_shared(void *ctx, int64_t chunk) {
    packing *p = ctx;
    int64_t C = p->C, D = p->D;
    float *lows = p->lows + chunk * C, *highs = p->highs + chunk * C, centres[MAX_CHUNK], halves[MAX_CHUNK];
    float *work = scratch(SCRATCH_TASK, 8 * (kvquant_beyond(p->G * D) + 1));
    if (!work) {
        p->no_memory = true;
        return;
    }
    const uint16_t *x = p->v + p->starts[chunk] * D;
    for (int64_t t = 0; t < C; t++) {
        thresholds(x + t * D, p->S * D, p->G, D, work, lows + t, highs + t);
        centres[t] = (highs[t] + lows[t]) * .5f;
        halves[t] = (highs[t] - lows[t]) * .5f;
    }
    uint8_t *shared = p->to->v.shared + chunk * p->to->v.shared_bytes;
    store_halves(shared, centres, C);
    store_halves(shared + 2 * C, halves, C);
}

static void encode_kvquant(const packing *p, float *y, const region *to, int64_t chunk, int64_t g, bool is_v, uint8_t *meta) {
    int64_t C = p->C, D = p->D, P = round_up(D);
    float centres[MAX(MAX_HEAD_DIM, MAX_CHUNK)] = {0}, halves[MAX(MAX_HEAD_DIM, MAX_CHUNK)] = {0};
    nonuniform u = {.levels = levels_of(is_v ? p->data->v_levels : p->data->k_levels, to->bits),
                    .centres = centres, .halves = halves};
    if (!is_v) {
        memcpy(centres, p->data->k_centre + g * D, 4 * D);
        memcpy(halves, p->data->k_half + g * D, 4 * D);
        kvquant(y, &u, to->bits, C, D, P, meta, false);
        return;
    }
    const uint8_t *shared = to->shared + chunk * to->shared_bytes;
    for (int64_t t = 0; t < C; t++) {
        uint16_t pair[2];
        memcpy(pair, shared + 2 * t, 2);
        memcpy(pair + 1, shared + 2 * (C + t), 2);
        centres[t] = half_to_float(pair[0]), halves[t] = half_to_float(pair[1]);
    }
    u.lows = p->lows + chunk * C, u.highs = p->highs + chunk * C;
    kvquant(y, &u, to->bits, C, D, P, meta, true);
}

/* K (even items) or V (odd items) of one chunk and KV head. */
static void pack_block(void *ctx, int64_t item) {
    packing *p = ctx;
    bool is_v = item & 1;
    const region *to = is_v ? &p->to->v : &p->to->k;
    int64_t chunk = item / 2 / p->G, g = item / 2 % p->G, C = p->C, D = p->D, P = round_up(D);
    const uint16_t *x = (is_v ? p->v : p->k) + (g * p->S + p->starts[chunk]) * D;
    uint8_t *codes = to->codes + g * to->codes_stride + chunk * to->codes_bytes;
    uint8_t *meta = to->meta + g * to->meta_stride + chunk * to->meta_bytes;
    if (to->family == HALF) {
        memcpy(codes, x, 2 * C * D);
        return;
    }
    float *y = scratch(SCRATCH_TASK, 4 * C * P);
    if (!y) {
        p->no_memory = true;
        return;
    }
    load_rows(x, C, D, P, to->family != ROTATED, y);
    if (!is_v && (to->family == ATOM || to->family == KVQUANT)) {
        int64_t row = p->positions[chunk] * (D / 2);
        turn_back(y, p->data->cos + row, p->data->sin + row, C, D, P);
    }
    switch (to->family) {
    case ROTATED:
        rotate_rows(y, C, D, P);
        (is_v ? rotated_v : rotated_k)(y, to->bits, C, D, P, meta);
        break;
    case KIVI: (is_v ? kivi_v : kivi_k)(y, to->bits, C, D, P, meta); break;
    case ATOM: atom(y, C, P, meta); break;
    default: encode_kvquant(p, y, to, chunk, g, is_v, meta);
    }
    (is_v ? store_channels : store_tokens)(y, to->bits, C, D, P, codes);
}

int FN(pack)(const uint16_t *k, const uint16_t *v, const span *to, const int32_t *starts, const int32_t *positions,
             const format_data *data, int64_t S, int64_t G, int64_t D, int64_t C) {
    packing p = {k, v, to, starts, positions, data, S, G, D, C, NULL, NULL, false};
    if (to->v.family == KVQUANT) {
        p.lows = scratch(SCRATCH_CALL, 8 * to->n * C);
        if (!p.lows) return NO_MEMORY;
        p.highs = p.lows + to->n * C;
        pool_run(pack_shared, &p, to->n);
    }
    pool_run(pack_block, &p, 2 * to->n * G);
    memcpy(to->positions, positions, 4 * to->n);
    return p.no_memory ? NO_MEMORY : OK;
}
