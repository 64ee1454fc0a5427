/* Copies to a warp's queue: codes, metadata and FP16 rows, each lane its share. `to` is a shared_address(). */
#include "attention.cuh"

/* `from` is this lane's: 16 or 4 bytes per lane further than the first one's. */
template <int BYTES> INLINE void copy_codes(u32 to, const u8 *from, i32 lane) {
#pragma unroll
    for (i32 i = 0; i < BYTES; i += 16 * WARP)
        if (i + 16 * WARP <= BYTES || i + 16 * lane < BYTES) copy_bytes_async<16>(to + 16 * lane + i, from + i);
}

template <int WORDS> INLINE void copy_words(u32 to, const u8 *from, i32 lane) {
#pragma unroll
    for (i32 i = 0; i < WORDS; i += WARP)
        if (i + WARP <= WORDS || i + lane < WORDS) copy_bytes_async<4>(to + 4 * lane + 4 * i, from + 4 * i);
}

/* FP16 rows. K: a lane reads K_VECTOR words of octet r, vector i of its row; V: V_VECTOR channels (vector n) of token
 * 8 * i + 2 * t + e. Rows of 128 bytes and more (LINEAR) are copied as they lie in memory; then an XOR (K) or a gap
 * of two vectors (V) keeps bank conflicts out of both sides. In units of vectors. */
#define LINEAR (D % 64 == 0)
#define K_VECTORS (D / (8 * K_VECTOR))
#define V_VECTORS (D / (8 * V_VECTOR))
#define V_GAP (LINEAR ? 16 * V_VECTORS + 2 : 1)                     /* from t to t + 1 */
#define V_OCTET (LINEAR ? 64 * V_VECTORS + 6 : 64 * V_VECTORS)      /* from i to i + 1 */
#define HALF_V_BYTES(tokens) ((tokens) / 8 * V_OCTET * 2 * V_VECTOR)

INLINE i32 half_k_at(i32 r, i32 i, i32 lane) {
    return (r * K_VECTORS + i) * WARP + (LINEAR ? lane ^ i % 2 * 4 : lane);
}

INLINE i32 half_v_at(i32 i, i32 n, i32 e, i32 lane) {
    return i * V_OCTET + (LINEAR ? lane % 4 * V_GAP + (n * 2 + e) * 8 + lane / 4 : (n * 2 + e) * WARP + lane);
}

/* T rows from `from`, zeros from row `valid` on; WHOLE: all are valid. */
template <int T, bool WHOLE> INLINE void copy_half_k(u32 to, const u8 *from, i32 valid, i32 lane) {
    constexpr int BYTES = 4 * K_VECTOR, LANES = LINEAR ? D / 8 : 4; /* LANES side by side on a row */
    constexpr int ROWS = LINEAR ? WARP / LANES : 8;                  /* of a step, if it has whole rows */
#pragma unroll
    for (i32 n = 0; n < T / 8 * K_VECTORS; n++) {
        const i32 row = LINEAR ? n * ROWS : n / K_VECTORS * 8, more = lane / LANES; /* their sum is the row */
        const i32 i = LINEAR ? lane % LANES / 4 : n % K_VECTORS, t = lane % 4, odd = row % 2;
        const i32 swizzled = (4 * odd + 4 * more + t) ^ i % 2 * 4;
        const i32 at = LINEAR ? (row / 8 * K_VECTORS + i) * WARP + (row % 8 - odd) * 4 + swizzled : n * WARP + lane;
        const u8 *source = from + row * 2 * D + more * 2 * D + (i * 4 + t) * BYTES;
        if (WHOLE)
            copy_bytes_async<BYTES>(to + at * BYTES, source);
        else
            copy_bytes_async<BYTES>(to + at * BYTES, row + more < valid ? source : from, row + more < valid);
    }
}

template <int T, bool WHOLE> INLINE void copy_half_v(u32 to, const u8 *from, i32 valid, i32 lane) {
    constexpr int BYTES = 2 * V_VECTOR, LANES = LINEAR ? D / 8 : 8, ROWS = LINEAR ? WARP / LANES : 4;
#pragma unroll
    for (i32 k = 0; k < T / 8 * V_VECTORS * 2; k++) {
        /* LINEAR: rows row + more. Else: rows row + 2 * more. */
        const i32 row = LINEAR ? k * ROWS : k / (V_VECTORS * 2) * 8 + k % 2;
        const i32 more = LINEAR ? lane / LANES : lane % 4 * 2;
        const i32 n = LINEAR ? lane % LANES / 8 : k / 2 % V_VECTORS, g = LINEAR ? lane % 8 : lane / 4;
        const i32 pair = row % 8 / 2 * V_GAP + more / 2 * V_GAP + (n * 2 + row % 2 + more % 2) * 8 + g;
        const i32 at = row / 8 * V_OCTET + (LINEAR ? pair : (n * 2 + k % 2) * WARP + lane);
        const u8 *source = from + row * 2 * D + more * 2 * D + (n * 8 + g) * BYTES;
        if (WHOLE)
            copy_bytes_async<BYTES>(to + at * BYTES, source);
        else
            copy_bytes_async<BYTES>(to + at * BYTES, row + more < valid ? source : from, row + more < valid);
    }
}
