/* Rows of K and V (G, S, D) FP16 to slots slot, slot + 1, ... of a tail (G, capacity, D).
 *
 * Macros: D head_dim. */
#include "common.cuh"

/* grid (rows, KV heads); one warp for K, one for V */
KERNEL __launch_bounds__(2 * WARP)
    copy_tail(const uint4 *k, const uint4 *v, i64 S, const i32 *rows, uint4 *tail_k, uint4 *tail_v, i64 capacity,
              i64 slot) {
    const i64 g = blockIdx.y, i = threadIdx.x % WARP;
    const i64 from = (g * S + rows[blockIdx.x]) * (D / 8) + i, to = (g * capacity + slot + blockIdx.x) * (D / 8) + i;
    if (i >= D / 8) return;
    if (threadIdx.x < WARP)
        tail_k[to] = k[from];
    else
        tail_v[to] = v[from];
}
