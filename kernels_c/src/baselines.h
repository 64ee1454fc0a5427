/* Encoding the formats of published methods (runtime.formats: kivi, atom, kvquant), after which y (C, P) holds the codes.
 * Every float operation is the reference's, in its order; what it rounds to FP16 is rounded here too.
 *
 * Metadata, FP16 where nothing else is said. kivi: K scales[D], zeros[D]; V scales[groups][C], zeros[groups][C].
 * atom: scales[C], zero points[C]. kvquant, of V and for all KV heads at once (region.shared): centres[C], halves[C];
 * and each block's own outliers: u16 kept, u16 without a place, then pairs (u16 token * D + channel, value). */

/* Outliers that a block has room for: runtime.formats.kvquant. */
INLINE int64_t sparse_capacity(int64_t C, int64_t D) { return (C * D + 79) / 80; }

INLINE vf as_half(vf x) { return vf_from_half(vf_to_half(x)); }

static void store_halves(uint8_t *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        vh halves = vf_to_half(vf_load(from + i));
        memcpy(to + 2 * i, &halves, 2 * MIN(VL, n - i));
    }
}

/* K as it was before RoPE: rows of y turned back; cos, sin (C, D / 2) of their positions. */
static void turn_back(float *y, const float *cos, const float *sin, int64_t C, int64_t D, int64_t P) {
    int64_t half = D / 2;
    for (int64_t t = 0; t < C; t++, y += P, cos += half, sin += half) {
        int64_t i = 0;
        for (; i + VL <= half; i += VL) {
            vf a = vf_load(y + i), b = vf_load(y + half + i), c = vf_load(cos + i), s = vf_load(sin + i);
            vf_store(y + i, a * c + b * s);
            vf_store(y + half + i, b * c - a * s);
        }
        for (; i < half; i++) {
            float a = y[i], b = y[half + i];
            y[i] = a * cos[i] + b * sin[i];
            y[half + i] = b * cos[i] - a * sin[i];
        }
        for (i = D; i < P; i++) y[i] = y[D - 1];
    }
}

/* kivi: per channel over the tokens. */
static void kivi_k(float *y, int bits, int64_t C, int64_t D, int64_t P, uint8_t *meta) {
    float top = (1 << bits) - 1, scales[MAX_HEAD_DIM], zeros[MAX_HEAD_DIM];
    for (int64_t i = 0; i < P; i += VL) {
        vf low = vf_load(y + i), high = low;
        for (int64_t t = 1; t < C; t++) low = vf_min(low, vf_load(y + t * P + i)), high = vf_max(high, vf_load(y + t * P + i));
        vf scale = as_half((high - low) / top), zero = as_half(low + 0);
        for (float *x = y + i; x < y + C * P; x += P) {
            vf code = clip(vf_round((vf_load(x) - zero) / scale), 0, top);
            vf_store(x, vf_select(scale > 0, code, vf_set1(0)));
        }
        vf_store(scales + i, scale);
        vf_store(zeros + i, zero);
    }
    store_halves(meta, scales, D);
    store_halves(meta + 2 * D, zeros, D);
}

/* Least and largest of x (n,), n a multiple of VL. */
INLINE void extremes(const float *x, int64_t n, float *low, float *high) {
    vf least = vf_load(x), most = least;
    for (int64_t i = VL; i < n; i += VL) least = vf_min(least, vf_load(x + i)), most = vf_max(most, vf_load(x + i));
    *low = -vf_hmax(-least), *high = vf_hmax(most);
}

/* kivi: per token over groups of channels. */
static void kivi_v(float *y, int bits, int64_t C, int64_t D, int64_t P, uint8_t *meta) {
    int64_t groups = (D + KIVI_GROUP - 1) / KIVI_GROUP;
    float top = (1 << bits) - 1, scales[MAX_CHUNK], zeros[MAX_CHUNK];
    for (int64_t g = 0; g < groups; g++, meta += 2 * C) {
        int64_t n = MIN(KIVI_GROUP, P - g * KIVI_GROUP);
        for (int64_t t = 0; t < C; t++) {
            float *x = y + t * P + g * KIVI_GROUP, low, high;
            extremes(x, n, &low, &high);
            vf scale = as_half(vf_set1((high - low) / top)), zero = as_half(vf_set1(low + 0));
            for (int64_t i = 0; i < n; i += VL) {
                vf code = clip(vf_round((vf_load(x + i) - zero) / scale), 0, top);
                vf_store(x + i, vf_select(scale > 0, code, vf_set1(0)));
            }
            scales[t] = scale[0], zeros[t] = zero[0];
        }
        store_halves(meta, scales, C);
        store_halves(meta + 2 * groups * C, zeros, C);
    }
}

/* atom, K and V: per token over the head, with a whole zero point. */
static void atom(float *y, int64_t C, int64_t P, uint8_t *meta) {
    float scales[MAX_CHUNK], zeros[MAX_CHUNK];
    for (int64_t t = 0; t < C; t++, y += P) {
        float low, high;
        extremes(y, P, &low, &high);
        vf scale = as_half(vf_set1(MAX(high - low, 1e-5f) / 15));
        vf zero = clip(vf_round(vf_set1(-low) / scale), 0, 15) + 0;
        for (int64_t i = 0; i < P; i += VL) vf_store(y + i, clip(vf_round(vf_load(y + i) / scale) + zero, 0, 15));
        scales[t] = scale[0], zeros[t] = zero[0];
    }
    store_halves(meta, scales, C);
    store_halves(meta + 2 * C, zeros, C);
}

/* What kvquant does with the values of one block. K: thresholds per channel, of the calibration; V: per token. */
typedef struct {
    const float *levels;         /* (2^bits,) */
    const float *centres, *halves; /* (D,) or (C,) */
    const float *lows, *highs;   /* V: outside these lie a token's outliers */
} nonuniform;

INLINE void kvquant(float *y, const nonuniform *u, int bits, int64_t C, int64_t D, int64_t P, uint8_t *meta,
                    const bool per_token) {
    int64_t kept = 0, overflowed = 0, capacity = sparse_capacity(C, D);
    vf middles[15];
    for (int i = 0; i + 1 < 1 << bits; i++) middles[i] = vf_set1((u->levels[i] + u->levels[i + 1]) * .5f);
    memset(meta, 0, 4 + 4 * capacity);
    for (int64_t t = 0; t < C; t++, y += P)
        for (int64_t i = 0; i < P; i += VL) {
            vf x = vf_load(y + i), centre = per_token ? vf_set1(u->centres[t]) : vf_load(u->centres + i);
            vf half = per_token ? vf_set1(u->halves[t]) : vf_load(u->halves + i);
            vf share = vf_select(half > 0, (x - centre) / half, vf_set1(0));
            vi outlier = per_token ? (x > vf_set1(u->highs[t])) | (x < vf_set1(u->lows[t]))
                                   : (vf)((vi)share & 0x7fffffff) > vf_set1(1);
            outlier &= vi_iota() < (int32_t)MIN(D - i, VL);
            vi code = {0};
            for (int m = 0; m + 1 < 1 << bits; m++) code -= middles[m] < share;
            vf_store(y + i, __builtin_convertvector(code, vf));
            if (!vf_any(outlier)) continue;
            vh values = vf_to_half(clip(x, -65504, 65504)); /* K before RoPE may exceed FP16 */
            for (int lane = 0; lane < VL; lane++) {
                if (!outlier[lane]) continue;
                uint16_t entry[2] = {t * D + i + lane, values[lane]};
                if (kept == capacity) overflowed++;
                else memcpy(meta + 4 + 4 * kept++, entry, 4);
            }
        }
    uint16_t counts[2] = {kept, overflowed};
    memcpy(meta, counts, 4);
}

/* Put x in its place among the n largest so far, in descending order. */
INLINE void insert(float *largest, int64_t n, float x) {
    int64_t i = n - 1;
    for (; i > 0 && largest[i - 1] < x; i--) largest[i] = largest[i - 1];
    largest[i] = x;
}

/* How many values of a token are beyond each of its two thresholds at most, of n. */
INLINE int64_t kvquant_beyond(int64_t n) { return MAX(1, (n + 100) / 200); }

/* The (k + 1)-th least and largest of one token's values over G heads `stride` apart. work: 2 * (k + 1) floats. */
static void thresholds(const uint16_t *x, int64_t stride, int64_t G, int64_t D, float *work, float *low, float *high) {
    int64_t n = kvquant_beyond(G * D) + 1;
    float *most = work, *least = work + n; /* of the values, and of their negatives */
    for (int64_t i = 0; i < 2 * n; i++) work[i] = -INFINITY;
    for (int64_t g = 0; g < G; g++, x += stride)
        for (int64_t i = 0; i < D; i += VL) {
            uint16_t lanes[VL] = {0};
            if (i + VL > D) memcpy(lanes, x + i, 2 * (D - i));
            vf a = vf_from_half(vh_load(i + VL > D ? lanes : x + i));
            if (!vf_any((a > vf_set1(most[n - 1])) | (-a > vf_set1(least[n - 1])))) continue;
            for (int64_t lane = 0; lane < MIN(VL, D - i); lane++) {
                if (a[lane] > most[n - 1]) insert(most, n, a[lane]);
                if (-a[lane] > least[n - 1]) insert(least, n, -a[lane]);
            }
        }
    *low = -least[n - 1] + 0, *high = most[n - 1] + 0; /* never -0 */
}
