/* What all of decode attention shares: its sizes, what is read (Segment), what is kept (Running), the query. */
#include "common.cuh"
#include "asm.cuh"
#include "families.cuh"
#include "formats.cuh"
#include "rotation.cuh"

#define WARPS 4
#define THREADS (WARPS * WARP)
#define TILES ((GROUP + 7) / 8) /* columns of eight query heads */
#define LANE_HEADS (GROUP == 1 ? 1 : 2) /* of a tile: 2 * t + {0, 1} */
#define HEADROOM 14
#define SLACK 4
#define NO_MAXIMUM -1e30f /* finite, so that subtracting it from a masked score is not NaN */
#define NO_SCALE (1.f / (1ll << 62) / (1 << 30)) /* 2^-92: below every scale there is */
#define LOG2_E 1.44269504f
#define TAIL 0
#define FORMAT(k_bits, v_bits) (100 * (k_bits) + (v_bits))
#define STATE_SIZE 8 /* of runtime.backend: position, slot, ... of one sequence */

/* kernels_cu/work.py makes these. */
struct Segment {
    const u8 *k_codes, *k_meta, *v_codes, *v_meta; /* of the first chunk */
    const i32 *positions;                          /* of the chunks, or of the tail's slots */
    i32 format;                                    /* FORMAT(), or TAIL */
    i32 sequence;                                  /* whose state */
    i32 head;                                      /* KV head: of all sequences' */
    i32 n;                                         /* chunks, or slots */
    i32 part, parts;                               /* which of how many blocks share it; negative: a flushed span */
    i32 result;                                    /* where the partial result goes after this segment, or -1 */
    i32 next;                                      /* the block's next segment, or -1 */
#if FAMILY == KVQUANT
    const u8 *v_shared; /* what V's chunks store once for all heads */
#endif
};

/* Of one sequence and layer: runtime.backend.FormatData, Tail.head, and how many KV heads there are. */
struct SequenceData {
    const float *cos, *sin, *k_levels, *v_levels, *k_centre, *k_half;
    i64 head, kv_heads;
};

/* What is visible of a segment. */
struct Source : Segment {
    i32 tokens; /* of an FP16 stream */
    i32 oldest; /* first visible position */
    i32 hidden, hidden_end; /* rows of a tail that were flushed */
    const SequenceData *data;
};

/* A running softmax over what one warp has seen. This lane's share: of scores and sums, heads 8 * n + 2 * t + {0, 1}. */
struct Running {
    float out[D / 16][TILES][4]; /* channels 16 * m + g and 16 * m + 8 + g, two heads each */
    float centre[TILES][4];      /* V's scaled probabilities: what a code of 1 would give */
    float maximum[TILES][LANE_HEADS], sum[TILES][LANE_HEADS];
    float v_top; /* a power of two not below any V scale so far */

    INLINE void clear() {
#pragma unroll
        for (i32 n = 0; n < TILES; n++) {
#pragma unroll
            for (i32 i = 0; i < 4; i++) {
#pragma unroll
                for (i32 m = 0; m < D / 16; m++) out[m][n][i] = 0;
                centre[n][i] = 0;
            }
#pragma unroll
            for (i32 h = 0; h < LANE_HEADS; h++) maximum[n][h] = NO_MAXIMUM, sum[n][h] = 0;
        }
        v_top = NO_SCALE;
    }
};

/* The query as the B operand, the same for all warps. */
struct Query {
    uint2 fragments[D / 16][TILES][WARP]; /* halves, scaled by a power of two per head */
    float unit[TILES * 8];                /* what undoes that scale */
    float total[TILES * 8];               /* sum over the channels */
};

__shared__ Query query;
#if TURNED
__shared__ __align__(16) float query_rows[GROUP][D + 8]; /* in the same unit; the gap keeps heads apart in the banks */
#endif
__shared__ float warp_maximum[WARPS][TILES * 8], warp_sums[WARPS][TILES * 8];

INLINE float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

/* 2^difference for whole numbers <= 0, exactly; 0 far below. */
INLINE float rescale_factor(float difference) {
    return difference > -126.f ? power_of_two((int)difference) : 0.f;
}

/* 1 / x of a power of two. */
INLINE float inverse_power(float x) { return __int_as_float((254 << 23) - __float_as_int(x)); }

INLINE float bf16_to_float(u32 bits) { return __uint_as_float(bits << 16); }

/* threadIdx.x; where registers are short nothing that follows from it is worked out long before. */
INLINE u32 this_thread() {
    u32 x = threadIdx.x;
    if (FAMILY == KVQUANT) forget_origin(x);
    return x;
}

/* Heads of q (GROUP, D) to operand B; rotated for quantized K. One warp per head; a lane holds neighbouring channels. */
INLINE void prepare_query(const float *q, bool rotated) {
    constexpr int N = LANE_CHANNELS;
    const u32 thread = this_thread();
    const i32 warp = thread / WARP, lane = thread % WARP;
    wait_for_predecessor(); /* which wrote q */
    __syncthreads();        /* nobody reads the query before this any more */
    if (thread >= GROUP && thread < TILES * 8) query.unit[thread] = query.total[thread] = 0;
    for (i32 i = thread; GROUP % 8 && i < D / 16 * 8 * 4; i += THREADS) /* columns without a head */
        if (i % 32 / 4 >= GROUP % 8) query.fragments[i / 32][TILES - 1][i % 32] = make_uint2(0, 0);
    for (i32 head = warp; head < GROUP; head += WARPS) {
        float x[N], largest = 0, total = 0;
#pragma unroll
        for (i32 i = 0; i < N; i++)
            x[i] = lane * N + i < D ? q[head * D + lane * N + i] * (LOG2_E / sqrtf((float)D)) : 0.f;
        if (rotated) rotate_head(x, lane);
#pragma unroll
        for (i32 i = 0; i < N; i++) largest = fmaxf(largest, fabsf(x[i]));
        /* The largest becomes 16 .. 32: times a scale of up to 255 stays below FP16's 65504. */
        const int exponent = max((__float_as_int(warp_max(largest)) >> 23) - 127, -100) - 4;
#pragma unroll
        for (i32 i = 0; i < N; i += 2) {
            const i32 d = lane * N + i;
            const u32 pair = pack_half2(x[i] * power_of_two(-exponent), x[i + 1] * power_of_two(-exponent));
            total += half_to_float((u16)pair) + half_to_float((u16)(pair >> 16));
            if (d < D) ((u32 *)&query.fragments[d / 16][head / 8][head % 8 * 4 + d / 2 % 4])[d / 8 % 2] = pair;
        }
#if TURNED
#pragma unroll
        for (i32 i = 0; i < N; i++)
            if (lane * N + i < D) query_rows[head][lane * N + i] = x[i] * power_of_two(-exponent);
#endif
        total = warp_sum(total);
        if (lane == 0) query.unit[head] = power_of_two(exponent), query.total[head] = total;
    }
    __syncthreads();
}
