/* One id from a row of logits: repetition penalty, temperature, top-k, min-p, top-p, draw; as kernels_c's sample. The
 * options, the uniform number and where the id goes are in device memory, so that a captured step can end with it.
 *
 * One block. Every candidate gets a rank key: (top - logit) / temperature in units of 2^-25, smallest best, equal keys by
 * id. Probabilities relative to the best are whole numbers of 2^-40, so that sums are exact in any order and the draw does
 * not depend on the order of atomics. Top-k, top-p and the draw all ask the same question: at which candidate does the
 * running weight (1 each, or probability) pass a goal? It is answered digit by digit of the key, by histograms. */
#include "common.cuh"

#define THREADS 1024
#define BINS 256
#define KEY_UNIT 33554432.f    /* 2^25: e^-104 is 0 in float32, and 104 * 2^25 < 2^32 */
#define MASS_UNIT 1099511627776.f /* 2^40 */
#define NOT_A_CANDIDATE 0xffffffffu
#define ID_DIGITS 3 /* of 8 bits */
#define KEY_DIGITS 4
#define LARGEST 3.402823466e38f

/* What is written to *fault; the id is 0 then. */
#define BAD_SEEN 2
#define NOT_FINITE 3
#define BAD_DRAW 4

enum Weight { ONE, MASS };

struct Found {
    u32 key;
    i32 id;
    u64 through; /* the running weight, this candidate included */
};

INLINE u64 mass_of(u32 key) {
    return key == NOT_A_CANDIDATE ? 0 : (u64)__float2ll_rn(expf(-(float)key / KEY_UNIT) * MASS_UNIT);
}

INLINE u64 weight_of(u32 key, Weight weight) { return weight == MASS ? mass_of(key) : key != NOT_A_CANDIDATE; }

/* Weights by bin, in parts of 14 bits, so that up to 2^18 of them add up in 32 bits: shared memory adds those natively. */
struct Histogram {
    u32 parts[3][BINS];

    INLINE void clear() {
        for (i32 i = threadIdx.x; i < 3 * BINS; i += THREADS) parts[i / BINS][i % BINS] = 0;
    }

    INLINE void add(u32 bin, u64 weight) {
#pragma unroll
        for (i32 i = 0; i < 3; i++) {
            const u32 part = weight >> 14 * i & 0x3fff;
            if (part) atomicAdd(&parts[i][bin], part);
        }
    }

    /* Where all lanes of a warp have the same bin. */
    INLINE void add_from_warp(u32 bin, u64 weight) {
#pragma unroll
        for (i32 i = 0; i < 3; i++) {
            const u32 part = __reduce_add_sync(FULL, (u32)(weight >> 14 * i & 0x3fff));
            if (threadIdx.x % WARP == 0) atomicAdd(&parts[i][bin], part);
        }
    }

    INLINE u64 operator[](u32 bin) const { return parts[0][bin] + ((u64)parts[1][bin] << 14) + ((u64)parts[2][bin] << 28); }
};

INLINE u64 block_sum_exact(u64 x, u64 *shared) {
    __syncthreads();
    if (threadIdx.x == 0) *shared = 0;
    __syncthreads();
    for (i32 lane = WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(FULL, x, lane);
    if (threadIdx.x % WARP == 0) atomicAdd(shared, x);
    __syncthreads();
    return *shared;
}

/* The candidate, in order of (key, id) or of id alone, at which the running weight first exceeds goal. Once a digit has
 * narrowed the search, the ids that are left are listed in `left` (V,); their order there does not matter. */
__device__ Found find(const u32 *keys, i32 V, Weight weight, u64 goal, bool by_key, Histogram &histogram, i32 *left) {
    __shared__ u32 chosen;
    __shared__ u64 before;
    __shared__ i32 listed;
    u64 prefix = 0; /* key * 2^24 + id, its digits so far */
    u64 passed = 0;
    bool narrowed = false;
    const i32 first = by_key ? KEY_DIGITS + ID_DIGITS - 1 : (V - 1 >> 16 ? 2 : 1), narrow_after = by_key ? first : 1;
    for (i32 digit = first; digit >= 0; digit--) {
        const i32 n = narrowed ? listed : V;
        histogram.clear();
        __syncthreads();
#pragma unroll 4
        for (i32 base = threadIdx.x / WARP * WARP; base < n; base += THREADS) {
            const i32 at = base + threadIdx.x % WARP, i = at < n && narrowed ? left[at] : at;
            const u32 key = at < n ? keys[i] : NOT_A_CANDIDATE;
            const u64 rank = ((u64)(by_key ? key : 0) << 24 | i) >> 8 * digit;
            u64 w = rank >> 8 == prefix ? weight_of(key, weight) : 0;
            if (!by_key && digit > 0) histogram.add_from_warp(rank % BINS, w);
            else if (w) histogram.add(rank % BINS, w);
        }
        __syncthreads();
        if (threadIdx.x < WARP) { /* eight bins a lane */
            u64 own = 0;
            for (i32 i = 0; i < BINS / WARP; i++) own += histogram[threadIdx.x * (BINS / WARP) + i];
            u64 through = own;
            for (i32 lane = 1; lane < WARP; lane *= 2) {
                const u64 other = __shfl_up_sync(FULL, through, lane);
                if (threadIdx.x >= lane) through += other;
            }
            u64 running = passed + through - own;
            if (passed + through > goal && running <= goal) {
                u32 bin = threadIdx.x * (BINS / WARP);
                while (running + histogram[bin] <= goal) running += histogram[bin++];
                chosen = bin;
                before = running;
            }
        }
        if (digit == narrow_after && threadIdx.x == 0) listed = 0;
        __syncthreads();
        prefix = prefix << 8 | chosen;
        passed = before;
        if (digit == narrow_after) {
#pragma unroll 4
            for (i32 i = threadIdx.x; i < V; i += THREADS) {
                const u32 key = keys[i];
                if (key != NOT_A_CANDIDATE && ((u64)(by_key ? key : 0) << 24 | i) >> 8 * digit == prefix)
                    left[atomicAdd(&listed, 1)] = i;
            }
            narrowed = true;
        }
        __syncthreads();
    }
    const i32 id = prefix & 0xffffff;
    return {keys[id], id, passed + weight_of(keys[id], weight)};
}

/* Mass of the candidates up to and including (key, id). */
INLINE u64 mass_through(const u32 *keys, i32 V, Found last, u64 *shared) {
    u64 mass = 0;
#pragma unroll 4
    for (i32 i = threadIdx.x; i < V; i += THREADS)
        if (keys[i] < last.key || (keys[i] == last.key && i <= last.id)) mass += mass_of(keys[i]);
    return block_sum_exact(mass, shared);
}

INLINE bool ahead(float a, i32 a_id, float b, i32 b_id) { return a > b || (a == b && a_id < b_id); }

INLINE float without_nan(float logit) { return logit == logit ? fminf(logit, LARGEST) : -INFINITE; }

/* The largest value (NaN is none) and its lowest id, in every thread. */
INLINE float block_best(const float *values, i32 V, i32 *id) {
    __shared__ float best_value[WARP];
    __shared__ i32 best_id[WARP];
    float best = -INFINITE;
    i32 at = V;
#pragma unroll 8
    for (i32 i = threadIdx.x; i < V; i += THREADS) {
        const float value = without_nan(values[i]);
        if (ahead(value, i, best, at)) best = value, at = i;
    }
    for (i32 round = 0; round < 2; round++) {
        for (i32 lane = WARP / 2; lane; lane /= 2) {
            const float other = __shfl_xor_sync(FULL, best, lane);
            const i32 other_at = __shfl_xor_sync(FULL, at, lane);
            if (ahead(other, other_at, best, at)) best = other, at = other_at;
        }
        if (round) break;
        if (threadIdx.x % WARP == 0) best_value[threadIdx.x / WARP] = best, best_id[threadIdx.x / WARP] = at;
        __syncthreads();
        best = best_value[threadIdx.x % WARP], at = best_id[threadIdx.x % WARP];
    }
    *id = at;
    return best;
}

/* The id, in thread 0; on a fault 0. values: scratch (V,), which becomes the keys; left: scratch (V,). */
__device__ i32 draw(const float *logits, i32 V, float temperature, i32 top_k, float top_p, float min_p, float penalty,
                    const i32 *seen, i32 n_seen, double uniform, float *values, i32 *left, i32 *fault) {
    __shared__ Histogram histogram;
    __shared__ u64 exact;
    const bool plain = penalty == 1;
    bool bad = false;
    if (!plain || temperature > 0) {
#pragma unroll 8
        for (i32 i = threadIdx.x; i < V; i += THREADS) values[i] = without_nan(logits[i]);
        __syncthreads();
        for (i32 i = threadIdx.x; !plain && i < n_seen; i += THREADS) { /* seen twice: written twice, the same value */
            const i32 id = seen[i];
            if ((u32)id >= (u32)V) {
                bad = true;
                continue;
            }
            const float x = without_nan(logits[id]);
            values[id] = x > 0 ? x / penalty : x * penalty;
        }
        bad = __syncthreads_or(bad);
        logits = values;
    }
    i32 id;
    const float top = block_best(logits, V, &id);
    if (bad || top == -INFINITE) {
        if (threadIdx.x == 0) *fault = bad ? BAD_SEEN : NOT_FINITE;
        return 0;
    }
    if (temperature == 0) return id;
    const float lowest = min_p > 0 ? logf(min_p) : -INFINITE;
    u32 *keys = (u32 *)values;
    u64 mass = 0, candidates = 0;
    __syncthreads();
#pragma unroll 4
    for (i32 i = threadIdx.x; i < V; i += THREADS) {
        const float x = (values[i] - top) / temperature;
        keys[i] = x >= lowest && x > -104 ? (u32)(-x * KEY_UNIT) : NOT_A_CANDIDATE;
        mass += mass_of(keys[i]);
        candidates += keys[i] != NOT_A_CANDIDATE;
    }
    mass = block_sum_exact(mass, &exact);
    candidates = block_sum_exact(candidates, &exact);
    const bool few = top_k > 0 && top_k < candidates, by_key = few || top_p < 1;
    if (few) {
        const Found last = find(keys, V, ONE, top_k - 1, true, histogram, left);
        mass = mass_through(keys, V, last, &exact);
    }
    if (top_p < 1) {
        const u64 enough = (u64)ceil((double)top_p * (double)mass);
        mass = find(keys, V, MASS, min(enough ? enough - 1 : 0, mass - 1), true, histogram, left).through;
    }
    const u64 goal = min((u64)(uniform * (double)mass), mass - 1);
    return find(keys, V, MASS, goal, by_key, histogram, left).id;
}

/* Of one sequence. options: temperature, top_k, top_p, min_p, penalty; uniforms (N,); seen (M,): M - N ids, then the
 * draws; state: position, slot, token, drawn; ids (N,): the draws, in the host's memory, like what went wrong. */
struct Draw {
    const double *options, *uniforms;
    i32 *seen, *state, *ids, *fault;
    i32 N, M;
};

/* The next id, and the state that comes with it. */
INLINE void draw_next(const float *logits, i32 V, const Draw &to, float *values, i32 *left) {
    const double *const options = to.options;
    const float temperature = options[0], top_p = options[2], min_p = options[3], penalty = options[4];
    const double top_k = options[1];
    const i32 drawn = to.state[3], N = to.N, M = to.M;
    const bool valid = temperature >= 0 && top_k >= 0 && penalty > 0 && (u32)drawn < (u32)N;
    i32 id = 0;
    if (valid)
        id = draw(logits, V, temperature, (i32)fmin(top_k, (double)V), top_p, min_p, penalty, to.seen, M - N + drawn,
                  to.uniforms[drawn], values, left, to.fault);
    if (threadIdx.x) return;
    if (valid) to.seen[M - N + drawn] = to.ids[drawn] = id;
    else *to.fault = BAD_DRAW;
    i32 *const state = to.state;
    state[0]++, state[1]++, state[2] = id, state[3]++;
}

KERNEL __launch_bounds__(THREADS, 1)
    sample(const float *logits, i32 V, const double *options, const double *uniforms, i32 N, i32 *seen, i32 M,
           i32 *state, float *values, i32 *left, i32 *ids, i32 *fault) {
    wait_for_predecessor();
    start_successor();
    draw_next(logits, V, {options, uniforms, seen, state, ids, fault, N, M}, values, left);
}

/* One block for each sequence of a batch: row b of logits, values and left for the b-th. */
KERNEL __launch_bounds__(THREADS, 1)
    sample_rows(const float *logits, i32 V, const Draw *draws, float *values, i32 *left) {
    const Draw mine = draws[blockIdx.x]; /* no kernel writes these */
    wait_for_predecessor();
    start_successor();
    const i64 row = (i64)blockIdx.x * V;
    draw_next(logits + row, V, mine, values + row, left + row);
}
