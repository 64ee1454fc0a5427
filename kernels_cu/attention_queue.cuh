/* A warp's queue of copies from global to shared memory, in slots that take turns: begin and copy, or copy_rows, or
 * nothing, then end, for each piece; wait for each in the same order. From sm_90 on one lane starts bulk copies (of rows:
 * one lane per row) and a barrier per slot counts the bytes; before, every lane copies its share. */
#include "attention.cuh"

#define MAX_SLOTS 8
#define BULK (ARCH >= 90)
#define ROW_BYTES (2 * D + 16) /* of an FP16 row in a slot: the gap keeps ldmatrix free of bank conflicts */

#if BULK
#include "hopper.cuh"
__shared__ u64 arrivals[WARPS][MAX_SLOTS];
#endif

struct Queue {
    u32 slots;    /* shared_address() of this warp's */
    u32 parities; /* of the phases to wait for, a bit per slot */
    i32 warp, lane;

    INLINE Queue(u32 slots) : slots(slots), parities(0), warp(threadIdx.x / WARP), lane(threadIdx.x % WARP) {
#if BULK
        if (lane < MAX_SLOTS) barrier_create(&arrivals[warp][lane], 1);
#endif
    }

    /* Begin a piece of `bytes` in slot `slot`; the caller copies where this is true. */
    INLINE bool begin(i32 slot, u32 bytes) {
#if BULK
        if (!elected()) return false;
        barrier_arrive_expecting(&arrivals[warp][slot], bytes);
#endif
        return true;
    }

    /* BYTES, a multiple of 16 like both addresses, to place `at` of the slots. */
    template <int BYTES> INLINE void copy(i32 slot, u32 at, const u8 *from) {
#if BULK
        copy_bulk(slots + at, from, BYTES, &arrivals[warp][slot]);
#else
#pragma unroll
        for (i32 i = 0; i < BYTES; i += 16 * WARP)
            if (i + 16 * lane < BYTES) copy_bytes_async(slots + at + i + 16 * lane, from + i + 16 * lane);
#endif
    }

    /* A piece of `rows` rows of FP16, at most ROWS. */
    template <int ROWS> INLINE void copy_rows(i32 slot, u32 at, const u8 *from, i32 rows) {
#if BULK
        if (lane == 0) barrier_arrive_expecting(&arrivals[warp][slot], rows * 2 * D);
        if (lane < rows) copy_bulk(slots + at + lane * ROW_BYTES, from + lane * 2 * D, 2 * D, &arrivals[warp][slot]);
#else
#pragma unroll 4
        for (i32 i = lane; i < ROWS * (D / 8); i += WARP)
            if (i / (D / 8) < rows)
                copy_bytes_async(slots + at + i / (D / 8) * ROW_BYTES + i % (D / 8) * 16, from + 16 * i);
#endif
    }

    INLINE void end() {
#if !BULK
        copy_commit(); /* after an empty piece too: copy_wait counts groups */
#endif
    }

    /* Wait for the piece in a slot, of which PENDING later ones may be under way. Then the whole warp is done with
     * what it waited for before. */
    template <int PENDING> INLINE void wait(i32 slot) {
#if BULK
        barrier_wait(&arrivals[warp][slot], parities >> slot & 1);
        parities ^= 1 << slot;
#else
        copy_wait<PENDING>();
#endif
        __syncwarp();
    }
};
