/* Every operation. build.py declares each once per instruction set (FN(embed) -> embed_avx2) to cffi; each isa_*.c
 * includes this file, so that a definition which differs does not compile. Shapes are in runtime/backend.py; letters:
 * T tokens, E hidden, H query heads, G KV heads, D head_dim, S slots, V vocabulary. Python has checked everything. */

int FN(embed)(const int32_t *ids, const matrix *table, float *out, int64_t T);
