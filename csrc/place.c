/* Where threads run: the CPUs that the process may use, and which of them a pool takes. */
#include "threads.h"

#include <stdio.h>
#include <stdlib.h>

cpu_mask kt_own_mask(void) {
    cpu_mask mask = {0};
    if (sched_getaffinity(0, sizeof mask, mask.sets) == 0) return mask;
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    for (int cpu = 0; cpu == 0 || cpu < online; cpu++) add(&mask, cpu);
    return mask;
}

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
        candidate c = {.cpu = cpu, .places = atomic_load(&kt_process.places[cpu])};
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

int kt_choose_places(const char *root, const cpu_mask *allowed, size_t n_threads, int *cpus, int *nodes) {
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
