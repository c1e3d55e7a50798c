"""Attention on a CPU: `torch_mla` against the captured code and the definition, request by request in both forms."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from models import captured_plain
from test_mla import FAMILIES, PHASES, ROLES, ROOMY, attention, compare, embedded, recorded
from tolerances import CHAIN

from ktcompile import Call, Parts, regions
from ktcompile.backends import torch_mla
from ktcompile.backends.torch_mla import TorchMLA
from ktcompile.checkpoint import open_checkpoint
from ktcompile.fake import allocated
from ktcompile.kernel import refusal
from ktcompile.model import Phase
from ktcompile.ops.mla import MLAShape, mla_reference
from ktcompile.symbols import PAGE, sizes
from ktcompile.verify import _inputs
from ktcompile.weights import ModuleSource

SHAPE = MLAShape(heads=2, nope=3, rope=4, v=5, lora=6, scale=0.4, interleaved=True, eps=1e-6)
HIDDEN = 8


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_requests(name: str, phase: Phase) -> None:
    gm, read = recorded(name, phase)
    source = ModuleSource({k: v.detach() for k, v in captured_plain(name, phase).keys.items()})
    for region in attention(gm):
        compare(TorchMLA(), region, source, read[region.path], ROOMY, "f32")


@pytest.mark.parametrize(("phase", "dtype"), [("decode", "fp32"), ("prefill", "fp32"), ("prefill", "bf16")])
def test_weights_of_a_file(phase: Phase, dtype: str) -> None:
    gm = embedded(phase, dtype)
    region = attention(gm)[0]
    inputs = _inputs(region, sizes(gm, 3, 8 + 2 * PAGE))
    compare(TorchMLA(), region, open_checkpoint().source, inputs, ROOMY, dtype.replace("fp32", "f32"))


def weights() -> dict[str, torch.Tensor]:
    s, made = SHAPE, torch.Generator().manual_seed(0)
    rows = {
        "q_proj": (s.heads * (s.nope + s.rope), HIDDEN),
        "kv_a_proj_with_mqa": (s.lora + s.rope, HIDDEN),
        "kv_a_layernorm": (s.lora,),
        "kv_b_proj": (s.heads * (s.nope + s.v), s.lora),
        "o_proj": (HIDDEN, s.heads * s.v),
    }
    return {name: torch.randn(shape, generator=made) for name, shape in rows.items()}


@given(
    requests=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0, 1, 1, 2, 17, 33])), min_size=1, max_size=4),
    padding=st.integers(0, 2),
    absorb=st.booleans(),
    scores=st.sampled_from([1, 100, 1 << 22]),
)
def test_any_step(requests: list[tuple[int, int]], padding: int, absorb: bool, scores: int) -> None:
    """Requests with nothing, one and many tokens; rows of no request; what nobody wrote is NaN."""
    shape, made = replace(SHAPE, absorb=absorb), torch.Generator().manual_seed(len(requests))
    lengths, counts = (list(column) for column in zip(*requests, strict=True))
    tokens, pages = sum(counts) + padding, 5
    assume(tokens)
    table = torch.randperm(len(requests) * pages, generator=made).view(len(requests), pages)
    pool = torch.full((len(requests) * pages, PAGE, SHAPE.lora + SHAPE.rope), torch.nan)
    for row, length in zip(table, lengths, strict=True):
        written = pool[row].view(-1, pool.shape[2])
        written[:length] = torch.randn(length, pool.shape[2], generator=made)
        pool[row] = written.view(pages, PAGE, -1)
    start = torch.tensor([0, *counts]).cumsum(0)
    hidden, turn = torch.randn(tokens, HIDDEN, generator=made), torch.randn(tokens, SHAPE.rope // 2, generator=made)
    given_pools = pool.clone(), pool.clone()
    tables = table, torch.tensor(lengths), start
    want = mla_reference(hidden, turn.cos(), turn.sin(), weights(), shape, given_pools[0], *tables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_mla, "SCORES", scores)
        got = TorchMLA().run(weights(), shape, (hidden, turn.cos(), turn.sin(), given_pools[1], *tables))
    assert torch.allclose(given_pools[0], given_pools[1], atol=1e-6, equal_nan=True)
    assert (got - want).norm() <= CHAIN["f32"] * want.norm()
    assert not got[tokens - padding :].any()


def test_where_it_runs() -> None:
    region = attention(embedded("decode"))[0]
    assert refusal(TorchMLA(), region, ROOMY) == "runs on cpu, the region is on cpu:1"
    assert TorchMLA().missing() is None
    other = next(regions(embedded("decode"), op="norm"))
    assert refusal(TorchMLA(), other, ROOMY) == "is for mla"


def test_it_tells_what_it_allocates() -> None:
    """No less than a call does, in the larger of two forms, and not many times as much."""
    gm = embedded("prefill")
    region = attention(gm)[0]
    step = sizes(gm, 128, 256)
    inputs = _inputs(region, step)
    keys = {leaf: str(node.meta["weight"]) for leaf, node in region.weights.items()}
    packed = TorchMLA().pack(Parts(open_checkpoint().source, keys), region, ROOMY)
    call = Call(region.path, region.op, region.binding.shape, None, tuple(region.weights))
    most = allocated(lambda: TorchMLA()(packed, call, *(inputs[region.binding.roles[role]] for role in ROLES)))
    assert most <= TorchMLA().workspace_bytes(region, step) <= 8 * most
