/* Tasks and doorbells, and the driver that runs them. */
#include "threads.h"

enum { IDLE, QUEUED, DONE, LISTENING };  /* kt_task.state */

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
    if (atomic_load(&kt_process.awake) > limit) {
        sched_yield();
        return;
    }
    KT_SPINNING(1);
    relax();
    KT_SPINNING(-1);
}

void *kt_drive(void *argument) {
    kt_pool *pool = argument;
    /* Whoever will submit needs a CPU too. */
    size_t limit = pool->spin_limit ? pool->spin_limit - 1 : 0;
    atomic_fetch_add(&kt_process.awake, 1);
    for (;;) {
        /* Before the lists are looked at, so that what comes later is noticed. */
        unsigned seen = atomic_load(&pool->bell.count);
        int stop = atomic_load(&pool->stop_driver);
        int served = serve_tasks(pool);
        if (serve_doorbells(pool) || served) continue;
        if (stop) break;
        if (pool->doorbells && atomic_load(&pool->ringing)) poll_again(limit);
        else wait_for(&pool->bell, seen, limit, pool->doorbells ? LISTEN_NS : SPIN_NS);
    }
    atomic_fetch_sub(&kt_process.awake, 1);
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
        int done = spin(pool->spin_limit, state_of(task), QUEUED, 0, SPIN_NS);
        atomic_fetch_sub(&kt_process.awake, 1);
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

int kt_pool_rest(kt_pool *pool, int resting) {
    if (!pool) return KT_BAD_ARGUMENT;
    if (is_forked(pool)) return KT_FORKED;
    atomic_store(&pool->spin_ns, LISTEN_NS);
    int before = atomic_load(&pool->ringing), after;
    do {
        int others = before > 0 ? before : 0;
        after = !resting ? others + 1 : others ? others - 1 : 0;
    } while (!atomic_compare_exchange_weak(&pool->ringing, &before, after));
    if (resting) return KT_OK;
    kt_pool_leave(pool);
    ring(&pool->bell);
    return KT_OK;
}

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
