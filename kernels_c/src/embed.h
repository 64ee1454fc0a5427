/* Rows of the embedding table as float32. */

int FN(embed)(const int32_t *ids, const matrix *table, float *out, int64_t T) {
    int64_t E = table->cols;
    for (int64_t t = 0; t < T; t++, out += E) {
        if (ids[t] < 0 || ids[t] >= table->rows) return BAD_INDEX;
        const void *row = matrix_row(table, ids[t]);
        int64_t i = 0;
        for (; i + VL <= E; i += VL) vf_store(out + i, vf_weights(row, i, table->dtype));
        for (; i < E; i++) out[i] = weight(row, i, table->dtype);
    }
    return OK;
}
