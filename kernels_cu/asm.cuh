/* PTX that only the cache kernels use: small asynchronous copies, arithmetic on packed halves, transposition. */

/* BYTES (4, 8 or 16) from global to shared memory, past the registers; shared: an address of shared_address(). */
template <int BYTES> INLINE void copy_bytes_async(u32 shared, const u8 *global) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared), "l"(global) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(shared), "l"(global), "n"(BYTES) : "memory");
}

/* The same, or zeros where `valid` is false; then nothing is read. */
template <int BYTES> INLINE void copy_bytes_async(u32 shared, const u8 *global, bool valid) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(shared), "l"(global), "n"(BYTES), "r"(valid ? BYTES : 0) : "memory");
}

/* a * b + c of two packed halves, rounded once. */
INLINE u32 fma_half2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

INLINE u32 mul_half2(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

/* The transpose of an 8x8 matrix of halves; lane l holds row l / 4, columns 2 * (l % 4) + {0, 1}. */
INLINE u32 transpose(u32 a) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
    return r;
}

/* 2^x, to two units in the last place; 0 for -infinity. */
INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
