/* The thread pool, scratch memory and processor detection: the parts that are compiled once.
 *
 * Decode makes about 150 calls per token, each of a fraction of a millisecond, so a worker spins briefly before it
 * sleeps; the bound on spinning keeps a shared processor usable (libgomp's default spins far longer). */
#include "common.h"

#include <pthread.h>
#include <sched.h>

#define MAX_THREADS 256
#define SPINS 4000 /* 50 to 150 us: longer than the gap between two calls of a decode step */

static struct {
    void (*task)(void *, int64_t);
    void *ctx;
    int64_t n;
    /* High half: number of the job. Low half: tasks not yet claimed. A worker claims task n - left by decrementing,
     * so one that wakes late finds either nothing left or a job whose task and ctx are still valid. */
    _Atomic uint64_t ticket;
    _Atomic int64_t done;
    _Atomic int active; /* threads of this job, caller included */
    pthread_mutex_t run, lock;
    int started; /* workers running; worker i, from 1, takes part where i < active */
} pool = {.run = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER};

static struct {
    pthread_cond_t wake;
    _Atomic bool sleeping;
} workers[MAX_THREADS];

static _Atomic int compute_threads, memory_threads; /* 0, as good as 1, until they are set */

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline uint32_t tasks_left(uint64_t ticket) { return (uint32_t)ticket; }

/* Claim and run tasks until none is left. */
static void work(void) {
    uint64_t ticket = atomic_load(&pool.ticket);
    while (tasks_left(ticket)) {
        if (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket - 1)) continue;
        pool.task(pool.ctx, pool.n - tasks_left(ticket));
        atomic_fetch_add(&pool.done, 1);
        ticket = atomic_load(&pool.ticket);
    }
}

static bool idle(int index) { return !tasks_left(atomic_load(&pool.ticket)) || index >= atomic_load(&pool.active); }

static void *worker(void *arg) {
    int index = (int)(intptr_t)arg;
    for (;;) {
        for (int spin = 0; spin < SPINS && idle(index); spin++) relax();
        if (idle(index)) {
            pthread_mutex_lock(&pool.lock);
            atomic_store(&workers[index].sleeping, true);
            while (idle(index)) pthread_cond_wait(&workers[index].wake, &pool.lock);
            atomic_store(&workers[index].sleeping, false);
            pthread_mutex_unlock(&pool.lock);
        }
        work();
    }
    return NULL;
}

/* A forked child has none of the workers; its first job starts new ones. */
static void forget_workers(void) {
    pool.started = 0;
    atomic_store(&pool.ticket, 0);
    pthread_mutex_init(&pool.run, NULL);
    pthread_mutex_init(&pool.lock, NULL);
}

static void start_workers(int wanted) {
    static bool registered;
    if (!registered) registered = pthread_atfork(NULL, NULL, forget_workers) == 0;
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    while (pool.started < wanted - 1) {
        pthread_t id;
        int index = pool.started + 1;
        pthread_cond_init(&workers[index].wake, NULL);
        atomic_store(&workers[index].sleeping, false);
        if (pthread_create(&id, &attr, worker, (void *)(intptr_t)index)) break; /* fewer is only slower */
        pool.started++;
    }
    pthread_attr_destroy(&attr);
}

void pool_set_threads(int compute, int memory) {
    atomic_store(&compute_threads, MAX(1, MIN(compute, MAX_THREADS)));
    atomic_store(&memory_threads, MAX(1, MIN(memory, MAX_THREADS)));
}

int pool_threads(void) { return atomic_load(&compute_threads); }

static void run(void (*task)(void *, int64_t), void *ctx, int64_t n, int threads) {
    /* Alone, nothing to share, or the pool serves another caller: run here. The result is the same. */
    if (threads < 2 || n < 2 || n > UINT32_MAX || pthread_mutex_trylock(&pool.run)) {
        for (int64_t i = 0; i < n; i++) task(ctx, i);
        return;
    }
    if (pool.started < threads - 1) start_workers(threads);
    pool.task = task, pool.ctx = ctx, pool.n = n;
    atomic_store(&pool.done, 0);
    atomic_store(&pool.active, threads);
    uint64_t job = (atomic_load(&pool.ticket) >> 32) + 1;
    atomic_store(&pool.ticket, job << 32 | (uint32_t)n);
    for (int i = 1; i < threads && i <= pool.started; i++) {
        if (!atomic_load(&workers[i].sleeping)) continue;
        pthread_mutex_lock(&pool.lock);
        pthread_cond_signal(&workers[i].wake);
        pthread_mutex_unlock(&pool.lock);
    }
    work();
    for (int spin = 0; atomic_load(&pool.done) < n; spin++) {
        if (spin < SPINS) relax();
        else sched_yield(); /* the last worker lost its core */
    }
    pthread_mutex_unlock(&pool.run);
}

void pool_run(void (*task)(void *, int64_t), void *ctx, int64_t n) { run(task, ctx, n, compute_threads); }

void pool_stream(void (*task)(void *, int64_t), void *ctx, int64_t n) { run(task, ctx, n, memory_threads); }

typedef struct {
    void *data[SCRATCH_SLOTS];
    size_t size[SCRATCH_SLOTS];
} owned_scratch;

static pthread_key_t scratch_key;
static bool frees_scratch; /* where the system has no key left, what an ended thread held stays */

static void free_scratch(void *arg) {
    owned_scratch *own = arg;
    for (int slot = 0; slot < SCRATCH_SLOTS; slot++) free(own->data[slot]);
    free(own);
}

static void make_scratch_key(void) { frees_scratch = pthread_key_create(&scratch_key, free_scratch) == 0; }

void *scratch(enum scratch_slot slot, size_t nbytes) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    static _Thread_local owned_scratch *own;
    if (!own) {
        if (!(own = calloc(1, sizeof *own))) return NULL;
        pthread_once(&once, make_scratch_key);
        if (frees_scratch) pthread_setspecific(scratch_key, own); /* when the thread ends: callers come and go */
    }
    nbytes = MAX(nbytes, 1); /* so that NULL always means that memory is out */
    if (own->size[slot] < nbytes) {
        free(own->data[slot]);
        size_t size = (nbytes + 4095) / 4096 * 4096;
        own->data[slot] = aligned_alloc(64, size);
        own->size[slot] = own->data[slot] ? size : 0;
    }
    return own->data[slot];
}

int cpu_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    return avx2;
#else
    return 0;
#endif
}
