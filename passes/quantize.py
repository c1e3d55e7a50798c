"""quantize: fewer bits for weights that are stored with more, made while they are loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule

from ktcompile import Context, OptionError, Pass, Region, regions, suggest, value_of
from ktcompile.graph import stored_bytes
from ktcompile.weights import size_of
from ktcompile.weights.ggml import BY_NAME
from ktcompile.weights.mixture import block_type, is_exact

ENCODINGS = {
    "int8": "q8_0",
    "int4": "q4_k",
    "fp8": "fp8_block128",
    "int8_row": "int8_row",
    "int4_32": "q4_0",
    "int4_64": "int4_64",
    "int4_128": "int4_128",
    **{name: name for name in ("q8_0", "q6_k", "q5_k", "q5_0", "q4_k", "q4_0")},
}
"""What a rule may ask for: integers with a scale for a group of 32, FP8 with one for a block of 128 x 128.

int8_row has one scale a row, int4_<n> one for n weights of a row, without minima; only the CPU's experts take them.
"""

KEEP = "keep"


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantise the matrices of each region to the encoding of the first rule whose glob matches its path. Lossy.

    `int8` is q8_0, `int4` q4_k, `fp8` e4m3 with a scale a block; ggml's q8_0, q6_k, q5_k, q5_0, q4_k and q4_0 are
    known by name; `int8_row` has a scale a row, `int4_32` (q4_0), `int4_64` and `int4_128` one for so many weights;
    `keep` leaves a region as stored. Weights that are stored in as few bits, norms, biases and routers stay as they
    are; rows that do not divide into a type's blocks get smaller ones: q5_0 or q8_0, int4_64 or q4_0.
    """

    name = "quantize"
    requires = ("folded",)
    rules: Mapping[str, str] = field(default_factory=dict)

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        for glob, wanted in self.rules.items():
            if wanted not in (*ENCODINGS, KEEP):
                raise OptionError(f"rules.{glob}", f"no encoding {wanted!r}; there are {', '.join(ENCODINGS)}, {KEEP}")
        found = list(regions(gm))
        for glob in self.rules:
            if not any(r.matches(glob) for r in found):
                raise OptionError(f"rules.{glob}", f"rule {glob!r} matches no region; {suggest(glob, found)}")
        for region in found:
            wanted = next((e for glob, e in self.rules.items() if region.matches(glob)), KEEP)
            if wanted != KEEP:
                self._quantize(region, ENCODINGS[wanted], ctx)
        if not self.rules:
            ctx.skip("", "off: weights are packed from the encoding that they are stored in")
        return gm

    @staticmethod
    def _saves(stored: str, before: int, after: int) -> bool:
        """Whether quantising makes it smaller. FP8 to int8 counts: a CPU multiplies integers faster."""
        is_quantised = any(e in BY_NAME and BY_NAME[e].block_values > 1 for e in stored.split("+"))
        return after < before if is_quantised else after < 1.1 * before

    def _quantize(self, region: Region, wanted: str, ctx: Context) -> None:
        chosen: dict[str, str] = {}
        stored: dict[str, None] = {}
        why = f"{wanted} would not make it smaller"
        for leaf, node in region.weights.items():
            shape = region.matrix_shape(leaf)
            if is_exact(str(node.meta["weight"]), shape):
                continue
            encoding = wanted if wanted.startswith("fp8") else block_type(wanted, "other", shape[-1])
            if encoding == "bf16":
                why = f"rows of {shape[-1]} values do not divide into blocks of {wanted}, nor into 32"
            elif self._saves(str(node.meta["encoding"]), stored_bytes(node), size_of(shape, encoding)):
                chosen[leaf] = encoding
                stored[str(node.meta["encoding"])] = None
        if chosen:
            region.quantize(chosen)
            made = "+".join(dict.fromkeys(chosen.values()))
            ctx.lossy(f"{'+'.join(stored)} weights quantised to {made} while loading")
        elif any(value_of(w).dim() > 1 for w in region.weights.values()):
            ctx.skip(region, f"stays as stored: {why}")
