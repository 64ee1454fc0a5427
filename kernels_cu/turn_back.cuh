/* A chunk's rows of FP16 to floats in shared memory, K's perhaps as they were before RoPE. */

/* x (CHUNK, D) to y (CHUNK, STRIDE). back: each row is turned by its position's angle, position, position + 1, ..., the
 * other way; cos, sin (P, D / 2). All threads call it. */
INLINE void load_rows(const u16 *x, float *y, bool back, i32 position, const float *cos, const float *sin) {
    for (i32 i = threadIdx.x; i < CHUNK * (D / 2); i += THREADS) {
        const i32 token = i / (D / 2), d = i % (D / 2);
        const float a = half_to_float(x[token * D + d]), b = half_to_float(x[token * D + D / 2 + d]);
        float *const to = y + token * STRIDE + d;
        if (back) {
            const i64 at = (i64)(position + token) * (D / 2) + d;
            to[0] = add(mul(a, cos[at]), mul(b, sin[at]));
            to[D / 2] = sub(mul(b, cos[at]), mul(a, sin[at]));
        } else
            to[0] = a, to[D / 2] = b;
    }
    __syncthreads();
}
