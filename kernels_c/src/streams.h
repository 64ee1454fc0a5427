/* How the codes of a block lie in memory, whatever the family, and how they get there. Lanes are channels.
 *
 * K: words[ceil(D * bits / 32)][C] of uint32: a token's D codes are one little-endian bit stream, and word w of token t is
 * words[w][t]. V: words[ceil(C * bits / 32)][D]: a channel's C codes are one stream. At 16 bits a block is the FP16 (C, D)
 * itself.
 *
 * Rows of y, float values and then codes, hold P floats, D rounded up to whole vectors. */

INLINE vf clip(vf x, float low, float high) { return vf_min(vf_max(x, vf_set1(low)), vf_set1(high)); }

/* y (C, P) of x (C, D); what lies beyond D repeats the row's last value, or is zero. */
static void load_rows(const uint16_t *x, int64_t C, int64_t D, int64_t P, bool repeat, float *y) {
    for (int64_t t = 0; t < C; t++, x += D, y += P)
        for (int64_t i = 0; i < P; i += VL) {
            uint16_t lanes[VL];
            for (int64_t d = i; i + VL > D && d < i + VL; d++) lanes[d - i] = d < D ? x[d] : repeat ? x[D - 1] : 0;
            vf_store(y + i, vf_from_half(vh_load(i + VL > D ? lanes : x + i)));
        }
}

/* The low `bits` of each of eight bytes, moved together: 8 * bits bits. */
INLINE uint64_t squeeze(uint64_t x, int bits) {
    if (bits == 8) return x;
    x = (x | x >> (8 - bits)) & ((UINT64_C(1) << 2 * bits) - 1) * UINT64_C(0x0001000100010001);
    x = (x | x >> (16 - 2 * bits)) & ((UINT64_C(1) << 4 * bits) - 1) * UINT64_C(0x0000000100000001);
    return (x | x >> (32 - 4 * bits)) & ((UINT64_C(1) << 8 * bits) - 1);
}

/* Codes (C, P) as K's words. */
static void store_tokens(const float *y, int bits, int64_t C, int64_t D, int64_t P, uint8_t *words) {
    for (int64_t t = 0; t < C; t++, y += P) {
        uint8_t codes[MAX_HEAD_DIM], stream[MAX_HEAD_DIM + 8];
        for (int64_t i = 0; i < P; i += VL) {
            vb bytes = __builtin_convertvector(__builtin_convertvector(vf_load(y + i), vi), vb);
            memcpy(codes + i, &bytes, sizeof bytes);
        }
        for (int64_t i = 0; i < D; i += 8) { /* each write's bytes past its own stream are zero */
            uint64_t eight;
            memcpy(&eight, codes + i, 8);
            eight = squeeze(eight, bits);
            memcpy(stream + i / 8 * bits, &eight, 8);
        }
        for (int64_t w = 0; 32 * w < D * bits; w++) memcpy(words + 4 * (w * C + t), stream + 4 * w, 4);
    }
}

/* Codes (C, P) as V's words. */
static void store_channels(const float *y, int bits, int64_t C, int64_t D, int64_t P, uint8_t *words) {
    for (int64_t i = 0; i < P; i += VL) {
        int64_t word = 0, nbytes = 4 * MIN(VL, D - i);
        int used = 0;
        vu stream = {0};
        for (int64_t t = 0; t < C; t++) {
            vu code = __builtin_convertvector(vf_load(y + t * P + i), vu);
            stream |= code << used;
            used += bits;
            if (used >= 32) { /* what did not fit begins the next word */
                memcpy(words + 4 * (word++ * D + i), &stream, nbytes);
                used -= 32;
                stream = used ? code >> (bits - used) : (vu){0};
            }
        }
        if (used) memcpy(words + 4 * (word * D + i), &stream, nbytes);
    }
}

/* kvquant: a layer has levels for 2, 3 and 4 bits behind one another (runtime.formats.kvquant.levels_of). */
INLINE const float *levels_of(const float *levels, int bits) { return levels + (1 << bits) - 4; }
