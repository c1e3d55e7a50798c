"""Calls of the routed experts: what they read and write, what they refuse, and calls from threads and after fork."""

import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from native.problems import HERE, N_EXPERTS, TOP_K, cached_layer, environment, problem, taken
from torch import Tensor

from ktcompile.backends import native


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


@pytest.mark.parametrize("bad", [-2, -(2**63), N_EXPERTS, 2**40])
def test_bad_expert_leaves_y_alone(pool, bad):
    weights, x, ids, scores, _ = problem(("f32",) * 3, 31, 33, 7, "random")
    ids = ids.clone()
    ids[-1, -1] = bad
    y = torch.full_like(x, 5.0)
    with pytest.raises(ValueError, match=rf"{bad}.* allowed is \[0, {N_EXPERTS}\) and -1"):
        native.moe(pool, "scalar", weights, x, ids, scores, out=y)
    assert (y == 5).all()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("row", "places"), [(0, (0, 1)), (8, (0, 2)), (4, (1, 2))])
def test_repeated_expert_leaves_y_alone(pool, row, places, isa):
    weights, x, ids, scores, _ = problem(taken(isa)[0], 256, 512, 9, "random", "silu", True)
    ids = ids.clone()
    ids[row, places[1]] = ids[row, places[0]]
    ids[1, :2] = -1
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
