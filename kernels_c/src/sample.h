/* One id from a row of logits: repetition penalty, temperature, top-k, min-p, top-p, draw.
 *
 * Candidates are taken from a heap, largest first (lowest id first among equals), only as far as the filters and the draw
 * need: a full sort of the vocabulary would take longer than a layer. NaN counts as -infinity. */

typedef struct {
    float *value; /* (V,) log-probabilities up to a constant */
    float *p;     /* (V,) their exponentials */
    int32_t *ids; /* heap of `left` candidates, then the taken ones, the first of them last */
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

/* The first of kept candidates at which the running sum passes `goal`; in order of rank, or of ids. */
static int32_t walk(candidates *c, int64_t n, int64_t kept, bool by_rank, double goal) {
    double sum = 0;
    int32_t id = 0;
    for (int64_t i = 0; i < kept && sum <= goal; i++) {
        id = by_rank ? ranked(c, n, i) : c->ids[i];
        sum += c->p[id];
    }
    return id; /* the last one where rounding left the sum just below the mass */
}

static int32_t draw(candidates *c, int64_t n, int64_t top_k, float top_p, double uniform) {
    double mass = 0, sum = 0;
    int64_t kept = top_k > 0 ? MIN(top_k, n) : n;
    bool by_rank = kept < n || top_p < 1;
    if (by_rank)
        for (int64_t i = n / 2; i-- > 0;) sift_down(c, i);
    for (int64_t i = 0; i < kept; i++) mass += c->p[kept < n ? ranked(c, n, i) : c->ids[i]];
    for (int64_t i = 0; top_p < 1 && i < kept; i++) {
        sum += c->p[ranked(c, n, i)];
        if (sum < top_p * mass) continue;
        kept = i + 1;
        mass = sum;
    }
    return walk(c, n, kept, by_rank, uniform * mass);
}

/* The id, or a negative status. temperature 0 takes the largest; top_k 0, top_p 1, min_p 0 and penalty 1 do nothing. */
int FN(sample)(const float *logits, int64_t V, float temperature, int64_t top_k, float top_p, float min_p,
               float penalty, const int32_t *seen, int64_t n_seen, double uniform) {
    int64_t padded = (V + VL - 1) / VL * VL;
    float *value = scratch(SCRATCH_CALL, (2 * sizeof(float) + sizeof(int32_t)) * padded);
    if (!value) return NO_MEMORY;
    int status = penalized(logits, V, penalty, seen, n_seen, value);
    if (status) return status;
    for (int64_t i = V; i < padded; i++) value[i] = -INFINITY;
    vf tops = vf_set1(-INFINITY);
    for (int64_t i = 0; i < V; i += VL) tops = vf_max(vf_load(value + i), tops);
    float top = vf_hmax(tops);
    if (top == -INFINITY) return NOT_FINITE;
    if (temperature == 0) {
        int32_t best = 0;
        while (value[best] != top) best++;
        return best;
    }
    candidates c = {.value = value, .p = value + padded, .ids = (int32_t *)(value + 2 * padded)};
    float lowest = min_p > 0 ? logf(min_p) : -INFINITY;
    for (int64_t i = 0; i < V; i += VL) {
        vf x = (vf_load(value + i) - top) / temperature;
        vf_store(value + i, x);
        vf_store(c.p + i, vf_exp(x));
    }
    for (int64_t i = 0; i < V; i++)
        if (value[i] >= lowest && c.p[i] > 0) c.ids[c.left++] = (int32_t)i;
    return draw(&c, c.left, top_k, top_p, uniform);
}
