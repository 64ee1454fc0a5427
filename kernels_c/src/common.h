/* What every source of the extension shares: records passed from Python, the thread pool, scratch memory. */
#ifndef COCKTAIL_COMMON_H
#define COCKTAIL_COMMON_H

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error "these kernels need GCC 12 or later, or clang: set CC to one of them"
#endif

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Between the two marks lies what build.py also shows to cffi: plain C, no preprocessor. */
/* cffi: begin */
enum dtype { F32, F16, BF16 };

/* Every operation returns one of these; Python turns them into exceptions. */
enum status { OK = 0, NO_MEMORY = -1, BAD_INDEX = -2, NOT_FINITE = -3 };

/* A weight matrix (rows = outputs, cols = inputs), row-major, of any alignment (it may lie in a mapped file). */
typedef struct {
    const void *data;
    int64_t rows, cols;
    int32_t dtype;
} matrix;

/* Both are multiples of 8. */
enum limits { MAX_CHUNK = 256, MAX_HEAD_DIM = 256 };

/* Channels of V that share a scale in the kivi formats. */
enum { KIVI_GROUP = 32 };

/* How a region's blocks are stored: FP16, or the family of its width (runtime.formats). */
enum family { HALF, ROTATED, KIVI, ATOM, KVQUANT };

/* K or V of a span (runtime.backend.Span): chunk c of KV head g is at codes + g * codes_stride + c * codes_bytes. */
typedef struct {
    uint8_t *codes, *meta;
    uint8_t *shared; /* of all KV heads; chunk c's is at shared + c * shared_bytes */
    int64_t codes_stride, meta_stride, codes_bytes, meta_bytes, shared_bytes;
    int32_t bits, family;
} region;

typedef struct {
    region k, v;
    int32_t *positions; /* of each chunk's first token */
    int64_t n;
} span;

/* What formats take from outside the cache (runtime.backend.FormatData); NULL where no family of the cache asks. */
typedef struct {
    const float *cos, *sin;           /* (P, D / 2): ATOM and KVQUANT keep K as it is before RoPE */
    const float *turns;               /* (tiles, D / 2, 2, row): the same, in decode attention's order (decoded.h) */
    const float *k_levels, *v_levels; /* (28,): of 2, 3 and 4 bits */
    const float *k_centre, *k_half;   /* (G, D) */
    int64_t P, tiles, first, row;     /* tile i: positions first + i * C on, `row` tokens of which C count */
} format_data;

/* One layer's cache as decode attention reads it; tail_k, tail_v FP16 (G, capacity, D). The flushed span holds chunks that
 * were in the tail from slot `head` on: as many of each as state[4] says are read there and no longer here. */
typedef struct {
    const span *spans, *flushed;
    const format_data *data;
    uint16_t *tail_k, *tail_v;
    int32_t *tail_positions;
    int64_t n_spans, capacity, head, H, G, D, C;
    int64_t window; /* INT32_MAX where there is none */
} cache;

/* int32 of a sequence's decode state (runtime.backend.STATE_*). */
enum { STATE_SIZE = 8 };

/* 0 scalar, 1 AVX2, 2 AVX-512: the widest that this processor and its operating system support. */
int cpu_isa(void);

/* The pool belongs to the process. Threads, caller included, for work bound by arithmetic and for work bound by memory
 * reads, which often saturates with fewer. Results never depend on either. */
void pool_set_threads(int compute, int memory);
int pool_threads(void); /* for arithmetic; 0 while they have not been set */
/* cffi: end */

/* Run task(ctx, 0) .. task(ctx, n - 1) on the pool, in any order; returns when all are done. Tasks must write
 * disjoint outputs and compute each of them the same way whoever runs it. */
void pool_run(void (*task)(void *ctx, int64_t i), void *ctx, int64_t n);

/* The same for tasks that only stream memory, such as matrix-vector products. */
void pool_stream(void (*task)(void *ctx, int64_t i), void *ctx, int64_t n);

/* Scratch of the calling thread, 64-byte aligned, kept until the next request of the same slot or the thread's end; NULL
 * if memory is out.
 * SCRATCH_CALL and SCRATCH_ROWS are for what one call shares with its tasks, SCRATCH_TASK for what a task needs itself. */
enum scratch_slot { SCRATCH_CALL, SCRATCH_ROWS, SCRATCH_TASK, SCRATCH_SLOTS };
void *scratch(enum scratch_slot slot, size_t nbytes);

#define INLINE static inline __attribute__((always_inline))
#define UNUSED __attribute__((unused))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#endif
