/* What a linear operation does with its sums. A unit is one row of the weights, or two that are needed together: the
 * two channels that RoPE turns, or a gate row and its up row. EPILOGUE chooses the operation; kernels take
 * EPILOGUE_PARAMETERS, make an Epilogue of them, ask it for a unit's weight rows and hand it a unit's PAIR sums. */
#include "weights.cuh"

#define STORE 1   /* out (T, units) = y */
#define ADD 2     /* out (T, units) += y + bias */
#define GATE_UP 3 /* out (T, units) = silu(gate) * up */
#define QKV 4     /* bias, RoPE, q in float32, k and v in FP16 at the tokens' slots */

#define BAD_INDEX 1 /* what is written to *fault */

INLINE const u8 *weight_row(const void *weight, i32 row, i32 K) {
    return (const u8 *)weight + (i64)row * K * VALUE_BYTES;
}

INLINE float biased(float y, const float *bias, i32 row) { return bias ? y + bias[row] : y; }

#if EPILOGUE == STORE || EPILOGUE == ADD
#define PAIR 1
#define EPILOGUE_PARAMETERS const void *weight, const float *bias, float *out, i32 units
#define EPILOGUE_ARGUMENTS {weight, bias, out, units}
struct Epilogue {
    const void *weight;
    const float *bias;
    float *out;
    i32 units;

    INLINE const u8 *row(i32 unit, i32, i32 K) const { return weight_row(weight, unit, K); }

    INLINE void finish(i32 unit, i32 token, const float (&y)[PAIR]) const {
        float *to = out + (i64)token * units + unit;
        *to = biased(y[0], bias, unit) + (EPILOGUE == ADD ? *to : 0.f);
    }
};

#elif EPILOGUE == GATE_UP
#define PAIR 2
#define EPILOGUE_PARAMETERS const void *gate, const void *up, const float *gate_bias, const float *up_bias, float *out, i32 units
#define EPILOGUE_ARGUMENTS {gate, up, gate_bias, up_bias, out, units}
struct Epilogue {
    const void *gate, *up;
    const float *gate_bias, *up_bias;
    float *out;
    i32 units;

    INLINE const u8 *row(i32 unit, i32 which, i32 K) const { return weight_row(which ? up : gate, unit, K); }

    INLINE float value(i32 unit, const float (&y)[PAIR]) const {
        const float g = biased(y[0], gate_bias, unit), u = biased(y[1], up_bias, unit);
        return g / (1 + expf(-g)) * u;
    }

    INLINE void finish(i32 unit, i32 token, const float (&y)[PAIR]) const { out[(i64)token * units + unit] = value(unit, y); }
};

#elif EPILOGUE == QKV
#define PAIR 2
#define HALF (D / 2)
#define EPILOGUE_PARAMETERS                                                                                             \
    const void *wq, const void *wk, const void *wv, const float *bq, const float *bk, const float *bv,                  \
        const float *cosines, const float *sines, i32 P, const i32 *positions, const i32 *slots, i32 H, i32 G, i32 S,   \
        float *q, u16 *k, u16 *v, i32 *fault, i32 units
#define EPILOGUE_ARGUMENTS {wq, wk, wv, bq, bk, bv, cosines, sines, P, positions, slots, H, G, S, q, k, v, fault}
struct Epilogue {
    const void *wq, *wk, *wv;
    const float *bq, *bk, *bv, *cosines, *sines; /* tables (P, D/2) */
    i32 P;
    const i32 *positions, *slots; /* (T,) */
    i32 H, G, S;
    float *q;   /* (T, H, D) */
    u16 *k, *v; /* (G, S, D) */
    i32 *fault;

    /* Units run over heads (H of q, G of k, G of v), in each over the first D/2 channels. */
    INLINE const u8 *row(i32 unit, i32 which, i32 K) const {
        const i32 head = unit / HALF, channel = unit % HALF + which * HALF;
        const void *weight = head < H ? wq : head < H + G ? wk : wv;
        return weight_row(weight, (head < H ? head : (head - H) % G) * D + channel, K);
    }

    INLINE void finish(i32 unit, i32 token, const float (&y)[PAIR]) const {
        const i32 head = unit / HALF, channel = unit % HALF, position = positions[token], slot = slots[token];
        if ((u32)position >= (u32)P || (u32)slot >= (u32)S) {
            *fault = BAD_INDEX;
            return;
        }
        const i32 local = head < H ? head : (head - H) % G, at = local * D + channel;
        const float *bias = head < H ? bq : head < H + G ? bk : bv;
        const float a = biased(y[0], bias, at), b = biased(y[1], bias, at + HALF);
        const float c = cosines[(i64)position * HALF + channel], s = sines[(i64)position * HALF + channel];
        const bool turned = head < H + G;
        /* Contracted by hand: every kernel that ends so gives the same bits. */
        const float low = turned ? fmaf(a, c, -(b * s)) : a, high = turned ? fmaf(b, c, a * s) : b;
        if (head < H) {
            float *to = q + ((i64)token * H + head) * D + channel;
            to[0] = low, to[HALF] = high;
        } else {
            u16 *to = (head < H + G ? k : v) + ((i64)local * S + slot) * D + channel;
            to[0] = float_to_half(clamp_half(low)), to[HALF] = float_to_half(clamp_half(high));
        }
    }
};

#else
#error "EPILOGUE must be STORE, ADD, GATE_UP or QKV"
#endif
