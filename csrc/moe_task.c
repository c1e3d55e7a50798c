/* The routed experts as a task: kt_moe_run behind a function of one pointer. */
#include "kt.h"

/* Whoever waits for the task, or sees its doorbell's flag, sees y and status: both are written with release after this. */
void kt_moe_task(void *arguments) {
    kt_moe_arguments *a = arguments;
    int status = kt_moe_run(a->pool, a->moe, a->isa, a->n_tokens, a->top_k, a->x, a->ids, a->scores, a->y, a->scratch,
                            a->scratch_bytes);
    if (!a->status) a->status = status;   /* the first: a doorbell may ring many times before anybody asks */
}
