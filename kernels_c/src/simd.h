/* Vectors of VL floats under one set of names, for the instruction set that the including isa_*.c chose.
 *
 * Arithmetic on vf and vi uses the compiler's vector extensions (+, -, *, <, &, >>); the functions below add what
 * those lack. vf_fma rounds once where the processor has it and twice on the scalar path: never use it in packing. */
#if defined(ISA_AVX512) || defined(ISA_AVX2)
#include <immintrin.h>
#endif

#if defined(ISA_AVX512)
#define VL 16
#elif defined(ISA_AVX2)
#define VL 8
#else
#define VL 4 /* the baseline of every 64-bit processor; the compiler emits what it has */
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL))); /* VL halves, or brain floats, as stored */

/* Loads and stores of any alignment. */
INLINE vf vf_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE vi vi_load(const void *p) { vi v; memcpy(&v, p, sizeof v); return v; }
INLINE vh vh_load(const void *p) { vh v; memcpy(&v, p, sizeof v); return v; }
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE void vi_store(void *p, vi v) { memcpy(p, &v, sizeof v); }
INLINE void vh_store(void *p, vh v) { memcpy(p, &v, sizeof v); }
INLINE vf vf_set1(float x) { return x - (vf){0}; } /* x - 0 keeps the sign of -0 */
INLINE vi vi_set1(int32_t x) { return x + (vi){0}; }
INLINE vi vi_iota(void) { vi v; for (int i = 0; i < VL; i++) v[i] = i; return v; }

/* mask lanes are all ones or all zeros, as comparisons give them. */
INLINE vf vf_select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

#if defined(ISA_AVX512)
INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vf vf_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf vf_min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vf vf_round(vf a) { return (vf)_mm512_roundscale_ps((__m512)a, 8); } /* to nearest even, no exceptions */
INLINE vf vf_from_half(vh h) { return (vf)_mm512_cvtph_ps((__m256i)h); }
INLINE vh vf_to_half(vf a) { return (vh)_mm512_cvtps_ph((__m512)a, 8); }
#elif defined(ISA_AVX2)
INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf vf_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf vf_min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vf vf_round(vf a) { return (vf)_mm256_round_ps((__m256)a, 8); }
INLINE vf vf_from_half(vh h) { return (vf)_mm256_cvtph_ps((__m128i)h); }
INLINE vh vf_to_half(vf a) { return (vh)_mm256_cvtps_ph((__m256)a, 8); }
#else
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); } /* b where either is NaN, as x86 has it */
INLINE vf vf_min(vf a, vf b) { return vf_select(a < b, a, b); }
INLINE vf vf_round(vf a) { /* adding 1.5 * 2^23 leaves no fraction bits; larger values have none to begin with */
    vf magic = vf_set1(0x1.8p23f), rounded = (a + magic) - magic;
    vi small = (vi)a & 0x7fffffff;
    return vf_select(small < 0x4a800000, rounded, a); /* 2^22 */
}
/* Exact: the exponent is rebiased by one multiplication, which also normalizes subnormals. */
INLINE vf vf_from_half(vh h) {
    vi bits = __builtin_convertvector(h, vi), magnitude = (bits & 0x7fff) << 13;
    vi value = (vi)((vf)magnitude * 0x1p112f);
    value |= (magnitude >= 0x0f800000) & 0x7f800000; /* infinity, NaN */
    return (vf)(value | (bits & 0x8000) << 16);
}
/* Round to nearest even, overflow to infinity, as F16C does. */
INLINE vh vf_to_half(vf a) {
    vi bits = (vi)a, magnitude = bits & 0x7fffffff;
    vi normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    vi subnormal = (vi)((vf)magnitude + 0.5f) - 0x3f000000; /* the addition rounds at 2^-24, half's last place */
    vi tiny = magnitude < 0x38800000, half = (tiny & subnormal) | (~tiny & normal);
    vi big = magnitude >= 0x477ff000, nan = magnitude > 0x7f800000; /* rounds to 65536 or more, infinity, NaN */
    half = (big & (0x7c00 | (nan & 0x200))) | (~big & half);
    return __builtin_convertvector(half | (bits >> 16 & 0x8000), vh);
}
#endif

INLINE vf vf_from_bfloat(vh h) { return (vf)(__builtin_convertvector(h, vi) << 16); }

/* Sum and maximum over the lanes, by halving: the same tree every time. */
typedef float v4 __attribute__((vector_size(16)));
#define V4_MAX(a, b) ((v4)((((a) > (b)) & (v4i)(a)) | (((a) <= (b)) & (v4i)(b))))
typedef int32_t v4i __attribute__((vector_size(16)));
INLINE float vf_sum(vf v) {
    v4 part[VL / 4];
    memcpy(part, &v, sizeof v);
    for (int width = VL / 8; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    v4 t = part[0] + __builtin_shufflevector(part[0], part[0], 2, 3, 0, 1);
    return t[0] + t[1];
}
INLINE float vf_hmax(vf v) {
    v4 part[VL / 4];
    memcpy(part, &v, sizeof v);
    for (int width = VL / 8; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] = V4_MAX(part[i], part[i + width]);
    v4 t = part[0];
    t = V4_MAX(t, __builtin_shufflevector(t, t, 2, 3, 0, 1));
    return MAX(t[0], t[1]);
}

/* One value of a stored row. */
INLINE float half_to_float(uint16_t h) { return vf_from_half((vh){h})[0]; }
INLINE uint16_t float_to_half(float x) { return vf_to_half(vf_set1(x))[0]; }
INLINE float bfloat_to_float(uint16_t h) { return vf_from_bfloat((vh){h})[0]; }

/* VL weights of type `dtype` (a constant where it matters) from element i of a row; the scalar form for a row's end. */
INLINE vf vf_weights(const void *row, int64_t i, int dtype) {
    if (dtype == F16) return vf_from_half(vh_load((const char *)row + 2 * i));
    if (dtype == BF16) return vf_from_bfloat(vh_load((const char *)row + 2 * i));
    vf v;
    memcpy(&v, (const char *)row + 4 * i, sizeof v);
    return v;
}
INLINE float weight(const void *row, int64_t i, int dtype) {
    uint16_t h;
    float f;
    if (dtype == F32) return memcpy(&f, (const char *)row + 4 * i, 4), f;
    memcpy(&h, (const char *)row + 2 * i, 2);
    return dtype == F16 ? half_to_float(h) : bfloat_to_float(h);
}
INLINE const void *matrix_row(const matrix *w, int64_t row) {
    return (const char *)w->data + row * w->cols * (w->dtype == F32 ? 4 : 2);
}

/* 2^(n + f) for a whole n in [-127, 128) and f in [-1/2, 1/2]; 0 for n = -127.
 * The polynomial is the minimax fit of 2^f for relative error (1.9e-9). */
INLINE vf vf_exp2_parts(vf n, vf f) {
    vf p = vf_set1(1.53458121613e-4f);
    p = vf_fma(p, f, vf_set1(1.33999311772e-3f));
    p = vf_fma(p, f, vf_set1(9.61848895633e-3f));
    p = vf_fma(p, f, vf_set1(5.55032877711e-2f));
    p = vf_fma(p, f, vf_set1(2.40226468906e-1f));
    p = vf_fma(p, f, vf_set1(6.93147205737e-1f));
    p = vf_fma(p, f, vf_set1(1.0f));
    vf power = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return p * power;
}

/* 2^x for x <= 127, relative error under 2 units in the last place; 0 from about -126.5 down (-infinity included). */
INLINE vf vf_exp2(vf x) {
    x = vf_max(x, vf_set1(-127));
    vf n = vf_round(x);
    return vf_exp2_parts(n, x - n);
}

/* e^x, saturating at about e^88, 0 below about e^-87.7; log2(e) in two parts keeps the error at a few units. */
INLINE vf vf_exp(vf x) {
    x = vf_min(vf_max(x, vf_set1(-88)), vf_set1(88));
    vf n = vf_round(x * 1.44269502f), f = vf_fma(x, vf_set1(1.44269502f), -n);
    return vf_exp2_parts(n, vf_fma(x, vf_set1(1.92596303e-8f), f));
}
