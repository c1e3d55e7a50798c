/* Which instruction sets run here: what the CPU has and what the operating system lets us use. */
#define _GNU_SOURCE
#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux: asm/prctl.h. Tile data is 8 KiB a thread, so a process has to ask for it. */
enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

typedef struct { unsigned leaf1_c, leaf7_b, leaf7_c, leaf7_d, leaf7_1_a, xcr0; } cpu_bits;

static cpu_bits read_cpu(void) {
    cpu_bits cpu = {0};
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
    cpu.leaf1_c = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        cpu.leaf7_b = b, cpu.leaf7_c = c, cpu.leaf7_d = d;
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.leaf7_1_a = a;
    }
    if (cpu.leaf1_c >> 27 & 1) __asm__ volatile("xgetbv" : "=a"(cpu.xcr0), "=d"(d) : "c"(0));  /* OSXSAVE */
    return cpu;
}

static int has(unsigned word, unsigned mask) { return (word & mask) == mask; }

const char *kt_isa_missing(int isa) {
    enum { FMA = 1u << 12, F16C = 1u << 29, AVX2 = 1u << 5 };
    enum { AVX512F = 1u << 16, AVX512DQ = 1u << 17, AVX512BW = 1u << 30 };
    const unsigned avx512vl = 1u << 31;
    enum { VBMI = 1u << 1, VNNI = 1u << 11, BF16 = 1u << 5, FP16 = 1u << 23, AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25 };
    enum { YMM_STATE = 0x06, ZMM_STATE = 0xe6, TILE_STATE = 0x60000 };
    if (isa < 0 || isa >= KT_ISA_COUNT) return "no such instruction set";
    if (isa == KT_SCALAR) return NULL;
    cpu_bits cpu = read_cpu();
    if (!has(cpu.leaf1_c, FMA | F16C) || !has(cpu.leaf7_b, AVX2)) return "the CPU has no AVX2 with FMA and F16C";
    if (!has(cpu.xcr0, YMM_STATE)) return "the operating system does not save AVX registers";
    if (isa == KT_AVX2) return NULL;
    if (!has(cpu.leaf7_b, AVX512F | AVX512DQ | AVX512BW | avx512vl)) return "the CPU has no AVX-512 F, BW, DQ and VL";
    if (!has(cpu.xcr0, ZMM_STATE)) return "the operating system does not save AVX-512 registers";
    if (isa == KT_AVX512) return NULL;
    if (isa == KT_AVX512_VNNI) return has(cpu.leaf7_c, VNNI) ? NULL : "the CPU has no AVX-512 VNNI";
    if (isa == KT_AMX_INT8) {
        if (!has(cpu.leaf7_c, VNNI)) return "the CPU has no AVX-512 VNNI";
        if (!has(cpu.leaf7_d, AMX_TILE | AMX_INT8)) return "the CPU has no AMX with INT8";
    } else {
        if (!has(cpu.leaf7_1_a, BF16)) return "the CPU has no AVX-512 BF16";
        if (isa == KT_AVX512_BF16) return NULL;
        if (!has(cpu.leaf7_d, FP16)) return "the CPU has no AVX-512 FP16";
        if (!has(cpu.leaf7_c, VBMI)) return "the CPU has no AVX-512 VBMI";
        if (!has(cpu.leaf7_d, AMX_TILE | AMX_BF16)) return "the CPU has no AMX with BF16";
    }
    if (!has(cpu.xcr0, TILE_STATE)) return "the operating system does not save AMX tiles";
    /* Through syscall(), so that the emulator of tests/native can answer for a kernel without tiles. */
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return "the kernel does not permit AMX tiles";
    return NULL;
}
#else
const char *kt_isa_missing(int isa) {
    if (isa < 0 || isa >= KT_ISA_COUNT) return "no such instruction set";
    return isa == KT_SCALAR ? NULL : "this build is not for x86-64";
}
#endif

int kt_isa_supported(int isa) { return !kt_isa_missing(isa); }
