/* The "kvquant" family (runtime/formats/kvquant.py): codes name the levels of a calibration, outliers lie in a sparse
 * store of their chunk, K is kept as it was before RoPE. Codes of K and of V lie in K's order (formats.cuh); a word of
 * V's codes is transposed as it is. Pairs of codes become pairs of FP16 values in the registers that are operand A: the
 * lanes of a warp hold the levels, and a lane asks the one that its code names. What an outlier is beyond what its code
 * says goes to a row of zeros in shared memory; K's rows are added before the turn, V's are one more matrix instruction.
 * V's centres and half ranges of a block of T tokens, shared by all heads: centres, token 8 * i + g at
 * g * (T / 8) + i, then the half ranges in the same order. */

/* Entries of a sparse store: u16 token * D + channel, FP16 value, in the order of the first. */
#define CAPACITY ((CHUNK * D + 79) / 80)

/* Before RoPE a value reaches sqrt(2) times FP16's largest number, and turning adds two of them: K is decoded to a
 * quarter. An outlier of V may lie on the other side of zero than what its code says: what it is beyond that is halved,
 * and p doubled. */
#define K_UNIT 0.25f

#define BELOW_LARGEST 0x7bfe7bfeu /* FP16's largest number but one, 65472, twice */

struct Family {
    static constexpr int K_WHOLE = 4 + 4 * CAPACITY, K_TOKEN = 0, V_WHOLE = K_WHOLE, V_TOKEN = 0, V_SHARED = 4;
};

__shared__ u16 levels[2][28]; /* of K and of V, as halves: of 2, 3 and 4 bits */
/* K's half range and centre of the channels 2 * i and 2 * i + 1, times K_UNIT */
__shared__ uint2 channels[D / 2];

/* All threads call it, and __syncthreads() after it. head: of the sequence's KV heads. */
INLINE void prepare_levels(const SequenceData &data, i32 head) {
#pragma unroll 1
    for (i32 i = this_thread(); i < 2 * 28; i += THREADS)
        levels[0][i] = float_to_half(i < 28 ? data.k_levels[i] : data.v_levels[i - 28]);
#pragma unroll 1
    for (i32 i = this_thread(); i < D / 2; i += THREADS) {
        const float2 half = ((const float2 *)(data.k_half + head * D))[i];
        const float2 centre = ((const float2 *)(data.k_centre + head * D))[i];
        channels[i] = make_uint2(pack_half2(half.x * K_UNIT, half.y * K_UNIT),
                                 pack_half2(centre.x * K_UNIT, centre.y * K_UNIT));
    }
}

/* Where a lane's word lies in a slot, in words (see load_words): word `word` of the group'th R * UNIT_WORDS. */
template <class C> INLINE u32 place_of(u32 group, u32 word, u32 lane) {
    constexpr u32 N = C::R * C::UNIT_WORDS, FOURS = C::WORDS / 4 * 4, TWOS = C::WORDS / 2 * 2;
    if (C::FOLDED) __builtin_assume(word < N);
    if (N % 4 == 0 && C::WORDS == FOURS) return (group * N + word / 4 * 4) * WARP + lane * 4 + word % 4;
    word += group * N;
    return word < FOURS  ? word / 4 * 4 * WARP + lane * 4 + word % 4
           : word < TWOS ? FOURS * WARP + lane * 2 + word % 2
                         : TWOS * WARP + lane;
}

/* Codes of two token octets that a lane holds, of K or, each word transposed, of V; decode(): pairs of values. ROLLED: the
 * loop over a block's tokens need not be unrolled, which halves the code at the same speed; else all codes are held. */
template <bool TRANSPOSED, int BITS, int T> struct Block {
    typedef Codes<true, BITS, T> C;
    static constexpr bool ROLLED = C::FOLDED && C::R % 2 == 0;
    static constexpr int STEPS = (C::R + 1) / 2, WORDS = ROLLED ? C::WORDS / STEPS : C::WORDS;
    u32 words[WORDS > 0 ? WORDS : 1];
    u32 level; /* this lane's: the level of the code lane % 2^BITS */
    const u8 *slot;
    i32 lane;

    INLINE Block(const u8 *slot, i32 lane)
        : level(levels[TRANSPOSED][(1 << BITS) - 4 + lane % (1 << BITS)]), slot(slot), lane(lane) {}

    /* The codes of the token octets 2 * step and 2 * step + 1. */
    INLINE void load(u32 step) {
        if constexpr (ROLLED) {
            constexpr u32 N = 2 * C::UNIT_WORDS; /* words of UNIT channel octets, side by side */
            __builtin_assume(step < STEPS);
#pragma unroll
            for (u32 i = 0; i < WORDS; i += 2) {
                const uint2 two = *(const uint2 *)((const u32 *)slot + place_of<C>(i / N, step * N + i % N, lane));
                words[i] = two.x, words[i + 1] = two.y;
            }
        } else
            load_words<C::WORDS>(words, slot, lane);
        if (TRANSPOSED)
#pragma unroll
            for (i32 i = 0; i < WORDS; i++) words[i] = transpose(words[i]);
    }

    /* level * half + centre of both values of a pair; of the token octet 2 * step + i. */
    INLINE u32 decode(i32 octet, i32 step, i32 i, u32 half, u32 centre) const {
        const i32 pair = ROLLED ? (octet / C::UNIT * 2 + i) * C::UNIT + octet % C::UNIT : C::pair(octet, 2 * step + i);
        const u32 *const unit = words + pair / C::UNIT * C::UNIT_WORDS;
        const i32 at = pair % C::UNIT;
        u32 codes; /* the lowest bits of its halves */
        if (!ROLLED && pair >= C::IN_UNITS) {
            codes = C::extract_rest(slot, pair - C::IN_UNITS, lane);
            if (TRANSPOSED) codes = transpose(codes);
        } else if (BITS == 3 && at == 15)
            codes = C::extract(unit, at) >> C::bit(octet);
        else
            codes = BITS == 3 ? unit[at / 5] >> 3 * (at % 5) : unit[0] >> BITS * at;
        const u32 second = fma_half2(from_lane<1 << BITS>(level << 16, codes >> 16), half, centre);
        return fma_half2(from_lane<1 << BITS>(level, codes), half, second);
    }
};

/* The code of one value in a slot; of_lane: whose pair it is, side: which of the two. */
template <class C, int BITS> INLINE u32 code_at(const u8 *slot, u32 octet, u32 r, u32 of_lane, u32 side) {
    __builtin_assume(r < C::R && octet < C::OCTETS);
    const u32 pair = C::pair(octet, r), at = (C::FOLDED ? octet : pair) % C::UNIT;
    if (C::REST && pair >= C::IN_UNITS)
        return C::extract_rest(slot, pair - C::IN_UNITS, of_lane) >> 16 * side & ((1 << BITS) - 1);
    const u32 group = C::FOLDED ? octet / C::UNIT : 0, first = (C::FOLDED ? r : pair / C::UNIT) * C::UNIT_WORDS;
    const auto half = [&](u32 i) { return (u32)((const u16 *)slot)[2 * place_of<C>(group, first + i, of_lane) + side]; };
    if (BITS != 3) return half(0) >> at * BITS & ((1 << BITS) - 1);
    return at == 15 ? half(0) >> 15 | half(1) >> 15 << 1 | half(2) >> 15 << 2 : half(at / 5) >> at % 5 * 3 & 7;
}

/* Which of a store's entries is the first of token `token` or a later one. All of a warp. */
INLINE i32 first_entry(const u8 *store, i32 token, i32 lane) {
    i32 at = 0;
    const i32 kept = *(const u16 *)store;
    for (i32 i = lane; CHUNK > BLOCK_TOKENS && token && i - lane < kept; i += WARP)
        at += __popc(__ballot_sync(FULL, i < kept && (((const u32 *)store)[1 + i] & 0xffff) < token * D));
    return at;
}

/* The rows of 16 tokens, which are zeros before and after each use. */
INLINE void clear_rows(u8 *rows, i32 lane) {
    for (i32 i = lane; i < ROW_BYTES; i += WARP) ((uint4 *)rows)[i] = make_uint4(0, 0, 0, 0);
}

/* Put beyond(token in the rows, channel, FP16 value) of each outlier of the 16 tokens from `token` of the chunk on into the
 * rows. entry: the first of theirs in the store; returns the first of later tokens. All of a warp. */
template <class Beyond> INLINE i32 place_outliers(u8 *rows, const u8 *store, i32 entry, i32 token, i32 lane, Beyond beyond) {
    const i32 kept = *(const u16 *)store;
    u32 mine;
    do {
        const u32 word = entry + lane < kept ? ((const u32 *)store)[1 + entry + lane] : ~0u;
        const u32 at = (word & 0xffff) - token * D;
        mine = __ballot_sync(FULL, at < 16 * D);
        if (at < 16 * D)
            *(u16 *)(rows + 2 * at + at / D * (ROW_BYTES - 2 * D)) = (u16)beyond(at / D, at % D, word >> 16);
        entry += __popc(mine);
    } while (mine == FULL);
    __syncwarp();
    return entry;
}

/* Zeros there again. All of a warp. */
INLINE void remove_outliers(u8 *rows, const u8 *store, i32 entry, i32 end, i32 token, i32 lane) {
    __syncwarp();
#pragma unroll 1
    for (i32 i = entry + lane; i < end; i += WARP) {
        const u32 at = (((const u32 *)store)[1 + i] & 0xffff) - token * D;
        *(u16 *)(rows + 2 * at + at / D * (ROW_BYTES - 2 * D)) = 0;
    }
    __syncwarp();
}

/* store: the chunk's sparse store; first: the block's first token in the chunk; rows: see clear_rows. */
template <int BITS, int T>
INLINE void block_scores(float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, const u8 *store, i32 lane, i32 first,
                         u8 *rows) {
    typedef Block<false, BITS, T> B;
    constexpr int R = T / 8;
    B block(slot, lane);
    const u32 address = matrix_address(rows, lane & 8, 0, 16, lane) + (lane & 16 ? D : 0);
    i32 entry = first_entry(store, first, lane);
#pragma unroll(B::ROLLED ? 1 : B::STEPS)
    for (u32 m = 0; m < B::STEPS; m++) {
        const i32 next = place_outliers(rows, store, entry, first + 16 * m, lane, [&](u32 token, u32 d, u32 value) {
            const u32 code = code_at<typename B::C, BITS>(slot, d / 8, 2 * m + token / 8, token % 8 * 4 + d % 8 / 2, d % 2);
            const u16 *const of = (const u16 *)(channels + d / 2) + d % 2;
            const u32 coded = fma_half2(levels[0][(1 << BITS) - 4 + code], of[0], of[2]);
            return fma_half2(value, float_to_half(K_UNIT), negative_half2(coded));
        });
        float c[TILES][4] = {};
        block.load(m);
#pragma unroll
        for (i32 j = 0; j < D / 16; j++) {
            u32 a[4];
            load_matrix(a, address + 16 * j);
#pragma unroll
            for (i32 o = 0; o < 2; o++) {
                const i32 octet = j + o * (D / 16);
                const uint2 by = channels[4 * octet + lane % 4];
#pragma unroll
                for (i32 i = 0; i < 2; i++)
                    if (R % 2 == 0 || 2 * m + i < R)
                        a[2 * o + i] = add_half2(a[2 * o + i], block.decode(octet, m, i, by.x, by.y));
            }
            turn(a[0], a[2], places[2 * m][j][lane]);
            if (R % 2 == 0 || 2 * m + 1 < R) turn(a[1], a[3], places[2 * m + 1][j][lane]);
#pragma unroll
            for (i32 n = 0; n < TILES; n++) {
                const uint2 b = turned_query(j, n, threadIdx.x / WARP, lane);
                mma_half(c[n], a, b.x, b.y);
            }
        }
        remove_outliers(rows, store, entry, next, first + 16 * m, lane);
        entry = next;
#pragma unroll
        for (i32 n = 0; n < TILES; n++)
#pragma unroll
            for (i32 h = 0; h < LANE_HEADS; h++) {
                const float unit = query.unit[8 * n + 2 * (lane % 4) + h] / K_UNIT;
#pragma unroll
                for (i32 r = 0; r < R; r++)
                    if (r / 2 == m) s[r][n][h] = c[n][r % 2 * 2 + h] * unit;
            }
    }
}

/* V's half ranges, made so small that no value overflows FP16, for all their roundings. */
INLINE u32 within(u32 centre, u32 half) {
    return min_half2(half, max_half2(add_half2(BELOW_LARGEST, centre | 0x80008000), 0));
}

/* ranges: the block's centres and half ranges. */
template <int BITS, int T>
INLINE void add_values(Running &x, float (&s)[T / 8][TILES][LANE_HEADS], const u8 *slot, const u8 *store, i32 lane,
                       i32 first, u8 *rows, const u8 *ranges) {
    typedef Block<true, BITS, T> B;
    constexpr int R = T / 8;
    const u32 one_half = pack_half2(0.5f, 0.5f);
    u32 p[(R + 1) / 2 * 2][TILES];
    block_softmax<16, T>(x, s, p, 0, lane);
    B block(slot, lane);
    const u32 address = matrix_address(rows, lane & 16, lane & 8, 16, lane);
    i32 entry = first_entry(store, first, lane);
#pragma unroll(B::ROLLED ? 1 : B::STEPS)
    for (u32 k = 0; k < B::STEPS; k++) {
        block.load(k);
        const i32 next = place_outliers(rows, store, entry, first + 16 * k, lane, [&](u32 token, u32 d, u32 value) {
            const u32 code = code_at<typename B::C, BITS>(slot, d / 8, 2 * k + token / 8, token % 8 * 4 + d % 8 / 2, d % 2);
            const u16 *const of = (const u16 *)ranges + token % 8 * R + 2 * k + token / 8;
            const u32 coded = fma_half2(levels[1][(1 << BITS) - 4 + code], within(of[0], of[T]), of[0]);
            return fma_half2(value, one_half, negative_half2(mul_half2(coded, one_half)));
        });
        u32 half[2], centre[2], once[2][TILES], twice[2][TILES];
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            if (R % 2 == 0 || 2 * k + i < R) { /* of tokens 8 * (2 * k + i) + 2 * t + {0, 1} */
                const u16 *const of = (const u16 *)ranges + lane % 4 * 2 * R + 2 * k + i;
                centre[i] = of[0] | of[R] << 16, half[i] = within(centre[i], of[T] | of[T + R] << 16);
            }
#pragma unroll
            for (i32 n = 0; n < TILES; n++) {
#pragma unroll
                for (i32 r = i; r < 2 * B::STEPS; r += 2)
                    if (r / 2 == k) once[i][n] = p[r][n];
                twice[i][n] = add_half2(once[i][n], once[i][n]);
            }
        }
#pragma unroll
        for (i32 m = 0; m < D / 16; m++) {
            u32 a[4], beyond[4];
            load_matrix_transposed(beyond, address + 32 * m);
#pragma unroll
            for (i32 i = 0; i < 2; i++)
#pragma unroll
                for (i32 o = 0; o < 2; o++)
                    a[o + 2 * i] = R % 2 == 0 || 2 * k + i < R ? block.decode(2 * m + o, k, i, half[i], centre[i]) : 0;
#pragma unroll
            for (i32 n = 0; n < TILES; n++) {
                mma_half(x.out[m][n], a, once[0][n], once[1][n]);
                mma_half(x.out[m][n], beyond, twice[0][n], twice[1][n]);
            }
        }
        remove_outliers(rows, store, entry, next, first + 16 * k, lane);
        entry = next;
    }
}

template <int V_BITS> INLINE void finish_segment(Running &, i32) {}
