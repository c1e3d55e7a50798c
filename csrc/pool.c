/* Persistent worker threads, pinned; they spin for the next job, then sleep. The calling thread is thread 0. One more,
 * the driver, takes its place for tasks that are submitted. pool.h has the rules. */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pool.h"

/* The tests count the threads that spin. */
#ifndef KT_SPINNING
#define KT_SPINNING(change) ((void)0)
#endif

enum {
    SPIN_NS = 100000,    /* covers the gap between two layers; far shorter than a scheduler tick */
    CHECK = 32,          /* turns of a spin between looks at the clock */
    FANOUT = 2,          /* a thread wakes so many others, and they more: to wake all takes one caller 1 us for each */
    LINE = 128,          /* two cache lines: Intel's prefetcher fetches pairs */
    MAX_THREADS = 4096,
    MAX_NODES = 1024,
    MAX_CPUS = 8192,
};

/* What is the process's and no single pool's: its CPUs, and being a fork. */
static struct {
    _Alignas(LINE) atomic_size_t awake;
    _Alignas(LINE) atomic_uint forks;   /* of the process since it began; a pool made before the last one is dead */
    atomic_uint places[MAX_CPUS];       /* threads that pools have put on this CPU: the next pool goes elsewhere */
} process;

typedef struct { cpu_set_t sets[MAX_CPUS / CPU_SETSIZE]; } cpu_mask;   /* or nodes */

static int has(const cpu_mask *mask, int cpu) {
    return cpu >= 0 && cpu < MAX_CPUS && CPU_ISSET_S((size_t)cpu, sizeof *mask, mask->sets);
}
static void add(cpu_mask *mask, int cpu) {
    if (cpu >= 0 && cpu < MAX_CPUS) CPU_SET_S((size_t)cpu, sizeof *mask, mask->sets);
}

static cpu_mask own_mask(void) {
    cpu_mask mask = {0};
    if (sched_getaffinity(0, sizeof mask, mask.sets) == 0) return mask;
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    for (int cpu = 0; cpu == 0 || cpu < online; cpu++) add(&mask, cpu);
    return mask;
}

/* A counter to wait on. */
typedef struct { atomic_uint count, parked; } event;

typedef struct { kt_pool *pool; size_t thread; pthread_t id; } worker;

enum { IDLE, QUEUED, DONE, LISTENING };  /* kt_task.state */

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
    _Alignas(LINE) event completed; /* tasks */
};

/* ---- waiting --------------------------------------------------------------------------------------------------- */

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int is_past(uint64_t *deadline) {
    uint64_t now = now_ns();
    if (!*deadline) *deadline = now + SPIN_NS;
    return now >= *deadline;
}

/* Spins until *word is (or is not) the value; 0 if that took too long or more than `limit` threads are awake. The
 * calling thread is one of them: of those that spin at a moment, the last to have become awake saw them all. */
static int spin(size_t limit, const atomic_uint *word, unsigned value, int equal) {
    if ((atomic_load_explicit(word, memory_order_acquire) == value) == equal) return 1;
    if (atomic_load(&process.awake) > limit) return 0;
    KT_SPINNING(1);
    int found = 0;
    uint64_t deadline = 0;
    do {
        for (int i = 0; i < CHECK && !found; i++) {
            relax();
            found = (atomic_load_explicit(word, memory_order_acquire) == value) == equal;
        }
    } while (!found && atomic_load(&process.awake) <= limit && !is_past(&deadline));
    KT_SPINNING(-1);
    return found;
}

/* A sleeper's bit says which count it has seen, so that a wake is not taken by one that waits for a later count. */
static unsigned bit(unsigned seen) { return 1u << seen % 32; }

static void futex_wait(atomic_uint *word, unsigned seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, seen, NULL, NULL, bit(seen));
}

static void futex_wake(atomic_uint *word, int n_threads, unsigned bits) {
    syscall(SYS_futex, word, FUTEX_WAKE_BITSET | FUTEX_PRIVATE_FLAG, n_threads, NULL, NULL, bits);
}

/* Sleeps until the count is not `seen`. Either `ring` sees this thread in `parked`, or this thread sees its count. */
static void park(event *e, unsigned seen) {
    atomic_fetch_add(&e->parked, 1);
    while (atomic_load(&e->count) == seen) futex_wait(&e->count, seen);
    atomic_fetch_sub(&e->parked, 1);
}

static void ring(event *e) {
    atomic_fetch_add(&e->count, 1);
    if (atomic_load(&e->parked)) futex_wake(&e->count, INT_MAX, FUTEX_BITSET_MATCH_ANY);
}

static void wake_some(event *e, unsigned seen) {
    if (atomic_load(&e->parked)) futex_wake(&e->count, FANOUT, bit(seen));
}

/* For a thread of the pool: spins, then sleeps. Wakes others that sleep for the same count. */
static void wait_for(event *e, unsigned seen, size_t limit) {
    if (spin(limit, &e->count, seen, 0)) return;
    atomic_fetch_sub(&process.awake, 1);
    park(e, seen);
    atomic_fetch_add(&process.awake, 1);
    wake_some(e, seen);
}

/* For a thread that may sleep at once: becomes awake if there is a CPU for it. */
static int wake_if_room(size_t limit) {
    size_t awake = atomic_load(&process.awake);
    while (awake < limit)
        if (atomic_compare_exchange_weak(&process.awake, &awake, awake + 1)) return 1;
    return 0;
}

/* ---- jobs ------------------------------------------------------------------------------------------------------ */

static int is_forked(const kt_pool *pool) {
    return pool->forks != atomic_load_explicit(&process.forks, memory_order_relaxed);
}

static int is_driver(const kt_pool *pool) {
    return atomic_load_explicit(&pool->driving, memory_order_acquire) && pthread_equal(pool->driver, pthread_self());
}

/* Past the spin, the missing thread computes or was preempted: yielding gives it this core. */
static void spin_or_yield(const kt_pool *pool, const atomic_uint *word, unsigned value, int equal) {
    while (!spin(pool->spin_limit, word, value, equal)) sched_yield();
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
    atomic_fetch_add(&process.awake, 1);
    for (unsigned seen = 0;; seen++) {
        wait_for(&pool->job, seen, pool->spin_limit);
        if (atomic_load_explicit(&pool->stop, memory_order_relaxed)) break;
        pool->work(pool->argument, thread);
        atomic_fetch_add_explicit(&pool->finished, 1, memory_order_release);
    }
    atomic_fetch_sub(&process.awake, 1);
    return NULL;
}

/* Moves a caller that is where a worker must run. The scheduler takes some 10 ms to do so: it cannot move the worker,
 * and seldom moves a thread that runs. The caller keeps its mask. */
static void make_way(const kt_pool *pool) {
    if (!has(&pool->worker_cpus, sched_getcpu())) return;
    cpu_mask mask = own_mask(), one = {0};
    if (!has(&mask, pool->cpus[0])) return;
    add(&one, pool->cpus[0]);
    if (sched_setaffinity(0, sizeof one, one.sets) == 0) sched_setaffinity(0, sizeof mask, mask.sets);
}

int kt_pool_run(kt_pool *pool, void (*work)(void *argument, size_t thread), void *argument) {
    if (is_forked(pool)) return KT_FORKED;
    pthread_mutex_lock(&pool->turn);
    if (pool->n_threads == 1) {
        work(argument, 0);
        pthread_mutex_unlock(&pool->turn);
        return KT_OK;
    }
    make_way(pool);
    pool->work = work;
    pool->argument = argument;
    unsigned jobs = atomic_fetch_add(&pool->job.count, 1);
    wake_some(&pool->job, jobs);
    int counted = is_driver(pool);
    if (!counted) atomic_fetch_add(&process.awake, 1);
    work(argument, 0);
    spin_or_yield(pool, &pool->finished, (jobs + 1) * (unsigned)(pool->n_threads - 1), 1);
    if (!counted) atomic_fetch_sub(&process.awake, 1);
    pthread_mutex_unlock(&pool->turn);
    return KT_OK;
}

/* ---- tasks ----------------------------------------------------------------------------------------------------- */

/* kt.h is also read by tools that do not know _Atomic. */
static atomic_uint *state_of(kt_task *task) { return (atomic_uint *)&task->state; }
_Static_assert(sizeof(atomic_uint) == sizeof(unsigned) && _Alignof(atomic_uint) == _Alignof(unsigned), "state_of");

/* Takes a task that is in nobody's list. */
static int claim(kt_pool *pool, kt_task *task, unsigned state) {
    unsigned now = atomic_load(state_of(task));
    if (now == QUEUED || now == LISTENING) return KT_BAD_ARGUMENT;
    if (!atomic_compare_exchange_strong(state_of(task), &now, state)) return KT_BAD_ARGUMENT;
    task->pool = pool;
    return KT_OK;
}

/* 0 if there were none. */
static int serve_tasks(kt_pool *pool) {
    if (!atomic_load_explicit(&pool->submitted, memory_order_relaxed)) return 0;
    kt_task *last = atomic_exchange_explicit(&pool->submitted, NULL, memory_order_acquire), *first = NULL;
    while (last) {
        kt_task *before = last->next;
        last->next = first;
        first = last;
        last = before;
    }
    while (first) {
        kt_task *task = first;
        first = task->next;  /* once it is done, the task is its owner's */
        task->call(task->argument);
        atomic_store(state_of(task), DONE);
        ring(&pool->completed);
    }
    return 1;
}

static int serve_doorbells(kt_pool *pool) {
    int served = 0;
    for (kt_task *task = pool->doorbells; task; task = task->next) {
        if (!__atomic_load_n(task->start, __ATOMIC_ACQUIRE)) continue;
        __atomic_store_n(task->start, 0, __ATOMIC_RELAXED);
        task->call(task->argument);
        __atomic_store_n(task->done, 1, __ATOMIC_RELEASE);
        served = 1;
    }
    return served;
}

static void poll_again(size_t limit) {
    if (atomic_load(&process.awake) > limit) {
        sched_yield();
        return;
    }
    KT_SPINNING(1);
    relax();
    KT_SPINNING(-1);
}

static void *drive(void *argument) {
    kt_pool *pool = argument;
    /* Whoever will submit needs a CPU too. */
    size_t limit = pool->spin_limit ? pool->spin_limit - 1 : 0;
    atomic_fetch_add(&process.awake, 1);
    for (;;) {
        /* Before the lists are looked at, so that what comes later is noticed. */
        unsigned seen = atomic_load(&pool->bell.count);
        int stop = atomic_load(&pool->stop_driver);
        int served = serve_tasks(pool);
        if (serve_doorbells(pool) || served) continue;
        if (stop) break;
        if (pool->doorbells) poll_again(limit);
        else wait_for(&pool->bell, seen, limit);
    }
    atomic_fetch_sub(&process.awake, 1);
    return NULL;
}

int kt_pool_submit(kt_pool *pool, kt_task *task) {
    if (!pool || !task || !task->call) return KT_BAD_ARGUMENT;
    int status = kt_pool_start_driver(pool);
    if (!status) status = claim(pool, task, QUEUED);
    if (status) return status;
    task->next = atomic_load_explicit(&pool->submitted, memory_order_relaxed);
    while (!atomic_compare_exchange_weak(&pool->submitted, &task->next, task)) {}
    ring(&pool->bell);
    return KT_OK;
}

int kt_pool_wait(kt_pool *pool, kt_task *task) {
    if (!pool || !task) return KT_BAD_ARGUMENT;
    if (is_forked(pool)) return KT_FORKED;
    unsigned state = atomic_load(state_of(task));
    if (state == DONE) return KT_OK;
    if (state != QUEUED || task->pool != pool || is_driver(pool)) return KT_BAD_ARGUMENT;
    /* Where the driver must run, this thread would be in its way. */
    if (sched_getcpu() != pool->cpus[0] && wake_if_room(pool->spin_limit)) {
        int done = spin(pool->spin_limit, state_of(task), QUEUED, 0);
        atomic_fetch_sub(&process.awake, 1);
        if (done) return KT_OK;
    }
    for (;;) {
        unsigned seen = atomic_load(&pool->completed.count);
        if (atomic_load(state_of(task)) != QUEUED) return KT_OK;
        park(&pool->completed, seen);
    }
}

void kt_task_submit(void *task) { ((kt_task *)task)->status = kt_pool_submit(((kt_task *)task)->pool, task); }
void kt_task_wait(void *task) { ((kt_task *)task)->status = kt_pool_wait(((kt_task *)task)->pool, task); }

/* The list of doorbells is the driver's own: it is changed by tasks. */
static void add_doorbell(void *doorbell) {
    kt_task *task = doorbell, **link = &task->pool->doorbells;
    while (*link) link = &(*link)->next;
    task->next = NULL;
    *link = task;
}

static void remove_doorbell(void *doorbell) {
    kt_task *task = doorbell, **link = &task->pool->doorbells;
    while (*link != task) link = &(*link)->next;
    *link = task->next;
}

static int run_on_driver(kt_pool *pool, void (*call)(void *), void *argument) {
    kt_task task = {.call = call, .argument = argument};
    int status = kt_pool_submit(pool, &task);
    return status ? status : kt_pool_wait(pool, &task);
}

int kt_pool_listen(kt_pool *pool, kt_task *task, volatile uint32_t *start, volatile uint32_t *done) {
    if (!pool || !task || !task->call || !start || !done) return KT_BAD_ARGUMENT;
    if (is_forked(pool)) return KT_FORKED;
    if (is_driver(pool) || claim(pool, task, LISTENING)) return KT_BAD_ARGUMENT;
    task->start = start;
    task->done = done;
    int status = run_on_driver(pool, add_doorbell, task);
    if (status) atomic_store(state_of(task), IDLE);
    return status;
}

int kt_pool_unlisten(kt_pool *pool, kt_task *task) {
    if (!pool || !task) return KT_BAD_ARGUMENT;
    if (is_forked(pool)) return KT_FORKED;
    if (atomic_load(state_of(task)) != LISTENING || task->pool != pool || is_driver(pool)) return KT_BAD_ARGUMENT;
    int status = run_on_driver(pool, remove_doorbell, task);
    if (!status) atomic_store(state_of(task), IDLE);
    return status;
}

/* ---- places ---------------------------------------------------------------------------------------------------- */

/* Reads a list as 0-3,8; a file that is missing has nothing in it. */
static cpu_mask read_list(const char *root, const char *path, int number) {
    char name[512];
    size_t used = (size_t)snprintf(name, sizeof name, "%s/", root);
    cpu_mask list = {0};
    if (used >= sizeof name) return list;
    snprintf(name + used, sizeof name - used, path, number);
    FILE *file = fopen(name, "r");
    if (!file) return list;
    for (int first, last, mark = ','; mark == ',' && fscanf(file, "%d", &first) == 1;) {
        last = first;
        mark = getc(file);
        if (mark == '-' && fscanf(file, "%d", &last) == 1) mark = getc(file);
        for (int i = first; i <= last && i < MAX_CPUS; i++) add(&list, i);
    }
    fclose(file);
    return list;
}

typedef struct {
    int cpu, node, taken;
    int rank;           /* which hardware thread of its core, of those allowed */
    unsigned places;    /* of other pools */
} candidate;

static size_t list_candidates(const char *root, const cpu_mask *allowed, candidate *out) {
    size_t n = 0;
    for (int cpu = 0; cpu < MAX_CPUS; cpu++) {
        if (!has(allowed, cpu)) continue;
        cpu_mask siblings = read_list(root, "cpu/cpu%d/topology/thread_siblings_list", cpu);
        candidate c = {.cpu = cpu, .places = atomic_load(&process.places[cpu])};
        for (int other = 0; other < cpu; other++) c.rank += has(&siblings, other) && has(allowed, other);
        out[n++] = c;
    }
    cpu_mask nodes = read_list(root, "node/online", 0);
    for (int node = 0; node < MAX_NODES; node++) {
        if (!has(&nodes, node)) continue;
        cpu_mask inside = read_list(root, "node/node%d/cpulist", node);
        for (size_t i = 0; i < n; i++)
            if (has(&inside, out[i].cpu)) out[i].node = node;
    }
    return n;
}

static int is_better(const candidate *a, const candidate *b, const size_t *used) {
    if (a->places != b->places) return a->places < b->places;
    if (a->rank != b->rank) return a->rank < b->rank;
    if (used[a->node] != used[b->node]) return used[a->node] < used[b->node];
    return a->node < b->node;  /* then the lower CPU, which comes first */
}

/* A CPU and its node for each thread, from the files under root (/sys/devices/system); n_threads is at most the number
 * of CPUs allowed. Threads of a node are neighbours. */
static int choose_places(const char *root, const cpu_mask *allowed, size_t n_threads, int *cpus, int *nodes) {
    candidate *all = malloc((size_t)CPU_COUNT_S(sizeof *allowed, allowed->sets) * sizeof *all);
    if (!all) return -1;
    size_t used[MAX_NODES] = {0}, n = list_candidates(root, allowed, all), placed = 0;
    for (size_t thread = 0; thread < n_threads; thread++) {
        candidate *best = NULL;
        for (size_t i = 0; i < n; i++)
            if (!all[i].taken && (!best || is_better(&all[i], best, used))) best = &all[i];
        best->taken = 1;
        used[best->node]++;
    }
    for (int node = 0; node < MAX_NODES; node++)
        for (int rank = 0; used[node]; rank++)
            for (size_t i = 0; i < n; i++) {
                if (!all[i].taken || all[i].node != node || all[i].rank != rank) continue;
                cpus[placed] = all[i].cpu;
                nodes[placed++] = node;
                used[node]--;
            }
    free(all);
    return 0;
}

/* ---- making and freeing ---------------------------------------------------------------------------------------- */

static void in_child(void) {
    atomic_fetch_add(&process.forks, 1);
    atomic_store(&process.awake, 0);
    for (int cpu = 0; cpu < MAX_CPUS; cpu++) atomic_store(&process.places[cpu], 0);
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
        error = start_thread(&pool->driver, pool->cpus[0], drive, pool);
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
        if (pool->cpus[i] >= 0) atomic_fetch_add(&process.places[pool->cpus[i]], 1);
    }
}

static void release(kt_pool *pool) {
    for (size_t i = 0; pool->n_nodes && i < pool->n_threads && !is_forked(pool); i++)
        if (pool->cpus[i] >= 0) atomic_fetch_sub(&process.places[pool->cpus[i]], 1);
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
    cpu_mask allowed = own_mask();
    size_t n_cpus = (size_t)CPU_COUNT_S(sizeof allowed, allowed.sets);
    int shared = 0;
    if (!n_threads || n_threads > MAX_THREADS || (cpus && !are_usable(&allowed, n_threads, cpus, &shared))) return NULL;
    kt_pool *pool = aligned_alloc(LINE, sizeof *pool);
    if (!pool) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->n_threads = n_threads;
    pool->spin_limit = n_threads > n_cpus || shared ? 0 : n_cpus;
    pool->forks = atomic_load(&process.forks);
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
    cpu_mask allowed = own_mask();
    if (n_threads > (size_t)CPU_COUNT_S(sizeof allowed, allowed.sets)) return kt_pool_new_on(n_threads, NULL, NULL);
    int *places = calloc(n_threads, 2 * sizeof *places);
    kt_pool *pool = NULL;
    if (places && !choose_places("/sys/devices/system", &allowed, n_threads, places, places + n_threads))
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
