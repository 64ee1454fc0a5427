/* Every operation. build.py declares each once per instruction set (FN(embed) -> embed_avx2) to cffi; each isa_*.c
 * includes this file, so that a definition which differs does not compile. Shapes are in runtime/backend.py; letters:
 * B sequences, T tokens, E hidden, H query heads, G KV heads, D head_dim, S slots, V vocabulary. Python has checked everything. */

int FN(embed)(const int32_t *ids, const matrix *table, float *out, int64_t T);
int FN(linear_add)(const float *h, const matrix *weight, const float *bias, float *x, int64_t T);
int FN(gate_up)(const float *x, const float *norm, float eps, const matrix *gate, const matrix *up,
                const float *gate_bias, const float *up_bias, float *out, int64_t T);
int FN(logits)(const float *x, const float *norm, float eps, const matrix *head, float *out, int64_t T);
int FN(qkv)(const float *x, const float *norm, float eps, const matrix *wq, const matrix *wk, const matrix *wv,
            const float *bq, const float *bk, const float *bv, const float *cos, const float *sin, int64_t P,
            const int32_t *positions, const int32_t *slots, int64_t H, int64_t G, int64_t D, int64_t S, float *q,
            uint16_t *k, uint16_t *v, int64_t T);
int FN(prefill_attention)(const float *q, const uint16_t *k, const uint16_t *v, float *out, int64_t T, int64_t H,
                          int64_t G, int64_t D, int64_t S, int64_t start, int64_t window);
int FN(attention_mass)(const float *q, const uint16_t *k, float *out, int64_t T, int64_t H, int64_t G, int64_t D,
                       int64_t S, int64_t start, int64_t window, int64_t first, int64_t chunk, int64_t N);

int FN(encoder_embed)(const int32_t *ids, const int32_t *positions, const matrix *words, const float *places, int64_t P,
                      const float *norm, const float *norm_bias, float eps, float *out, int64_t T);
int FN(encoder_attention)(const float *x, const matrix *wq, const matrix *wk, const matrix *wv, const float *bias,
                          const int32_t *starts, int64_t B, int64_t H, float *out, int64_t T);
int FN(encoder_add)(const float *h, const matrix *weight, const float *bias, const float *norm, const float *norm_bias,
                    float eps, float *x, int64_t T);
int FN(encoder_gelu)(const float *x, const matrix *weight, const float *bias, float *out, int64_t T);
int FN(encoder_pool)(const float *x, const int32_t *starts, int64_t B, int64_t E, int64_t T, int32_t mean, float *out);

int FN(sample)(const float *logits, int64_t V, float temperature, int64_t top_k, float top_p, float min_p,
               float penalty, const int32_t *seen, int64_t n_seen, double uniform);

int FN(pack)(const uint16_t *k, const uint16_t *v, const span *to, const int32_t *starts, const int32_t *positions,
             const format_data *data, int64_t S, int64_t G, int64_t D, int64_t C);
int FN(append)(const uint16_t *k, const uint16_t *v, const cache *const *caches, const int32_t *state, int64_t B);
int FN(decode_attention)(const float *q, const cache *const *caches, const int32_t *state, float *out, int64_t B);
