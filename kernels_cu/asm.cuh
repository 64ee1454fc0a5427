/* PTX that only the cache kernels use: copies to shared memory, arithmetic on packed halves, transposition. */

/* 16 bytes from global to shared memory, past the registers; shared: an address of shared_address(). */
INLINE void copy_bytes_async(u32 shared, const u8 *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared), "l"(global) : "memory");
}

#if ARCH >= 90
/* True in one lane of the warp. */
INLINE bool elected() {
    u32 yes;
    asm volatile("{\n"
                 ".reg .pred one;\n"
                 "elect.sync _|one, 0xffffffff;\n"
                 "selp.b32 %0, 1, 0, one;\n"
                 "}" : "=r"(yes));
    return yes;
}

/* A copy that one thread starts; its bytes count for the barrier (hopper.cuh). Addresses and bytes: multiples of 16. */
INLINE void copy_bulk(u32 shared, const u8 *global, u32 bytes, u64 *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared), "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
#endif

/* Order what this thread did in shared memory before bulk copies that are started after the next barrier. */
INLINE void fence_bulk() {
#if ARCH >= 90
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
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

INLINE u32 add_half2(u32 a, u32 b) {
    u32 r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

INLINE u32 negative_half2(u32 a) {
    u32 r;
    asm("neg.f16x2 %0, %1;" : "=r"(r) : "r"(a));
    return r;
}

INLINE u32 min_half2(u32 a, u32 b) {
    u32 r;
    asm("min.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

INLINE u32 max_half2(u32 a, u32 b) {
    u32 r;
    asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

/* x of the lane whose number is that of this one's group of WIDTH lanes and, in it, the lowest bits of `lane`. All of a warp. */
template <int WIDTH> INLINE u32 from_lane(u32 x, u32 lane) {
    u32 r;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, %3, -1;" : "=r"(r) : "r"(x), "r"(lane), "n"((WARP - WIDTH) << 8 | 31));
    return r;
}

/* A register with any content: no instruction fills it. */
INLINE u32 any_register() {
    u32 r;
    asm volatile("" : "=r"(r));
    return r;
}

/* Keeps the compiler from working out anything of x earlier than here, to hold it in registers all the while. */
INLINE void forget_origin(u32 &x) { asm volatile("" : "+r"(x)); }

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
