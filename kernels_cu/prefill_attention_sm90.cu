/* Prefill attention on Hopper's warpgroup instructions (sm_90a), for D = 64 and 128; otherwise as prefill_attention.cu.
 *
 * One thread of the third warpgroup has K and V copied into a ring in shared memory, KEYS rows at a time. Each of the
 * other two warpgroups owns 64 queries, held in registers. Step j starts the scores of its KEYS keys and, while these
 * become probabilities, the product of the probabilities of step j - 1 with their V; the warpgroups take turns at
 * starting, so that one multiplies while the other exponentiates (the order of FlashAttention-3, Shah et al. 2024,
 * section 3). WEIGHT is the type of out. */
#include "common.cuh"
#include "hopper.cuh"
#include "weights.cuh"

#define GROUP_THREADS 128
#define CONSUMERS 2
#define THREADS ((CONSUMERS + 1) * GROUP_THREADS)
#define GROUP_ROWS 64
#define ROWS (CONSUMERS * GROUP_ROWS)
#define TILE (KEYS * D) /* halves of a step's K or V */
#define LOG2_E 1.44269504f
#define NO_MAXIMUM -1e30f /* finite, so that subtracting it from a masked score is not NaN */

typedef float Scores[KEYS / 2];
typedef u32 Probabilities[KEYS / 16][4];
typedef float Output[D / 2];

/* 2^x, to two units in the last place; 0 for -infinity. */
INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE void start_scores(Scores &s, const u32 (&q)[D / 16][4], const u16 *k) {
#pragma unroll
    for (i32 d = 0; d < D; d += 16)
        warpgroup_mma<false>(s, q[d / 16], descriptor(k + d / 64 * (KEYS * 64) + d % 64, 16), d > 0);
    warpgroup_commit();
}

INLINE void start_values(Output &o, const Probabilities &p, const u16 *v) {
#pragma unroll
    for (i32 key = 0; key < KEYS; key += 16)
        warpgroup_mma<true>(o, p[key / 16], descriptor(v + key * 64, KEYS * 128), true);
    warpgroup_commit();
}

/* Number i of a thread's scores: its row is `row` or row + 8, its key key + .. */
INLINE void mask(Scores &s, i32 row, i32 key, i32 window) {
#pragma unroll
    for (i32 i = 0; i < KEYS / 2; i++) {
        const i32 age = row + i / 2 % 2 * 8 - (key + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2);
        if (age < 0 || age >= window) s[i] = -INFINITE;
    }
}

/* Scores to probabilities relative to the new running maximum; rescale: what the sums so far have to be multiplied by. */
INLINE void softmax(Scores &s, float (&maximum)[2], float (&sum)[2], float (&rescale)[2]) {
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        float top = maximum[half], part = 0;
#pragma unroll
        for (i32 i = 2 * half; i < KEYS / 2; i += 4) top = fmaxf(top, fmaxf(s[i], s[i + 1]));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
        rescale[half] = exp2_fast(maximum[half] - top);
        maximum[half] = top;
#pragma unroll
        for (i32 i = 2 * half; i < KEYS / 2; i += 4) {
            s[i] = exp2_fast(s[i] - top);
            s[i + 1] = exp2_fast(s[i + 1] - top);
            part += s[i] + s[i + 1];
        }
        sum[half] = sum[half] * rescale[half] + part;
    }
}

/* Probabilities in FP16, as operands of the product with V. */
INLINE void pack(const Scores &s, Probabilities &p) {
#pragma unroll
    for (i32 i = 0; i < KEYS / 2; i += 2) p[i / 8][i / 2 % 4] = pack_half2(s[i], s[i + 1]);
}

/* Tiles of K and V in the order in which they are needed: K 0, K 1, V 0, K 2, V 1, ... */
struct Ring {
    u16 *tiles; /* (SLOTS, TILE) */
    u64 *full, *empty; /* (SLOTS,) */
    i32 steps;

    INLINE i32 k(i32 step) const { return max(2 * step - 1, 0); }
    INLINE i32 v(i32 step) const { return min(2 * step + 2, 2 * steps - 1); }
    INLINE bool is_v(i32 i) const { return i == 2 * steps - 1 || (i > 0 && i % 2 == 0); }
    INLINE i32 step(i32 i) const { return i == 2 * steps - 1 ? steps - 1 : is_v(i) ? i / 2 - 1 : (i + 1) / 2; }

    INLINE u16 *tile(i32 i) const { return tiles + i % SLOTS * TILE; }

    /* For the producer: wait until tile i may be written. */
    INLINE void wait_empty(i32 i) const { barrier_wait(empty + i % SLOTS, i / SLOTS % 2 ^ 1); }

    /* For consumers: wait until tile i can be read; say that this warp has read it. */
    INLINE void wait_full(i32 i) const { barrier_wait(full + i % SLOTS, i / SLOTS % 2); }
    INLINE void leave(i32 i) const {
        if (threadIdx.x % WARP == 0) barrier_arrive(empty + i % SLOTS);
    }
};

/* Whose turn it is to start products: a warpgroup waits for the other's word, which has number 1 + its own. */
INLINE void take_turn(i32 group) { meet<2 * GROUP_THREADS>(1 + group); }
INLINE void give_turn(i32 group) { meet_later<2 * GROUP_THREADS>(2 - group); }

/* k, v: maps of (G, keys, D) halves with boxes of KEYS x 64, 128-byte swizzle; keys = start + T. grid: (row tiles, H). */
KERNEL __launch_bounds__(THREADS, 1)
    prefill_attention(const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const float *q, void *out,
                      i32 T, i32 H, i32 G, i32 start, i32 window) {
    extern __shared__ __align__(1024) u16 shared[];
    __shared__ u64 barriers[2 * SLOTS];
    const i32 group = __shfl_sync(FULL, threadIdx.x / GROUP_THREADS, 0), lane = threadIdx.x % WARP;
    const i32 head = blockIdx.y, row0 = (gridDim.x - 1 - blockIdx.x) * ROWS; /* a head's longest rows first */
    const i32 end = start + min(row0 + ROWS, T);                             /* keys that any row of the block sees */
    const i32 begin = max(0, start + row0 - window + 1) / KEYS * KEYS, steps = (end - begin + KEYS - 1) / KEYS;
    const Ring ring = {shared, barriers, barriers + SLOTS, steps};
    if (threadIdx.x < SLOTS) {
        barrier_create(ring.full + threadIdx.x, 1);
        barrier_create(ring.empty + threadIdx.x, CONSUMERS * GROUP_THREADS / WARP);
    }
    barriers_ready();

    if (group == CONSUMERS) {
        registers_give<24>();
        if (threadIdx.x == CONSUMERS * GROUP_THREADS)
            for (i32 i = 0; i < 2 * steps; i++) {
                u64 *const full = ring.full + i % SLOTS;
                ring.wait_empty(i);
                barrier_arrive_expecting(full, 2 * TILE);
#pragma unroll
                for (i32 d = 0; d < D; d += 64)
                    copy_box(ring.tile(i) + d * KEYS, ring.is_v(i) ? &v : &k, d, begin + ring.step(i) * KEYS,
                             head / (H / G), full);
            }
        return;
    }

    registers_take<240>();
    const i32 my_row = row0 + threadIdx.x / WARP * 16 + lane / 4;
    const i32 first = start + row0 + group * GROUP_ROWS, last = first + GROUP_ROWS - 1;
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
    const auto probabilities = [&](i32 key) { /* of the scores of the keys from `key` on */
        if (key + KEYS - 1 > first || key <= last - window) mask(s, start + my_row, key, window);
        softmax(s, maximum, sum, rescale);
    };
    if (group == 1) give_turn(group);
    ring.wait_full(0);
    take_turn(group);
    warpgroup_begin();
    start_scores(s, queries, ring.tile(0));
    give_turn(group);
    warpgroup_wait<0>();
    pin(s);
    ring.leave(0);
    probabilities(begin);
    pack(s, p);

    for (i32 j = 1; j < steps; j++) {
        const i32 at_k = ring.k(j), at_v = ring.v(j - 1);
        ring.wait_full(at_k);
        take_turn(group);
        pin(o);
        warpgroup_begin();
        start_scores(s, queries, ring.tile(at_k));
        ring.wait_full(at_v);
        start_values(o, p, ring.tile(at_v));
        give_turn(group);
        warpgroup_wait<1>();
        pin(s);
        ring.leave(at_k);
        probabilities(begin + j * KEYS);
        warpgroup_wait<0>();
        pin(o);
        ring.leave(at_v);
        pack(s, p);
        if (__any_sync(FULL, rescale[0] != 1 || rescale[1] != 1)) /* seldom: a maximum grew */
#pragma unroll
            for (i32 i = 0; i < D / 2; i++) o[i] *= rescale[i / 2 % 2];
    }
    ring.wait_full(2 * steps - 1);
    take_turn(group);
    pin(o);
    warpgroup_begin();
    start_values(o, p, ring.tile(2 * steps - 1));
    if (group == 0) give_turn(group);
    warpgroup_wait<0>();
    pin(o);

#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(FULL, total, 1);
        total += __shfl_xor_sync(FULL, total, 2);
        const i32 row = my_row + half * 8;
        if (row >= T) continue; /* the whole quad leaves or stays */
        const float inverse = 1 / total;
        const i64 to = ((i64)row * H + head) * D + lane % 4 * 2;
#pragma unroll
        for (i32 n = 0; n < D / 8; n++)
            store2(out, to + n * 8, o[n * 4 + 2 * half] * inverse, o[n * 4 + 2 * half + 1] * inverse);
    }
}
