/* out (B, E) float32: the mean of each sequence's rows x (T, E), halves, or its first row. A block has 256 columns of a
 * sequence; grid: (E / 256 rounded up, B). */
#include "common.cuh"

#define THREADS 256

KERNEL __launch_bounds__(THREADS) encoder_pool(const u16 *x, const i32 *starts, i32 mean, i32 E, float *out) {
    const i32 column = blockIdx.x * THREADS + threadIdx.x, b = blockIdx.y;
    if (column >= E) return;
    const i32 first = starts[b], last = mean ? starts[b + 1] : first + 1;
    float sum = 0;
    for (i32 t = first; t < last; t++) sum += half_to_float(x[(i64)t * E + column]);
    out[(i64)b * E + column] = sum / (last - first);
}
