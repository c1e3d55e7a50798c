/* What the files of the thread pool share: what a pool is, and how its threads wait. Include this file first. */
#ifndef KT_THREADS_H
#define KT_THREADS_H
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pool.h"

/* The tests count the threads that spin. */
#ifndef KT_SPINNING
#define KT_SPINNING(change) ((void)0)
#endif

enum {
    SPIN_NS = 100000,    /* far shorter than a scheduler tick */
    LISTEN_NS = 3000000, /* where doorbells are rung: covers what a GPU does between two layers, and a host between steps */
    CHECK = 32,          /* turns of a spin between looks at the clock */
    FANOUT = 2,          /* a thread wakes so many others, and they more: to wake all takes one caller 1 us for each */
    LINE = 128,          /* two cache lines: Intel's prefetcher fetches pairs */
    MAX_THREADS = 4096,
    MAX_NODES = 1024,
    MAX_CPUS = 8192,
};

/* What is the process's and no single pool's: its CPUs, and being a fork. */
extern struct kt_process {
    _Alignas(LINE) atomic_size_t awake;
    _Alignas(LINE) atomic_uint forks;   /* of the process since it began; a pool made before the last one is dead */
    atomic_uint places[MAX_CPUS];       /* threads that pools have put on this CPU: the next pool goes elsewhere */
} kt_process;

typedef struct { cpu_set_t sets[MAX_CPUS / CPU_SETSIZE]; } cpu_mask;   /* or nodes */

static inline int has(const cpu_mask *mask, int cpu) {
    return cpu >= 0 && cpu < MAX_CPUS && CPU_ISSET_S((size_t)cpu, sizeof *mask, mask->sets);
}
static inline void add(cpu_mask *mask, int cpu) {
    if (cpu >= 0 && cpu < MAX_CPUS) CPU_SET_S((size_t)cpu, sizeof *mask, mask->sets);
}

/* A counter to wait on. */
typedef struct { atomic_uint count, parked; } event;

typedef struct { kt_pool *pool; size_t thread; pthread_t id; } worker;

struct kt_pool {
    size_t n_threads, n_nodes;
    size_t spin_limit;              /* the CPUs, or 0: never spins */
    unsigned forks;
    int *cpus;                      /* of each thread, or -1; that of thread 0 is the driver's */
    cpu_mask worker_cpus;
    size_t *node_of;
    worker *workers;                /* of threads 1 and up */
    pthread_t driver;
    atomic_int driving;
    pthread_mutex_t turn;           /* held for a whole job */
    pthread_mutex_t starting;       /* held to make the driver */

    _Alignas(LINE) event job;       /* one line has all that a worker needs to begin */
    void (*work)(void *, size_t);
    void *argument;
    atomic_int stop;
    _Alignas(LINE) atomic_uint finished;   /* workers at the end of a job, since the beginning */
    _Alignas(LINE) atomic_size_t arrived;  /* at this barrier */
    _Alignas(LINE) atomic_uint round;      /* barriers passed */

    _Alignas(LINE) event bell;      /* for the driver */
    _Atomic(kt_task *) submitted;   /* a stack: the last one first */
    atomic_int stop_driver;
    kt_task *doorbells;             /* the driver's own */
    atomic_int ringing;             /* who may ring a doorbell now; at 0 the driver may sleep, -1: nobody said */
    atomic_uint spin_ns;            /* how long a worker spins for the next job */
    _Alignas(LINE) event completed; /* tasks */
    _Alignas(LINE) atomic_uint_fast64_t runs, bytes, ns;   /* kt_counts; written by who has the turn, or after it */
};

/* In place.c: the CPUs of the calling thread's mask; a CPU and its node for each thread, from the files under root
 * (/sys/devices/system), -1 without memory. n_threads is at most the number of CPUs allowed. Threads of a node are
 * neighbours. */
cpu_mask kt_own_mask(void);
int kt_choose_places(const char *root, const cpu_mask *allowed, size_t n_threads, int *cpus, int *nodes);
/* In pool.c: moves the caller, who will wait for something else, to a CPU that no thread of the pool has; it stays where
 * it is if there is none. */
void kt_pool_leave(const kt_pool *pool);
/* In submit.c: what the driver runs, of a pool. */
void *kt_drive(void *pool);

/* ---- waiting --------------------------------------------------------------------------------------------------- */

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline int is_past(uint64_t *deadline, unsigned ns) {
    uint64_t now = now_ns();
    if (!*deadline) *deadline = now + ns;
    return now >= *deadline;
}

/* Spins until *word is (or is not) the value; 0 if that took too long or more than `limit` threads are awake. The
 * calling thread is one of them: of those that spin at a moment, the last to have become awake saw them all. */
static inline int spin(size_t limit, const atomic_uint *word, unsigned value, int equal, unsigned ns) {
    if ((atomic_load_explicit(word, memory_order_acquire) == value) == equal) return 1;
    if (atomic_load(&kt_process.awake) > limit) return 0;
    KT_SPINNING(1);
    int found = 0;
    uint64_t deadline = 0;
    do {
        for (int i = 0; i < CHECK && !found; i++) {
            relax();
            found = (atomic_load_explicit(word, memory_order_acquire) == value) == equal;
        }
    } while (!found && atomic_load(&kt_process.awake) <= limit && !is_past(&deadline, ns));
    KT_SPINNING(-1);
    return found;
}

/* A sleeper's bit says which count it has seen, so that a wake is not taken by one that waits for a later count. */
static inline unsigned bit(unsigned seen) { return 1u << seen % 32; }

static inline void futex_wait(atomic_uint *word, unsigned seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, seen, NULL, NULL, bit(seen));
}

static inline void futex_wake(atomic_uint *word, int n_threads, unsigned bits) {
    syscall(SYS_futex, word, FUTEX_WAKE_BITSET | FUTEX_PRIVATE_FLAG, n_threads, NULL, NULL, bits);
}

/* Sleeps until the count is not `seen`. Either `ring` sees this thread in `parked`, or this thread sees its count. */
static inline void park(event *e, unsigned seen) {
    atomic_fetch_add(&e->parked, 1);
    while (atomic_load(&e->count) == seen) futex_wait(&e->count, seen);
    atomic_fetch_sub(&e->parked, 1);
}

static inline void ring(event *e) {
    atomic_fetch_add(&e->count, 1);
    if (atomic_load(&e->parked)) futex_wake(&e->count, INT_MAX, FUTEX_BITSET_MATCH_ANY);
}

static inline void wake_some(event *e, unsigned seen) {
    if (atomic_load(&e->parked)) futex_wake(&e->count, FANOUT, bit(seen));
}

/* For a thread of the pool: spins, then sleeps. Wakes others that sleep for the same count. */
static inline void wait_for(event *e, unsigned seen, size_t limit, unsigned ns) {
    if (spin(limit, &e->count, seen, 0, ns)) return;
    atomic_fetch_sub(&kt_process.awake, 1);
    park(e, seen);
    atomic_fetch_add(&kt_process.awake, 1);
    wake_some(e, seen);
}

/* For a thread that may sleep at once: becomes awake if there is a CPU for it. */
static inline int wake_if_room(size_t limit) {
    size_t awake = atomic_load(&kt_process.awake);
    while (awake < limit)
        if (atomic_compare_exchange_weak(&kt_process.awake, &awake, awake + 1)) return 1;
    return 0;
}

static inline int is_forked(const kt_pool *pool) {
    return pool->forks != atomic_load_explicit(&kt_process.forks, memory_order_relaxed);
}

static inline int is_driver(const kt_pool *pool) {
    return atomic_load_explicit(&pool->driving, memory_order_acquire) && pthread_equal(pool->driver, pthread_self());
}
#endif
