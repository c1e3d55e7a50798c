/* Persistent worker threads, pinned; they spin for the next job, then sleep. The calling thread is thread 0. One more,
 * the driver, takes its place for tasks that are submitted. kt.h has the rules. */
#include "threads.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

struct kt_process kt_process;

/* ---- jobs ------------------------------------------------------------------------------------------------------ */

/* Past the spin, the missing thread computes or was preempted: yielding gives it this core. */
static void spin_or_yield(const kt_pool *pool, const atomic_uint *word, unsigned value, int equal) {
    while (!spin(pool->spin_limit, word, value, equal, SPIN_NS)) sched_yield();
}

void kt_pool_barrier(kt_pool *pool) {
    unsigned seen = atomic_load_explicit(&pool->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) + 1 < pool->n_threads) {
        spin_or_yield(pool, &pool->round, seen, 0);
        return;
    }
    atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->round, seen + 1, memory_order_release);
}

static void *work_as(void *argument) {
    kt_pool *pool = ((worker *)argument)->pool;
    size_t thread = ((worker *)argument)->thread;
    atomic_fetch_add(&kt_process.awake, 1);
    for (unsigned seen = 0;; seen++) {
        unsigned spin_ns = atomic_load_explicit(&pool->spin_ns, memory_order_relaxed);
        wait_for(&pool->job, seen, pool->spin_limit, spin_ns);
        if (atomic_load_explicit(&pool->stop, memory_order_relaxed)) break;
        pool->work(pool->argument, thread);
        atomic_fetch_add_explicit(&pool->finished, 1, memory_order_release);
    }
    atomic_fetch_sub(&kt_process.awake, 1);
    return NULL;
}

/* Moves the caller to one of these CPUs. It keeps its mask. */
static void move_to(const cpu_mask *cpus) {
    cpu_mask mask = kt_own_mask();
    if (sched_setaffinity(0, sizeof *cpus, cpus->sets) == 0) sched_setaffinity(0, sizeof mask, mask.sets);
}

/* Moves a caller that is where a worker must run. The scheduler takes some 10 ms to do so: it cannot move the worker,
 * and seldom moves a thread that runs. */
static void make_way(const kt_pool *pool) {
    if (!has(&pool->worker_cpus, sched_getcpu())) return;
    cpu_mask mask = kt_own_mask(), one = {0};
    if (!has(&mask, pool->cpus[0])) return;
    add(&one, pool->cpus[0]);
    move_to(&one);
}

void kt_pool_leave(const kt_pool *pool) {
    int here = sched_getcpu(), found = 0;
    if (here != pool->cpus[0] && !has(&pool->worker_cpus, here)) return;
    cpu_mask mask = kt_own_mask(), others = {0};
    for (int cpu = 0; cpu < MAX_CPUS; cpu++) {
        if (!has(&mask, cpu) || has(&pool->worker_cpus, cpu) || cpu == pool->cpus[0]) continue;
        add(&others, cpu);
        found = 1;
    }
    if (found) move_to(&others);
}

int kt_pool_run(kt_pool *pool, void (*work)(void *argument, size_t thread), void *argument) {
    if (is_forked(pool)) return KT_FORKED;
    pthread_mutex_lock(&pool->turn);
    uint64_t start = now_ns();
    if (pool->n_threads == 1) {
        work(argument, 0);
        atomic_fetch_add_explicit(&pool->ns, now_ns() - start, memory_order_relaxed);
        pthread_mutex_unlock(&pool->turn);
        return KT_OK;
    }
    make_way(pool);
    pool->work = work;
    pool->argument = argument;
    unsigned jobs = atomic_fetch_add(&pool->job.count, 1);
    wake_some(&pool->job, jobs);
    int counted = is_driver(pool);
    if (!counted) atomic_fetch_add(&kt_process.awake, 1);
    work(argument, 0);
    spin_or_yield(pool, &pool->finished, (jobs + 1) * (unsigned)(pool->n_threads - 1), 1);
    if (!counted) atomic_fetch_sub(&kt_process.awake, 1);
    atomic_fetch_add_explicit(&pool->ns, now_ns() - start, memory_order_relaxed);
    pthread_mutex_unlock(&pool->turn);
    return KT_OK;
}

void kt_pool_count(kt_pool *pool, uint64_t bytes) {
    atomic_fetch_add_explicit(&pool->bytes, bytes, memory_order_relaxed);
    atomic_fetch_add_explicit(&pool->runs, 1, memory_order_relaxed);
}

kt_counts kt_pool_counts(const kt_pool *pool) {
    return (kt_counts){
        .runs = atomic_load_explicit(&pool->runs, memory_order_relaxed),
        .bytes = atomic_load_explicit(&pool->bytes, memory_order_relaxed),
        .ns = atomic_load_explicit(&pool->ns, memory_order_relaxed),
    };
}

/* ---- making and freeing ---------------------------------------------------------------------------------------- */

static void in_child(void) {
    atomic_fetch_add(&kt_process.forks, 1);
    atomic_store(&kt_process.awake, 0);
    for (int cpu = 0; cpu < MAX_CPUS; cpu++) atomic_store(&kt_process.places[cpu], 0);
}
static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

static int start_thread(pthread_t *thread, int cpu, void *(*run)(void *), void *argument) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return -1;
    cpu_mask pin = {0};
    add(&pin, cpu);
    int error = cpu < 0 ? 0 : pthread_attr_setaffinity_np(&attributes, sizeof pin, pin.sets);
    /* Signals belong to the application's threads; those of a faulting instruction stay with their thread. */
    sigset_t blocked, before;
    sigfillset(&blocked);
    const int faults[] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    if (!error) error = pthread_create(thread, &attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

static int start_worker(kt_pool *pool, size_t thread) {
    worker *w = &pool->workers[thread - 1];
    w->pool = pool;
    w->thread = thread;
    return start_thread(&w->id, pool->cpus[thread], work_as, w);
}

int kt_pool_start_driver(kt_pool *pool) {
    if (!pool) return KT_BAD_ARGUMENT;
    if (is_forked(pool)) return KT_FORKED;
    if (atomic_load_explicit(&pool->driving, memory_order_acquire)) return KT_OK;
    pthread_mutex_lock(&pool->starting);
    int error = 0;
    if (!atomic_load(&pool->driving)) {
        error = start_thread(&pool->driver, pool->cpus[0], kt_drive, pool);
        if (!error) atomic_store_explicit(&pool->driving, 1, memory_order_release);
    }
    pthread_mutex_unlock(&pool->starting);
    return error ? KT_NO_THREAD : KT_OK;
}

static void stop_workers(kt_pool *pool, size_t n_workers) {
    atomic_store(&pool->stop, 1);
    ring(&pool->job);
    for (size_t i = 0; i < n_workers; i++) pthread_join(pool->workers[i].id, NULL);
}

/* Nodes are renumbered in the order in which the threads name them. */
static void put(kt_pool *pool, const int *cpus, const int *nodes) {
    for (size_t i = 0; i < pool->n_threads; i++) {
        size_t same = 0;
        while (nodes && nodes[same] != nodes[i]) same++;
        pool->node_of[i] = same < i ? pool->node_of[same] : pool->n_nodes++;
        pool->cpus[i] = cpus ? cpus[i] : -1;
        if (i) add(&pool->worker_cpus, pool->cpus[i]);
        if (pool->cpus[i] >= 0) atomic_fetch_add(&kt_process.places[pool->cpus[i]], 1);
    }
}

static void release(kt_pool *pool) {
    for (size_t i = 0; pool->n_nodes && i < pool->n_threads && !is_forked(pool); i++)
        if (pool->cpus[i] >= 0) atomic_fetch_sub(&kt_process.places[pool->cpus[i]], 1);
    free(pool->workers);
    free(pool->node_of);
    free(pool->cpus);
    free(pool);
}

static int are_usable(const cpu_mask *allowed, size_t n_threads, const int *cpus, int *shared) {
    cpu_mask taken = {0};
    for (size_t i = 0; i < n_threads; i++) {
        if (cpus[i] == -1) continue;
        if (!has(allowed, cpus[i])) return 0;
        *shared |= has(&taken, cpus[i]);
        add(&taken, cpus[i]);
    }
    return 1;
}

kt_pool *kt_pool_new_on(size_t n_threads, const int *cpus, const int *nodes) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    cpu_mask allowed = kt_own_mask();
    size_t n_cpus = (size_t)CPU_COUNT_S(sizeof allowed, allowed.sets);
    int shared = 0;
    if (!n_threads || n_threads > MAX_THREADS || (cpus && !are_usable(&allowed, n_threads, cpus, &shared))) return NULL;
    kt_pool *pool = aligned_alloc(LINE, sizeof *pool);
    if (!pool) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->n_threads = n_threads;
    pool->spin_limit = n_threads > n_cpus || shared ? 0 : n_cpus;
    atomic_init(&pool->spin_ns, SPIN_NS);
    atomic_init(&pool->ringing, -1);
    pool->forks = atomic_load(&kt_process.forks);
    pool->workers = calloc(n_threads, sizeof *pool->workers);
    pool->node_of = calloc(n_threads, sizeof *pool->node_of);
    pool->cpus = calloc(n_threads, sizeof *pool->cpus);
    if (!pool->workers || !pool->node_of || !pool->cpus) {
        release(pool);
        return NULL;
    }
    put(pool, cpus, nodes);
    pthread_mutex_init(&pool->turn, NULL);
    pthread_mutex_init(&pool->starting, NULL);
    size_t started = 1;
    while (started < n_threads && !start_worker(pool, started)) started++;
    if (started == n_threads) return pool;
    stop_workers(pool, started - 1);
    release(pool);
    return NULL;
}

kt_pool *kt_pool_new(size_t n_threads) {
    if (!n_threads || n_threads > MAX_THREADS) return NULL;
    cpu_mask allowed = kt_own_mask();
    if (n_threads > (size_t)CPU_COUNT_S(sizeof allowed, allowed.sets)) return kt_pool_new_on(n_threads, NULL, NULL);
    int *places = calloc(n_threads, 2 * sizeof *places);
    kt_pool *pool = NULL;
    if (places && !kt_choose_places("/sys/devices/system", &allowed, n_threads, places, places + n_threads))
        pool = kt_pool_new_on(n_threads, places, places + n_threads);
    free(places);
    return pool;
}

void kt_pool_free(kt_pool *pool) {
    if (!pool) return;
    if (!is_forked(pool)) {
        if (atomic_load(&pool->driving)) {
            atomic_store(&pool->stop_driver, 1);
            ring(&pool->bell);
            pthread_join(pool->driver, NULL);
        }
        stop_workers(pool, pool->n_threads - 1);
        pthread_mutex_destroy(&pool->turn);
        pthread_mutex_destroy(&pool->starting);
    }
    release(pool);
}

size_t kt_pool_threads(const kt_pool *pool) { return pool->n_threads; }
size_t kt_pool_nodes(const kt_pool *pool) { return pool->n_nodes; }
size_t kt_pool_node_of(const kt_pool *pool, size_t thread) {
    return thread < pool->n_threads ? pool->node_of[thread] : 0;
}
