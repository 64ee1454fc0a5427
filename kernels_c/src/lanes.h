/* What the cache operations need beyond simd.h: exchanges between the lanes of a vector, and the Hadamard transform. */

typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint8_t vb __attribute__((vector_size(VL)));

/* SHUFFLE(a, b, f, d): lane i is lane f(i, d) of a and b side by side; d must be a constant. */
#define SHUFFLE(a, b, f, d) __builtin_shufflevector(a, b, LANES(f, d))
#define PARTNER(i, d) ((i) ^ (d))
#define SIGN(i, d) ((i) & (d) ? INT32_MIN : 0)
#define OWN(i, d) ((i) & (d) ? VL + (i) : (i))
#define OTHERS(i, d) (OWN(i, d) ^ (d))

/* Lanes i and i + d become their sum and their difference. */
#define BUTTERFLY(a, d) (SHUFFLE(a, a, PARTNER, d) + (vf)((vi)(a) ^ (vi){LANES(SIGN, d)}))
/* Lanes without bit d: a[i] + a[i ^ d]; lanes with it: b[i] + b[i ^ d]. */
#define FOLD(a, b, d) (SHUFFLE(a, b, OWN, d) + SHUFFLE(a, b, OTHERS, d))

/* H x in place, as runtime.formats.hadamard: blocks of `block` (at least 8) in n floats, n a multiple of VL. */
static void hadamard(float *x, int64_t n, int64_t block) {
    for (int64_t i = 0; i < n; i += VL) {
        vf a = vf_load(x + i);
        a = BUTTERFLY(a, 1);
        a = BUTTERFLY(a, 2);
#if VL >= 8
        a = BUTTERFLY(a, 4);
#endif
#if VL >= 16
        if (block > 8) a = BUTTERFLY(a, 8);
#endif
        vf_store(x + i, a);
    }
    for (int64_t distance = VL; distance < block; distance *= 2)
        for (int64_t start = 0; start < n; start += 2 * distance)
            for (int64_t i = start; i < start + distance; i += VL) {
                vf a = vf_load(x + i), b = vf_load(x + i + distance);
                vf_store(x + i, a + b);
                vf_store(x + i + distance, a - b);
            }
}

/* Lane t is vf_sum(v[t]), with the same additions for every t. Overwrites v. */
INLINE vf lanes_sums(vf v[VL]) {
#if VL >= 16
    for (int i = 0; i < 8; i++) v[i] = FOLD(v[i], v[i + 8], 8);
#endif
#if VL >= 8
    for (int i = 0; i < 4; i++) v[i] = FOLD(v[i], v[i + 4], 4);
#endif
    for (int i = 0; i < 2; i++) v[i] = FOLD(v[i], v[i + 2], 2);
    return FOLD(v[0], v[1], 1);
}

/* Whether a comparison holds in any lane. */
INLINE bool vf_any(vi mask) {
#if defined(ISA_AVX512)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(ISA_AVX2)
    return _mm256_movemask_epi8((__m256i)mask);
#else
    int64_t halves[2];
    memcpy(halves, &mask, sizeof mask);
    return halves[0] | halves[1];
#endif
}

INLINE int64_t round_up(int64_t n) { return (n + VL - 1) / VL * VL; }

/* The largest power of two that divides D: formats.rotation_block. */
INLINE int64_t rotation_block(int64_t D) { return D & -D; }

INLINE float bf16_value(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
