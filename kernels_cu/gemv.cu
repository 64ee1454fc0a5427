/* One row of activations times weights (units * PAIR, K), at the speed at which the weights can be read.
 *
 * A team of TEAM warps owns a contiguous share of the units; lane by lane it holds the activations in registers and
 * streams rows past them, 16 bytes a load, UNITS * PAIR * CHUNKS loads in flight per thread: the first of them before the
 * kernels that this one follows have ended, since weights depend on none. Each warp leaves its part of a row's sum in
 * shared memory; only at the end does the block meet, and the parts are added in a fixed order. With NORM the activations
 * are multiplied by the norm's weights first; the root mean square is one factor of the final sums. */
#include "common.cuh"
#include "epilogue.cuh"

#define ROWS (UNITS * PAIR)
#define TEAMS (WARPS / TEAM)
/* Whether a lane has registers for the next loads while it makes sums of the last. */
#define AHEAD (ROWS * CHUNKS <= (WEIGHT == F16 && (PAIR == 1 || CHUNKS <= 6) ? 16 : 8))

INLINE i32 share(i32 index, i32 units, i32 parts) { return (i32)((i64)index * units / parts); }

/* Every lane's values[i] summed over the warp: lane l returns the sum of number l / (32 / ROWS). */
INLINE float transposed_sum(float (&values)[ROWS], i32 lane) {
    i32 width = WARP / 2;
#pragma unroll
    for (i32 count = ROWS / 2; count; count /= 2, width /= 2)
#pragma unroll
        for (i32 i = 0; i < count; i++) {
            const bool upper = lane & width;
            const float give = upper ? values[i] : values[i + count], keep = upper ? values[i + count] : values[i];
            values[i] = keep + __shfl_xor_sync(FULL, give, width);
        }
    float sum = values[0];
    for (; width; width /= 2) sum += __shfl_xor_sync(FULL, sum, width);
    return sum;
}

KERNEL __launch_bounds__(WARPS *WARP, BLOCKS)
    gemv(const float *x, const float *norm, float eps, i32 K, EPILOGUE_PARAMETERS) {
    extern __shared__ float parts[]; /* (TEAMS, units of a team * PAIR, TEAM) */
    __shared__ float squares[WARPS];
    const Epilogue epilogue = EPILOGUE_ARGUMENTS;
    const i32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, team = warp / TEAM, member = warp % TEAM;
    const i32 index = blockIdx.x * TEAMS + team, all = gridDim.x * TEAMS;
    const i32 first = share(index, units, all), last = share(index + 1, units, all);
    float *sums = parts + team * ((units + all - 1) / all) * PAIR * TEAM;

    uint4 w[ROWS][CHUNKS];
    auto load = [&](i32 unit) {
#pragma unroll
        for (i32 r = 0; r < ROWS; r++) { /* beyond the share the last unit is read again: a hit in L1 */
            const u8 *row = epilogue.row(min(unit + r / PAIR, last - 1), r % PAIR, K);
#pragma unroll
            for (i32 c = 0; c < CHUNKS; c++) {
                const i32 k = ((c * TEAM + member) * WARP + lane) * VALUES;
                w[r][c] = make_uint4(0, 0, 0, 0);
                if (c < CHUNKS - 1 || k < K) w[r][c] = load_stream(row + k * VALUE_BYTES);
            }
        }
    };
    start_successor();
    if (AHEAD && first < last) load(first);
    wait_for_predecessor();

    float xs[CHUNKS][VALUES], square = 0;
#pragma unroll
    for (i32 c = 0; c < CHUNKS; c++) {
        const i32 k = ((c * TEAM + member) * WARP + lane) * VALUES;
#pragma unroll
        for (i32 i = 0; i < VALUES; i += 4) {
            float4 a = make_float4(0, 0, 0, 0);
            if (k < K) a = *(const float4 *)(x + k + i);
#if NORM
            square += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
            if (k < K) {
                const float4 n = *(const float4 *)(norm + k + i);
                a.x *= n.x, a.y *= n.y, a.z *= n.z, a.w *= n.w;
            }
#endif
            xs[c][i] = a.x, xs[c][i + 1] = a.y, xs[c][i + 2] = a.z, xs[c][i + 3] = a.w;
        }
    }
    if (NORM) {
        square = warp_sum(square);
        if (lane == 0) squares[warp] = square;
    }

    for (i32 unit = first; unit < last; unit += UNITS) {
        if (!AHEAD) load(unit);
        float values[ROWS];
#pragma unroll
        for (i32 r = 0; r < ROWS; r++) {
            values[r] = 0;
#pragma unroll
            for (i32 c = 0; c < CHUNKS; c++) {
                float f[VALUES];
                widen(w[r][c], f);
#pragma unroll
                for (i32 i = 0; i < VALUES; i++) values[r] = fmaf(f[i], xs[c][i], values[r]);
            }
        }
        if (AHEAD && unit + UNITS < last) load(unit + UNITS);
        const float sum = transposed_sum(values, lane);
        const i32 r = lane / (WARP / ROWS);
        if (lane % (WARP / ROWS) == 0 && unit + r / PAIR < last) sums[((unit - first) * PAIR + r) * TEAM + member] = sum;
    }

    __syncthreads();
    float scale = 1;
    if (NORM) {
        float total = 0;
        for (i32 i = 0; i < TEAM; i++) total += squares[team * TEAM + i];
        scale = 1 / sqrtf(total / K + eps);
    }
    for (i32 unit = first + member * WARP + lane; unit < last; unit += TEAM * WARP) {
        float y[PAIR];
        for (i32 p = 0; p < PAIR; p++) {
            const float *part = sums + ((unit - first) * PAIR + p) * TEAM;
            y[p] = 0;
            for (i32 i = 0; i < TEAM; i++) y[p] += part[i];
            y[p] *= scale;
        }
        epilogue.finish(unit, 0, y);
    }
}
