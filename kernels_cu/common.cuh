/* Types, conversions, loads, reductions and matrix instructions that every kernel shares. No CUDA header is included:
 * halves travel as unsigned short and are converted by PTX, so that NVRTC needs nothing but this text. */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed int i32;
typedef signed long long i64;

#define INLINE __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define FULL 0xffffffffu
#define WARP 32
#define INFINITE __int_as_float(0x7f800000)

/* --- halves and bfloat16 ------------------------------------------------------------------------------------- */
INLINE float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

INLINE u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

/* Two floats to packed halves, the first in the low 16 bits. */
INLINE u32 pack_half2(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

INLINE u32 pack_bf162(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

INLINE float2 unpack_half2(u32 h) { return make_float2(half_to_float((u16)h), half_to_float((u16)(h >> 16))); }

INLINE float2 unpack_bf162(u32 b) { return make_float2(__uint_as_float(b << 16), __uint_as_float(b & 0xffff0000u)); }

/* The finite range of FP16; NaN becomes -65504, as on the CPU. */
INLINE float clamp_half(float x) { return fminf(fmaxf(x, -65504.f), 65504.f); }

/* --- memory -------------------------------------------------------------------------------------------------- */
/* 16 bytes that are read once: past L1, and first to leave L2. */
INLINE uint4 load_stream(const void *p) {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
    return r;
}

INLINE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

/* 16 bytes from global to shared memory, past the registers; zeros where `valid` is false (nothing is read then). */
INLINE void copy_async(void *shared, const void *global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

INLINE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Wait until at most `pending` of this thread's latest groups are still under way. */
template <int pending> INLINE void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory"); }

/* --- one kernel after the other -------------------------------------------------------------------------------- */
/* A kernel that calls wait_for_predecessor() is launched early (build.py): its blocks start as soon as every block of
 * the kernel before has called start_successor() or ended. Before it has waited, a thread may read only what no kernel
 * writes (weights), and must write nothing that others see. Every path waits: a kernel that did not would end before
 * its predecessors, and its successors would take that for their end too. */
INLINE void wait_for_predecessor() {
#if ARCH >= 90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

INLINE void start_successor() {
#if ARCH >= 90
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* --- reductions, in a fixed order ------------------------------------------------------------------------------ */
INLINE float warp_sum(float x) {
    for (int lane = WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(FULL, x, lane);
    return x;
}

INLINE float warp_max(float x) {
    for (int lane = WARP / 2; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, lane));
    return x;
}

/* Sum over the block, in every thread; scratch: one float per warp. All threads must call it. */
INLINE float block_sum(float x, float *scratch) {
    const int warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads(); /* scratch may still be read from the call before */
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < warps; warp++) sum += scratch[warp];
    return sum;
}

/* --- matrix instructions --------------------------------------------------------------------------------------- */
/* Four 8x8 matrices of 16-bit values from shared memory; lane i passes the address of row i % 8 of matrix i / 8. */
INLINE void load_matrix(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

INLINE void load_matrix_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

/* c (16x8, FP32) += a (16x16) * b (16x8), FP16. Lane l holds of c: rows l/4 and l/4 + 8, columns 2 * (l%4) + {0, 1}. */
INLINE void mma_half(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

INLINE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
