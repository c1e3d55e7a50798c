/* Emulates AMX (tiles, bf16 and int8 products) for a process that has none: preload it, and unmodified AMX code runs.
 *
 *     cc -O2 -shared -fPIC amx_emu.c -o amx_emu.so -ldl -lm;  LD_PRELOAD=./amx_emu.so python amx_run.py
 *
 * A tile instruction raises SIGILL; the handler decodes it, does its work on tiles in memory and steps over it. About
 * 20 us an instruction, int8 to the bit, bf16 as the manual's pseudocode. It does not fake CPUID: the caller names the
 * instruction set. Two kinds of machine:
 *   without AMX             everything traps, ldtilecfg too
 *   with AMX, no permission ldtilecfg and tilerelease run on the hardware and tile data traps: the configuration is then
 *                           in the signal frame. syscall(arch_prctl) is intercepted, so permission is never really asked.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ROWS = 16, ROW_BYTES = 64, ARCH_REQ_XCOMP_PERM = 0x1023, XTILECFG = 17, XTILEDATA = 18 };

typedef struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config;
typedef struct { uint8_t row[ROWS][ROW_BYTES]; } tile;

unsigned long amx_emu_traps;  /* instructions emulated so far: proof that the code under test was really emulated */
static __thread config loaded;
static __thread tile tiles[8];
static struct sigaction previous;
static unsigned frame_offset;  /* of the tile configuration in an XSAVE area; 0 if the CPU has none */

/* VEX.128.W0 map 0F38, as all tile instructions are. */
typedef struct { int opcode, prefix, mod, reg, rm, vvvv; int64_t base, index; int scale; const uint8_t *end; } instruction;

static int64_t general_register(const ucontext_t *context, int number) {
    static const int place[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[place[number]];
}

static int64_t displacement(const uint8_t **at, int bytes) {
    int8_t narrow;
    int32_t wide;
    memcpy(&narrow, *at, 1);
    memcpy(&wide, *at, 4);
    *at += bytes;
    return bytes == 1 ? narrow : wide;
}

static int decode(const ucontext_t *context, instruction *op) {
    const uint8_t *at = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
    if (at[0] != 0xC4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84)) return 0;
    int x = !(at[1] & 0x40), b = !(at[1] & 0x20);  /* stored inverted: high bits of index and base */
    op->vvvv = ~at[2] >> 3 & 15;
    op->prefix = at[2] & 3;
    op->opcode = at[3];
    op->mod = at[4] >> 6, op->reg = at[4] >> 3 & 7, op->rm = at[4] & 7;
    op->base = op->index = op->scale = 0;
    at += 5;
    if (op->mod == 3) {
        op->end = at;
        return 1;
    }
    int has_base = 1, base = op->rm;
    if (op->rm == 4) {
        int sib = *at++, index = (sib >> 3 & 7) | x << 3;
        op->scale = sib >> 6;
        if (index != 4) op->index = general_register(context, index);
        base = sib & 7;
        if (base == 5 && op->mod == 0) has_base = 0, op->base = displacement(&at, 4);
    } else if (op->rm == 5 && op->mod == 0) {
        has_base = 0, op->base = displacement(&at, 4);
        op->base += (int64_t)at;
    }
    if (has_base) op->base = general_register(context, base | b << 3);
    if (op->mod == 1) op->base += displacement(&at, 1);
    if (op->mod == 2) op->base += displacement(&at, 4);
    op->end = at;
    return 1;
}

/* What ldtilecfg loaded: seen by the emulator, or, where it runs on hardware, saved in the signal frame. */
static config configuration(const ucontext_t *context) {
    config none = {0};
    if (loaded.palette || !frame_offset) return loaded;
    const uint8_t *area = (const uint8_t *)context->uc_mcontext.fpregs;
    uint64_t saved;
    memcpy(&saved, area + 512, 8);  /* XSTATE_BV, after the 512 bytes of the legacy area */
    if (saved >> XTILECFG & 1) memcpy(&none, area + frame_offset, sizeof none);
    return none;
}

static float bf16(const uint8_t *p) {
    uint16_t half;
    memcpy(&half, p, 2);
    uint32_t bits = (uint32_t)half << 16;
    if (!(bits & 0x7f800000u)) bits &= 0x80000000u;  /* denormals are zero */
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static float flushed(float value) { return fpclassify(value) == FP_SUBNORMAL ? copysignf(0, value) : value; }

/* Even and odd products are summed apart and meet at the end, as in the manual. */
static void dot_bf16(tile *c, const tile *a, const tile *b, int rows, int columns, int depth) {
    for (int m = 0; m < rows; m++) {
        float even[16] = {0}, odd[16] = {0}, *out = (float *)(void *)c->row[m];
        for (int k = 0; k < depth; k++)
            for (int n = 0; n < columns; n++) {
                even[n] = flushed(fmaf(bf16(a->row[m] + 4 * k), bf16(b->row[k] + 4 * n), even[n]));
                odd[n] = flushed(fmaf(bf16(a->row[m] + 4 * k + 2), bf16(b->row[k] + 4 * n + 2), odd[n]));
            }
        for (int n = 0; n < columns; n++) out[n] = flushed(flushed(out[n]) + flushed(even[n] + odd[n]));
    }
}

static void dot_int8(tile *c, const tile *a, const tile *b, int rows, int columns, int depth, int a_signed, int b_signed) {
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < columns; n++) {
            int32_t sum = 0;
            for (int k = 0; k < depth; k++)
                for (int j = 0; j < 4; j++) {
                    uint8_t u = a->row[m][4 * k + j], v = b->row[k][4 * n + j];
                    sum += (a_signed ? (int8_t)u : u) * (b_signed ? (int8_t)v : v);
                }
            ((int32_t *)(void *)c->row[m])[n] += sum;
        }
}

static int products(const instruction *op, const config *set) {
    int c = op->reg, a = op->rm, b = op->vvvv & 7;
    if (c == a || c == b || a == b || !set->palette) return 0;
    if (set->row_bytes[a] / 4 != set->rows[b] || set->rows[c] != set->rows[a] || set->row_bytes[c] != set->row_bytes[b]) return 0;
    int rows = set->rows[c], columns = set->row_bytes[c] / 4, depth = set->row_bytes[a] / 4;
    if (op->opcode == 0x5E)  /* prefix none: both unsigned; 66: b signed; F3: a signed; F2: both */
        dot_int8(&tiles[c], &tiles[a], &tiles[b], rows, columns, depth, op->prefix >= 2, op->prefix & 1);
    else if (op->prefix == 2)
        dot_bf16(&tiles[c], &tiles[a], &tiles[b], rows, columns, depth);
    else
        return 0;
    return 1;
}

static int move(const instruction *op, const config *set) {
    int64_t stride = op->index << op->scale;
    if (!set->palette) return 0;
    if (op->prefix == 2) {  /* tilestored */
        for (int r = 0; r < set->rows[op->reg]; r++)
            memcpy((void *)(op->base + r * stride), tiles[op->reg].row[r], set->row_bytes[op->reg]);
        return 1;
    }
    if (op->prefix == 0) return 0;
    memset(&tiles[op->reg], 0, sizeof(tile));  /* tileloadd, tileloaddt1 */
    for (int r = 0; r < set->rows[op->reg]; r++)
        memcpy(tiles[op->reg].row[r], (const void *)(op->base + r * stride), set->row_bytes[op->reg]);
    return 1;
}

static int configure(const instruction *op, const config *set) {
    void *memory = (void *)(op->base + (op->index << op->scale));
    if (op->mod == 3 && op->prefix == 3 && op->rm == 0) {  /* tilezero */
        memset(&tiles[op->reg], 0, sizeof(tile));
        return set->palette != 0;
    }
    if (op->mod != 3 && op->reg == 0 && op->prefix == 1) {  /* sttilecfg */
        memcpy(memory, set, sizeof *set);
        return 1;
    }
    if (op->reg != 0 || op->prefix != 0) return 0;
    memset(&loaded, 0, sizeof loaded);
    memset(tiles, 0, sizeof tiles);
    if (op->mod != 3) memcpy(&loaded, memory, sizeof loaded);  /* ldtilecfg; else tilerelease */
    return loaded.palette <= 1;
}

static int emulate(ucontext_t *context) {
    instruction op;
    if (!decode(context, &op)) return 0;
    config set = configuration(context);
    int done = op.opcode == 0x49 ? configure(&op, &set)
             : op.opcode == 0x4B && op.mod != 3 && op.rm == 4 ? move(&op, &set)
             : (op.opcode == 0x5E || op.opcode == 0x5C) && op.mod == 3 ? products(&op, &set) : 0;
    if (!done) return 0;
    context->uc_mcontext.gregs[REG_RIP] = (greg_t)op.end;
    __atomic_fetch_add(&amx_emu_traps, 1, __ATOMIC_RELAXED);
    return 1;
}

static void on_illegal_instruction(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info;
    if (!emulate(context)) sigaction(SIGILL, &previous, NULL);  /* runs it again, without us */
}

__attribute__((constructor)) static void install(void) {
    unsigned size, offset, c, d;
    if (__get_cpuid_count(0xD, XTILECFG, &size, &offset, &c, &d) && size == sizeof(config)) frame_offset = offset;
    struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    sigaction(SIGILL, &action, &previous);
}

/* Says yes to the request for tile data and passes every other system call on. */
long syscall(long number, ...) {
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_arch_prctl && a[0] == ARCH_REQ_XCOMP_PERM && a[1] == XTILEDATA) return 0;
    static long (*real)(long, ...);
    if (!real) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
