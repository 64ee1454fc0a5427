/* RMSNorm: out[t] = weight * x[t] / sqrt(mean(x[t]^2) + eps), in float32. */

static void rms_norm(const float *x, const float *weight_E, float eps, float *out, int64_t T, int64_t E) {
    for (int64_t t = 0; t < T; t++, x += E, out += E) {
        vf squares = {0};
        float rest = 0;
        int64_t i = 0;
        for (; i + VL <= E; i += VL) {
            vf v = vf_load(x + i);
            squares = vf_fma(v, v, squares);
        }
        for (; i < E; i++) rest += x[i] * x[i];
        float scale = 1 / sqrtf((vf_sum(squares) + rest) / (float)E + eps);
        for (i = 0; i + VL <= E; i += VL) vf_store(out + i, vf_load(weight_E + i) * (vf_load(x + i) * scale));
        for (; i < E; i++) out[i] = weight_E[i] * (x[i] * scale);
    }
}
