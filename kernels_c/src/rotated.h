/* Encoding the rotated formats (runtime.formats.rotated), after which y (C, P) holds the codes. */

static const float K_CLIP[] = {1.0f, 0.85f, 0.7f};
static const float V_CLIP[] = {1.0f, 0.9f, 0.8f, 0.7f, 0.6f, 0.5f, 0.4f};

INLINE vf vf_ceil(vf x) { vf r = vf_round(x); return r + (vf)((vi)vf_set1(1) & (r < x)); }
INLINE vf vf_floor(vf x) { vf r = vf_round(x); return r - (vf)((vi)vf_set1(1) & (r > x)); }
INLINE vf inverse_or_zero(vf s) { return vf_select(s > 0, 1 / s, vf_set1(0)); }

/* The bits of the least BF16 not below x, for x >= 0. */
INLINE uint16_t bf16_up(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0xffff) >> 16;
}

/* Rows of y = formats.rotate of themselves. */
static void rotate_rows(float *y, int64_t C, int64_t D, int64_t P) {
    vf share = vf_set1(1.0f / rotation_block(D));
    for (int64_t t = 0; t < C; t++, y += P) {
        hadamard(y, P, rotation_block(D));
        for (int64_t i = 0; i < P; i += VL) vf_store(y + i, vf_load(y + i) * share);
    }
}

INLINE vf quantize_k(vf y, vf zero, vf inverse, float top) {
    return vf_round(clip((y - zero) * inverse, 0, top)); /* clipping first is the same: both limits are integers */
}

/* scale and zero of VL channels over the tokens of y (C, P), before they are rounded to 8 bits. */
static void fit_k(const float *y, int64_t C, int64_t P, int bits, float *scale, float *zero) {
    float top = (1 << bits) - 1;
    vf low = vf_load(y), high = low, total = low;
    for (int64_t t = 1; t < C; t++) {
        vf a = vf_load(y + t * P);
        low = vf_min(low, a), high = vf_max(high, a), total = total + a;
    }
    vf middle = (low + high) * 0.5f, half = (high - low) * 0.5f, tokens = vf_set1(C), mean = total / tokens;
    if (bits == 8) {
        vf_store(scale, half * (2 / top));
        vf_store(zero, middle - half);
        return;
    }
    vf best = vf_set1(INFINITY), best_scale = middle, best_zero = middle;
    for (int attempt = 0; attempt < 3; attempt++) {
        vf limit = half * K_CLIP[attempt], s = limit * (2 / top), z = middle - limit;
        vf inverse = inverse_or_zero(s), codes = quantize_k(vf_load(y), z, inverse, top);
        for (int64_t t = 1; t < C; t++) codes = codes + quantize_k(vf_load(y + t * P), z, inverse, top);
        vf code_mean = codes / tokens, covariance = vf_set1(0), variance = covariance;
        for (int64_t t = 0; t < C; t++) {
            vf a = vf_load(y + t * P), deviation = quantize_k(a, z, inverse, top) - code_mean;
            covariance = covariance + deviation * (a - mean);
            variance = variance + deviation * deviation;
        }
        s = vf_select(variance > 0, covariance / variance, s);
        z = mean - s * code_mean;
        inverse = inverse_or_zero(s);
        vf error = vf_set1(0);
        for (int64_t t = 0; t < C; t++) {
            vf a = vf_load(y + t * P), e = a - (quantize_k(a, z, inverse, top) * s + z);
            error = error + e * e;
        }
        vi better = error < best;
        best = vf_select(better, error, best);
        best_scale = vf_select(better, s, best_scale), best_zero = vf_select(better, z, best_zero);
    }
    vf_store(scale, best_scale);
    vf_store(zero, best_zero);
}

static void rotated_k(float *y, int bits, int64_t C, int64_t D, int64_t P, uint8_t *meta) {
    float top = (1 << bits) - 1, centre = top * 0.5f;
    float scale[MAX_HEAD_DIM], zero[MAX_HEAD_DIM], inverse[MAX_HEAD_DIM];
    for (int64_t i = 0; i < P; i += VL) fit_k(y + i, C, P, bits, scale + i, zero + i);

    float largest = -INFINITY;
    for (int64_t d = 0; d < D; d++) largest = MAX(largest, scale[d]);
    uint16_t bases[2] = {bf16_up(largest)};
    float step = bf16_value(bases[0]) / 255;
    largest = 0;
    for (int64_t i = 0; i < P; i += VL) {
        vf s = vf_load(scale + i), z = vf_load(zero + i), units = step > 0 ? s / step : vf_set1(0);
        units = clip(units, 0, 255);
        units = bits == 8 ? vf_ceil(units) : vf_round(units);
        vf decoded = units * step;
        z = (z + s * centre) - decoded * centre;
        vf_store(scale + i, units);
        vf_store(zero + i, z);
        vf_store(inverse + i, inverse_or_zero(decoded));
    }
    for (int64_t d = 0; d < D; d++) largest = MAX(largest, fabsf(zero[d]));
    bases[1] = bf16_up(largest);
    step = bf16_value(bases[1]) / 127;
    for (int64_t i = 0; i < P; i += VL) {
        vf units = step > 0 ? vf_load(zero + i) / step : vf_set1(0);
        vf_store(zero + i, vf_round(clip(units, -127, 127)));
    }
    for (int64_t d = 0; d < D; d++) meta[d] = scale[d], meta[D + d] = (int8_t)zero[d];
    memcpy(meta + 2 * D, bases, 4);

    for (int64_t t = 0; t < C; t++, y += P)
        for (int64_t i = 0; i < P; i += VL)
            vf_store(y + i, quantize_k(vf_load(y + i), vf_load(zero + i) * step, vf_load(inverse + i), top));
}

INLINE vf quantize_v(vf y, float inverse, float half, float top) { return clip(vf_floor(y * inverse) + half, 0, top); }

/* The squared error of one token, summed as formats._sum_channels does. */
INLINE float error_v(const float *y, int64_t D, int64_t P, float s, float inverse, float half, float top) {
    vf squares[MAX_HEAD_DIM / VL];
    int64_t n = 0;
    for (; n * VL < P; n++) {
        vf a = vf_load(y + n * VL), e = a - (quantize_v(a, inverse, half, top) - top * 0.5f) * s;
        squares[n] = e * e;
        if (n * VL + VL > D) squares[n] = (vf)((vi)squares[n] & (vi_iota() < (int32_t)(D - n * VL)));
    }
    for (; n & (n - 1); n++) squares[n] = vf_set1(0);
    for (n /= 2; n; n /= 2)
        for (int64_t i = 0; i < n; i++) squares[i] = squares[i] + squares[i + n];
    return vf_sum(squares[0]);
}

static void rotated_v(float *y, int bits, int64_t C, int64_t D, int64_t P, uint8_t *meta) {
    float top = (1 << bits) - 1, half = 1 << (bits - 1);
    for (int64_t t = 0; t < C; t++) {
        float *row = y + t * P;
        vf largest = vf_set1(0);
        for (int64_t i = 0; i < P; i += VL) largest = vf_max(largest, (vf)((vi)vf_load(row + i) & 0x7fffffff));
        float limit = vf_hmax(largest), best = INFINITY, best_inverse = 0;
        for (int attempt = 0; attempt < (bits == 8 ? 1 : 7); attempt++) {
            uint16_t s = bf16_up(limit * V_CLIP[attempt] * (2 / top));
            float scale = bf16_value(s), inverse = scale > 0 ? 1 / scale : 0;
            float error = bits == 8 ? 0 : error_v(row, D, P, scale, inverse, half, top);
            if (attempt == 0 || error < best) {
                best = error, best_inverse = inverse;
                memcpy(meta + 2 * t, &s, 2);
            }
        }
        for (int64_t i = 0; i < P; i += VL) vf_store(row + i, quantize_v(vf_load(row + i), best_inverse, half, top));
    }
}
