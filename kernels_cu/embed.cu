/* out (T, E) float32 = rows `ids` of the table (V, E). One block per token; an id outside the table is a fault. */
#include "common.cuh"
#include "weights.cuh"

#define BAD_INDEX 1

KERNEL __launch_bounds__(256) embed(const i32 *ids, const void *table, i32 V, i32 E, float *out, i32 *fault) {
    wait_for_predecessor();
    start_successor();
    const i32 id = ids[blockIdx.x];
    if ((u32)id >= (u32)V) {
        if (threadIdx.x == 0) *fault = BAD_INDEX;
        return;
    }
    const uint4 *row = (const uint4 *)((const u8 *)table + (i64)id * E * VALUE_BYTES);
    float *to = out + (i64)blockIdx.x * E;
    for (i32 i = threadIdx.x; i < E / VALUES; i += 256) {
        float f[VALUES];
        widen(row[i], f);
#pragma unroll
        for (i32 j = 0; j < VALUES; j += 4)
            *(float4 *)(to + i * VALUES + j) = make_float4(f[j], f[j + 1], f[j + 2], f[j + 3]);
    }
}
