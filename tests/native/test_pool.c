/* Checks of the thread pool, from inside: prints "ok" for each and exits with 1 at the first that fails. With the
 * argument `time`, prints what a run, a barrier, a task and a doorbell cost instead. tests/test_native_pool.py compiles
 * it, with and without sanitizers. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>

static atomic_int spinning, most_spinning, allocations;  /* of the pool */
static atomic_int threads_left = 1 << 30;
static _Thread_local int own_spins;

static void count_spinning(int change) {
    int now = atomic_fetch_add(&spinning, change) + change, most = atomic_load(&most_spinning);
    while (now > most && !atomic_compare_exchange_weak(&most_spinning, &most, now)) {}
    own_spins += change > 0;
}

static void *counted(void *memory) {
    atomic_fetch_add(&allocations, 1);
    return memory;
}

static int create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument) {
    if (atomic_fetch_sub(&threads_left, 1) <= 0) return EAGAIN;
    return pthread_create(thread, attributes, run, argument);
}

#define KT_SPINNING(change) count_spinning(change)
#define malloc(size) counted(malloc(size))
#define calloc(n, size) counted(calloc(n, size))
#define aligned_alloc(alignment, size) counted(aligned_alloc(alignment, size))
#define pthread_create create
#include "../../csrc/place.c"
#include "../../csrc/submit.c"
#include "../../csrc/pool.c"
#undef pthread_create

enum { MAX = 8, PAD = 32, ROUNDS = 2000 };

static void require_at(int line, const char *text, int holds) {
    if (holds) return;
    printf("FAILED line %d: %s (errno %d)\n", line, text, errno);
    fflush(stdout);
    _exit(1);
}
#define require(condition) require_at(__LINE__, #condition, (condition) != 0)

static void sleep_us(unsigned us) {
    struct timespec t = {us / 1000000, us % 1000000 * 1000L};
    nanosleep(&t, NULL);
}
static int cpu_count(void) {
    cpu_mask mask = kt_own_mask();
    return CPU_COUNT_S(sizeof mask, mask.sets);
}
static int first_cpu(const cpu_mask *mask) {
    int cpu = 0;
    while (!has(mask, cpu)) cpu++;
    return cpu;
}
static pthread_t start(void *(*run)(void *), void *argument) {
    pthread_t thread;
    require(pthread_create(&thread, NULL, run, argument) == 0);
    return thread;
}
static void join(pthread_t thread) { require(pthread_join(thread, NULL) == 0); }
static void become(atomic_int *value, int wanted) {  /* a test that hangs is ended by its alarm */
    while (atomic_load(value) < wanted) sched_yield();
}

/* ---- jobs ------------------------------------------------------------------------------------------------------ */

typedef struct { kt_pool *pool; size_t n; int rounds; unsigned seen[MAX * PAD]; } meeting;

static void do_nothing(void *argument, size_t thread) { (void)argument, (void)thread; }

/* What a thread wrote before a barrier is seen by all after it: plain memory, so ThreadSanitizer judges too. */
static void meet(void *argument, size_t thread) {
    meeting *m = argument;
    for (int round = 0; round < m->rounds; round++) {
        m->seen[thread * PAD]++;
        kt_pool_barrier(m->pool);
        for (size_t other = 0; other < m->n; other++) require(m->seen[other * PAD] == m->seen[thread * PAD]);
        kt_pool_barrier(m->pool);
    }
}

static void test_runs_and_barriers(void) {
    const size_t counts[] = {1, 2, 3, 5};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        meeting m = {.n = counts[i]};
        require((m.pool = kt_pool_new(m.n)) != NULL);
        require(kt_pool_threads(m.pool) == m.n);
        m.rounds = ROUNDS;
        require(kt_pool_run(m.pool, meet, &m) == KT_OK);
        m.rounds = 1;
        for (int run = 0; run < ROUNDS; run++) require(kt_pool_run(m.pool, meet, &m) == KT_OK);
        m.rounds = 0;
        for (int run = 0; run < ROUNDS; run++) require(kt_pool_run(m.pool, meet, &m) == KT_OK);
        for (size_t thread = 0; thread < m.n; thread++) require(m.seen[thread * PAD] == 2 * ROUNDS);
        m.rounds = 1;
        for (int run = 0; run < 50; run++) {  /* the workers sleep in between */
            sleep_us(200);
            require(kt_pool_run(m.pool, meet, &m) == KT_OK);
        }
        kt_pool_free(m.pool);
        require(atomic_load(&kt_process.awake) == 0);
    }
}

static void *run_often(void *argument) {
    for (int run = 0; run < 1000; run++) require(kt_pool_run(((meeting *)argument)->pool, meet, argument) == KT_OK);
    return NULL;
}

/* Jobs of several threads exclude each other: `seen` is shared and plain. */
static void test_callers_take_turns(void) {
    meeting m = {.n = 2, .rounds = 1, .pool = kt_pool_new(2)};
    pthread_t callers[4];
    for (int i = 0; i < 4; i++) callers[i] = start(run_often, &m);
    for (int i = 0; i < 4; i++) join(callers[i]);
    require(m.seen[0] == 4000 && m.seen[PAD] == 4000);
    kt_pool_free(m.pool);
}

static void test_pools_side_by_side(void) {
    meeting m[3];
    pthread_t callers[3];
    for (int i = 0; i < 3; i++) m[i] = (meeting){.n = (size_t)i + 1, .rounds = 2, .pool = kt_pool_new((size_t)i + 1)};
    for (int i = 0; i < 3; i++) callers[i] = start(run_often, &m[i]);
    for (int i = 0; i < 3; i++) join(callers[i]);
    for (int i = 0; i < 3; i++) kt_pool_free(m[i].pool);
    require(atomic_load(&kt_process.awake) == 0);
}

static void test_refuses(void) {
    int cpus[2] = {-1, MAX_CPUS - 1};
    require(!kt_pool_new(0) && !kt_pool_new(MAX_THREADS + 1) && !kt_pool_new_on(0, NULL, NULL));
    require(!kt_pool_new_on(2, cpus, NULL));
    cpus[1] = -2;
    require(!kt_pool_new_on(2, cpus, NULL));
    atomic_store(&threads_left, 2);
    require(!kt_pool_new(5));
    atomic_store(&threads_left, 0);
    kt_pool *pool = kt_pool_new(1);
    require(pool && kt_pool_start_driver(pool) == KT_NO_THREAD);
    atomic_store(&threads_left, 1 << 30);
    require(kt_pool_start_driver(pool) == KT_OK && kt_pool_start_driver(pool) == KT_OK);
    kt_pool_free(pool);
    kt_pool_free(NULL);
    kt_task task = {0};
    require(kt_pool_submit(NULL, &task) == KT_BAD_ARGUMENT && kt_pool_wait(NULL, &task) == KT_BAD_ARGUMENT);
    require(kt_pool_start_driver(NULL) == KT_BAD_ARGUMENT);
    require(atomic_load(&kt_process.awake) == 0);
}

/* ---- places ---------------------------------------------------------------------------------------------------- */

static void write_file(const char *root, const char *path, const char *text) {
    char name[512];
    snprintf(name, sizeof name, "%s/%s", root, path);
    for (char *slash = strchr(name + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(name, 0700);
        *slash = '/';
    }
    FILE *file = fopen(name, "w");
    require(file != NULL);
    fputs(text, file);
    fclose(file);
}

static void expect_places(const char *root, const char *allowed, size_t n, const char *expected) {
    int cpus[16], nodes[16], used = 0;
    char got[256] = "";
    write_file(root, "allowed", allowed);
    cpu_mask mask = read_list(root, "allowed", 0);
    require(kt_choose_places(root, &mask, n, cpus, nodes) == 0);
    for (size_t i = 0; i < n; i++)
        used += snprintf(got + used, sizeof got - (size_t)used, i ? " %d/%d" : "%d/%d", cpus[i], nodes[i]);
    if (strcmp(got, expected)) printf("of %s: %s, not %s\n", allowed, got, expected);
    require(!strcmp(got, expected));
}

/* A machine of two nodes with four cores each, two threads a core: CPU c and c + 8 are one core. */
static void test_places(const char *root) {
    expect_places(root, "0-3\n", 2, "0/0 1/0");  /* no files */
    for (int cpu = 0; cpu < 16; cpu++) {
        char path[64], text[16];
        snprintf(path, sizeof path, "cpu/cpu%d/topology/thread_siblings_list", cpu);
        snprintf(text, sizeof text, "%d,%d\n", cpu % 8, cpu % 8 + 8);
        write_file(root, path, text);
    }
    write_file(root, "node/online", "0-1\n");
    write_file(root, "node/node0/cpulist", "0-3,8-11\n");
    write_file(root, "node/node1/cpulist", "4-7,12-15\n");
    expect_places(root, "0-15\n", 1, "0/0");
    expect_places(root, "0-15\n", 4, "0/0 1/0 4/1 5/1");
    expect_places(root, "0-15\n", 5, "0/0 1/0 2/0 4/1 5/1");
    expect_places(root, "0-15\n", 10, "0/0 1/0 2/0 3/0 8/0 4/1 5/1 6/1 7/1 12/1");
    expect_places(root, "1-2,5,9-10\n", 3, "1/0 2/0 5/1");
    expect_places(root, "1-2,5,9-10\n", 5, "1/0 2/0 9/0 10/0 5/1");
    expect_places(root, "9-10\n", 2, "9/0 10/0");
    expect_places(root, "4-7\n", 2, "4/1 5/1");
    atomic_fetch_add(&kt_process.places[0], 1);  /* another pool's */
    expect_places(root, "0-15\n", 2, "1/0 4/1");
    atomic_fetch_sub(&kt_process.places[0], 1);
}

static void test_nodes(void) {
    const int nodes[5] = {7, 3, 3, 7, 9};
    const size_t expected[5] = {0, 1, 1, 0, 2};
    kt_pool *pool = kt_pool_new_on(5, NULL, nodes);
    require(pool && kt_pool_nodes(pool) == 3);
    for (size_t i = 0; i < 5; i++) require(kt_pool_node_of(pool, i) == expected[i]);
    meeting m = {.n = 5, .rounds = 10, .pool = pool};
    require(kt_pool_run(pool, meet, &m) == KT_OK);
    kt_pool_free(pool);
    require((pool = kt_pool_new_on(3, NULL, NULL)) != NULL);
    require(kt_pool_nodes(pool) == 1 && kt_pool_node_of(pool, 2) == 0);
    kt_pool_free(pool);
}

typedef struct { cpu_mask mask[MAX]; int cpu[MAX]; sigset_t blocked[MAX]; } whereabouts;

static void look(void *argument, size_t thread) {
    whereabouts *w = argument;
    if (thread >= MAX) return;
    w->mask[thread] = kt_own_mask();
    w->cpu[thread] = sched_getcpu();
    pthread_sigmask(SIG_SETMASK, NULL, &w->blocked[thread]);
}
static void look_as_driver(void *argument) { look(argument, 0); }

static int is_only(const cpu_mask *mask, int cpu) {
    return CPU_COUNT_S(sizeof *mask, mask->sets) == 1 && has(mask, cpu);
}
static int are_equal(const cpu_mask *a, const cpu_mask *b) { return CPU_EQUAL_S(sizeof *a, a->sets, b->sets); }

static void test_pinning(void) {
    static whereabouts w;
    cpu_mask mine = kt_own_mask();
    size_t n = (size_t)cpu_count();
    if (n > MAX) n = MAX;
    kt_pool *pool = kt_pool_new(n), *other = kt_pool_new(n);
    require(pool && other);
    require(kt_pool_run(pool, look, &w) == KT_OK);
    require(are_equal(&w.mask[0], &mine));
    for (size_t i = 1; i < n; i++) {
        require(is_only(&w.mask[i], pool->cpus[i]) && has(&mine, pool->cpus[i]));
        for (size_t j = 0; j < i; j++) require(pool->cpus[i] != pool->cpus[j]);
        require(sigismember(&w.blocked[i], SIGINT) && !sigismember(&w.blocked[i], SIGSEGV));
    }
    kt_task task = {.call = look_as_driver, .argument = &w};
    require(kt_pool_submit(pool, &task) == KT_OK && kt_pool_wait(pool, &task) == KT_OK);
    require(is_only(&w.mask[0], pool->cpus[0]));
    if (n > 1) {  /* a caller in a worker's way moves, and keeps its mask */
        int apart = 0;
        cpu_mask one = {0};
        add(&one, pool->cpus[1]);
        for (int i = 0; i < 20; i++) {
            require(sched_setaffinity(0, sizeof one, one.sets) == 0);
            require(sched_setaffinity(0, sizeof mine, mine.sets) == 0);
            require(kt_pool_run(pool, look, &w) == KT_OK);
            require(are_equal(&w.mask[0], &mine));
            apart += w.cpu[0] != pool->cpus[1];
        }
        require(apart >= 10);
    }
    kt_pool_free(pool);
    kt_pool_free(other);
    require((pool = kt_pool_new((size_t)cpu_count() + 1)) != NULL && pool->spin_limit == 0);
    require(kt_pool_run(pool, look, &w) == KT_OK);
    for (size_t i = 0; i <= n && i < MAX; i++) require(are_equal(&w.mask[i], &mine));
    kt_pool_free(pool);
    int same[2] = {first_cpu(&mine), first_cpu(&mine)};
    require((pool = kt_pool_new_on(2, same, NULL)) != NULL && pool->spin_limit == 0);
    meeting m = {.n = 2, .rounds = 100, .pool = pool};
    require(kt_pool_run(pool, meet, &m) == KT_OK);
    kt_pool_free(pool);
    for (int cpu = 0; cpu < MAX_CPUS; cpu++) require(atomic_load(&kt_process.places[cpu]) == 0);
}

/* ---- tasks ----------------------------------------------------------------------------------------------------- */

enum { SENDERS = 4, SENT = 100, LOG = SENDERS * SENT };

/* Written by the driver only, and plain: tasks exclude each other. */
static int notes[LOG], n_notes;
typedef struct { kt_task task; int mark; } entry;

static void note(void *argument) {
    require(n_notes < LOG);
    notes[n_notes++] = ((entry *)argument)->mark;
}
static void fill(entry *entries, int n, int first) {
    memset(entries, 0, (size_t)n * sizeof *entries);
    for (int i = 0; i < n; i++)
        entries[i] = (entry){.task = {.call = note, .argument = &entries[i]}, .mark = first + i};
}

typedef struct { kt_pool *pool; int first; } sender;

static void *send(void *argument) {
    sender *s = argument;
    entry entries[SENT];
    fill(entries, SENT, s->first);
    for (int i = 0; i < SENT; i++) require(kt_pool_submit(s->pool, &entries[i].task) == KT_OK);
    for (int i = SENT; i--;) require(kt_pool_wait(s->pool, &entries[i].task) == KT_OK);
    return NULL;
}

static void test_tasks_of_several_threads(void) {
    kt_pool *pool = kt_pool_new(2);
    sender senders[SENDERS];
    pthread_t threads[SENDERS];
    for (int repeat = 0; repeat < 5; repeat++) {
        n_notes = 0;
        for (int i = 0; i < SENDERS; i++) {
            senders[i] = (sender){pool, i * SENT};
            threads[i] = start(send, &senders[i]);
        }
        for (int i = 0; i < SENDERS; i++) join(threads[i]);
        require(n_notes == LOG);
        int next[SENDERS] = {0};
        for (int i = 0; i < LOG; i++) require(notes[i] % SENT == next[notes[i] / SENT]++);
    }
    kt_pool_free(pool);
}

typedef struct { kt_pool *pool; meeting *m; atomic_int begun, may_end; kt_task *other; int status; } errand;

static void run_meeting(void *argument) {
    meeting *m = argument;
    require(kt_pool_run(m->pool, meet, m) == KT_OK);
}
static void hold(void *argument) {
    errand *e = argument;
    atomic_store(&e->begun, 1);
    become(&e->may_end, 1);
}
static void wait_for_other(void *argument) {
    errand *e = argument;
    e->status = kt_pool_wait(e->pool, e->other);
}
static void *wait_outside(void *argument) {
    errand *e = argument;
    require(kt_pool_wait(e->pool, e->other) == KT_OK);
    return NULL;
}

static void test_tasks(void) {
    for (size_t n = 1; n <= 3; n++) {
        kt_pool *pool = kt_pool_new(n), *other = kt_pool_new(1);
        require(kt_pool_start_driver(pool) == KT_OK);
        int before = atomic_load(&allocations);
        meeting m = {.n = n, .rounds = 2, .pool = pool};
        kt_task job = {.call = run_meeting, .argument = &m}, empty = {0};
        require(kt_pool_submit(pool, &empty) == KT_BAD_ARGUMENT && kt_pool_wait(pool, &job) == KT_BAD_ARGUMENT);
        for (int i = 0; i < 500; i++) {  /* again and again; runs of another thread in between */
            require(kt_pool_submit(pool, &job) == KT_OK);
            if (i % 3 == 0) require(kt_pool_run(pool, meet, &m) == KT_OK);
            require(kt_pool_wait(pool, &job) == KT_OK && kt_pool_wait(pool, &job) == KT_OK);
        }
        require(m.seen[0] == 2 * (500 + 167));

        errand held = {.pool = pool};
        kt_task holding = {.call = hold, .argument = &held};
        errand early = {.pool = pool}, late = {.pool = pool, .other = &holding}, outside = {.pool = pool};
        kt_task waiting = {.call = wait_for_other, .argument = &early};
        kt_task after = {.call = wait_for_other, .argument = &late};
        early.other = &after;  /* the driver would wait for itself */
        outside.other = &after;
        require(kt_pool_submit(pool, &holding) == KT_OK && kt_pool_submit(pool, &waiting) == KT_OK);
        require(kt_pool_submit(pool, &after) == KT_OK);
        become(&held.begun, 1);
        require(kt_pool_submit(pool, &holding) == KT_BAD_ARGUMENT && kt_pool_submit(pool, &after) == KT_BAD_ARGUMENT);
        require(kt_pool_wait(other, &after) == KT_BAD_ARGUMENT);
        pthread_t waiters[3];
        for (int i = 0; i < 3; i++) waiters[i] = start(wait_outside, &outside);
        while (atomic_load(&pool->completed.parked) < 3) sched_yield();
        atomic_store(&held.may_end, 1);
        for (int i = 0; i < 3; i++) join(waiters[i]);
        require(early.status == KT_BAD_ARGUMENT && late.status == KT_OK);

        kt_task hosted = {.call = run_meeting, .argument = &m, .pool = pool};  /* as cudaLaunchHostFunc calls them */
        kt_task_submit(&hosted);
        require(hosted.status == KT_OK);
        kt_task_wait(&hosted);
        require(hosted.status == KT_OK && m.seen[0] == 2 * (500 + 168));
        require(atomic_load(&allocations) == before);
        kt_pool_free(pool);
        kt_pool_free(other);
        require(atomic_load(&kt_process.awake) == 0);
    }
}

typedef struct { kt_pool *pool; kt_task next; int left, done; } chain;

static void go_on(void *argument) {
    chain *c = argument;
    c->done++;
    if (!c->left--) return;
    memset(&c->next, 0, sizeof c->next);
    c->next = (kt_task){.call = go_on, .argument = c};
    require(kt_pool_submit(c->pool, &c->next) == KT_OK);
}
static void nap(void *argument) { sleep_us(*(unsigned *)argument); }

static void test_free_finishes_tasks(void) {
    entry entries[SENT];
    fill(entries, SENT, 0);
    n_notes = 0;
    unsigned us = 2000;
    kt_pool *pool = kt_pool_new(2);
    kt_task slow = {.call = nap, .argument = &us};
    chain links = {.pool = pool, .left = 20};
    kt_task chained = {.call = go_on, .argument = &links};
    require(kt_pool_submit(pool, &slow) == KT_OK && kt_pool_submit(pool, &chained) == KT_OK);
    for (int i = 0; i < SENT; i++) require(kt_pool_submit(pool, &entries[i].task) == KT_OK);
    kt_pool_free(pool);
    require(n_notes == SENT && links.done == 21);
    for (int i = 0; i < SENT; i++) require(notes[i] == i && entries[i].task.state == DONE);
    require(atomic_load(&kt_process.awake) == 0);
}

/* ---- doorbells ------------------------------------------------------------------------------------------------- */

typedef struct { kt_task task; kt_pool *pool; uint32_t start, done; unsigned question, answer; meeting m; } bell;

static void answer(void *argument) {
    bell *b = argument;
    require(kt_pool_run(b->pool, meet, &b->m) == KT_OK);
    b->answer = b->question + 1;
}
static void push(bell *b) { __atomic_store_n(&b->start, 1, __ATOMIC_RELEASE); }
static void await(bell *b) {
    while (!__atomic_load_n(&b->done, __ATOMIC_ACQUIRE)) sched_yield();
    __atomic_store_n(&b->done, 0, __ATOMIC_RELAXED);
}

/* In place of a GPU. */
static void *ask(void *argument) {
    bell *bells = argument;
    for (unsigned i = 0; i < 450; i++) {
        bell *b = &bells[i % 3];
        b->question = i;
        push(b);
        await(b);
        require(b->answer == i + 1 && !__atomic_load_n(&b->start, __ATOMIC_RELAXED));
    }
    return NULL;
}

static void listen_from_task(void *argument) {
    bell *b = argument;
    require(kt_pool_unlisten(b->pool, &b->task) == KT_BAD_ARGUMENT);
    kt_task other = {.call = listen_from_task};
    require(kt_pool_listen(b->pool, &other, &b->start, &b->done) == KT_BAD_ARGUMENT);
}

static void test_doorbells(void) {
    for (size_t n = 1; n <= 3; n++) {
        kt_pool *pool = kt_pool_new(n);
        static bell bells[3];
        memset(bells, 0, sizeof bells);
        for (int i = 3; i--;) {
            bell *b = &bells[i];
            *b = (bell){.pool = pool, .m = {.n = n, .rounds = 1, .pool = pool}};
            b->task = (kt_task){.call = answer, .argument = b};
            require(kt_pool_listen(pool, &b->task, &b->start, NULL) == KT_BAD_ARGUMENT);
            require(kt_pool_unlisten(pool, &b->task) == KT_BAD_ARGUMENT);
            require(kt_pool_listen(pool, &b->task, &b->start, &b->done) == KT_OK);
            require(kt_pool_listen(pool, &b->task, &b->start, &b->done) == KT_BAD_ARGUMENT);
            require(kt_pool_submit(pool, &b->task) == KT_BAD_ARGUMENT);
            require(kt_pool_wait(pool, &b->task) == KT_BAD_ARGUMENT);
        }
        pthread_t gpu = start(ask, bells);
        kt_task checks = {.call = listen_from_task, .argument = &bells[0]};
        for (int i = 0; i < 100; i++)
            require(kt_pool_submit(pool, &checks) == KT_OK && kt_pool_wait(pool, &checks) == KT_OK);
        join(gpu);
        sleep_us(1000);
        require(atomic_load(&pool->bell.parked) == 0);
        require(kt_pool_unlisten(pool, &bells[1].task) == KT_OK);
        require(kt_pool_unlisten(pool, &bells[1].task) == KT_BAD_ARGUMENT);
        push(&bells[1]);
        push(&bells[0]);
        await(&bells[0]);
        require(bells[1].start == 1 && bells[1].done == 0 && bells[1].task.state == IDLE);
        require(kt_pool_unlisten(pool, &bells[0].task) == KT_OK);
        require(kt_pool_listen(pool, &bells[1].task, &bells[1].start, &bells[1].done) == KT_OK);  /* rung already */
        await(&bells[1]);
        require(kt_pool_unlisten(pool, &bells[1].task) == KT_OK && kt_pool_unlisten(pool, &bells[2].task) == KT_OK);
        while (!atomic_load(&pool->bell.parked)) sched_yield();  /* none is left: it sleeps */
        require(kt_pool_listen(pool, &bells[2].task, &bells[2].start, &bells[2].done) == KT_OK);
        kt_pool_free(pool);
        require(atomic_load(&kt_process.awake) == 0);
    }
}

static void hold_once(void *argument) {
    hold(argument);
    ((errand *)argument)->status++;
}

/* A ring while the task runs is one for the next time. */
static void test_doorbell_rung_again(void) {
    kt_pool *pool = kt_pool_new(1);
    errand held = {.pool = pool};
    kt_task task = {.call = hold_once, .argument = &held};
    uint32_t flags[2] = {1, 0};
    require(kt_pool_listen(pool, &task, &flags[0], &flags[1]) == KT_OK);
    become(&held.begun, 1);
    atomic_store(&held.begun, 0);
    __atomic_store_n(&flags[0], 1, __ATOMIC_RELEASE);
    atomic_store(&held.may_end, 1);
    become(&held.begun, 1);
    kt_pool_free(pool);
    require(held.status == 2);
}

/* Told to rest it sleeps, and sees what rang meanwhile when told not to. */
static void test_doorbell_while_resting(void) {
    kt_pool *pool = kt_pool_new(2);
    static bell b;
    b = (bell){.pool = pool, .m = {.n = 2, .rounds = 1, .pool = pool}};
    b.task = (kt_task){.call = answer, .argument = &b};
    require(kt_pool_rest(NULL, 1) == KT_BAD_ARGUMENT);
    require(kt_pool_listen(pool, &b.task, &b.start, &b.done) == KT_OK);
    for (unsigned i = 0; i < 20; i++) {
        require(kt_pool_rest(pool, 1) == KT_OK);
        while (!atomic_load(&pool->bell.parked)) sched_yield();
        b.question = i;
        push(&b);
        if (i == 0) {
            sleep_us(1000);
            require(__atomic_load_n(&b.start, __ATOMIC_RELAXED) == 1);
        }
        require(kt_pool_rest(pool, 0) == KT_OK);
        await(&b);
        require(b.answer == i + 1);
    }
    kt_pool_free(pool);
    require(atomic_load(&kt_process.awake) == 0);
}

/* Two ring: it sleeps once both have said that they are done. */
static void test_two_ring(void) {
    kt_pool *pool = kt_pool_new(2);
    static bell b;
    b = (bell){.pool = pool, .m = {.n = 2, .rounds = 1, .pool = pool}};
    b.task = (kt_task){.call = answer, .argument = &b};
    require(kt_pool_listen(pool, &b.task, &b.start, &b.done) == KT_OK);
    for (unsigned i = 0; i < 20; i++) {
        require(kt_pool_rest(pool, 0) == KT_OK && kt_pool_rest(pool, 0) == KT_OK);
        require(kt_pool_rest(pool, 1) == KT_OK);
        if (i == 0) sleep_us(10000);
        b.question = i;
        push(&b);
        await(&b);
        require(b.answer == i + 1);
        require(kt_pool_rest(pool, 1) == KT_OK);
        if (i % 2) require(kt_pool_rest(pool, 1) == KT_OK);  /* once too often */
        while (!atomic_load(&pool->bell.parked)) sched_yield();
    }
    kt_pool_free(pool);
    require(atomic_load(&kt_process.awake) == 0);
}

/* Who rings is about to wait: it leaves the CPUs of the pool, if there are others, and keeps its mask. */
static void test_ringing_makes_way(void) {
    cpu_mask mask = kt_own_mask();
    int first = -1, second = -1;
    for (int cpu = 0; cpu < MAX_CPUS; cpu++) {
        if (!has(&mask, cpu)) continue;
        if (first < 0) first = cpu;
        else if (second < 0) second = cpu;
    }
    if (second < 0) return;
    const int own[1] = {first}, all[2] = {first, second};
    cpu_mask here = {0};
    add(&here, first);
    kt_pool *pool = kt_pool_new_on(1, own, NULL);
    require(sched_setaffinity(0, sizeof here, here.sets) == 0 && sched_getcpu() == first);
    require(sched_setaffinity(0, sizeof mask, mask.sets) == 0);
    require(kt_pool_rest(pool, 0) == KT_OK);
    require(sched_getcpu() != first);
    cpu_mask after = kt_own_mask();
    require(!memcmp(&mask, &after, sizeof mask));
    kt_pool_free(pool);
    if (sched_getaffinity(0, sizeof mask, mask.sets) < 0) return;
    pool = kt_pool_new_on(2, all, NULL);
    require(kt_pool_rest(pool, 0) == KT_OK);  /* with no other CPU it stays, without harm */
    kt_pool_free(pool);
}

static void test_doorbells_in_order(void) {
    kt_pool *pool = kt_pool_new(1);
    entry entries[3];
    uint32_t flags[3][2] = {{0}};
    fill(entries, 3, 0);
    const int order[3] = {2, 0, 1};
    for (int i = 0; i < 3; i++) {
        volatile uint32_t *pair = flags[order[i]];
        require(kt_pool_listen(pool, &entries[order[i]].task, pair, pair + 1) == KT_OK);
    }
    for (int repeat = 0; repeat < 20; repeat++) {
        n_notes = 0;
        errand held = {.pool = pool};
        kt_task holding = {.call = hold, .argument = &held};
        require(kt_pool_submit(pool, &holding) == KT_OK);
        become(&held.begun, 1);
        for (int i = 0; i < 3; i++) __atomic_store_n(&flags[i][0], 7, __ATOMIC_RELEASE);  /* any value but 0 rings */
        atomic_store(&held.may_end, 1);
        for (int i = 0; i < 3; i++) {
            while (!__atomic_load_n(&flags[i][1], __ATOMIC_ACQUIRE)) sched_yield();
            require(__atomic_load_n(&flags[i][1], __ATOMIC_RELAXED) == 1);
            __atomic_store_n(&flags[i][1], 0, __ATOMIC_RELAXED);
        }
        require(kt_pool_wait(pool, &holding) == KT_OK && n_notes == 3);
        for (int i = 0; i < 3; i++) require(notes[i] == order[i]);
    }
    kt_pool_free(pool);
}

/* ---- spinning -------------------------------------------------------------------------------------------------- */

typedef struct { kt_pool *pool; atomic_int working; } crowd;

static void work_until_waiter_sleeps(void *argument, size_t thread) {
    crowd *c = argument;
    (void)thread;
    atomic_fetch_add(&c->working, 1);
    while (!atomic_load(&c->pool->completed.parked)) relax();
}
static void run_crowd(void *argument) {
    require(kt_pool_run(((crowd *)argument)->pool, work_until_waiter_sleeps, argument) == KT_OK);
}
static void work_until_waiter_waits(void *argument) {
    crowd *c = argument;
    atomic_store(&c->working, 1);
    while (!atomic_load(&spinning) && !atomic_load(&c->pool->completed.parked)) relax();
}

static void test_waiters_spin_only_where_there_is_room(void) {
    size_t n = (size_t)cpu_count();
    kt_pool *pool = kt_pool_new(n);
    crowd c = {.pool = pool};
    kt_task task = {.call = run_crowd, .argument = &c};
    require(kt_pool_submit(pool, &task) == KT_OK);
    become(&c.working, (int)n);  /* every CPU has a thread of the pool that computes */
    require(atomic_load(&kt_process.awake) == n);
    int before = own_spins;
    require(kt_pool_wait(pool, &task) == KT_OK && own_spins == before);
    kt_pool_free(pool);
    if (n == 1) return;
    cpu_mask mine = kt_own_mask(), one = {0}, others = mine;
    pool = kt_pool_new(1);
    add(&one, pool->cpus[0]);
    CPU_CLR_S((size_t)pool->cpus[0], sizeof others, others.sets);
    for (int elsewhere = 0; elsewhere < 2; elsewhere++) {  /* on the driver's CPU it would be in its way */
        require(sched_setaffinity(0, sizeof mine, elsewhere ? others.sets : one.sets) == 0);
        c = (crowd){.pool = pool};
        task = (kt_task){.call = work_until_waiter_waits, .argument = &c};
        require(kt_pool_submit(pool, &task) == KT_OK);
        become(&c.working, 1);
        require(kt_pool_wait(pool, &task) == KT_OK && own_spins == before + elsewhere);
    }
    require(sched_setaffinity(0, sizeof mine, mine.sets) == 0);
    kt_pool_free(pool);
}

static void test_idle_threads_sleep(void) {
    kt_pool *pool = kt_pool_new((size_t)cpu_count());
    require(kt_pool_run(pool, do_nothing, NULL) == KT_OK && kt_pool_start_driver(pool) == KT_OK);
    while (atomic_load(&kt_process.awake)) sched_yield();
    sleep_us(1000);
    clock_t before = clock();
    sleep_us(100000);
    require(clock() - before < CLOCKS_PER_SEC / 50);
    kt_pool_free(pool);
}

static void test_never_more_spin_than_cpus(void) {
    int most = atomic_load(&most_spinning), cpus = cpu_count();
    require(most <= cpus && atomic_load(&spinning) == 0);
    require(cpus == 1 || most > 0);
}

/* ---- fork ------------------------------------------------------------------------------------------------------ */

static void hold_job(void *argument, size_t thread) {
    if (!thread) hold(argument);
}
static void *run_held(void *argument) {
    require(kt_pool_run(((errand *)argument)->pool, hold_job, argument) == KT_OK);
    return NULL;
}

static void test_fork(void) {
    kt_pool *pool = kt_pool_new(2), *idle = kt_pool_new(2);
    entry e;
    fill(&e, 1, 0);
    n_notes = 0;
    require(kt_pool_submit(pool, &e.task) == KT_OK && kt_pool_wait(pool, &e.task) == KT_OK);
    errand held = {.pool = pool};
    pthread_t caller = start(run_held, &held);
    become(&held.begun, 1);  /* fork while a job runs and its lock is held */
    while (!atomic_load(&pool->job.parked) || !atomic_load(&idle->job.parked) || !atomic_load(&pool->bell.parked))
        sched_yield();  /* a thread that frees memory at the fork leaves AddressSanitizer's lock locked in the child */
    pid_t child = fork();
    require(child >= 0);
    if (!child) {
        alarm(30);
        uint32_t flags[2] = {0};
        meeting m = {.n = 2, .rounds = 3};
        require(kt_pool_run(pool, meet, &m) == KT_FORKED && kt_pool_run(idle, meet, &m) == KT_FORKED);
        require(kt_pool_submit(pool, &e.task) == KT_FORKED && kt_pool_wait(pool, &e.task) == KT_FORKED);
        require(kt_pool_submit(idle, &e.task) == KT_FORKED && kt_pool_start_driver(idle) == KT_FORKED);
        require(kt_pool_listen(pool, &e.task, flags, flags + 1) == KT_FORKED);
        require(kt_pool_unlisten(pool, &e.task) == KT_FORKED);
        kt_pool_free(pool);
        kt_pool_free(idle);
        require(atomic_load(&kt_process.awake) == 0);
#if defined(__SANITIZE_THREAD__)
        puts("note: no thread is made in the child, which ThreadSanitizer does not support");
#else
        m.pool = kt_pool_new(2);  /* the child's own */
        require(m.pool && kt_pool_run(m.pool, meet, &m) == KT_OK && m.seen[0] == 3);
        require(kt_pool_submit(m.pool, &e.task) == KT_OK && kt_pool_wait(m.pool, &e.task) == KT_OK && n_notes == 2);
        kt_pool_free(m.pool);
        require(atomic_load(&kt_process.awake) == 0);
#endif
        fflush(stdout);
        _exit(0);
    }
    int status;
    require(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    atomic_store(&held.may_end, 1);
    join(caller);
    meeting m = {.n = 2, .rounds = 3, .pool = pool};
    require(kt_pool_run(pool, meet, &m) == KT_OK && m.seen[0] == 3);
    kt_pool_free(pool);
    kt_pool_free(idle);
}

/* ---- times ----------------------------------------------------------------------------------------------------- */

static void do_nothing_later(void *argument) { (void)argument; }
static void pass_barriers(void *pool, size_t thread) {
    (void)thread;
    for (int i = 0; i < 100000; i++) kt_pool_barrier(pool);
}

static void print_times(size_t n) {
    kt_pool *pool = kt_pool_new(n);
    require(pool && kt_pool_start_driver(pool) == KT_OK);
    uint64_t begin = now_ns(), asleep = 0;
    for (int i = 0; i < 100000; i++) kt_pool_run(pool, do_nothing, NULL);
    printf("%zu threads: empty run %.0f ns", n, (double)(now_ns() - begin) / 100000);
    begin = now_ns();
    kt_pool_run(pool, pass_barriers, pool);
    printf(", barrier %.0f ns", (double)(now_ns() - begin) / 100000);
    for (int i = 0; i < 100; i++) {
        sleep_us(2000);
        begin = now_ns();
        kt_pool_run(pool, do_nothing, NULL);
        asleep += now_ns() - begin;
    }
    printf(", empty run of sleeping threads %.0f ns", (double)asleep / 100);
    kt_task task = {.call = do_nothing_later};
    begin = now_ns();
    for (int i = 0; i < 20000; i++) require(!kt_pool_submit(pool, &task) && !kt_pool_wait(pool, &task));
    printf(", submit and wait %.0f ns", (double)(now_ns() - begin) / 20000);
    bell b = {.task = {.call = do_nothing_later}};
    require(kt_pool_listen(pool, &b.task, &b.start, &b.done) == KT_OK);
    begin = now_ns();
    for (int i = 0; i < 20000; i++) {
        push(&b);
        while (!__atomic_load_n(&b.done, __ATOMIC_ACQUIRE)) relax();
        __atomic_store_n(&b.done, 0, __ATOMIC_RELAXED);
    }
    printf(", doorbell %.0f ns\n", (double)(now_ns() - begin) / 20000);
    kt_pool_free(pool);
}

#define run_test(test) (test, printf("ok %s\n", #test))

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    alarm(120);
    if (argc > 1 && !strcmp(argv[1], "time")) {
        for (int n = 1; n <= cpu_count(); n *= 2) print_times((size_t)n);
        return 0;
    }
    require(argc > 1);  /* a folder for made-up machines */
    run_test(test_refuses());
    run_test(test_places(argv[1]));
    run_test(test_nodes());
    run_test(test_pinning());
    run_test(test_runs_and_barriers());
    run_test(test_callers_take_turns());
    run_test(test_pools_side_by_side());
    run_test(test_tasks());
    run_test(test_tasks_of_several_threads());
    run_test(test_free_finishes_tasks());
    run_test(test_doorbells());
    run_test(test_doorbells_in_order());
    run_test(test_doorbell_while_resting());
    run_test(test_two_ring());
    run_test(test_ringing_makes_way());
    run_test(test_doorbell_rung_again());
    run_test(test_waiters_spin_only_where_there_is_room());
    run_test(test_idle_threads_sleep());
    run_test(test_fork());
    run_test(test_never_more_spin_than_cpus());
    return 0;
}
