/* The Walsh-Hadamard rotation of one head by one warp, in blocks of the largest power of two that divides D. */

#define LANE_CHANNELS ((D + WARP - 1) / WARP < 4 ? 4 : (D + WARP - 1) / WARP)

/* x: channels lane * LANE_CHANNELS + i; those from D on stay apart from the others. */
INLINE void rotate_head(float (&x)[LANE_CHANNELS], i32 lane) {
    constexpr int N = LANE_CHANNELS;
#pragma unroll
    for (i32 distance = 1; distance < (D & -D); distance *= 2)
        if (distance < N) {
#pragma unroll
            for (i32 i = 0; i < N; i++)
                if (!(i & distance)) {
                    const float a = x[i], b = x[i + distance];
                    x[i] = a + b, x[i + distance] = a - b;
                }
        } else {
#pragma unroll
            for (i32 i = 0; i < N; i++) {
                const float other = __shfl_xor_sync(FULL, x[i], distance / N);
                x[i] = lane & distance / N ? other - x[i] : x[i] + other;
            }
        }
}
