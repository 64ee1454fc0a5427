/* What every packing kernel shares: arithmetic of one rounding per operation, and where codes go (formats.cuh). */

#define THREADS 128
#define STRIDE (D + 8) /* floats of a row in shared memory: eight columns of four rows fall into different banks */
#define TOP ((1 << WIDTH) - 1)
#ifndef ROWS_FIRST
#define ROWS_FIRST PACKS_K /* whether codes lie in K's order */
#endif

/* Not as expressions: those may become fused multiply-adds. */
INLINE float add(float a, float b) { return __fadd_rn(a, b); }
INLINE float sub(float a, float b) { return __fsub_rn(a, b); }
INLINE float mul(float a, float b) { return __fmul_rn(a, b); }
INLINE float clip(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

/* Side e of a lane's pair; codes (T, D). */
template <class C> INLINE u32 code_at(const u8 *codes, i32 pair, i32 lane, i32 e) {
    const i32 g = lane / 4, t = lane % 4, octet = C::octet_of(pair), r = C::r_of(pair);
    return ROWS_FIRST ? codes[(8 * r + g) * D + 8 * octet + 2 * t + e]
                      : codes[(8 * r + 2 * t + e) * D + 8 * octet + g];
}

template <int T> INLINE void store_block(const u8 *codes, u32 *out) {
    typedef Codes<ROWS_FIRST, WIDTH, T> C;
    constexpr i32 W = C::WORDS, VECTORS = W / 4 * 4 * WARP, TWO = W % 4 / 2 * 2 * WARP;
    for (i32 i = threadIdx.x; i < Codes<PACKS_K, WIDTH, T>::BYTES / 4; i += THREADS) {
        u32 word = 0;
        if (i < W * WARP) { /* word w of a lane */
            i32 lane, w;
            if (i < VECTORS)
                lane = i % 128 / 4, w = i / 128 * 4 + i % 4;
            else if (i < VECTORS + TWO)
                lane = (i - VECTORS) / 2, w = W / 4 * 4 + i % 2;
            else
                lane = (i - VECTORS - TWO), w = W - 1;
            const i32 part = w % C::UNIT_WORDS, first = w / C::UNIT_WORDS * C::UNIT;
            constexpr i32 FIELDS = 16 / WIDTH;
            for (i32 e = 0; e < 2; e++) {
                for (i32 s = 0; s < FIELDS; s++)
                    word |= code_at<C>(codes, first + part * FIELDS + s, lane, e) << (s * WIDTH + 16 * e);
                if (WIDTH == 3) word |= (code_at<C>(codes, first + 15, lane, e) >> part & 1) << (15 + 16 * e);
            }
        } else if (i < W * WARP + C::REST * 2 * WIDTH) { /* bits of one pair of several lanes */
            const i32 row = (i - W * WARP) / (2 * WIDTH), first = (i - W * WARP) % (2 * WIDTH) * 32;
            for (i32 b = 0; b < 32; b++) {
                const i32 lane = (first + b) / (2 * WIDTH), at = (first + b) % (2 * WIDTH);
                word |= (code_at<C>(codes, C::IN_UNITS + row, lane, at / WIDTH) >> at % WIDTH & 1) << b;
            }
        }
        out[i] = word;
    }
}

/* The codes (CHUNK, D) of chunk number `chunk` of a region; all threads call it. */
INLINE void store_codes(const u8 *bytes, u8 *codes, i64 chunk) {
    constexpr i32 FULL_T = CHUNK < BLOCK_TOKENS ? CHUNK : BLOCK_TOKENS, REST_T = CHUNK % FULL_T;
    constexpr i32 BLOCK_BYTES = Codes<PACKS_K, WIDTH, FULL_T>::BYTES;
    constexpr i32 REST_BYTES = Codes<PACKS_K, WIDTH, REST_T ? REST_T : 8>::BYTES;
    codes += chunk * (CHUNK / FULL_T * BLOCK_BYTES + (REST_T ? REST_BYTES : 0));
    for (i32 b = 0; b < CHUNK / FULL_T; b++)
        store_block<FULL_T>(bytes + b * FULL_T * D, (u32 *)(codes + b * BLOCK_BYTES));
    if constexpr (REST_T != 0)
        store_block<REST_T>(bytes + CHUNK / FULL_T * FULL_T * D, (u32 *)(codes + CHUNK / FULL_T * BLOCK_BYTES));
}
