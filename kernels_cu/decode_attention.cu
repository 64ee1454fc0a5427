/* Decode attention: one token's query over the spans and the tail of one layer's cache, for one sequence or a batch.
 *
 * Every block of four warps has a part of one KV head's bytes (work.py): segments, each some chunks of one span or the
 * slots of a tail, read for all query heads of the KV head at once. The warps take a segment's blocks of up to 32 tokens
 * in turn, each with a running softmax and a queue of asynchronous copies of its own. Where the rotation changes, and at
 * the end, what was summed goes to a partial result; merge_attention.cu adds those up.
 *
 * K and V are the 16-row operand A of mma.m16n8k16, query heads the 8 columns: scores = K x q, output = V x p. Codes
 * are used as subnormal FP16 numbers as they are (formats.cuh). K: the scales of a chunk's channels go into q, its zeros
 * are one more row of K. V: a token's scale goes into its probability; the levels' centre is subtracted at the end.
 *
 * Scores are in base 2 (q carries log2(e) / sqrt(D)) and the running maximum is a whole number, so that rescaling what
 * was summed so far multiplies by an exact power of two. It is set SLACK above the largest score, so that it seldom
 * rises again. A probability at the maximum is 2^HEADROOM, which keeps small ones out of FP16's subnormal range. q is
 * scaled by a power of two per head, V's scales by one per warp (`v_top`), so that no input overflows FP16.
 *
 * Macros: D head_dim, GROUP query heads per KV head, CHUNK tokens, WINDOWED, RING bytes of a warp's queue, BLOCKS per
 * multiprocessor, FAMILY of the formats, FORMATS: F(K bits, V bits) of every span that is not all FP16, FLUSH: whether
 * the tail gives chunks up. */
#include "attention_segment.cuh"

/* Add T tokens to x: those from row `row` of the segment, in chunk `chunk`. next(is_k): the slot of the next piece. */
template <class B, int T, class Next>
INLINE void attend_block(Running &x, const Source &source, Next &next, i32 chunk, i32 row, u8 *rows) {
    const i32 lane = this_thread() % WARP;
    float s[T / 8][TILES][LANE_HEADS];
    u8 *slot = next(true);
    B::template scores<T>(s, source, slot, chunk, row, rows, lane);
    slot = B::TOGETHER ? slot + B::K_SLOT : next(false);
    B::template values<T>(x, s, source, slot, chunk, row, rows, lane);
}

/* Add a segment to x. Pieces (K and V of a block in turn) pass through the queue in order. q (GROUP, D), or NULL where
 * the query is prepared. */
template <int K_BITS, int V_BITS>
INLINE void attend(Running &x, const Source &source, const float *q, Queue &queue, u8 *ring) {
    typedef Blocks<K_BITS, V_BITS> B;
    const i32 warp = threadIdx.x / WARP;
    B blocks(source, warp);
    i32 to = 0, from = 0;
    auto advance = [](i32 &at) { at = at == B::SLOTS - 1 ? 0 : at + 1; };
    auto issue = [&](bool is_k) {
        blocks.copy(source, queue, to, is_k);
        advance(to);
    };
    auto next = [&](bool is_k) { /* the slot of the next piece; the slot before it is free and takes the latest one */
        queue.wait<B::SLOTS - 2>(from);
        issue(is_k == (B::SLOTS % 2 == 1));
        u8 *slot = ring + from * B::SLOT;
        advance(from);
        return slot;
    };
#pragma unroll
    for (i32 i = 0; i < B::SLOTS - 1; i++) issue(i % 2 == 0);
    if (q) prepare_query(q, FAMILY == ROTATED && K_BITS < 16);
#if FAMILY == KVQUANT
    if (!B::STREAM) clear_rows(ring + RING - 16 * ROW_BYTES, threadIdx.x % WARP);
#endif

    for (i32 chunk = blocks.first(source, warp); chunk < blocks.chunks; chunk = blocks.after(source, chunk))
        for (i32 part = 0; part < B::PER_CHUNK; part++) {
            const i32 row = chunk * B::UNIT + part * B::FULL_T;
            if (B::LAST_T != B::FULL_T && part == B::PER_CHUNK - 1)
                attend_block<B, B::LAST_T>(x, source, next, chunk, row, ring + RING - 16 * ROW_BYTES);
            else
                attend_block<B, B::FULL_T>(x, source, next, chunk, row, ring + RING - 16 * ROW_BYTES);
        }

    if constexpr (V_BITS < 16) finish_segment<V_BITS>(x, threadIdx.x % WARP);
}

/* Add the warps' results up: output (GROUP, D) and (maximum, sum) per head. shared: all rings. */
INLINE void store_partial(Running &x, float unit, float *shared, float *out, float2 *softmax) {
    const u32 thread = this_thread();
    const i32 warp = thread / WARP, lane = thread % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (i32 n = 0; n < TILES; n++)
#pragma unroll
        for (i32 h = 0; h < LANE_HEADS; h++) {
#pragma unroll
            for (i32 l = 4; l < WARP; l *= 2) x.sum[n][h] += __shfl_xor_sync(FULL, x.sum[n][h], l);
            if (g == 0) {
                warp_maximum[warp][8 * n + 2 * t + h] = x.maximum[n][h];
                warp_sums[warp][8 * n + 2 * t + h] = x.sum[n][h];
            }
        }
    __syncthreads(); /* also: no warp reads its queue any more */
#pragma unroll
    for (i32 n = 0; n < TILES; n++)
#pragma unroll
        for (i32 h = 0; h < LANE_HEADS; h++) {
            const i32 head = 8 * n + 2 * t + h;
            if (head >= GROUP) continue;
            float maximum = NO_MAXIMUM;
            for (i32 w = 0; w < WARPS; w++) maximum = fmaxf(maximum, warp_maximum[w][head]);
            const float factor = rescale_factor(x.maximum[n][h] - maximum) * unit;
#pragma unroll
            for (i32 m = 0; m < D / 16; m++)
#pragma unroll
                for (i32 o = 0; o < 2; o++)
                    shared[(warp * GROUP + head) * D + 16 * m + 8 * o + g] = x.out[m][n][2 * o + h] * factor;
        }
    __syncthreads();
    for (i32 i = thread; i < GROUP * D; i += THREADS) {
        float sum = shared[i];
        for (i32 w = 1; w < WARPS; w++) sum += shared[w * GROUP * D + i];
        out[i] = sum;
    }
    if (thread < GROUP) {
        float maximum = NO_MAXIMUM, sum = 0;
        for (i32 w = 0; w < WARPS; w++) maximum = fmaxf(maximum, warp_maximum[w][thread]);
        for (i32 w = 0; w < WARPS; w++)
            sum += warp_sums[w][thread] * rescale_factor(warp_maximum[w][thread] - maximum);
        softmax[thread] = make_float2(maximum, sum);
    }
    __syncthreads(); /* the queues are free again */
}

/* grid (blocks); block b begins with segment b. q (sequences * H, D) float32, state (sequences, STATE_SIZE).
 * partial (results, GROUP, D), softmax (results, GROUP). Until wait_for_predecessor(), which every thread calls in its
 * first prepare_query() at the latest, only packed chunks are read: no kernel of a step writes those. data: of each
 * sequence, where the family or FLUSH needs it. */
KERNEL __launch_bounds__(THREADS, BLOCKS)
    decode_attention(const float *q, const Segment *segments, const i32 *state, i32 window, float *partial,
                     float2 *softmax, const SequenceData *data) {
    extern __shared__ __align__(16) u8 rings[];
    u8 *const ring = rings + threadIdx.x / WARP * RING;
    __shared__ Source source; /* not in registers: they are short */
    Queue queue(shared_address(ring));
    i32 prepared = -1; /* 2 * KV head + rotated */
#if TURNED
    i32 placed = -1;   /* whose tables prepare_places() read */
    i32 levelled = -1; /* the KV head that prepare_levels() read */
#endif
    Running x;
    x.clear();
    start_successor();
    for (i32 i = blockIdx.x; i >= 0; i = source.next) {
        fence_bulk();    /* slots may have been written */
        __syncthreads(); /* nobody uses the segment before or its slots any more */
        if (threadIdx.x == 0) {
            (Segment &)source = segments[i];
            source.tokens = source.n * CHUNK, source.oldest = 0;
            if (FLUSH || TURNED) source.data = data + source.sequence;
            if (FLUSH) source.hidden = source.hidden_end = 0;
            if (WINDOWED || source.format == TAIL || (FLUSH && source.parts < 0)) {
                wait_for_predecessor();
                const i32 *const mine = state + source.sequence * STATE_SIZE;
                const i32 position = mine[0], slot = mine[1];
                if (WINDOWED) source.oldest = position - window + 1;
                if (source.format == TAIL) source.tokens = min(slot + 1, source.n);
                if (FLUSH && source.format == TAIL)
                    source.hidden = (i32)source.data->head, source.hidden_end = source.hidden + mine[4] * CHUNK;
                if (FLUSH && source.parts < 0) {
                    source.n = min(mine[4], source.n), source.parts = -source.parts;
                    source.tokens = source.n * CHUNK;
                }
            }
        }
        __syncthreads();
#if TURNED
        if (source.sequence != placed) {
            placed = source.sequence;
            prepare_places(source.data->cos, source.data->sin);
            __syncthreads();
        }
#endif
#if FAMILY == KVQUANT
        if (source.format != TAIL && source.head != levelled) {
            levelled = source.head;
            prepare_levels(*source.data, source.head % (i32)source.data->kv_heads);
            __syncthreads();
        }
#endif
        const bool tail = source.format == TAIL, rotated_k = FAMILY == ROTATED && !tail && source.format < 1600;
        const float *new_q = prepared == 2 * source.head + rotated_k ? 0 : q + (i64)source.head * GROUP * D;
        prepared = 2 * source.head + rotated_k;
        switch (source.format) {
#define F(k_bits, v_bits)                                                                                              \
    case FORMAT(k_bits, v_bits):                                                                                       \
        attend<k_bits, v_bits>(x, source, new_q, queue, ring);                                                         \
        break;
            FORMATS
#undef F
        default: attend<16, 16>(x, source, new_q, queue, ring);
        }
        if (source.result >= 0) {
            const i64 at = (i64)source.result * GROUP;
            const bool coded_v = FAMILY != KVQUANT && !tail && source.format % 100 < 16;
            store_partial(x, coded_v ? SUBNORMAL_UNIT * x.v_top : 1.f, (float *)rings, partial + at * D, softmax + at);
            x.clear();
        }
    }
}
