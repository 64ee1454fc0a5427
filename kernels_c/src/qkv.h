/* Query, key and value of a layer: three linear layers on RMSNorm(x), RoPE, and the FP16 store of K and V.
 *
 * RoPE rotates channel i with channel i + D/2 (the order of Hugging Face checkpoints). K and V are clamped to the finite
 * range of FP16: an infinity in the cache would turn a masked product 0 * inf into NaN for every later token. */

typedef struct {
    const float *cos, *sin; /* (positions, D/2) */
    const int32_t *positions, *slots;
    float *q;
    const float *k_rows, *v_rows; /* (T, G * D) */
    uint16_t *k, *v;
    int64_t H, G, D, S;
} rope_call;

INLINE void rotate(float *head, const float *cos, const float *sin, int64_t half) {
    int64_t i = 0;
    for (; i + VL <= half; i += VL) {
        vf a = vf_load(head + i), b = vf_load(head + half + i), c = vf_load(cos + i), s = vf_load(sin + i);
        vf_store(head + i, a * c - b * s);
        vf_store(head + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

INLINE void store_half(const float *x, uint16_t *out, int64_t n) {
    const float top = 65504;
    int64_t i = 0;
    for (; i + VL <= n; i += VL) vh_store(out + i, vf_to_half(vf_min(vf_max(vf_load(x + i), vf_set1(-top)), vf_set1(top))));
    for (; i < n; i++) out[i] = float_to_half(MIN(MAX(x[i], -top), top));
}

static void rope_task(void *ctx, int64_t t) {
    const rope_call *call = ctx;
    int64_t D = call->D, half = D / 2, slot = call->slots[t];
    const float *cos = call->cos + call->positions[t] * half, *sin = call->sin + call->positions[t] * half;
    for (int64_t h = 0; h < call->H; h++) rotate(call->q + (t * call->H + h) * D, cos, sin, half);
    for (int64_t g = 0; g < call->G; g++) {
        float head[MAX_HEAD_DIM];
        memcpy(head, call->k_rows + (t * call->G + g) * D, sizeof(float) * D);
        rotate(head, cos, sin, half);
        store_half(head, call->k + (g * call->S + slot) * D, D);
        store_half(call->v_rows + (t * call->G + g) * D, call->v + (g * call->S + slot) * D, D);
    }
}

int FN(qkv)(const float *x, const float *norm, float eps, const matrix *wq, const matrix *wk, const matrix *wv,
            const float *bq, const float *bk, const float *bv, const float *cos, const float *sin, int64_t P,
            const int32_t *positions, const int32_t *slots, int64_t H, int64_t G, int64_t D, int64_t S, float *q,
            uint16_t *k, uint16_t *v, int64_t T) {
    for (int64_t t = 0; t < T; t++)
        if (positions[t] < 0 || positions[t] >= P || slots[t] < 0 || slots[t] >= S) return BAD_INDEX;
    float *rows = scratch(SCRATCH_ROWS, sizeof(float) * 2 * T * G * D);
    if (!rows) return NO_MEMORY;
    linear jobs[] = {
        {.mode = STORE, .weight = wq, .bias = bq, .out = q},
        {.mode = STORE, .weight = wk, .bias = bk, .out = rows},
        {.mode = STORE, .weight = wv, .bias = bv, .out = rows + T * G * D},
    };
    int status = linear_run(jobs, 3, x, norm, eps, T);
    if (status) return status;
    rope_call call = {.cos = cos, .sin = sin, .positions = positions, .slots = slots, .q = q, .k_rows = rows,
                      .v_rows = rows + T * G * D, .k = k, .v = v, .H = H, .G = G, .D = D, .S = S};
    pool_run(rope_task, &call, T);
    return OK;
}
