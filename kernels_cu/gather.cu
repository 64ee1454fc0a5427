/* What each sequence of a batch keeps for itself, side by side: its state, its token, RoPE of its position. */
#include "common.cuh"

#define STATE_SIZE 8
#define BAD_INDEX 1 /* what is written to *fault */

struct Source {
    const i32 *state;
    const float *cosines, *sines; /* (positions, half) */
    i64 positions;
};

/* grid (sequences); state (sequences, STATE_SIZE), token (sequences,), cosines and sines (sequences, half) */
KERNEL __launch_bounds__(4 * WARP) gather(const Source *sources, i32 half, i32 *state, i32 *token, float *cosines,
                                          float *sines, i32 *fault) {
    const i64 b = blockIdx.x;
    const Source from = sources[b]; /* no kernel writes these */
    wait_for_predecessor();
    start_successor();
    const i32 position = from.state[0];
    if (position < 0 || position >= from.positions) {
        *fault = BAD_INDEX;
        return;
    }
    if (threadIdx.x < STATE_SIZE) state[b * STATE_SIZE + threadIdx.x] = from.state[threadIdx.x];
    if (threadIdx.x == 0) token[b] = from.state[2];
    for (i32 i = threadIdx.x; i < half; i += 4 * WARP) {
        cosines[b * half + i] = from.cosines[(i64)position * half + i];
        sines[b * half + i] = from.sines[(i64)position * half + i];
    }
}
