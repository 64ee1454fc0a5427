/* Weight values as stored: WEIGHT is F32, F16 or BF16; VALUES of them are 16 bytes. */
#define F32 1
#define F16 2
#define BF16 3

#if WEIGHT < F32 || WEIGHT > BF16
#error "WEIGHT must be F32, F16 or BF16"
#endif

#if WEIGHT == F32
#define VALUES 4
INLINE void widen(uint4 w, float (&f)[VALUES]) {
    f[0] = __uint_as_float(w.x), f[1] = __uint_as_float(w.y), f[2] = __uint_as_float(w.z), f[3] = __uint_as_float(w.w);
}
#else
#define VALUES 8
#if WEIGHT == F16
#define unpack2 unpack_half2
#define mma_weight mma_half
INLINE u32 pack2(float low, float high) { return pack_half2(clamp_half(low), clamp_half(high)); }
#else
#define unpack2 unpack_bf162
#define mma_weight mma_bf16
INLINE u32 pack2(float low, float high) { return pack_bf162(low, high); }
#endif
INLINE void widen(uint4 w, float (&f)[VALUES]) {
    const u32 words[4] = {w.x, w.y, w.z, w.w};
    for (i32 i = 0; i < 4; i++) {
        const float2 two = unpack2(words[i]);
        f[2 * i] = two.x, f[2 * i + 1] = two.y;
    }
}
#endif

#define VALUE_BYTES (16 / VALUES)

/* Values number i, which is even, and i + 1 of an array in the weights' type. */
INLINE void store2(void *array, i64 i, float first, float second) {
#if WEIGHT == F32
    *(float2 *)((float *)array + i) = make_float2(first, second);
#else
    *(u32 *)((u16 *)array + i) = pack2(first, second);
#endif
}
