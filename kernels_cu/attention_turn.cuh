/* RoPE for K that is stored as it was before it. The key of token j of a block at position p is R(p + j) x = R(p) R(j) x, so
 * q.key = (R(-p) q).(R(j) x): a warp turns the query once per block of tokens, by the row of the run's tables that comes
 * with the block, and every key by its place in the block, for which one small table serves all blocks. The channels d and
 * d + D/2 that RoPE pairs are the two halves of operand A's columns here, not neighbours. */

#define PLACES ((CHUNK < BLOCK_TOKENS ? CHUNK : BLOCK_TOKENS) / 8) /* octets of tokens */

/* cos, sin of places 8 * r + g, channels 8 * j + 2 * t + {0, 1}: halves */
__shared__ uint2 places[PLACES][D / 16][WARP];
/* R(-p) q of each warp's block as operand B, without the columns that have no head: channels as above, then D/2 on */
__shared__ uint2 turned[WARPS][D / 16][GROUP * 4];

/* All threads call it, and __syncthreads() after it. cos, sin: rows 0, 1, ... of the run's tables. */
INLINE void prepare_places(const float *cos, const float *sin) {
#pragma unroll 1
    for (i32 i = this_thread(); i < PLACES * (D / 16) * WARP; i += THREADS) {
        const i32 lane = i % WARP, j = i / WARP % (D / 16), token = i / (D / 16 * WARP) * 8 + lane / 4;
        const i32 at = token * (D / 2) + 8 * j + lane % 4 * 2;
        places[0][0][i] = make_uint2(pack_half2(cos[at], cos[at + 1]), pack_half2(sin[at], sin[at + 1]));
    }
}

/* rows: cosines, then sines of the position of the block's first token. */
INLINE void turn_query(const u8 *rows, i32 warp, i32 lane) {
    for (i32 i = lane; i < GROUP * (D / 4); i += WARP) {
        const i32 t = i % 4, head = i / 4 % GROUP, j = i / 4 / GROUP, d = 8 * j + 2 * t;
        const float2 a = *(const float2 *)(query_rows[head] + d), b = *(const float2 *)(query_rows[head] + D / 2 + d);
        const float2 c = ((const float2 *)rows)[d / 2], s = ((const float2 *)rows)[D / 4 + d / 2];
        turned[warp][j][head * 4 + t] = make_uint2(pack_half2(a.x * c.x + b.x * s.x, a.y * c.y + b.y * s.y),
                                                   pack_half2(b.x * c.x - a.x * s.x, b.y * c.y - a.y * s.y));
    }
    __syncwarp();
}

INLINE uint2 turned_query(i32 j, i32 n, i32 warp, i32 lane) {
    return 32 * n + lane < GROUP * 4 ? turned[warp][j][32 * n + lane] : make_uint2(0, 0);
}

/* (a, b) turned by the angle of cos, sin */
INLINE void turn(u32 &a, u32 &b, uint2 angle) {
    const u32 x = a;
    a = fma_half2(x, angle.x, negative_half2(mul_half2(b, angle.y)));
    b = fma_half2(b, angle.x, mul_half2(x, angle.y));
}

/* Scores of T tokens. pair(r, octet): the halves of token octet r and channel octet `octet`, up to what scale(r) undoes
 * for token 8 * r + g. */
template <int T, class Pair, class Scale>
INLINE void turned_scores(float (&s)[T / 8][TILES][LANE_HEADS], i32 lane, Pair pair, Scale scale) {
    constexpr int R = T / 8, M = (R + 1) / 2;
    const i32 warp = threadIdx.x / WARP, t = lane % 4;
    float c[M][TILES][4] = {};
#pragma unroll
    for (i32 j = 0; j < D / 16; j++) {
        u32 a[M][4];
#pragma unroll
        for (i32 r = 0; r < 2 * M; r++) {
            u32 first = 0, second = 0;
            if (r < R) {
                first = pair(r, j), second = pair(r, j + D / 16);
                turn(first, second, places[r][j][lane]);
            }
            a[r / 2][r % 2] = first, a[r / 2][r % 2 + 2] = second;
        }
#pragma unroll
        for (i32 n = 0; n < TILES; n++) {
            const uint2 b = turned_query(j, n, warp, lane);
#pragma unroll
            for (i32 m = 0; m < M; m++) mma_half(c[m][n], a[m], b.x, b.y);
        }
    }
#pragma unroll
    for (i32 n = 0; n < TILES; n++)
#pragma unroll
        for (i32 h = 0; h < LANE_HEADS; h++) {
            const float unit = query.unit[8 * n + 2 * t + h];
#pragma unroll
            for (i32 r = 0; r < R; r++) s[r][n][h] = c[r / 2][n][r % 2 * 2 + h] * (unit * scale(r));
        }
}
