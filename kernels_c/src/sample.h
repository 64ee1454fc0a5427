/* One id from a row of logits: repetition penalty, temperature, top-k, min-p, top-p, draw.
 *
 * Candidates are taken from a heap, largest first (lowest id first among equals), only as far as the filters and the draw
 * need: a full sort of the vocabulary would take longer than a layer. NaN counts as -infinity. */

typedef struct {
    const float *value; /* (V,) log-probabilities up to a constant */
    int32_t *ids;       /* heap of `left` candidates, then the taken ones, the first of them last */
    int64_t left;
} candidates;

INLINE bool ahead(const float *value, int32_t a, int32_t b) {
    return value[a] > value[b] || (value[a] == value[b] && a < b);
}

static void sift_down(const candidates *c, int64_t at) {
    int32_t id = c->ids[at];
    for (int64_t child; (child = 2 * at + 1) < c->left; at = child) {
        if (child + 1 < c->left && ahead(c->value, c->ids[child + 1], c->ids[child])) child++;
        if (!ahead(c->value, c->ids[child], id)) break;
        c->ids[at] = c->ids[child];
    }
    c->ids[at] = id;
}

/* The i-th largest of n candidates; i grows from 0 by at most 1 from call to call. */
static int32_t ranked(candidates *c, int64_t n, int64_t i) {
    if (c->left == n - i) {
        int32_t top = c->ids[0];
        c->ids[0] = c->ids[--c->left];
        sift_down(c, 0);
        c->ids[c->left] = top;
    }
    return c->ids[n - 1 - i];
}

/* logits without NaN and +infinity, and with every seen id's logit divided (or, if negative, multiplied) by the penalty. */
static int penalized(const float *logits, int64_t V, float penalty, const int32_t *seen, int64_t n_seen, float *out) {
    for (int64_t i = 0; i < V; i++) out[i] = logits[i] == logits[i] ? MIN(logits[i], FLT_MAX) : -INFINITY;
    for (int64_t i = 0; i < n_seen; i++) {
        if (seen[i] < 0 || seen[i] >= V) return BAD_INDEX;
        float x = out[seen[i]] == -INFINITY ? -INFINITY : MIN(logits[seen[i]], FLT_MAX);
        out[seen[i]] = x > 0 ? x / penalty : x * penalty;
    }
    return OK;
}

static int32_t draw(candidates *c, int64_t n, int64_t top_k, float top_p, double uniform) {
    double mass = 0, sum = 0;
    int64_t kept = n;
    if (top_k > 0 && top_k < n) {
        kept = top_k;
        for (int64_t i = 0; i < kept; i++) mass += exp(c->value[ranked(c, n, i)]);
    } else {
        for (int64_t i = 0; i < n; i++) mass += exp(c->value[c->ids[i]]);
    }
    if (top_p < 1)
        for (int64_t i = 0; i < kept; i++) {
            sum += exp(c->value[ranked(c, n, i)]);
            if (sum < top_p * mass) continue;
            kept = i + 1;
            mass = sum;
        }
    sum = 0;
    for (int64_t i = 0; i < kept; i++) {
        sum += exp(c->value[ranked(c, n, i)]);
        if (sum > uniform * mass) return ranked(c, n, i);
    }
    return ranked(c, n, kept - 1); /* rounding left the sum just below the mass */
}

/* The id, or a negative status. temperature 0 takes the largest; top_k 0, top_p 1, min_p 0 and penalty 1 do nothing. */
int FN(sample)(const float *logits, int64_t V, float temperature, int64_t top_k, float top_p, float min_p,
               float penalty, const int32_t *seen, int64_t n_seen, double uniform) {
    float *value = scratch(SCRATCH_CALL, (sizeof(float) + sizeof(int32_t)) * V);
    if (!value) return NO_MEMORY;
    int status = penalized(logits, V, penalty, seen, n_seen, value);
    if (status) return status;
    vf tops = vf_set1(-INFINITY);
    int64_t best = 0, n = 0;
    for (int64_t i = 0; i + VL <= V; i += VL) tops = vf_max(vf_load(value + i), tops);
    float top = vf_hmax(tops);
    for (int64_t i = V / VL * VL; i < V; i++) top = MAX(top, value[i]);
    if (top == -INFINITY) return NOT_FINITE;
    if (temperature == 0) {
        while (value[best] != top) best++;
        return (int)best;
    }
    candidates c = {.value = value, .ids = (int32_t *)(value + V)};
    float lowest = min_p > 0 ? logf(min_p) : -103; /* e^-103 is 0 in float32 */
    for (int64_t i = 0; i < V; i++) {
        value[i] = (value[i] - top) / temperature;
        if (value[i] >= lowest) c.ids[n++] = (int32_t)i;
    }
    c.left = n;
    for (int64_t i = n / 2; i-- > 0;) sift_down(&c, i);
    return draw(&c, n, top_k, top_p, uniform);
}
