/* The register-blocked product behind every matrix-matrix operation, and the transposition that feeds it. */

#if defined(ISA_AVX512)
#define MR 12 /* rows of a tile, at most VL: MR * NV accumulators, NV columns and a broadcast fill the registers */
#elif defined(ISA_AVX2)
#define MR 6
#else
#define MR 4
#endif
#define NV 2 /* vectors across a tile */
#define NR (NV * VL)

/* C (MR, nv * VL) = or += A (MR, depth) B (depth, nv * VL). A[r][k] lies at a[r * a_row + k * a_step], B[k] at
 * b[k * b_step], C[r] at c[r * c_row]. The strides and nv should be constants where this is inlined. The product is
 * summed before it is added to C: over thousands of keys one long chain of additions would drift. */
INLINE void micro(int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step,
                  float *c, int64_t c_row, const int nv, bool add) {
    vf acc[MR][NV];
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < nv; v++) acc[r][v] = (vf){0};
    for (int64_t k = 0; k < depth; k++, a += a_step, b += b_step) {
        vf column[NV];
        for (int v = 0; v < nv; v++) column[v] = vf_load(b + v * VL);
        for (int r = 0; r < MR; r++) {
            vf row = vf_set1(a[r * a_row]);
            for (int v = 0; v < nv; v++) acc[r][v] = vf_fma(row, column[v], acc[r][v]);
        }
    }
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < nv; v++) {
            float *out = c + r * c_row + v * VL;
            vf_store(out, add ? vf_load(out) + acc[r][v] : acc[r][v]);
        }
}

/* Lanes of the two vectors that exchange blocks of s lanes between rows i and i + s. */
#define LOW(j, s) ((j) & (s) ? VL + (j) - (s) : (j))
#define HIGH(j, s) ((j) & (s) ? VL + (j) : (j) + (s))
#define LANES4(f, j, s) f(j, s), f(j + 1, s), f(j + 2, s), f(j + 3, s)
#define LANES8(f, j, s) LANES4(f, j, s), LANES4(f, j + 4, s)
#if VL == 16
#define LANES(f, s) LANES8(f, 0, s), LANES8(f, 8, s)
#elif VL == 8
#define LANES(f, s) LANES8(f, 0, s)
#else
#define LANES(f, s) LANES4(f, 0, s)
#endif
#define EXCHANGE(rows, s)                                                                      \
    for (int i = 0; i < VL; i++) {                                                             \
        if (i & (s)) continue;                                                                 \
        vf low = rows[i], high = rows[i + (s)];                                                \
        rows[i] = __builtin_shufflevector(low, high, LANES(LOW, s));                           \
        rows[i + (s)] = __builtin_shufflevector(low, high, LANES(HIGH, s));                    \
    }

/* A VL x VL block in registers: rows become columns. */
INLINE void transpose(vf rows[VL]) {
    EXCHANGE(rows, 1)
    EXCHANGE(rows, 2)
#if VL >= 8
    EXCHANGE(rows, 4)
#endif
#if VL >= 16
    EXCHANGE(rows, 8)
#endif
}

/* out[k * step + r] = row r's element first + k, for r < n_rows <= VL (zero beyond, up to VL) and k < depth. Rows lie
 * `pitch` elements apart. Each k writes VL floats; with step < VL the surplus is overwritten by the next k, and the last
 * one's surplus of VL - step floats must be the caller's to lose. */
INLINE void pack_transposed(const void *rows, int64_t pitch, int n_rows, int dtype, int64_t first, int64_t depth,
                            float *out, int64_t step) {
    const int64_t size = dtype == F32 ? 4 : 2;
    int64_t k = 0;
    for (; k + VL <= depth; k += VL) {
        vf block[VL];
        for (int r = 0; r < VL; r++)
            block[r] = r < n_rows ? vf_weights((const char *)rows + r * pitch * size, first + k, dtype) : (vf){0};
        transpose(block);
        for (int j = 0; j < VL; j++) vf_store(out + (k + j) * step, block[j]);
    }
    for (; k < depth; k++)
        for (int r = 0; r < MIN(step, VL); r++)
            out[k * step + r] = r < n_rows ? weight((const char *)rows + r * pitch * size, first + k, dtype) : 0;
}
