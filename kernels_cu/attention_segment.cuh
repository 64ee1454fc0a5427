#include "attention_block.cuh"

/* How a segment of one format is cut into blocks, and this lane's place in copying them: warp w copies and attends to
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
    static constexpr int K_SLOT = K_BYTES + (K_BITS < 16 ? K_META : 0);
    static constexpr int V_SLOT = V_BITS == 16 ? HALF_V_BYTES(FULL_T) : V_BYTES + 2 * FULL_T;
    static constexpr int SLOT = ((K_SLOT > V_SLOT ? K_SLOT : V_SLOT) + 15) / 16 * 16;
    static constexpr int SLOTS = RING / SLOT;
    static_assert(SLOTS >= 2, "RING holds fewer than two pieces");

    const u8 *k, *k_meta, *v, *v_meta; /* of the next block to copy; codes and metadata at this lane's place */
    i32 chunk, part, chunks, step;     /* the next block; chunks of the segment; from chunk to chunk */

    INLINE Blocks(const Source &source, i32 warp, i32 lane) {
        step = STREAM ? WARPS * source.parts : WARPS; /* only a tail has parts */
        chunk = first(source, warp);
        chunks = STREAM ? (source.tokens + UNIT - 1) / UNIT : source.n;
        part = 0;
        k = source.k_codes + (i64)chunk * K_CHUNK + (K_BITS < 16 ? 16 * lane : 0);
        v = source.v_codes + (i64)chunk * V_CHUNK + (V_BITS < 16 ? 16 * lane : 0);
        k_meta = source.k_meta + (i64)chunk * K_META + 4 * lane;
        v_meta = source.v_meta + (i64)chunk * V_META + 4 * lane;
    }

    static INLINE i32 first(const Source &source, i32 warp) { return STREAM ? WARPS * source.part + warp : warp; }

    /* Start copying K or V of the next block, if there is one; V moves on to the block after. */
    INLINE void copy(const Source &source, u32 slot, bool is_k, i32 lane) {
        if (chunk >= chunks) return;
        if (LAST_T != FULL_T && part == PER_CHUNK - 1)
            copy_block<LAST_T>(source, slot, is_k, lane);
        else
            copy_block<FULL_T>(source, slot, is_k, lane);
        const bool last = part == PER_CHUNK - 1;
        if (is_k) {
            k += last ? (i64)step * K_CHUNK - (PER_CHUNK - 1) * K_BYTES : K_BYTES;
            if (last) k_meta += step * K_META;
        } else {
            v += last ? (i64)step * V_CHUNK - (PER_CHUNK - 1) * V_BYTES : V_BYTES;
            v_meta += last ? step * V_META - (PER_CHUNK - 1) * 2 * FULL_T : 2 * FULL_T;
            part = last ? 0 : part + 1;
            if (last) chunk += step;
        }
    }

    template <int T> INLINE void copy_block(const Source &source, u32 slot, bool is_k, i32 lane) {
        const i32 valid = STREAM ? source.tokens - chunk * UNIT : T;
        if (is_k && K_BITS == 16) {
            if (valid >= T)
                copy_half_k<T, true>(slot, k, T, lane);
            else
                copy_half_k<T, false>(slot, k, valid, lane);
        } else if (is_k) {
            copy_codes<K<T>::BYTES>(slot, k, lane);
            copy_words<K_META / 4>(slot + K<T>::BYTES, k_meta, lane);
        } else if (V_BITS == 16) {
            if (valid >= T)
                copy_half_v<T, true>(slot, v, T, lane);
            else
                copy_half_v<T, false>(slot, v, valid, lane);
        } else {
            copy_codes<V<T>::BYTES>(slot, v, lane);
            copy_words<T / 2>(slot + V<T>::BYTES, v_meta, lane);
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
    static INLINE void scores(float (&s)[T / 8][TILES][LANE_HEADS], const Source &source, const u8 *slot, i32 row,
                              i32 lane) {
        if constexpr (K_BITS == 16)
            block_scores_half<T>(s, slot, lane);
        else
            block_scores<K_BITS, T>(s, slot, lane);
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
    static INLINE void values(Running &x, float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, i32 lane) {
        u32 p[(T / 8 + 1) / 2 * 2][TILES];
        block_softmax<V_BITS, T>(x, s, p, slot + V<T>::BYTES, lane);
        if constexpr (V_BITS == 16)
            block_values_half<T>(x, p, slot, lane);
        else
            block_values<V_BITS, T>(x, p, slot, lane);
    }
};
