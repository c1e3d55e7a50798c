"""The routed experts: every instruction set that runs here, and the tile kernels under an emulator, against float64."""

import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import report
from native.problems import HERE, MIXES, N_EXPERTS, TOP_K, cached_layer, environment, problem, taken
from native.reference import ROUTINGS, TILES, Layer, error, family, inputs, layer, normal, route
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


def check(
    pool: native.Pool, isa: str, types: tuple[str, str, str], hidden: int, width: int, tokens: int, *more
) -> None:
    weights, x, ids, scores, expected = problem(types, hidden, width, tokens, *more)
    got = native.moe(pool, isa, weights, x, ids, scores)
    report.ran(isa, "native")
    assert error(got, expected) < TOLERANCE[family(isa, types, tokens)], (isa, types, hidden, width, tokens, *more)


# The instruction sets are innermost, so that they share the references.
@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("type", native.TYPES)
def test_agrees_with_float64(pool, type, isa):
    """Every number of tokens on every shape, with each routing on a part of the shapes.

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
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_places_computed_elsewhere_change_no_bit(pool, isa, data):
    """An expert of score 0, after all others, adds a zero to a finished sum: it stands in for a place without one."""
    types = data.draw(st.sampled_from(taken(isa)))
    many, top_k = cached_layer(types, 256, 512, "silu", True).weights, 2
    tokens, tile_tokens = data.draw(st.sampled_from([1, 2, 8, 9, 40])), data.draw(st.integers(0, 4))
    experts = N_EXPERTS - top_k  # the last ones stand in: one for each place of a row
    kept = {name: getattr(many, name)[:experts] for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")}
    ids, scores = route("random", experts, tokens, top_k, data.draw(st.integers(0, 99)))
    bits = st.lists(st.booleans(), min_size=tokens * top_k, max_size=tokens * top_k)
    elsewhere = torch.tensor(data.draw(bits)).view(tokens, top_k)
    x = inputs(256, tokens)
    expected = native.moe(
        *(pool, isa, replace(many, tile_tokens=tile_tokens), x),
        torch.where(elsewhere, torch.arange(experts, N_EXPERTS), ids),
        scores.masked_fill(elsewhere, 0),
    )
    few = replace(many, experts=experts, tile_tokens=tile_tokens, **kept)
    ids, scores = ids.masked_fill(elsewhere, -1), scores.masked_fill(elsewhere, torch.nan)
    got = native.moe(pool, isa, few, x, ids, scores, torch.full_like(x, 5.0))
    assert torch.equal(got, expected)
    assert not got[elsewhere.all(1)].any()
    for t in range(tokens if tokens <= 8 or not tile_tokens else 0):
        row, remain = slice(t, t + 1), ~elsewhere[t]
        assert torch.equal(native.moe(pool, isa, few, x[row], ids[row, remain], scores[row, remain]), got[row])


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_all_places_computed_elsewhere(pool, tokens, isa):
    weights, x, _, _, _ = problem(taken(isa)[0], 256, 512, tokens, "random", "silu", True)
    none = torch.full((tokens, 2 * N_EXPERTS), -1)  # more than there are experts
    nan = torch.full(none.shape, torch.nan)
    assert not native.moe(pool, isa, weights, x, none, nan, torch.full_like(x, 5.0)).any()


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
    made = Layer(native.MoeWeights(1, 1024, 512, "silu", *packed, *("int8_row",) * 3, tile_tokens=8), *exact)
    for tokens in (2, 40):
        x = inputs(1024, tokens).abs()
        ids, scores = route("one expert", 1, tokens, 1)
        off = error(native.moe(pool, isa, made.weights, x, ids, scores), made.expected(x, ids, scores))
        rounds = family(isa, made.weights.types, tokens)
        # In float, codes meet x with an offset that is taken off again: of a sum of thousands, where little is left.
        assert off < (20 * TOLERANCE["f32"] if rounds == "f32" else TOLERANCE[rounds]), tokens


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
