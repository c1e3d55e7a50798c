"""Runs a tile kernel under the emulator (LD_PRELOAD) against float64: a plain script, as pytest takes SIGILL over."""

import ctypes
import sys

from native.reference import error, inputs, layer, route
from tolerances import TOLERANCE

from ktcompile.backends import native

CASES = {  # types, hidden, width, tokens, routing: 2 x 2 and 1 x 2 blocks, edges of both axes, more than one panel
    "amx": (
        (("bf16",) * 3, 63, 65, 9, "one expert"),
        (("bf16",) * 3, 100, 65, 17, "one expert"),
        (("q8_0", "iq4_nl", "bf16"), 1056, 64, 33, "one expert"),
        (("q4_k", "q4_k", "q6_k"), 256, 512, 20, "random"),
        (("q8_0",) * 3, 288, 96, 33, "some elsewhere"),
        (("mxfp4", "q5_0", "mxfp4"), 96, 64, 16, "one expert"),
        (("fp8_block128",) * 3, 300, 129, 33, "some experts unused"),
        (("int8_row", "fp8_block128", "q6_k"), 257, 256, 24, "one expert"),
        (("q3_k", "q2_k", "iq4_xs"), 256, 256, 12, "one expert"),
        (("q5_k", "q4_0", "int4_128"), 256, 256, 12, "one expert"),
        (("int4_64", "int4_128", "int4_64"), 128, 64, 12, "one expert"),
    ),
    "amx_int8": (
        (("int8_row",) * 3, 63, 65, 9, "one expert"),
        (("int8_row",) * 3, 257, 300, 33, "random"),
        (("int8_row",) * 3, 300, 129, 33, "some elsewhere"),
        (("int8_row",) * 3, 4160, 64, 17, "one expert"),
    ),
}


def main(isa: str) -> None:
    traps = ctypes.c_ulong.in_dll(ctypes.CDLL(None), "amx_emu_traps")
    native._native().lib.kt_isa_missing(native._ISAS.index(isa))  # asks for tiles; the emulator answers
    pool = native.Pool(2)
    for types, hidden, width, tokens, routing in CASES[isa]:
        made = layer(types, 3, hidden, width)
        x = inputs(hidden, tokens)
        ids, scores = route(routing, 3, tokens, 2)
        before = traps.value
        got = native._launch(pool, isa, made.weights, x, ids, scores)  # the CPU itself may have no AMX to report
        off = error(got, made.expected(x, ids, scores))
        if traps.value == before:
            raise SystemExit(f"{types} {hidden} x {width}: nothing was emulated")
        if not off < TOLERANCE[native.FAMILY[isa]]:
            raise SystemExit(f"{types} {hidden} x {width}, {tokens} tokens: off by {off}")
    pool.close()
    print(f"emulated {traps.value} tile instructions")


if __name__ == "__main__":
    main(sys.argv[1])
