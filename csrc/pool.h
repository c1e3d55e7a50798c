/* The thread pool, for moe.c and ceiling.c; kt.h has what everyone sees of it. */
#ifndef KT_POOL_H
#define KT_POOL_H
#include "kt.h"

/* Runs work(argument, thread) on every thread of the pool, thread 0 being the caller, and returns when all have. Calls
 * from several threads take turns; not from inside work. */
int kt_pool_run(kt_pool *pool, void (*work)(void *argument, size_t thread), void *argument);
/* Inside work: waits for all threads of the pool. What they wrote before it is seen by all after it. */
void kt_pool_barrier(kt_pool *pool);
/* One more run that read so many bytes of experts. */
void kt_pool_count(kt_pool *pool, uint64_t bytes);
#endif
