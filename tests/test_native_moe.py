"""The routed experts: every instruction set that runs here, and the tile kernels under an emulator, against float64."""

import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import report
from native.reference import RANDOM_BITS, ROUTINGS, TILES, Layer, error, family, inputs, layer, normal, route
from tolerances import FEW_VALUES, TOLERANCE
from torch import Tensor

from ktcompile.backends import native

TOKENS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 128)
ANY_SIZE = ("f32", "bf16", "fp8_block128", "int8_row")
# [hidden, width]: around rows of a group, spans of columns, tiles and tasks. Each of 14 sizes is a hidden and a width.
SHAPES = dict.fromkeys(native.TYPES, ((256, 256), (256, 512), (512, 256)))
SHAPES |= dict.fromkeys(
    ("q8_0", "q5_0", "q4_0", "iq4_nl", "mxfp4"), ((32, 32), (32, 96), (96, 64), (288, 32), (256, 288))
)
SHAPES |= {"int4_64": ((64, 64), (64, 192), (192, 128), (320, 64)), "int4_128": ((128, 128), (128, 384), (384, 128))}
SHAPES |= dict.fromkeys(
    ANY_SIZE,
    (
        *((1, 17), (15, 16), (16, 31), (17, 1), (31, 33), (32, 15), (33, 32)),
        *((63, 65), (64, 63), (65, 64), (255, 257), (256, 255), (257, 300), (300, 256)),
    ),
)
MIXES = (
    ("q4_k", "q4_k", "q6_k"),
    ("iq4_xs", "q3_k", "q2_k"),
    ("q8_0", "mxfp4", "q5_k"),
    ("int8_row", "int4_64", "int4_128"),
    ("fp8_block128", "q4_0", "bf16"),
    ("bf16", "fp8_block128", "iq4_nl"),
    ("f32", "bf16", "q5_0"),
    ("int8_row",) * 3,
)
N_EXPERTS, TOP_K = 5, 3

for _isa, _reason in native.isas().items():
    report.ran(_isa, f"not run: {_reason}" if _reason else "no test of it selected")
HERE = [isa for isa, reason in native.isas().items() if reason is None]


@pytest.fixture(scope="module")
def pool() -> Iterator[native.Pool]:
    made = native.Pool(2)
    yield made
    made.close()


def all_positive(types: tuple[str, str, str], hidden: int, width: int) -> bool:
    """Sums of so few values may cancel, and then no relative bound holds: they get weights and tokens of one sign."""
    return min(hidden, width) < 64 and not set(types) & set(RANDOM_BITS)


@lru_cache(maxsize=20)
def cached_layer(
    types: tuple[str, str, str], hidden: int, width: int, activation: str = "silu", biases: bool = False
) -> Layer:
    positive = all_positive(types, hidden, width)
    return layer(types, N_EXPERTS, hidden, width, activation, positive=positive, biases=biases)


@lru_cache(maxsize=200)
def problem(types: tuple[str, str, str], hidden: int, width: int, tokens: int, routing: str, *more):
    made, positive = cached_layer(types, hidden, width, *more), all_positive(types, hidden, width)
    x = inputs(hidden, tokens, positive)
    ids, scores = route(routing, N_EXPERTS, tokens, TOP_K, seed=tokens)
    scores = scores.abs() if positive else scores
    return made.weights, x, ids, scores, made.expected(x, ids, scores)


def check(
    pool: native.Pool, isa: str, types: tuple[str, str, str], hidden: int, width: int, tokens: int, *more
) -> None:
    weights, x, ids, scores, expected = problem(types, hidden, width, tokens, *more)
    got = native.moe(pool, isa, weights, x, ids, scores)
    report.ran(isa, "native")
    assert error(got, expected) < TOLERANCE[family(isa, types, tokens)], (isa, types, hidden, width, tokens, *more)


def taken(isa: str) -> list[tuple[str, str, str]]:
    return [types for types in MIXES if native.refuses(isa, types) is None]


# The instruction sets are innermost, so that they share the references.
@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("type", native.TYPES)
def test_agrees_with_float64(pool, type, isa):
    """Every number of tokens on every shape, with each routing on a third of the shapes.

    Small results scatter around what a family rounds by: its bound is that of the root mean square over a shape.
    """
    if native.refuses(isa, [type]):
        with pytest.raises(ValueError, match=f"{isa} computes in .* and does not take {type} weights"):
            native.moe(pool, isa, *problem((type,) * 3, *SHAPES[type][0], 1, "random")[:4])
        return
    for i, shape in enumerate(SHAPES[type]):
        errors: dict[str, list[float]] = {}
        for j, tokens in enumerate(TOKENS):
            key = (type,) * 3, *shape, tokens, ROUTINGS[(i + j) % len(ROUTINGS)]
            weights, x, ids, scores, expected = problem(*key)
            off = error(native.moe(pool, isa, weights, x, ids, scores), expected)
            rounds = family(isa, [type], tokens)
            assert off < FEW_VALUES[rounds], (isa, *key)
            errors.setdefault(rounds, []).append(off)
        for rounds, offs in errors.items():
            assert sum(off**2 for off in offs) < len(offs) * TOLERANCE[rounds] ** 2, (isa, type, shape, rounds)
    report.ran(isa, "native")


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_oai"])
def test_activations_and_biases(pool, activation, isa):
    for biases in (False, True):
        for tokens in (1, 9, 40):
            check(pool, isa, taken(isa)[0], 256, 512, tokens, "random", activation, biases)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("types", MIXES, ids="-".join)
def test_mixed_types(pool, types, isa):
    if native.refuses(isa, types):
        return  # which types an instruction set takes is the business of test_agrees_with_float64
    for tokens in (1, 8, 9, 40):
        check(pool, isa, types, 512, 256, tokens, "random", "silu", True)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_oai"])
def test_gates_beyond_what_exp_takes(pool, activation, isa):
    """Of saturated gates few values are left that errors can average over."""
    made = cached_layer(taken(isa)[0], 256, 512, activation)
    for tokens in (3, 33):
        x = inputs(256, tokens) * 200
        ids, scores = route("random", N_EXPERTS, tokens, TOP_K)
        got = native.moe(pool, isa, made.weights, x, ids, scores)
        assert error(got, made.expected(x, ids, scores)) < FEW_VALUES[family(isa, taken(isa)[0], tokens)], tokens


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(
    ("type", "hidden", "width"),
    [("q8_0", 2080, 64), ("q4_k", 1280, 2304), ("bf16", 1055, 65), ("fp8_block128", 1153, 64), ("int8_row", 4417, 33)],
)
def test_columns_in_panels_and_many_tokens_on_one_expert(pool, type, hidden, width, isa):
    """More columns than a panel holds, more rows than a task, more tokens than one kt_dot takes."""
    if native.refuses(isa, [type]) is None:
        check(pool, isa, (type,) * 3, hidden, width, 33 if width > 65 else 290, "one expert")


@pytest.mark.parametrize("isa", HERE)
def test_more_experts_than_a_run(pool, isa):
    """Results of several runs of experts meet in y, experts by tiles and experts without, one expert without tokens."""
    types = ("int8_row",) * 3 if isa == "amx_int8" else ("q4_0", "q8_0", "iq4_nl")
    made = layer(types, 50, 288, 96, biases=True, tile_tokens=4)
    x = inputs(288, 40)
    ids, scores = route("random", 49, 40, 5)
    got = native.moe(pool, isa, made.weights, x, ids, scores)
    assert error(got, made.expected(x, ids, scores)) < TOLERANCE[native.FAMILY[isa]]


@pytest.mark.parametrize("isa", [isa for isa in TILES if isa in HERE])
@pytest.mark.parametrize("tile_tokens", [0, 1, 6, 1000])
def test_any_number_of_tile_tokens(pool, tile_tokens, isa):
    for types in taken(isa):
        for tokens in (9, 40):
            weights, x, ids, scores, expected = problem(types, 512, 256, tokens, "random", "silu", True)
            got = native.moe(pool, isa, replace(weights, tile_tokens=tile_tokens), x, ids, scores)
            tiles = tile_tokens if tile_tokens < 1000 else 0
            assert error(got, expected) < TOLERANCE[family(isa, types, tokens, tiles)], (types, tokens)


@pytest.mark.parametrize("isa", HERE)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_size(pool, isa, data):
    """All numbers positive: where nothing cancels, the bound of few values holds for a single product too."""
    type = data.draw(st.sampled_from([type for type in (*ANY_SIZE, "q8_0") if not native.refuses(isa, [type])]))
    unit = 32 if type == "q8_0" else 1
    hidden, width = (unit * data.draw(st.integers(1, 160 // unit)) for _ in range(2))
    tokens, top_k, experts = (data.draw(st.integers(1, most)) for most in (40, 4, 18))
    made = layer((type,) * 3, experts, hidden, width, positive=True, tile_tokens=data.draw(st.integers(0, 9)))
    x = inputs(hidden, tokens, positive=True)
    ids, scores = route(data.draw(st.sampled_from(ROUTINGS)), experts, tokens, top_k)
    scores = scores.abs()
    got = native.moe(pool, isa, made.weights, x, ids, scores)
    assert error(got, made.expected(x, ids, scores)) < FEW_VALUES[native.FAMILY[isa]]


@pytest.mark.parametrize("isa", HERE)
def test_threads_do_not_change_a_bit(isa):
    many = layer(("int8_row",) * 3, 40, 300, 65, tile_tokens=3).weights
    cases = [problem(types, 512, 256, tokens, "random", "silu", True)[:4] for types in taken(isa) for tokens in (1, 33)]
    cases.append((many, inputs(300, 40), *route("random", 40, 40, 6)))
    pools = [native.Pool(threads) for threads in (1, 2, 3, 5)]
    for case in cases:
        results = [native.moe(own, isa, *case) for own in pools for _ in range(2)]
        assert all(torch.equal(result, results[0]) for result in results), case[0].types
    for own in pools:
        own.close()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("type", native.TYPES)
def test_a_row_alone_is_the_same_to_the_bit(pool, type, isa):
    """In calls of up to 8 tokens, and in any call where no tiles are used."""
    if native.refuses(isa, [type]):
        return
    weights, x, ids, scores, _ = problem((type,) * 3, *SHAPES[type][-1], 33, "random")

    def run(rows: list[int], **changes: int) -> Tensor:
        return native.moe(pool, isa, replace(weights, **changes), x[rows], ids[rows], scores[rows])

    alone = torch.cat([run([row]) for row in range(33)])
    for rows in (list(range(8)), list(range(7, -1, -1)), [5, 20, 32], [9, 9, 9, 9, 2], [0, 31, 4, 4, 30, 1, 2]):
        assert torch.equal(run(rows), alone[rows]), rows
    assert torch.equal(run(list(range(33)), tile_tokens=0), alone)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("tokens", [8, 33])
def test_a_damaged_row_leaves_the_others_alone(pool, tokens, isa):
    for types in taken(isa):
        weights, x, ids, scores, _ = problem(types, 512, 256, tokens, "random", "silu", True)
        others = torch.arange(tokens) != 3
        before = native.moe(pool, isa, weights, x, ids, scores)
        for damage in (torch.nan, torch.inf, 3e38):
            damaged = x.clone()
            damaged[3, 100:] = damage
            assert torch.equal(native.moe(pool, isa, weights, damaged, ids, scores)[others], before[others]), types


@pytest.mark.parametrize("isa", HERE)
def test_zeros_are_exact(pool, isa):
    for types in taken(isa):
        weights, x, ids, scores, _ = problem(types, 512, 256, 33, "random", "silu")
        for tokens in (2, 33):
            zeros = torch.zeros(tokens, 512)
            assert not native.moe(pool, isa, weights, zeros, ids[:tokens], scores[:tokens]).any(), types
            assert not native.moe(pool, isa, weights, x[:tokens], ids[:tokens], 0 * scores[:tokens]).any(), types


@pytest.mark.parametrize("isa", HERE)
def test_sparse_rows(pool, isa):
    """One weight of 100 is not zero, and all tokens are positive: what is added to a zero by mistake adds up."""
    rng = np.random.default_rng(0)
    packed, exact = [], []
    for rows, cols in ((512, 1024), (512, 1024), (1024, 512)):
        raw = normal(rows, cols, rng) * torch.from_numpy(rng.random((rows, cols)) < 0.01)
        packed.append(native.pack(raw, "f32", "int8_row", rows, cols)[None])
        exact.append(native.unpack(packed[-1][0], "int8_row", rows, cols).double()[None])
    made = Layer(native.MoeWeights(1, 1024, 512, "silu", *packed, *("int8_row",) * 3), *exact)
    for tokens in (2, 40):
        x = inputs(1024, tokens).abs()
        ids, scores = route("one expert", 1, tokens, 1)
        off = error(native.moe(pool, isa, made.weights, x, ids, scores), made.expected(x, ids, scores))
        rounds = family(isa, made.weights.types, tokens)
        # In float, codes meet x with an offset that is taken off again: of a sum of thousands, where little is left.
        assert off < (20 * TOLERANCE["f32"] if rounds == "f32" else TOLERANCE[rounds]), tokens


class Fence:
    """Tensors between canaries, none at an address more aligned than its element, unless asked."""

    def __init__(self) -> None:
        self._areas: list[tuple[Tensor, int, int]] = []
        self._read_only: list[tuple[Tensor, Tensor]] = []

    def room(self, nbytes: int, odd: int) -> Tensor:
        """uint8 [nbytes], `odd` bytes past a multiple of 64."""
        area = native.empty(nbytes + 1024)
        area.fill_(0xA5)
        start = 512 + odd
        self._areas.append((area, start, start + nbytes))
        return area[start : start + nbytes]

    def read_only(self, tensor: Tensor, aligned: bool = False) -> Tensor:
        inside = self.room(tensor.numel() * tensor.element_size(), 0 if aligned else tensor.element_size())
        inside = inside.view(tensor.dtype).view(tensor.shape)
        inside.copy_(tensor)
        self._read_only.append((inside, tensor))
        return inside

    def intact(self) -> bool:
        around = all((area[:start] == 0xA5).all() and (area[end:] == 0xA5).all() for area, start, end in self._areas)
        return around and all(torch.equal(inside, tensor) for inside, tensor in self._read_only)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("tokens", [1, 8, 33])
def test_reads_are_only_read_and_writes_stay_inside(pool, tokens, isa):
    type = "int8_row" if native.refuses(isa, ["fp8_block128"]) else "fp8_block128"
    weights, x, ids, scores, _ = problem((type,) * 3, 257, 300, tokens, "random", "swiglu_oai", True)
    fence = Fence()
    names = {"gate": True, "up": True, "down": True, "gate_bias": False, "up_bias": False, "down_bias": False}
    inside = {name: fence.read_only(getattr(weights, name), aligned) for name, aligned in names.items()}
    fenced = replace(weights, **inside)
    pointers = [fence.read_only(tensor) for tensor in (x, ids, scores)]
    y = fence.room(4 * x.numel(), 4).view(torch.float32).view(x.shape)
    lib, number = native._native().lib, native._ISAS.index(isa)
    nbytes = lib.kt_moe_scratch_bytes(pool._handle, fenced._struct, number, tokens, TOP_K)
    scratch = fence.room(nbytes, 1)

    def run(scratch_bytes: int) -> int:
        kinds = ("float", "int64_t", "float", "float", "void")
        arguments = [native._pointer(*pair) for pair in zip(kinds, (*pointers, y, scratch), strict=True)]
        return lib.kt_moe_run(pool._handle, fenced._struct, number, tokens, TOP_K, *arguments, scratch_bytes)

    y.fill_(12345)
    assert run(nbytes - 1) == lib.KT_SMALL_SCRATCH
    assert (y == 12345).all()
    assert run(nbytes) == lib.KT_OK
    assert fence.intact()
    assert torch.equal(y, native.moe(pool, isa, weights, x, ids, scores))


@pytest.mark.parametrize("isa", HERE)
def test_scratch_grows_with_tokens(pool, isa):
    weights = cached_layer(taken(isa)[0], 256, 512).weights
    lib, number = native._native().lib, native._ISAS.index(isa)
    sizes = [lib.kt_moe_scratch_bytes(pool._handle, weights._struct, number, tokens, TOP_K) for tokens in range(300)]
    assert sizes == sorted(sizes) and sizes[0] > 0


def test_experts_with_a_stride(pool):
    weights, x, ids, scores, _ = problem(("q8_0",) * 3, 256, 288, 9, "random")
    nbytes = weights.gate.shape[1]
    wide = native.empty(N_EXPERTS * (nbytes + 192)).view(N_EXPERTS, nbytes + 192).fill_(0xA5)
    wide[:, 64:-128] = weights.gate
    moved = replace(weights, gate=wide[:, 64:-128])
    for isa in HERE:
        if native.refuses(isa, weights.types) is None:
            expected = native.moe(pool, isa, weights, x, ids, scores)
            assert torch.equal(native.moe(pool, isa, moved, x, ids, scores), expected)
    with pytest.raises(ValueError, match="gate is not at a multiple of 64 bytes"):
        replace(weights, gate=wide[:, 32:-160])
    with pytest.raises(ValueError, match=f"experts of gate are {nbytes - 64} bytes apart and {nbytes} long"):
        replace(weights, gate=torch.as_strided(wide, (N_EXPERTS, nbytes), (nbytes - 64, 1)))


def test_no_tokens(pool):
    weights, x, ids, scores, _ = problem(("f32",) * 3, 31, 33, 1, "random")
    assert native.moe(pool, "scalar", weights, x[:0], ids[:0], scores[:0]).shape == (0, 31)
    for isa in HERE:  # no experts
        weights, x, ids, scores, _ = problem(taken(isa)[0], 256, 512, 9, "random", "silu", True)
        none = ids[:, :0].contiguous(), scores[:, :0].contiguous()
        assert not native.moe(pool, isa, weights, x, *none, out=torch.full_like(x, 5.0)).any()


@pytest.mark.parametrize("bad", [-1, N_EXPERTS, 2**40])
def test_bad_expert_leaves_y_alone(pool, bad):
    weights, x, ids, scores, _ = problem(("f32",) * 3, 31, 33, 7, "random")
    ids = ids.clone()
    ids[-1, -1] = bad
    y = torch.full_like(x, 5.0)
    with pytest.raises(ValueError, match=rf"{bad}.* allowed is \[0, {N_EXPERTS}\)"):
        native.moe(pool, "scalar", weights, x, ids, scores, out=y)
    assert (y == 5).all()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("row", "places"), [(0, (0, 1)), (8, (0, 2)), (4, (1, 2))])
def test_repeated_expert_leaves_y_alone(pool, row, places, isa):
    weights, x, ids, scores, _ = problem(taken(isa)[0], 256, 512, 9, "random", "silu", True)
    ids = ids.clone()
    ids[row, places[1]] = ids[row, places[0]]
    y = torch.full_like(x, 5.0)
    with pytest.raises(ValueError, match="an expert appears twice among the experts of a token"):
        native.moe(pool, isa, weights, x, ids, scores, out=y)
    assert (y == 5).all()


def test_refusals_and_bad_input(pool):
    weights, x, ids, scores, _ = problem(("f32",) * 3, 31, 33, 7, "random")
    assert "does not take f32" in str(native.refuses("amx", ["f32"]))
    assert "does not take q8_0" in str(native.refuses("amx_int8", ["int8_row", "q8_0"]))
    assert native.refuses("scalar", native.TYPES) is None
    assert "no kernel takes" in str(native.refuses("scalar", ["f16"]))
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        native.moe(pool, "sse9", weights, x, ids, scores)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        native.moe(pool, "scalar", weights, x.double(), ids, scores)
    with pytest.raises(ValueError, match=r"scores is torch\.float32"):
        native.moe(pool, "scalar", weights, x, ids, scores[:-1])
    with pytest.raises(ValueError, match="x is not contiguous"):
        native.moe(pool, "scalar", weights, x.T.contiguous().T, ids, scores)
    with pytest.raises(ValueError, match="gate has 4 experts, not 5"):
        replace(weights, gate=weights.gate[1:])
    with pytest.raises(ValueError, match="no activation 'relu'"):
        replace(weights, activation="relu")
    with pytest.raises(ValueError, match=r"up_bias is .*\(5, 31\), not torch\.float32 \(5, 33\)"):
        replace(weights, up_bias=torch.zeros(5, 31))
    with pytest.raises(ValueError, match="1 to 4096 threads"):
        native.Pool(0)


def test_status_codes(pool):
    lib, ffi = native._native().lib, native._native().ffi
    weights, _x, _ids, _scores, _ = problem(("f32",) * 3, 31, 33, 7, "random")
    assert all(ffi.string(lib.kt_error(code)) != b"unknown status" for code in range(lib.KT_STATUS_COUNT))
    assert ffi.string(lib.kt_error(99)) == b"unknown status"
    floats, longs = (ffi.new(f"{kind}[]", 256) for kind in ("float", "int64_t"))

    def run(isa=lib.KT_SCALAR, tokens=1, top_k=1, x=floats, scratch_bytes=4, **changes) -> int:
        moe = ffi.new("kt_moe *", weights._struct[0])
        for name, value in changes.items():
            setattr(moe, name, value)
        assert lib.kt_moe_scratch_bytes(pool._handle, moe, isa, 1, 1) == 0 or not changes
        return lib.kt_moe_run(pool._handle, moe, isa, tokens, top_k, x, longs, floats, floats, floats, scratch_bytes)

    wrong = [run(isa=99), run(isa=-1), run(activation=9), run(gate_type=77), run(width=0), run(up=ffi.NULL)]
    assert [*wrong, run(x=ffi.NULL)] == [lib.KT_BAD_ARGUMENT] * 7
    assert run(gate_type=lib.KT_F16) == lib.KT_REFUSED
    assert run(gate_type=lib.KT_Q4_K) == lib.KT_BAD_COLUMNS
    assert run(tokens=2**40) == run(tokens=2**33, top_k=2**33) == run(experts=2**40) == lib.KT_TOO_LARGE
    assert run() == lib.KT_SMALL_SCRATCH
    assert run(tokens=0) == lib.KT_OK
    assert lib.kt_isa_missing(99) != ffi.NULL and not lib.kt_isa_supported(99)
    assert lib.kt_packed_bytes(lib.KT_AMX, lib.KT_F32, 1, 1) == 0


def test_calls_from_several_threads_take_turns(pool):
    weights, x, ids, scores, _ = problem(("q8_0",) * 3, 96, 64, 17, "random")
    expected = native.moe(pool, "scalar", weights, x, ids, scores)
    wrong: list[int] = []

    def call() -> None:
        for i in range(50):
            if not torch.equal(native.moe(pool, "scalar", weights, x, ids, scores), expected):
                wrong.append(i)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pool_in_a_forked_child():
    """The child is told, does not hang, and can make a pool of its own."""
    code = """
import os, torch
from native.reference import layer, route
from ktcompile.backends import native
pool, made = native.Pool(2), layer(("f32",) * 3, 2, 4, 4)
ids, scores = route("random", 2, 3, 2)
x = torch.ones(3, 4)
y = native.moe(pool, "scalar", made.weights, x, ids, scores)
child = os.fork()
if child == 0:
    tensors = {"x": ("float", x), "ids": ("int64_t", ids), "scores": ("float", scores), "y": ("float", y),
               "scratch": ("void", pool._scratch)}
    pointers = [native._pointer(*tensor) for tensor in tensors.values()]
    status = native._native().lib.kt_moe_run(
        pool._handle, made.weights._struct, 0, 3, 2, *pointers, pool._scratch.numel())
    try:
        native.moe(pool, "scalar", made.weights, x, ids, scores)
    except RuntimeError as error:
        told = "before fork()" in str(error)
    pool.close()
    own = native.Pool(2)
    same = torch.equal(native.moe(own, "scalar", made.weights, x, ids, scores), y)
    own.close()
    os._exit(0 if told and same and status == native._native().lib.KT_FORKED else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(native.moe(pool, "scalar", made.weights, x, ids, scores), y)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment())


def test_closed_pool():
    weights, x, ids, scores, _ = problem(("f32",) * 3, 31, 33, 1, "random")
    own = native.Pool(3)
    own.close()
    own.close()
    with pytest.raises(ValueError, match="the pool is closed"):
        native.moe(own, "scalar", weights, x, ids, scores)


@pytest.mark.parametrize("isa", TILES)
def test_tiles_under_the_emulator(isa, tmp_path):
    """The same object code, trapped instruction by instruction: tiles are tested on machines that have none.

    The rest of the kernels uses AVX-512, which is not emulated: only where tiles alone are missing is the test run.
    """
    reason = native.isas()[isa]
    if reason is not None and "AMX" not in reason:
        report.ran(isa, f"not emulated: {reason}")
        pytest.skip(reason)
    here, library = Path(__file__).parent / "native", tmp_path / "amx_emu.so"
    compiler = sysconfig.get_config_var("CC").split()[0]
    command = [compiler, "-O2", "-shared", "-fPIC", str(here / "amx_emu.c"), "-o", str(library), "-ldl", "-lm"]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, str(here / "amx_run.py"), isa],
        env=environment(LD_PRELOAD=str(library)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "emulated" in done.stdout
    report.ran(isa, "emulated")


def environment(**more: str) -> dict[str, str]:
    tests = Path(__file__).parent
    path = os.pathsep.join(filter(None, (str(tests.parent), str(tests), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}
