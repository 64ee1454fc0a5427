/* Hopper's asynchronous instructions (sm_90a): barriers in shared memory, tensor copies, products of a warpgroup. */

/* --- barriers ------------------------------------------------------------------------------------------------ */
/* A phase of a barrier ends when `arrivals` have come, and the bytes that were announced with them. */
INLINE void barrier_create(u64 *barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/* After the barriers' creation, before anyone uses them. All threads. */
INLINE void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
}

INLINE void barrier_arrive(u64 *barrier) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(shared_address(barrier)) : "memory");
}

INLINE void barrier_arrive_expecting(u64 *barrier, u32 bytes) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}"
                 ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

/* Wait for the end of a phase: parity 0 of the first, third, ... 1 of the second, ... and of the one before the first. */
INLINE void barrier_wait(u64 *barrier, u32 parity) {
    asm volatile("{.reg .pred done;"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
                 "@!done bra again;}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

/* Numbered meeting points of `threads` threads, 1 to 15: wait for the others, or let them go on without waiting. */
template <int threads> INLINE void meet(i32 point) { asm volatile("bar.sync %0, %1;" ::"r"(point), "n"(threads) : "memory"); }
template <int threads> INLINE void meet_later(i32 point) {
    asm volatile("bar.arrive %0, %1;" ::"r"(point), "n"(threads) : "memory");
}

/* --- tensor copies ------------------------------------------------------------------------------------------- */
/* CUtensorMap of the driver's API; a kernel takes it by value, as const __grid_constant__. */
struct __align__(64) TensorMap {
    u64 opaque[16];
};

/* The map's box at (x, y, z) to shared memory; its bytes count for the barrier. Zeros outside the tensor. */
INLINE void copy_box(u16 *shared, const TensorMap *map, i32 x, i32 y, i32 z, u64 *barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                 ::"r"(shared_address(shared)), "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)) : "memory");
}

/* --- registers of a warpgroup -------------------------------------------------------------------------------- */
template <int registers> INLINE void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)); }
template <int registers> INLINE void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)); }

/* --- products of a warpgroup --------------------------------------------------------------------------------- */
/* A matrix of halves in shared memory: blocks of 64 columns, rows of 128 bytes, the 16-byte parts of row r exchanged by
 * part ^= r % 8 (128-byte swizzle). block: bytes from one block of 64 columns to the next, where an operand has several. */
INLINE u64 descriptor(const u16 *shared, u32 block) {
    return (u64)(shared_address(shared) >> 4 & 0x3fff) | (u64)(block >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

#define FLOATS8(c, i)                                                                                                   \
    "+f"((c)[i]), "+f"((c)[i + 1]), "+f"((c)[i + 2]), "+f"((c)[i + 3]), "+f"((c)[i + 4]), "+f"((c)[i + 5]),             \
        "+f"((c)[i + 6]), "+f"((c)[i + 7])

/* c (64 x 64) = or += a (64 x 16, this thread's share, in registers) * b (16 x 64, in shared memory), not waited for.
 * transposed: b's rows in shared memory are its rows; else its columns are. Thread t of the warpgroup holds of c rows
 * 16 * (t / 32) + t % 32 / 4 and 8 further, of each eight columns 2 * (t % 4) and the next. */
template <bool transposed> INLINE void warpgroup_mma(float (&c)[32], const u32 (&a)[4], u64 b, bool add) {
    asm volatile("{.reg .pred add; setp.ne.b32 add, %37, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38;}"
                 : FLOATS8(c, 0), FLOATS8(c, 8), FLOATS8(c, 16), FLOATS8(c, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((i32)add), "n"(transposed));
}

/* The same with 128 columns. */
template <bool transposed> INLINE void warpgroup_mma(float (&c)[64], const u32 (&a)[4], u64 b, bool add) {
    asm volatile("{.reg .pred add; setp.ne.b32 add, %69, 0;"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, add, 1, 1, %70;}"
                 : FLOATS8(c, 0), FLOATS8(c, 8), FLOATS8(c, 16), FLOATS8(c, 24), FLOATS8(c, 32), FLOATS8(c, 40),
                   FLOATS8(c, 48), FLOATS8(c, 56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((i32)add), "n"(transposed));
}

INLINE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/* Wait until at most `pending` of the warpgroup's latest groups of products are under way. */
template <int pending> INLINE void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* The compiler must not move uses of c across this point: the tensor cores read or write it unseen. */
template <int n> INLINE void pin(float (&c)[n]) {
#pragma unroll
    for (i32 i = 0; i < n; i++) asm volatile("" : "+f"(c[i])::"memory");
}
