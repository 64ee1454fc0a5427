/* Prefill attention on Hopper's warpgroup instructions (sm_90a), for D = 64 and 128; otherwise as prefill_attention.cu.
 *
 * Each of the block's two warpgroups owns 64 queries, held in registers. Step j computes the scores of its KEYS keys and,
 * while these become probabilities, the product of the probabilities of step j - 1 with their V; the warpgroups take turns
 * at starting, so that one multiplies while the other exponentiates (the order of FlashAttention-3, Shah et al. 2024,
 * section 3). K and V lie in shared memory as the instructions want them: blocks of 64 channels, rows of 128 bytes, the
 * 16-byte parts of row r exchanged by part ^= r % 8. A slot of the ring holds K of step j and V of step j - 1. */
#include "common.cuh"

#define GROUP_THREADS 128
#define THREADS (2 * GROUP_THREADS)
#define GROUP_ROWS 64
#define ROWS (2 * GROUP_ROWS)
#define BUFFER (KEYS * D) /* halves */
#define LOG2_E 1.44269504f
#define NO_MAXIMUM -1e30f /* finite, so that subtracting it from a masked score is not NaN */

/* c (64 x 64) = or += a (64 x 16, this thread's share, in registers) * b (16 x 64, in shared memory), not waited for. */
template <bool transposed> INLINE void wgmma(float (&c)[32], const u32 (&a)[4], u64 b, bool add) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %37, 0;"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
          "%0, %1, %2, %3, %4, %5, %6, %7, "
          "%8, %9, %10, %11, %12, %13, %14, %15, "
          "%16, %17, %18, %19, %20, %21, %22, %23, "
          "%24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]),
          "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
          "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]),
          "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]),
          "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((i32)add), "n"(transposed));
}

INLINE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> INLINE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

/* The compiler must not move uses of c across this point: the tensor cores read or write it unseen. */
template <int n> INLINE void pin(float (&c)[n][32]) {
#pragma unroll
    for (i32 i = 0; i < n; i++)
#pragma unroll
        for (i32 j = 0; j < 32; j++) asm volatile("" : "+f"(c[i][j])::"memory");
}

/* A matrix in shared memory, 128-byte swizzle, 1024 bytes from one group of eight rows to the next. */
INLINE u64 descriptor(const u16 *shared) {
    return (u64)(shared_address(shared) >> 4 & 0x3fff) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

/* 2^x, to two units in the last place; 0 for -infinity. */
INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* KEYS rows of K or V from row `first` on, zeros from row `end` on (0 * V must stay 0). */
INLINE void load_rows(u16 *shared, const u16 *global, i32 first, i32 end) {
#pragma unroll
    for (i32 i = 0; i < KEYS * (D / 8) / THREADS; i++) {
        const i32 at = i * THREADS + threadIdx.x, row = at / (D / 8), part = at % (D / 8);
        const bool valid = first + row < end;
        u16 *to = shared + part / 8 * (KEYS * 64) + row * 64 + (part % 8 ^ row % 8) * 8;
        copy_async(to, global + (i64)(valid ? first + row : 0) * D + part * 8, valid);
    }
}

typedef float Scores[KEYS / 64][32];
typedef u32 Probabilities[KEYS / 16][4];
typedef float Output[D / 64][32];

INLINE void start_scores(Scores &s, const u32 (&q)[D / 16][4], const u16 *k) {
#pragma unroll
    for (i32 d = 0; d < D; d += 16)
#pragma unroll
        for (i32 n = 0; n < KEYS / 64; n++)
            wgmma<false>(s[n], q[d / 16], descriptor(k + d / 64 * (KEYS * 64) + n * 64 * 64 + d % 64), d > 0);
    wgmma_commit();
}

INLINE void start_values(Output &o, const Probabilities &p, const u16 *v) {
#pragma unroll
    for (i32 key = 0; key < KEYS; key += 16)
#pragma unroll
        for (i32 n = 0; n < D / 64; n++)
            wgmma<true>(o[n], p[key / 16], descriptor(v + n * (KEYS * 64) + key * 64), true);
    wgmma_commit();
}

/* Number i of a thread's scores: its row is `row` or row + 8, its key key + .. */
INLINE void mask(Scores &s, i32 row, i32 key, i32 window) {
#pragma unroll
    for (i32 i = 0; i < KEYS / 2; i++) {
        const i32 age = row + i / 2 % 2 * 8 - (key + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2);
        if (age < 0 || age >= window) s[i / 32][i % 32] = -INFINITE;
    }
}

/* Scores to probabilities relative to the new running maximum; rescale: what the sums so far have to be multiplied by. */
INLINE void softmax(Scores &s, float (&maximum)[2], float (&sum)[2], float (&rescale)[2]) {
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        float top = maximum[half], part = 0;
#pragma unroll
        for (i32 i = 2 * half; i < KEYS / 2; i += 4) top = fmaxf(top, fmaxf(s[i / 32][i % 32], s[i / 32][i % 32 + 1]));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
        rescale[half] = exp2_fast(maximum[half] - top);
        maximum[half] = top;
#pragma unroll
        for (i32 i = 2 * half; i < KEYS / 2; i += 4) {
            s[i / 32][i % 32] = exp2_fast(s[i / 32][i % 32] - top);
            s[i / 32][i % 32 + 1] = exp2_fast(s[i / 32][i % 32 + 1] - top);
            part += s[i / 32][i % 32] + s[i / 32][i % 32 + 1];
        }
        sum[half] = sum[half] * rescale[half] + part;
    }
}

/* Probabilities in FP16, as operands of the product with V. */
INLINE void pack(const Scores &s, Probabilities &p) {
#pragma unroll
    for (i32 i = 0; i < KEYS / 2; i += 2) p[i / 8][i / 2 % 4] = pack_half2(s[i / 32][i % 32], s[i / 32][i % 32 + 1]);
}

/* The ring: barrier j says that every thread's copies for step j are there, and that every thread has left step j - 2. */
struct Ring {
    u64 *barriers; /* (SLOTS,) */

    INLINE void create() const {
        if (threadIdx.x < SLOTS)
            asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barriers + threadIdx.x)), "n"(THREADS)
                         : "memory");
        __syncthreads();
    }

    /* All copies of this thread are there, visible to the tensor cores too: say so for step j. */
    template <int pending> INLINE void arrive(i32 j) const {
        copy_wait<pending>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(barriers + j % SLOTS))
                     : "memory");
    }

    INLINE void wait(i32 j) const {
        asm volatile(
            "{.reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra again;}"
            ::"r"(shared_address(barriers + j % SLOTS)), "r"(j / SLOTS % 2) : "memory");
    }
};

/* Whose turn it is to start products: a warpgroup waits for the other's word, which has number 1 + its own. */
INLINE void take_turn(i32 group) { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(THREADS) : "memory"); }
INLINE void give_turn(i32 group) { asm volatile("bar.arrive %0, %1;" ::"r"(2 - group), "n"(THREADS) : "memory"); }

KERNEL __launch_bounds__(THREADS, 1)
    prefill_attention(const float *q, const u16 *k, const u16 *v, float *out, i32 T, i32 H, i32 G, i32 S, i32 start,
                      i32 window) {
    extern __shared__ __align__(1024) u16 shared[]; /* (SLOTS, K and V, BUFFER) */
    __shared__ u64 barriers[SLOTS];
    const Ring ring = {barriers};
    const i32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const i32 head = blockIdx.x, row0 = (gridDim.y - 1 - blockIdx.y) * ROWS; /* the longest rows first */
    const i32 end = start + min(row0 + ROWS, T);                             /* keys that any row of the block sees */
    const i32 begin = max(0, start + row0 - window + 1) / KEYS * KEYS, steps = (end - begin + KEYS - 1) / KEYS;
    const i32 my_row = row0 + warp * 16 + lane / 4;
    const i32 group = warp / 4, first = start + row0 + group * GROUP_ROWS, last = first + GROUP_ROWS - 1;
    k += (i64)(head / (H / G)) * S * D;
    v += (i64)(head / (H / G)) * S * D;

    const auto slot = [&](i32 j) { return shared + j % SLOTS * 2 * BUFFER; };
    const auto load = [&](i32 j) { /* what step j needs */
        if (j < steps) load_rows(slot(j), k, begin + j * KEYS, end);
        if (j > 0 && j <= steps) load_rows(slot(j) + BUFFER, v, begin + (j - 1) * KEYS, end);
        copy_commit();
    };
    const auto enter = [&](i32 j) { /* everything that step j needs is there, and the next but one is on its way */
        ring.arrive<0>(j + 1);
        ring.wait(j);
        load(j + 2);
    };
    ring.create();
    load(0);
    load(1);
    u32 queries[D / 16][4];
    const float scale = LOG2_E / sqrtf((float)D);
#pragma unroll
    for (i32 d = 0; d < D / 16; d++)
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            const i32 row = my_row + i % 2 * 8;
            float2 two = make_float2(0, 0);
            if (row < T) two = *(const float2 *)(q + ((i64)row * H + head) * D + d * 16 + i / 2 * 8 + lane % 4 * 2);
            queries[d][i] = pack_half2(clamp_half(two.x * scale), clamp_half(two.y * scale));
        }

    Scores s;
    Probabilities p;
    Output o = {};
    float maximum[2] = {NO_MAXIMUM, NO_MAXIMUM}, sum[2] = {}, rescale[2];
    ring.arrive<1>(0);
    enter(0);
    if (group == 1) give_turn(group);
    take_turn(group);
    wgmma_begin();
    start_scores(s, queries, slot(0));
    give_turn(group);
    wgmma_wait<0>();
    pin(s);
    if (begin + KEYS - 1 > first || begin <= last - window) mask(s, start + my_row, begin, window);
    softmax(s, maximum, sum, rescale);
    pack(s, p);

    for (i32 j = 1; j < steps; j++) {
        const i32 key = begin + j * KEYS;
        enter(j);
        take_turn(group);
        pin(o);
        wgmma_begin();
        start_scores(s, queries, slot(j));
        start_values(o, p, slot(j) + BUFFER);
        give_turn(group);
        wgmma_wait<1>();
        pin(s);
        if (key + KEYS - 1 > first || key <= last - window) mask(s, start + my_row, key, window);
        softmax(s, maximum, sum, rescale);
        wgmma_wait<0>();
        pin(o);
        pack(s, p);
#pragma unroll
        for (i32 n = 0; n < D / 64; n++)
#pragma unroll
            for (i32 i = 0; i < 32; i++) o[n][i] *= rescale[i / 2 % 2];
    }
    enter(steps);
    take_turn(group);
    pin(o);
    wgmma_begin();
    start_values(o, p, slot(steps) + BUFFER);
    if (group == 0) give_turn(group);
    wgmma_wait<0>();
    pin(o);

#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(FULL, total, 1);
        total += __shfl_xor_sync(FULL, total, 2);
        const i32 row = my_row + half * 8;
        if (row >= T) continue; /* the whole quad leaves or stays */
        float *to = out + ((i64)row * H + head) * D + lane % 4 * 2;
#pragma unroll
        for (i32 n = 0; n < D / 8; n++) {
            const float *pair = o[n / 8] + n % 8 * 4 + 2 * half;
            *(float2 *)(to + n * 8) = make_float2(pair[0] / total, pair[1] / total);
        }
    }
}
