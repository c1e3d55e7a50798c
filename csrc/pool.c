/* Persistent worker threads: spin briefly for the next job, then sleep; the calling thread is thread 0. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

/* Longer than the gap between two layers of a small model, far shorter than a scheduler tick. */
enum { SPIN_NS = 50000 };

struct kt_pool {
    size_t n_threads;
    int spins;                      /* 0 if there are more threads than cores: spinning would take the core of a worker */
    pid_t pid;                      /* fork() copies this struct but not the threads */
    pthread_t *workers;
    pthread_mutex_t turn;           /* held for a whole job */
    pthread_mutex_t lock;           /* guards sleeping on wake */
    pthread_cond_t wake;
    void (*work)(void *, size_t);
    void *argument;
    _Alignas(64) atomic_uint job;   /* counts jobs; a change is the signal to start */
    atomic_int stop;
    _Alignas(64) atomic_size_t arrived;
    _Alignas(64) atomic_uint round; /* counts barriers passed */
};

typedef struct { kt_pool *pool; size_t thread; } worker_start;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Spins until *counter differs from seen; 0 if that took too long. */
static int spin_until_changed(const kt_pool *pool, atomic_uint *counter, unsigned seen) {
    if (!pool->spins) return atomic_load_explicit(counter, memory_order_acquire) != seen;
    uint64_t deadline = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(counter, memory_order_acquire) != seen) return 1;
            relax();
        }
    } while (now_ns() < deadline);
    return 0;
}

void kt_pool_barrier(kt_pool *pool) {
    unsigned seen = atomic_load(&pool->round);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 == pool->n_threads) {
        atomic_store(&pool->arrived, 0);
        atomic_fetch_add(&pool->round, 1);
        return;
    }
    /* Past the spin, the missing thread is computing or was preempted: give it this core. */
    while (!spin_until_changed(pool, &pool->round, seen)) sched_yield();
}

static void *worker(void *start) {
    kt_pool *pool = ((worker_start *)start)->pool;
    size_t thread = ((worker_start *)start)->thread;
    free(start);
    for (unsigned seen = 0;; seen++) {
        if (!spin_until_changed(pool, &pool->job, seen)) {
            pthread_mutex_lock(&pool->lock);
            while (atomic_load(&pool->job) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
            pthread_mutex_unlock(&pool->lock);
        }
        if (atomic_load(&pool->stop)) return NULL;
        pool->work(pool->argument, thread);
        kt_pool_barrier(pool);
    }
}

static void start_job(kt_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->job, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

int kt_pool_run(kt_pool *pool, void (*work)(void *argument, size_t thread), void *argument) {
    if (pool->pid != getpid()) return KT_FORKED;
    pthread_mutex_lock(&pool->turn);
    pool->work = work;
    pool->argument = argument;
    if (pool->n_threads > 1) start_job(pool);
    work(argument, 0);
    kt_pool_barrier(pool);
    pthread_mutex_unlock(&pool->turn);
    return KT_OK;
}

static size_t core_count(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return (size_t)CPU_COUNT(&set);
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (size_t)online : 1;
}

static int start_worker(kt_pool *pool, size_t thread) {
    worker_start *start = malloc(sizeof *start);
    if (!start) return -1;
    *start = (worker_start){pool, thread};
    int error = pthread_create(&pool->workers[thread - 1], NULL, worker, start);
    if (error) free(start);
    return error;
}

static void stop_workers(kt_pool *pool, size_t n_workers) {
    atomic_store(&pool->stop, 1);
    start_job(pool);
    for (size_t i = 0; i < n_workers; i++) pthread_join(pool->workers[i], NULL);
}

static void release(kt_pool *pool) {
    free(pool->workers);
    free(pool);
}

kt_pool *kt_pool_new(size_t n_threads) {
    if (!n_threads || n_threads > 4096) return NULL;
    kt_pool *pool = aligned_alloc(64, kt_round_up(sizeof *pool, 64));
    if (!pool) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->n_threads = n_threads;
    pool->spins = n_threads <= core_count();
    pool->pid = getpid();
    pool->workers = calloc(n_threads, sizeof *pool->workers);
    pthread_mutex_init(&pool->turn, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    if (!pool->workers) {
        release(pool);
        return NULL;
    }
    /* Signals belong to the application's threads; those of a faulting instruction stay with their thread. */
    sigset_t blocked, before;
    sigfillset(&blocked);
    const int faults[] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    size_t started = 1;
    while (started < n_threads && !start_worker(pool, started)) started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (started == n_threads) return pool;
    stop_workers(pool, started - 1);
    release(pool);
    return NULL;
}

void kt_pool_free(kt_pool *pool) {
    if (!pool) return;
    if (pool->pid == getpid()) stop_workers(pool, pool->n_threads - 1);
    release(pool);
}

size_t kt_pool_threads(const kt_pool *pool) { return pool->n_threads; }
