/* The "kvquant" family (runtime/formats/kvquant.py): codes name the levels of a calibration, outliers lie in a sparse store of
 * their chunk, K is kept as it was before RoPE. No product of codes will do here: a warp decodes 16 tokens at a time to rows
 * of FP16 in shared memory, puts the outliers over them and goes on as with FP16 rows, but for K's RoPE. Codes of K and of
 * V lie in K's order (formats.cuh). V's centres and half ranges of a block of T tokens, shared by all heads: centres,
 * token 8 * i + g at g * (T / 8) + i, then the half ranges in the same order. */

#define CAPACITY ((CHUNK * D + 79) / 80) /* entries of a sparse store: u16 token * D + channel, FP16 value */

/* Before RoPE a value reaches sqrt(2) times FP16's largest number, and turning adds two of them: K is decoded to a quarter. */
#define K_UNIT 0.25f

struct Family {
    static constexpr int K_WHOLE = 4 + 4 * CAPACITY, K_TOKEN = 0, V_WHOLE = K_WHOLE, V_TOKEN = 0, V_SHARED = 4;
};

/* For K and V each the levels of two codes, first + (second << bits), as halves; widths 2, 3 and 4 one behind another. */
#define PAIR_LEVELS (16 + 64 + 256)
__shared__ u32 levels[2][PAIR_LEVELS];
/* K's half range and centre of the channels 2 * i and 2 * i + 1, times K_UNIT */
__shared__ uint2 channels[D / 2];

/* All threads call it, and __syncthreads() after it. head: of the sequence's KV heads. */
INLINE void prepare_levels(const SequenceData &data, i32 head) {
#pragma unroll 1
    for (i32 i = this_thread(); i < 2 * PAIR_LEVELS; i += THREADS) {
        const float *const of = i < PAIR_LEVELS ? data.k_levels : data.v_levels;
        const i32 at = i % PAIR_LEVELS, bits = at < 16 ? 2 : at < 80 ? 3 : 4, pair = at - (at < 16 ? 0 : at < 80 ? 16 : 80);
        const float *const mine = of + (1 << bits) - 4;
        levels[0][i] = pack_half2(mine[pair & ((1 << bits) - 1)], mine[pair >> bits]);
    }
#pragma unroll 1
    for (i32 i = this_thread(); i < D / 2; i += THREADS) {
        const float2 half = ((const float2 *)(data.k_half + head * D))[i];
        const float2 centre = ((const float2 *)(data.k_centre + head * D))[i];
        channels[i] = make_uint2(pack_half2(half.x * K_UNIT, half.y * K_UNIT), pack_half2(centre.x * K_UNIT, centre.y * K_UNIT));
    }
}

#define LARGEST 0x7bff7bffu /* 65504 twice */

/* The pairs of one lane, two octets of tokens from octet `r` on, as values in rows of FP16. line(r, octet): half ranges and
 * centres of such a pair. CLAMP: where their roundings may lead beyond FP16's range. Tokens that the block has not become zeros, for 0 * V must be 0. */
template <class C, int BITS, bool CLAMP, class Line>
INLINE void decode_rows(u8 *rows, const u32 *words, const u8 *slot, const u32 *table, i32 r, i32 lane, Line line) {
    const u32 *const mine = table + (BITS == 2 ? 0 : BITS == 3 ? 16 : 80);
#pragma unroll
    for (i32 octet = 0; octet < C::OCTETS; octet++)
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            u32 value = 0;
            if (r + i < C::R) {
                const u32 low = pair_at<C>(words, slot, C::pair(octet, r + i), lane) >> C::bit(octet);
                const uint2 by = line(r + i, octet);
                value = fma_half2(mine[(low | low >> (16 - BITS)) & ((1 << 2 * BITS) - 1)], by.x, by.y);
                if (CLAMP) value = max_half2(min_half2(value, LARGEST), LARGEST | 0x80008000);
            }
            ((u32 *)(rows + (8 * i + lane / 4) * ROW_BYTES))[4 * octet + lane % 4] = value;
        }
}

/* Over the rows, which all lanes have written, the outliers of the 16 tokens of the chunk from `first` on, times `unit`, an
 * FP16 number. */
INLINE void place_outliers(u8 *rows, const u8 *store, i32 first, u32 unit, i32 lane) {
    __syncwarp();
    const i32 kept = *(const u16 *)store;
#pragma unroll 1
    for (i32 i = lane; i < kept; i += WARP) {
        const u32 entry = ((const u32 *)store)[1 + i];
        const u32 token = (entry & 0xffff) / D - first, channel = (entry & 0xffff) % D;
        if (token < 16) *(u16 *)(rows + token * ROW_BYTES + 2 * channel) = (u16)mul_half2(entry >> 16, unit);
    }
    __syncwarp();
}

/* store: the chunk's sparse store; first: the block's first token in the chunk; rows: room for 16 of FP16. */
template <int BITS, int T>
INLINE void block_scores(float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, const u8 *store, i32 lane, i32 first,
                         u8 *rows) {
    typedef Codes<true, BITS, T> C;
    constexpr int R = T / 8;
    u32 words[C::WORDS > 0 ? C::WORDS : 1];
    load_words<C::WORDS>(words, slot, lane);
    const u32 address = matrix_address(rows, lane & 8, 0, 16, lane) + (lane & 16 ? D : 0);
#pragma unroll
    for (i32 m = 0; m < (R + 1) / 2; m++) {
        decode_rows<C, BITS, false>(rows, words, slot, levels[0], 2 * m, lane,
                             [&](i32, i32 octet) { return channels[4 * octet + lane % 4]; });
        place_outliers(rows, store, first + 16 * m, float_to_half(K_UNIT), lane);
        float c[TILES][4] = {};
#pragma unroll
        for (i32 j = 0; j < D / 16; j++) {
            u32 a[4];
            load_matrix(a, address + 16 * j);
            turn(a[0], a[2], places[2 * m][j][lane]);
            if (2 * m + 1 < R) turn(a[1], a[3], places[2 * m + 1][j][lane]);
#pragma unroll
            for (i32 n = 0; n < TILES; n++) {
                const uint2 b = turned_query(j, n, threadIdx.x / WARP, lane);
                mma_half(c[n], a, b.x, b.y);
            }
        }
        __syncwarp(); /* the rows are free again */
#pragma unroll
        for (i32 n = 0; n < TILES; n++)
#pragma unroll
            for (i32 h = 0; h < LANE_HEADS; h++) {
                const float unit = query.unit[8 * n + 2 * (lane % 4) + h] / K_UNIT;
                s[2 * m][n][h] = c[n][h] * unit;
                if (2 * m + 1 < R) s[2 * m + 1][n][h] = c[n][2 + h] * unit;
            }
    }
}

/* ranges: the block's centres and half ranges. */
template <int BITS, int T>
INLINE void add_values(Running &x, float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, const u8 *store, i32 lane, i32 first,
                       u8 *rows, const u8 *ranges) {
    typedef Codes<true, BITS, T> C; /* the order of K's codes, in the room of V's */
    constexpr int R = T / 8;
    u32 p[(R + 1) / 2 * 2][TILES], words[C::WORDS > 0 ? C::WORDS : 1];
    u16 centre[R], half[R];
    block_softmax<16, T>(x, s, p, 0, lane);
    load_words<C::WORDS>(words, slot, lane);
    load_halves(centre, ranges, lane / 4);
    load_halves(half, ranges + 2 * T, lane / 4);
    const u32 address = matrix_address(rows, lane & 16, lane & 8, 16, lane);
#pragma unroll
    for (i32 k = 0; k < (R + 1) / 2; k++) {
        decode_rows<C, BITS, true>(rows, words, slot, levels[1], 2 * k, lane, [&](i32 r, i32) {
            return make_uint2(half[r] * 0x00010001u, centre[r] * 0x00010001u);
        });
        place_outliers(rows, store, first + 16 * k, float_to_half(1), lane);
#pragma unroll
        for (i32 m = 0; m < D / 16; m++) {
            u32 a[4];
            load_matrix_transposed(a, address + 32 * m);
#pragma unroll
            for (i32 n = 0; n < TILES; n++) mma_half(x.out[m][n], a, p[2 * k][n], p[2 * k + 1][n]);
        }
        __syncwarp();
    }
}

template <int V_BITS> INLINE void finish_segment(Running &, i32) {}
