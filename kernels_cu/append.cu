/* A new row of K and V (G, rows, D) FP16 for each sequence of a batch, to the slot of its own tail that its state names.
 *
 * Macros: D head_dim. */
#include "common.cuh"

#define STATE_SIZE 8
#define BAD_INDEX 1 /* what is written to *fault */

struct Place {
    uint4 *k, *v; /* a tail (G, capacity, D) */
    i64 capacity;
};

/* grid (sequences, KV heads); one warp for K, one for V */
KERNEL __launch_bounds__(2 * WARP)
    append(const uint4 *k, const uint4 *v, i64 rows, const Place *places, const i32 *state, i32 *fault) {
    const i64 b = blockIdx.x, g = blockIdx.y, i = threadIdx.x % WARP;
    const Place to = places[b]; /* no kernel writes these */
    wait_for_predecessor();
    start_successor();
    const i32 slot = state[b * STATE_SIZE + 1];
    if (slot < 0 || slot >= to.capacity) {
        *fault = BAD_INDEX;
        return;
    }
    if (i >= D / 8) return;
    const i64 from = (g * rows + b) * (D / 8) + i, at = (g * to.capacity + slot) * (D / 8) + i;
    if (threadIdx.x < WARP)
        to.k[at] = k[from];
    else
        to.v[at] = v[from];
}
