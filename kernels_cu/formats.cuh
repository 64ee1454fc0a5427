/* How quantized codes lie in memory: what a lane of a warp reads is what it feeds to mma.m16n8k16, without shuffles.
 * kernels_cu/layout.py states the same for the host.
 *
 * A chunk's codes are cut into blocks of 32 tokens, the last one may have 8, 16 or 24. Lane l = 4 * g + t of a warp
 * needs the operand A of m16n8k16 as registers of two halves, here called pairs:
 *   K, pair (j, r):  token 8 * r + g, channels 8 * j + 2 * t + {0, 1}   A = tokens x channels, D / 8 by T / 8 pairs
 *   V, pair (o, i):  channel 8 * o + g, tokens 8 * i + 2 * t + {0, 1}   A = channels x tokens
 * A lane's pairs are numbered (k_pair, v_pair) and stored in units: 16 / bits pairs in one word (2, 4, 8 bits) or 16
 * pairs in three (3 bits). A half-word holds the codes of one side of the unit's pairs from the lowest bit on; at 3 bits
 * five codes, and its top bit is bit w (w: 0, 1, 2, which word) of the unit's last code.
 * So `word & mask` is a pair already: a code at bit s of a half is the subnormal FP16 number code * 2^(s - 24). Where
 * s is the same for all pairs that meet one channel (K) or token (V), 2^-s is folded into the other operand.
 * A lane's words go to memory as vectors of four (then two, then one), lanes side by side. Pairs that fill no unit
 * follow, one after another: 2 * bits bits per lane, lanes in order.
 *
 * Metadata of a K chunk: for every 16 channels and every t, 4 scales and 4 zeros (plus 128) of the channels
 * 16 * step + {0, 1, 8, 9} + 2 * t; then the two BF16 bases. Of a V block: BF16 scales, token 8 * i + g at
 * g * (T / 8) + i. */

#define BLOCK_TOKENS 32
#define SUBNORMAL_UNIT 16777216.f /* 2^24: one over the FP16 number whose bits are 1 */

/* The codes of one block; IS_K: K's order, else V's. */
template <bool IS_K, int BITS, int T> struct Codes {
    static constexpr int R = T / 8;      /* octets of tokens */
    static constexpr int OCTETS = D / 8; /* of channels */
    static constexpr int PAIRS = R * OCTETS;
    static constexpr int UNIT = BITS == 3 ? 16 : 16 / BITS; /* pairs */
    static constexpr int UNIT_WORDS = BITS == 3 ? 3 : 1;
    static constexpr int WORDS = PAIRS / UNIT * UNIT_WORDS; /* of a lane */
    static constexpr int IN_UNITS = PAIRS / UNIT * UNIT, REST = PAIRS % UNIT;
    static constexpr int BYTES = 4 * (IS_K ? T * ((D * BITS + 31) / 32) : D * ((T * BITS + 31) / 32));
    /* Is a code's bit the same for all pairs that meet one channel (K) or token (V)? */
    static constexpr int PERIOD = BITS == 2 ? 4 : BITS == 4 ? 2 : BITS == 8 ? 1 : 16;
    static constexpr bool FOLDED = IS_K ? OCTETS % UNIT == 0 : R % PERIOD == 0;

    static INLINE constexpr int pair(int octet, int r) {
        return !IS_K ? octet * R + r
               : FOLDED ? (octet / UNIT * R + r) * UNIT + octet % UNIT
                        : r * OCTETS + octet;
    }

    static INLINE constexpr int octet_of(int pair) {
        return !IS_K ? pair / R : FOLDED ? pair / UNIT / R * UNIT + pair % UNIT : pair % OCTETS;
    }

    static INLINE constexpr int r_of(int pair) {
        return !IS_K ? pair % R : FOLDED ? pair / UNIT % R : pair / OCTETS;
    }

    /* The bit of the half at which `extract` leaves a code; x: channel octet (K) or token octet (V). */
    static INLINE constexpr int bit(int x) {
        if (!FOLDED || BITS == 8) return 0;
        if (BITS == 2) return x % 4 * 2;
        if (BITS == 4) return x % 2 * 4;
        const int slot = x % 16, word = slot / 5, field = slot % 5;
        return slot == 15 ? 6 : field < 3 ? 3 * field : 3 * (field - 3) + word;
    }

    /* Pair `slot` of the unit that begins at w. */
    static INLINE u32 extract(const u32 *w, int slot) {
        constexpr u32 ONES = 0x00010001, MASK = ((1 << BITS) - 1) * ONES;
        if (BITS != 3) {
            const int at = slot * BITS;
            if (!FOLDED) return w[0] >> at & MASK;
            return (at < 8 ? w[0] : w[0] >> 8) & MASK << at % 8;
        }
        const int word = slot / 5, field = slot % 5;
        if (slot == 15)
            return FOLDED ? (w[0] >> 9 & 64 * ONES) | (w[1] >> 8 & 128 * ONES) | (w[2] >> 7 & 256 * ONES)
                          : (w[0] >> 15 & ONES) | (w[1] >> 14 & 2 * ONES) | (w[2] >> 13 & 4 * ONES);
        if (!FOLDED) return w[word] >> 3 * field & MASK;
        return field < 3 ? w[word] & MASK << 3 * field : w[word] >> (9 - word) & MASK << (3 * (field - 3) + word);
    }

    /* A pair that fills no unit: the bits of lane `lane` in row `rest`. */
    static INLINE u32 extract_rest(const u8 *codes, int rest, int lane) {
        const int bit = lane * 2 * BITS;
        const u8 *at = codes + 128 * WORDS + rest * 8 * BITS + bit / 8;
        const u32 both = (at[0] | (bit % 8 + 2 * BITS > 8 ? at[1] << 8 : 0)) >> bit % 8;
        return (both & ((1 << BITS) - 1)) | (both >> BITS & ((1 << BITS) - 1)) << 16;
    }
};
