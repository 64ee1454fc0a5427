#include "attention_block.cuh"
#if TURNED
#include "attention_turn.cuh"
#endif
#if FAMILY == ROTATED
#include "attention_rotated.cuh"
#elif FAMILY == KIVI
#include "attention_kivi.cuh"
#elif FAMILY == ATOM
#include "attention_atom.cuh"
#elif FAMILY == KVQUANT
#include "attention_kvquant.cuh"
#endif

/* By how much more than its bytes metadata is copied, from the multiple of 16 before it on, where it begins anywhere. */
INLINE constexpr int padding(int bytes) {
    return bytes % 16 == 0 ? 0 : bytes % 16 == 8 ? 8 : bytes % 16 == 4 ? 12 : 20;
}

/* How a segment of one format is cut into blocks, and which of them is to be copied next: warp w copies and attends to
 * the chunks w, w + WARPS, ... Chunks of FP16 K and V are one stream of rows, cut into 16 whatever CHUNK is. Slots of
 * the tail that were flushed are skipped, or hidden where a piece has others too. */
template <int K_BITS, int V_BITS> struct Blocks {
    static constexpr bool STREAM = K_BITS == 16 && V_BITS == 16;
    static constexpr int UNIT = STREAM ? 16 : CHUNK; /* tokens of a chunk */
    static constexpr int FULL_T = UNIT < BLOCK_TOKENS ? UNIT : BLOCK_TOKENS;
    static constexpr int LAST_T = UNIT % FULL_T == 0 ? FULL_T : UNIT % FULL_T;
    static constexpr int PER_CHUNK = (UNIT + FULL_T - 1) / FULL_T;
    template <int T> using K = Codes<true, K_BITS < 16 ? K_BITS : 2, T>;
    template <int T> using V = Codes<false, V_BITS < 16 ? V_BITS : 2, T>;
    static constexpr int K_BYTES = K_BITS == 16 ? 2 * D * FULL_T : K<FULL_T>::BYTES; /* in memory */
    static constexpr int V_BYTES = V_BITS == 16 ? 2 * D * FULL_T : V<FULL_T>::BYTES;
    static constexpr int K_CHUNK = K_BITS == 16 ? 2 * D * UNIT : K<UNIT>::BYTES;
    static constexpr int V_CHUNK = V_BITS == 16 ? 2 * D * UNIT : V<UNIT>::BYTES;
    static constexpr int K_META = Family::K_WHOLE + UNIT * Family::K_TOKEN;
    static constexpr int V_META = Family::V_WHOLE + UNIT * Family::V_TOKEN;
    template <int T> static constexpr int K_COPIED = Family::K_WHOLE + T * Family::K_TOKEN + padding(K_META);
    template <int T> static constexpr int V_COPIED = Family::V_WHOLE + T * Family::V_TOKEN + padding(V_META);
    static constexpr int ROPE = TURNED && K_BITS < 16 ? 2 * D : 0; /* bytes of a row of cosines, of one of sines */
    static constexpr int K_SLOT = K_BITS == 16 ? ROW_BYTES * FULL_T : K_BYTES + K_COPIED<FULL_T> + 2 * ROPE;
    static constexpr int V_SLOT = V_BITS == 16 ? ROW_BYTES * FULL_T : V_BYTES + V_COPIED<FULL_T> + FULL_T * Family::V_SHARED;
    static constexpr int ROOM = FAMILY == KVQUANT && !STREAM ? RING - 16 * ROW_BYTES : RING; /* the rest: outliers' rows */
    /* A piece is K and V of a block where two such pieces fit, else K or V. */
    static constexpr bool TOGETHER = K_BITS < 16 && V_BITS < 16 && 2 * (K_SLOT + V_SLOT) <= ROOM;
    static constexpr int SLOT = TOGETHER ? K_SLOT + V_SLOT : K_SLOT > V_SLOT ? K_SLOT : V_SLOT;
    static constexpr int SLOTS = ROOM / SLOT < MAX_SLOTS ? ROOM / SLOT : MAX_SLOTS;
    static_assert(SLOTS >= 2, "RING holds fewer than two pieces");

    i32 chunk, part, chunks, step; /* the next block to copy; chunks of the segment; from chunk to chunk */
    i32 position;                  /* where RoPE matters: of that chunk */

    INLINE Blocks(const Source &source, i32 warp) {
        step = STREAM || FLUSH ? WARPS * source.parts : WARPS; /* a tail and the flushed span have parts */
        chunks = STREAM ? (source.tokens + UNIT - 1) / UNIT : source.n;
        chunk = first(source, warp);
        part = 0;
        find_position(source);
    }

    INLINE i32 first(const Source &source, i32 warp) const {
        return shown(source, STREAM || FLUSH ? WARPS * source.part + warp : warp);
    }

    INLINE i32 after(const Source &source, i32 chunk) const { return shown(source, chunk + step); }

    /* This chunk, or the next one of the warp's that is not hidden as a whole. */
    INLINE i32 shown(const Source &source, i32 chunk) const {
        if (!FLUSH || !STREAM || 16 * chunk < source.hidden || 16 * chunk + 16 > source.hidden_end) return chunk;
        return chunk + (source.hidden_end / 16 - chunk + step - 1) / step * step;
    }

    /* Long before it is needed. */
    INLINE void find_position(const Source &source) {
        if (ROPE && chunk < chunks) position = source.positions[chunk];
    }

    /* Start copying the next piece, if there is one, to a slot; not TOGETHER, K and V are to be asked for in turn. */
    INLINE void copy(const Source &source, Queue &queue, i32 slot, bool is_k) {
        if (chunk < chunks) {
            if (LAST_T != FULL_T && part == PER_CHUNK - 1)
                copy_block<LAST_T>(source, queue, slot, is_k);
            else
                copy_block<FULL_T>(source, queue, slot, is_k);
            if ((TOGETHER || !is_k) && ++part == PER_CHUNK) {
                part = 0, chunk = after(source, chunk);
                find_position(source);
            }
        }
        queue.end();
    }

    template <int T> INLINE void copy_block(const Source &source, Queue &queue, i32 slot, bool is_k) {
        constexpr u32 K_ALL = K<T>::BYTES + K_COPIED<T> + 2 * ROPE, V_ALL = V<T>::BYTES + V_COPIED<T> + T * Family::V_SHARED;
        const bool with_k = TOGETHER || is_k, with_v = TOGETHER || !is_k;
        const u8 *const k = source.k_codes + (i64)chunk * K_CHUNK + part * K_BYTES;
        const u8 *const v = source.v_codes + (i64)chunk * V_CHUNK + part * V_BYTES;
        const u32 at = slot * SLOT;
        if ((with_k ? K_BITS : V_BITS) == 16)
            queue.copy_rows<T>(slot, at, with_k ? k : v, STREAM ? min(source.tokens - chunk * UNIT, T) : T);
        else if (queue.begin(slot, (with_k ? K_ALL : 0) + (with_v ? V_ALL : 0))) {
            if (with_k) {
                const u8 *const meta = source.k_meta + (i64)chunk * K_META + part * FULL_T * Family::K_TOKEN;
                queue.copy<K<T>::BYTES>(slot, at, k);
                queue.copy<K_COPIED<T>>(slot, at + K<T>::BYTES, padding(K_META) ? (const u8 *)((u64)meta & ~15ull) : meta);
#if TURNED
                const i64 row = (i64)(position + part * FULL_T) * (D / 2);
                queue.copy<ROPE>(slot, at + K<T>::BYTES + K_COPIED<T>, (const u8 *)(source.data->cos + row));
                queue.copy<ROPE>(slot, at + K<T>::BYTES + K_COPIED<T> + ROPE, (const u8 *)(source.data->sin + row));
#endif
            }
            if (with_v) {
                const u8 *const meta = source.v_meta + (i64)chunk * V_META + part * FULL_T * Family::V_TOKEN;
                queue.copy<V<T>::BYTES>(slot, at + (TOGETHER ? K_SLOT : 0), v);
                queue.copy<V_COPIED<T>>(slot, at + (TOGETHER ? K_SLOT : 0) + V<T>::BYTES,
                                        padding(V_META) ? (const u8 *)((u64)meta & ~15ull) : meta);
#if FAMILY == KVQUANT
                queue.copy<4 * T>(slot, at + (TOGETHER ? K_SLOT : 0) + V<T>::BYTES + V_COPIED<T>,
                                  source.v_shared + ((i64)chunk * UNIT + part * FULL_T) * 4);
#endif
            }
        }
    }

    /* Is a token visible? row: of the segment; a tail's rows have positions of their own. */
    static INLINE bool visible(const Source &source, i32 row) {
        if (STREAM && row >= source.tokens) return false;
        if (STREAM && FLUSH && row >= source.hidden && row < source.hidden_end) return false;
        if (!WINDOWED) return true;
        return source.oldest <=
               (source.format == TAIL ? source.positions[row] : source.positions[row / CHUNK] + row % CHUNK);
    }

    /* rows: this warp's, where a family decodes to. */
    template <int T>
    static INLINE void scores(float (&s)[T / 8][TILES][LANE_HEADS], const Source &source, const u8 *slot,
                              i32 chunk, i32 row, u8 *rows, i32 lane) {
        if constexpr (K_BITS == 16)
            block_scores_half<T>(s, slot, lane);
        else {
            const u8 *const meta = slot + K<T>::BYTES;
            const u8 *const mine = meta + (padding(K_META) ? ((u64)source.k_meta + chunk * K_META) % 16 : 0);
#if TURNED
            turn_query(meta + K_COPIED<T>, threadIdx.x / WARP, lane);
#endif
#if FAMILY == KVQUANT
            block_scores<K_BITS, T>(s, slot, mine, lane, row - chunk * UNIT, rows);
#else
            block_scores<K_BITS, T>(s, slot, mine, lane);
#endif
        }
        if (STREAM || WINDOWED)
#pragma unroll
            for (i32 r = 0; r < T / 8; r++) {
                const bool seen = visible(source, row + 8 * r + lane / 4);
#pragma unroll
                for (i32 n = 0; n < TILES; n++)
#pragma unroll
                    for (i32 h = 0; h < LANE_HEADS; h++) s[r][n][h] = seen ? s[r][n][h] : -INFINITE;
            }
    }

    template <int T>
    static INLINE void values(Running &x, float (&s)[T / 8][TILES][LANE_HEADS], const Source &source,
                              u8 *slot, i32 chunk, i32 row, u8 *rows, i32 lane) {
        if constexpr (V_BITS == 16) {
            u32 p[(T / 8 + 1) / 2 * 2][TILES];
            block_softmax<16, T>(x, s, p, 0, lane);
            block_values_half<T>(x, p, slot, STREAM ? source.tokens - row : T, lane);
        } else {
            const u8 *const meta = slot + V<T>::BYTES;
#if FAMILY == KVQUANT
            add_values<V_BITS, T>(x, s, slot, meta + ((u64)source.v_meta + chunk * V_META) % 16, lane,
                                  row - chunk * UNIT, rows, meta + V_COPIED<T>);
#else
            add_values<V_BITS, T>(x, s, slot, meta, lane);
#endif
        }
    }
};
