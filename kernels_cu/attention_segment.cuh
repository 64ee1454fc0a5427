#include "attention_block.cuh"

/* How a segment of one format is cut into blocks, and which of them is to be copied next: warp w copies and attends to
 * the chunks w, w + WARPS, ... Chunks of FP16 K and V are one stream of rows, cut into 16 whatever CHUNK is. */
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
    static constexpr int K_META = 2 * D + 4, V_META = 2 * UNIT;
    static constexpr int K_SLOT = K_BITS == 16 ? ROW_BYTES * FULL_T : K_BYTES + K_META + 12;
    static constexpr int V_SLOT = V_BITS == 16 ? ROW_BYTES * FULL_T : V_BYTES + 2 * FULL_T;
    /* A piece is K and V of a block where two such pieces fit, else K or V. */
    static constexpr bool TOGETHER = K_BITS < 16 && V_BITS < 16 && 2 * (K_SLOT + V_SLOT) <= RING;
    static constexpr int SLOT = TOGETHER ? K_SLOT + V_SLOT : K_SLOT > V_SLOT ? K_SLOT : V_SLOT;
    static constexpr int SLOTS = RING / SLOT < MAX_SLOTS ? RING / SLOT : MAX_SLOTS;
    static_assert(SLOTS >= 2, "RING holds fewer than two pieces");

    i32 chunk, part, chunks, step; /* the next block to copy; chunks of the segment; from chunk to chunk */

    INLINE Blocks(const Source &source, i32 warp) {
        step = STREAM ? WARPS * source.parts : WARPS; /* only a tail has parts */
        chunk = first(source, warp);
        chunks = STREAM ? (source.tokens + UNIT - 1) / UNIT : source.n;
        part = 0;
    }

    static INLINE i32 first(const Source &source, i32 warp) { return STREAM ? WARPS * source.part + warp : warp; }

    /* Start copying the next piece, if there is one, to a slot; not TOGETHER, K and V are to be asked for in turn. */
    INLINE void copy(const Source &source, Queue &queue, i32 slot, bool is_k) {
        if (chunk < chunks) {
            if (LAST_T != FULL_T && part == PER_CHUNK - 1)
                copy_block<LAST_T>(source, queue, slot, is_k);
            else
                copy_block<FULL_T>(source, queue, slot, is_k);
            if ((TOGETHER || !is_k) && ++part == PER_CHUNK) part = 0, chunk += step;
        }
        queue.end();
    }

    template <int T> INLINE void copy_block(const Source &source, Queue &queue, i32 slot, bool is_k) {
        constexpr u32 K_ALL = K<T>::BYTES + K_META + 12, V_ALL = V<T>::BYTES + 2 * T;
        const bool with_k = TOGETHER || is_k, with_v = TOGETHER || !is_k;
        const u8 *const k = source.k_codes + (i64)chunk * K_CHUNK + part * K_BYTES;
        const u8 *const v = source.v_codes + (i64)chunk * V_CHUNK + part * V_BYTES;
        const u32 at = slot * SLOT;
        if ((with_k ? K_BITS : V_BITS) == 16)
            queue.copy_rows<T>(slot, at, with_k ? k : v, STREAM ? min(source.tokens - chunk * UNIT, T) : T);
        else if (queue.begin(slot, (with_k ? K_ALL : 0) + (with_v ? V_ALL : 0))) {
            if (with_k) { /* metadata begins at some multiple of 4: it is copied from the multiple of 16 before on */
                const u8 *const meta = source.k_meta + (i64)chunk * K_META;
                queue.copy<K<T>::BYTES>(slot, at, k);
                queue.copy<K_META + 12>(slot, at + K<T>::BYTES, (const u8 *)((u64)meta & ~15ull));
            }
            if (with_v) {
                const u8 *const meta = source.v_meta + (i64)chunk * V_META + part * 2 * FULL_T;
                queue.copy<V<T>::BYTES>(slot, at + (TOGETHER ? K_SLOT : 0), v);
                queue.copy<2 * T>(slot, at + (TOGETHER ? K_SLOT : 0) + V<T>::BYTES, meta);
            }
        }
    }

    /* Is a token visible? row: of the segment; a tail's rows have positions of their own. */
    static INLINE bool visible(const Source &source, i32 row) {
        if (STREAM && row >= source.tokens) return false;
        if (!WINDOWED) return true;
        return source.oldest <=
               (source.format == TAIL ? source.positions[row] : source.positions[row / CHUNK] + row % CHUNK);
    }

    template <int T>
    static INLINE void scores(float (&s)[T / 8][TILES][LANE_HEADS], const Source &source, const u8 *slot,
                              i32 chunk, i32 row, i32 lane) {
        if constexpr (K_BITS == 16)
            block_scores_half<T>(s, slot, lane);
        else
            block_scores<K_BITS, T>(s, slot, slot + K<T>::BYTES + ((u64)source.k_meta + chunk * K_META) % 16, lane);
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
                              u8 *slot, i32 row, i32 lane) {
        u32 p[(T / 8 + 1) / 2 * 2][TILES];
        block_softmax<V_BITS, T>(x, s, p, slot + V<T>::BYTES, lane);
        if constexpr (V_BITS == 16)
            block_values_half<T>(x, p, slot, STREAM ? source.tokens - row : T, lane);
        else
            block_values<V_BITS, T>(x, p, slot, lane);
    }
};
