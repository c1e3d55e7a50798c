"""Runs the AMX kernel under the emulator (LD_PRELOAD) against float64: a plain script, as pytest takes SIGILL over."""

import ctypes

import torch
from native.reference import error, layer, route
from tolerances import TOLERANCE

from ktcompile.backends import native

CASES = (  # types, hidden, width, tokens, routing: 2 x 2 and 1 x 2 blocks, edges of both axes, more than one panel
    (("bf16", "bf16", "bf16"), 33, 47, 8, "one expert"),
    (("bf16", "bf16", "bf16"), 100, 65, 17, "one expert"),
    (("q8_0", "q5_0", "bf16"), 1056, 32, 33, "one expert"),
    (("q4_k", "q6_k", "q4_k"), 256, 256, 20, "random"),
)


def main() -> None:
    traps = ctypes.c_ulong.in_dll(ctypes.CDLL(None), "amx_emu_traps")
    native._native().lib.kt_isa_missing(native._ISAS.index("amx"))  # asks for tiles; the emulator answers
    pool = native.Pool(2)
    for types, hidden, width, tokens, routing in CASES:
        made = layer(types, 3, hidden, width)
        x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0))
        ids, scores = route(routing, 3, tokens, 2)
        before = traps.value
        got = native._launch(pool, "amx", made.weights, x, ids, scores)  # the CPU itself may have no AMX to report
        off = error(got, made.expected(x, ids, scores))
        if traps.value == before:
            raise SystemExit(f"{types} {hidden} x {width}: nothing was emulated")
        if not off < TOLERANCE["bf16"]:
            raise SystemExit(f"{types} {hidden} x {width}, {tokens} tokens: off by {off}")
    pool.close()
    print(f"emulated {traps.value} tile instructions")


if __name__ == "__main__":
    main()
