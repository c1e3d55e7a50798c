"""The native kernels of csrc/kt.h, with tensors for pointers: routed experts, packing, quantisers, worker pool.

The caller chooses the instruction set ("isa") by name. Results depend on the precision family only (`FAMILY`), up to
the order of sums; tests/tolerances.py has one bound a family. Tensors are on the CPU. The extension is loaded at first
use, so this module imports where it is not built.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ktcompile.kernel import Counts

FAMILY = {
    "scalar": "f32",
    "avx2": "f32",
    "avx512": "f32",
    "avx512_bf16": "bf16",
    "amx": "bf16",
    "avx512_vnni": "int16",
    "amx_int8": "int8",
}
"""isa -> precision family: how activations and weights are rounded before they are multiplied."""

TYPES = (  # in the order of kt_type
    "f32",
    "bf16",
    "q8_0",
    "q5_0",
    "q4_0",
    "q6_k",
    "q5_k",
    "q4_k",
    "q3_k",
    "q2_k",
    "iq4_nl",
    "iq4_xs",
    "mxfp4",
    "fp8_block128",
    "int8_row",
    "int4_64",
    "int4_128",
)
"""Storage types a kernel may take; the blocks are ggml's, along the last axis.

"int8_row" has a scale a row, "int4_64" and "int4_128" one for so many weights of a row: `pack` makes these, with loss.
"""

GROUP_ROWS = 16
"""Rows of a matrix that are packed together: parts of a matrix are packed in multiples of it."""

LOSSY = ("int8_row", "int4_64", "int4_128")
"""Types that `pack` makes of any source by rounding."""

SOURCES = (*(t for t in TYPES if t not in LOSSY), "f16")
"""Types `pack` reads; "fp8_block128" is e4m3 with a float32 scale for each 128 x 128 block."""

_CODES = {name: code for code, name in enumerate((*TYPES, "f16"))}

QUANTIZERS = ("q8_0", "q4_0", "q5_0", "q4_k", "q5_k", "q6_k", "fp8_block128")
"""Types `quantize` writes."""

_ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "avx512_vnni", "amx", "amx_int8")  # in the order of kt_isa
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")  # in the order of kt_activation


_HUGE_PAGE = 2 << 20


@cache
def _native() -> Any:
    return import_module("ktcompile._native")


def _index(kind: str, name: str, allowed: tuple[str, ...]) -> int:
    if name not in allowed:
        raise ValueError(f"no {kind} {name!r}; there are {', '.join(allowed)}")
    return allowed.index(name)


def _pointer(kind: str, tensor: Tensor) -> Any:
    return _native().ffi.cast(f"{kind} *", tensor.data_ptr())


def _error(status: int) -> str:
    return str(_native().ffi.string(_native().lib.kt_error(status)).decode())


@cache
def _missing(isa: str) -> str | None:
    text = _native().lib.kt_isa_missing(_index("instruction set", isa, _ISAS))
    return None if text == _native().ffi.NULL else str(_native().ffi.string(text).decode())


def isas() -> dict[str, str | None]:
    """Every instruction set -> None if it runs here, else the reason why not. Asks the kernel for AMX tiles."""
    return {isa: _missing(isa) for isa in _ISAS}


def refuses(isa: str, types: Iterable[str]) -> str | None:
    """Why `isa` does not take weights of these storage types, or None. Says nothing about whether it runs here."""
    number = _index("instruction set", isa, _ISAS)
    for name in types:
        if name not in TYPES:
            return f"no kernel takes weights of type {name!r}"
        if not _native().lib.kt_isa_takes(number, TYPES.index(name)):
            return f"{isa} computes in {FAMILY[isa]} and does not take {name} weights"
    return None


class Pool:
    """`threads` threads that live until `close`, the calling one included. One call at a time; others wait their turn.

    Keeps the scratch memory of its calls, which grows to the largest. Unusable after fork() in the child.
    """

    def __init__(self, threads: int) -> None:
        if not 1 <= threads <= 4096:
            raise ValueError(f"a pool has 1 to 4096 threads, not {threads}")
        handle = _native().lib.kt_pool_new(threads)
        if handle == _native().ffi.NULL:
            raise RuntimeError(f"could not start {threads} threads")
        self.threads = threads
        self._handle = handle
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._scratch = empty(0)
        self._driver_scratch = empty(0)
        self._finalizer = weakref.finalize(self, _native().lib.kt_pool_free, handle)

    def rest(self, resting: bool) -> None:
        """False before flags are raised that submissions listen to, True after: the driver sleeps while nobody may.

        A flag that is raised nevertheless is seen once somebody says False. While one may be raised, the other threads
        spin for 3 ms after each call, so that the next one finds them awake.
        """
        self._check()
        _native().lib.kt_pool_rest(self._handle, resting)

    def counts(self) -> Counts:
        """What it has done since it was made; any thread may ask at any time, and nobody waits."""
        if not self._finalizer.alive:
            raise ValueError("the pool is closed")
        found = _native().lib.kt_pool_counts(self._handle)
        return Counts(int(found.runs), int(found.bytes), found.ns / 1e9)

    def close(self) -> None:
        """Joins the threads. A second call does nothing; a kernel on a closed pool raises ValueError."""
        self._finalizer()

    def _check(self) -> None:
        if not self._finalizer.alive:
            raise ValueError("the pool is closed")
        if self._pid != os.getpid():  # before the lock, which may have been held by another thread at the fork
            raise RuntimeError(_error(_native().lib.KT_FORKED))

    def _scratch_of(self, nbytes: int) -> Tensor:
        if self._scratch.numel() < nbytes:
            self._scratch = empty(nbytes)
        return self._scratch


def packed_bytes(type: str, rows: int, cols: int) -> int:
    """Bytes of a packed [rows, cols] matrix. ValueError if `cols` is no multiple of the type's block."""
    number = _index("storage type", type, TYPES)
    if rows < 1 or cols < 1:
        raise ValueError(f"a matrix of {rows} x {cols}")
    nbytes = int(_native().lib.kt_packed_bytes(_native().lib.KT_SCALAR, number, rows, cols))
    if not nbytes:
        raise ValueError(f"{cols} columns are no multiple of the block of {type}")
    return nbytes


def source_bytes(type: str, rows: int, cols: int) -> int:
    """Bytes of a row-major [rows, cols] matrix as files store it, without scales. ValueError as `packed_bytes`."""
    _index("source type", type, SOURCES)
    nbytes = int(_native().lib.kt_source_bytes(_CODES[type], rows, cols))
    if not nbytes:
        raise ValueError(f"{cols} columns are no multiple of the block of {type}")
    return nbytes


def pack(
    raw: Tensor,
    src: str,
    dst: str,
    rows: int,
    cols: int,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    span: tuple[int, int] | None = None,
) -> Tensor:
    """Packs a row-major [rows, cols] matrix, or its rows `span`, and returns uint8 [packed_bytes(dst, rows, cols)].

    Exact from any source to "f32", to "bf16" (nearest even) and to itself; to a type of `LOSSY` by rounding. `raw` has
    the bytes of the rows given, whatever its dtype. `scale` is float32 [ceil(rows / 128), ceil(cols / 128)] of those
    rows, for "fp8_block128" only. `out` receives the result; a span starts at a multiple of 16 (128 for
    "fp8_block128") and ends at one or with the matrix. The layout is that of csrc/internal.h. ValueError names what
    does not fit.
    """
    _index("source type", src, SOURCES)
    nbytes = packed_bytes(dst, rows, cols)
    first, last = span or (0, rows)
    _need_bytes("raw", raw, source_bytes(src, last - first, cols))
    scale_pointer = _native().ffi.NULL
    if (scale is not None) != (src == "fp8_block128"):
        raise ValueError(f"source type {src} {'needs a scale' if scale is None else 'takes no scale'}")
    if scale is not None:
        _need("scale", scale, torch.float32, (-(-(last - first) // 128), -(-cols // 128)))
        scale_pointer = _pointer("float", scale)
    if out is None:
        out = empty(nbytes)
    _need("out", out, torch.uint8, (nbytes,))
    status = _native().lib.kt_pack(
        _CODES[src],
        _CODES[dst],
        rows,
        cols,
        first,
        last - first,
        _pointer("void", raw),
        scale_pointer,
        _pointer("void", out),
    )
    if status:
        raise ValueError(f"cannot pack rows {first} to {last} of {rows} from {src} as {dst}: {_error(status)}")
    return out


def unpack(packed: Tensor, type: str, rows: int, cols: int) -> Tensor:
    """The float32 [rows, cols] values of a packed matrix, which the kernels compute with before any rounding."""
    _need_bytes("packed", packed, packed_bytes(type, rows, cols))
    out = torch.empty(rows, cols)
    status = _native().lib.kt_unpack(_CODES[type], rows, cols, _pointer("void", packed), _pointer("float", out))
    if status:
        raise ValueError(f"cannot unpack {type}: {_error(status)}")
    return out


def empty(nbytes: int) -> Tensor:
    """Uninitialised uint8 [nbytes] at a multiple of 4096, in pages of 2 MB where the system has them to give.

    Small ones are the allocator's. The memory goes back to the system with the tensor.
    """
    if nbytes < _HUGE_PAGE:
        padded = torch.empty(nbytes + 64, dtype=torch.uint8)
        return padded[-padded.data_ptr() % 64 :][:nbytes]
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages: small ones are slower, not wrong
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)[:nbytes]


def quantize(x: Tensor, dst: str, out: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Rounds a finite float32 [rows, cols] to a type of `QUANTIZERS`: uint8 [rows, row bytes], in `out` if given.

    For "fp8_block128" returns float8_e4m3fn [rows, cols] and the scales, float32 [ceil(rows / 128), ceil(cols / 128)].
    Runs on the calling thread, without the interpreter's lock; the bytes are the same on every CPU. Values beyond what
    fp16 scales reach (8e6 for q8_0) are clipped. ValueError names what does not fit. Methods: csrc/quantize.c.
    """
    lib = _native().lib
    _index("quantizer", dst, QUANTIZERS)
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"x is {tuple(x.shape)}, not [rows, cols]")
    rows, cols = x.shape
    _need("x", x, torch.float32, (rows, cols))
    nbytes = source_bytes(dst, rows, cols)
    if out is None:
        out = torch.empty(rows, nbytes // rows, dtype=torch.uint8)
    _need("out", out, torch.uint8, (rows, nbytes // rows))
    scales = torch.empty(-(-rows // 128), -(-cols // 128)) if dst == "fp8_block128" else None
    scales_pointer = _native().ffi.NULL if scales is None else _pointer("float", scales)
    status = lib.kt_quantize(_CODES[dst], rows, cols, _pointer("float", x), _pointer("void", out), scales_pointer)
    if status == lib.KT_BAD_ARGUMENT:
        row, col = (~x.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"x[{row}, {col}] is {x[row, col].item()}, and {dst} holds finite values only")
    if status:
        raise ValueError(f"cannot quantize to {dst}: {_error(status)}")
    return out if scales is None else (out.view(torch.float8_e4m3fn), scales)


@dataclass(frozen=True, eq=False)
class MoeWeights:
    """The packed experts of one layer; ValueError from the constructor names what does not fit.

    `tile_tokens`: experts with so many tokens in a call are computed by tiles, where an isa has them; 0: none.
    `alpha` and `limit` are of the activation "swiglu_oai" (gpt-oss). Biases are float32, [E, I], [E, I] and [E, H].

    gate, up and down are uint8 tensors whose first axis is the experts: [E, bytes] with the bytes of an expert
    contiguous (any constant stride between experts). An expert's gate and up are [width, hidden], its down is
    [hidden, width].
    """

    experts: int
    hidden: int
    width: int
    activation: str
    gate: Tensor
    up: Tensor
    down: Tensor
    gate_type: str
    up_type: str
    down_type: str
    tile_tokens: int
    alpha: float = 1.702
    limit: float = 7.0
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    _struct: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError(f"experts is {self.experts}")
        struct = _native().ffi.new("kt_moe *")
        struct.experts, struct.hidden, struct.width = self.experts, self.hidden, self.width
        struct.tile_tokens, struct.alpha, struct.limit = self.tile_tokens, self.alpha, self.limit
        struct.activation = _index("activation", self.activation, _ACTIVATIONS)
        sizes = {"gate": (self.width, self.hidden), "up": (self.width, self.hidden), "down": (self.hidden, self.width)}
        for name, (rows, cols) in sizes.items():
            tensor, type_name = getattr(self, name), getattr(self, f"{name}_type")
            nbytes = packed_bytes(type_name, rows, cols)
            if tensor.dtype != torch.uint8 or tensor.device.type != "cpu" or tensor.dim() < 2:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                    f"not uint8 [{self.experts}, {nbytes}] on cpu"
                )
            if tensor.shape[0] != self.experts:
                raise ValueError(f"{name} has {tensor.shape[0]} experts, not {self.experts}")
            _need_bytes(f"an expert of {name}", tensor[0], nbytes)
            if self.experts > 1 and tensor.stride(0) < nbytes:
                raise ValueError(f"experts of {name} are {tensor.stride(0)} bytes apart and {nbytes} long")
            setattr(struct, name, _pointer("void", tensor))
            setattr(struct, f"{name}_stride_bytes", tensor.stride(0))
            if tensor.data_ptr() % 64 or tensor.stride(0) % 64:
                raise ValueError(f"{name} is not at a multiple of 64 bytes")
            setattr(struct, f"{name}_type", TYPES.index(type_name))
            bias = getattr(self, f"{name}_bias")
            if bias is not None:
                _need(f"{name}_bias", bias, torch.float32, (self.experts, sizes[name][0]))
                setattr(struct, f"{name}_bias", _pointer("float", bias))
        object.__setattr__(self, "_struct", struct)

    @property
    def types(self) -> tuple[str, str, str]:
        """Storage types of gate, up and down."""
        return self.gate_type, self.up_type, self.down_type


def _need(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{name} is not contiguous on the CPU")


def _need_bytes(name: str, tensor: Tensor, nbytes: int) -> None:
    if tensor.numel() * tensor.element_size() != nbytes:
        raise ValueError(f"{name} holds {tensor.numel() * tensor.element_size()} bytes, not {nbytes}")
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{name} is not contiguous on the CPU")


def moe(
    pool: Pool, isa: str, weights: MoeWeights, x: Tensor, ids: Tensor, scores: Tensor, out: Tensor | None = None
) -> Tensor:
    """Routed experts: y[t] = sum_j scores[t, j] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])), e = ids[t, j].

    x float32 [T, H], ids int64 [T, k], scores float32 [T, k], all contiguous; returns float32 [T, H], in `out` if given
    (which shares no memory with the inputs). The result is the same to the bit for any number of threads; with at most
    8 tokens also for each token alone. An id of -1 is no expert: the sum is that of a row without this place, its score
    is not read, and a row of nothing else gives zeros. ValueError names a shape, a dtype, another id out of range or
    twice in a row, an isa that refuses the weights or does not run here.
    """
    reason = _missing(isa)
    if reason is not None:
        raise ValueError(f"{isa} does not run here: {reason}")
    return _launch(pool, isa, weights, x, ids, scores, out)


def _launch(
    pool: Pool, isa: str, weights: MoeWeights, x: Tensor, ids: Tensor, scores: Tensor, out: Tensor | None = None
) -> Tensor:
    # `moe` without asking the CPU: an emulator has instructions that the CPU does not report.
    native = _native()
    out = _checked(isa, weights, x, ids, scores, out)
    pool._check()
    number, struct = _ISAS.index(isa), weights._struct
    tokens, top_k = ids.shape
    with pool._turn:
        scratch_bytes = native.lib.kt_moe_scratch_bytes(pool._handle, struct, number, tokens, top_k)
        scratch = pool._scratch_of(scratch_bytes)
        status = native.lib.kt_moe_run(
            pool._handle,
            struct,
            number,
            tokens,
            top_k,
            _pointer("float", x),
            _pointer("int64_t", ids),
            _pointer("float", scores),
            _pointer("float", out),
            _pointer("void", scratch),
            scratch.numel(),
        )
    _raise(status, weights, ids)
    return out


def _checked(
    isa: str, weights: MoeWeights, x: Tensor, ids: Tensor, scores: Tensor, out: Tensor | None = None
) -> Tensor:
    """`out`, made if there is none; ValueError for what does not fit together."""
    if x.dim() != 2 or ids.dim() != 2:
        raise ValueError(f"x has {x.dim()} dimensions and ids {ids.dim()}; both have 2")
    tokens, top_k = ids.shape
    _need("x", x, torch.float32, (tokens, weights.hidden))
    _need("ids", ids, torch.int64, (tokens, top_k))
    _need("scores", scores, torch.float32, (tokens, top_k))
    if out is None:
        out = torch.empty(tokens, weights.hidden)
    _need("out", out, torch.float32, (tokens, weights.hidden))
    reason = refuses(isa, weights.types)
    if reason is not None:
        raise ValueError(reason)
    return out


def _raise(status: int, weights: MoeWeights, ids: Tensor) -> None:
    """The error of a run that ended with this status, if it is one."""
    lib = _native().lib
    if status == lib.KT_REPEATED_EXPERT:
        raise ValueError("an expert appears twice among the experts of a token")
    if status == lib.KT_BAD_EXPERT:
        raise ValueError(f"ids lie in [{int(ids.min())}, {int(ids.max())}], allowed is [0, {weights.experts}) and -1")
    if status:
        raise RuntimeError(f"kt_moe_run: {_error(status)}")


@dataclass(frozen=True)
class HostFunctions:
    """Addresses for cudaLaunchHostFunc: `submit(argument)` and `wait(argument)` are `void (void *)`, in C alone."""

    submit: int
    wait: int
    argument: int


class Submission:
    """A call of `moe` on these tensors, prepared once, to be run again and again by the pool's driver.

    The caller writes to x, ids and scores, runs it, and reads `out`. A run is started by `submit`, by a flag
    (`listen`), or from C (`host_functions`), and allocates nothing. Its scratch memory is the driver's: the pool may be
    used by others meanwhile. A run that fails leaves `out` alone; `wait` and `check` then raise what `moe` would have,
    of the first such run since the last time that they were asked. `close` ends it; so does the end of this object.
    """

    def __init__(
        self,
        pool: Pool,
        isa: str,
        weights: MoeWeights,
        x: Tensor,
        ids: Tensor,
        scores: Tensor,
        out: Tensor | None = None,
        elsewhere: Callable[[int], int] = lambda tokens: 0,
    ) -> None:
        """Tensors as in `moe`; `elsewhere` is `Prepared.elsewhere`, for whoever writes ids.

        Starts the pool's driver; ValueError as `moe`, RuntimeError if it cannot be started.
        """
        reason = _missing(isa)
        if reason is not None:
            raise ValueError(f"{isa} does not run here: {reason}")
        ffi, lib = _native().ffi, _native().lib
        self.out = _checked(isa, weights, x, ids, scores, out)
        pool._check()
        self.pool, self.isa, self.inputs, self.elsewhere = pool, isa, (x, ids, scores), elsewhere
        self._weights, self._ids = weights, ids
        number = _ISAS.index(isa)
        tokens, top_k = ids.shape
        # One for all of a pool: the driver runs them one after the other.
        scratch_bytes = int(lib.kt_moe_scratch_bytes(pool._handle, weights._struct, number, tokens, top_k))
        if pool._driver_scratch.numel() < scratch_bytes:
            pool._driver_scratch = empty(scratch_bytes)
        scratch = pool._driver_scratch
        call = self._call = ffi.new("kt_moe_arguments *")
        call.pool, call.moe, call.isa = pool._handle, weights._struct, number
        call.n_tokens, call.top_k = tokens, top_k
        call.x, call.ids, call.scores = _pointer("float", x), _pointer("int64_t", ids), _pointer("float", scores)
        call.y, call.scratch, call.scratch_bytes = _pointer("float", self.out), _pointer("void", scratch), len(scratch)
        task = self._task = ffi.new("kt_task *")
        task.call, task.argument, task.pool = ffi.addressof(lib, "kt_moe_task"), call, pool._handle
        self._flags: list[Tensor] = []
        self._accept(lib.kt_pool_start_driver(pool._handle), "the pool's driver cannot be started")
        # What the driver reads lives until it cannot read it any more.
        keep = call, weights, x, ids, scores, self.out, scratch, self._flags
        self._finalizer = weakref.finalize(self, _end, pool, task, keep)

    def resize(self, tokens: int) -> None:
        """The next run is of the first `tokens` rows of x, ids, scores and out. ValueError if there are fewer."""
        if not 0 <= tokens <= len(self._ids):
            raise ValueError(f"{tokens} tokens; x, ids, scores and out have {len(self._ids)} rows")
        self._call.n_tokens = tokens

    def submit(self) -> None:
        """Start a run, after those that others submitted. RuntimeError if its last one is not over, or it listens."""
        self._check()
        status = _native().lib.kt_pool_submit(self.pool._handle, self._task)
        self._accept(status, "it is under way or listens to a flag: wait, or unlisten, first")

    def wait(self) -> Tensor:
        """`out` once the run is over. RuntimeError if there was none."""
        self._check()
        status = _native().lib.kt_pool_wait(self.pool._handle, self._task)
        self._accept(status, "there is no run to wait for: submit first, or wait for the flag that you listen to")
        return self.check()

    def check(self) -> Tensor:
        """`out` of the last run, which is over: what there is to do after a flag said so, or C waited."""
        if status := self._call.status:  # each layer of a step is asked: nearly always it is KT_OK
            self._call.status = _native().lib.KT_OK
            _raise(status, self._weights, self._ids)
        return self.out

    def listen(self, start: Tensor, done: Tensor) -> None:
        """From now on, whenever `start` is not 0, the driver writes 0 to it, runs, then writes 1 to `done`.

        Both are int32 or uint32, one element each, on the CPU or pinned, so that a GPU may write and read them. The
        driver polls without sleeping until `unlisten`. RuntimeError if a run is under way or it listens already.
        """
        self._check()
        for name, flag in (("start", start), ("done", done)):
            if flag.dtype not in (torch.int32, torch.uint32) or flag.numel() != 1 or flag.device.type != "cpu":
                shape = tuple(flag.shape)
                raise ValueError(f"{name} is {flag.dtype} {shape} on {flag.device}, not one int32 or uint32 on the CPU")
        if start.data_ptr() == done.data_ptr():
            raise ValueError("start and done are the same flag")
        pointers = [_pointer("uint32_t", flag) for flag in (start, done)]
        self._flags += start, done
        status = _native().lib.kt_pool_listen(self.pool._handle, self._task, *pointers)
        if status:
            del self._flags[-2:]
        self._accept(status, "it is under way or listens to a flag: wait, or unlisten, first")

    def rest(self, resting: bool) -> None:
        """As `Pool.rest`."""
        self.pool.rest(resting)

    def unlisten(self) -> None:
        """Leave the flags alone, after the run that may be under way. RuntimeError if it does not listen."""
        self._check()
        status = _native().lib.kt_pool_unlisten(self.pool._handle, self._task)
        self._accept(status, "it does not listen to a flag")
        self._flags.clear()

    def host_functions(self) -> HostFunctions:
        """`submit` and `wait` without Python; `check` afterwards has the errors. Good as long as this object is."""
        self._check()
        ffi, lib = _native().ffi, _native().lib
        functions = (ffi.addressof(lib, name) for name in ("kt_task_submit", "kt_task_wait"))
        return HostFunctions(*(int(ffi.cast("uintptr_t", each)) for each in (*functions, self._task)))

    def close(self) -> None:
        """Waits for a run under way and stops listening. A second call does nothing; runs then raise ValueError."""
        self._finalizer()

    def _check(self) -> None:
        if not self._finalizer.alive:
            raise ValueError("the submission is closed")
        self.pool._check()

    def _accept(self, status: int, why: str) -> None:
        if status == _native().lib.KT_BAD_ARGUMENT:
            raise RuntimeError(why)
        if status:
            raise RuntimeError(f"{why}: {_error(status)}")


def _end(pool: Pool, task: Any, keep: Any) -> None:
    """Lets the driver finish with a task, unless the pool is gone, which did that. `keep` lives until then."""
    if not pool._finalizer.alive or pool._pid != os.getpid():
        return
    lib = _native().lib
    lib.kt_pool_unlisten(pool._handle, task)
    lib.kt_pool_wait(pool._handle, task)


def read_rate(pool: Pool, data: Tensor, ahead: int = 0) -> float:
    """Bytes/s at which all threads read `data` (far larger than the caches), asking for it `ahead` bytes early."""
    return float(_native().lib.kt_ceiling_read(pool._handle, _pointer("void", data), data.nbytes, ahead))


def tile_operand_bytes(pool: Pool) -> int:
    """Bytes of the operands of `tile_rate`, at a multiple of 64: use `empty`."""
    return int(_native().lib.kt_ceiling_tiles_bytes(pool._handle))


def tile_rate(pool: Pool, isa: str, order: int, repeats: int, operands: Tensor) -> float:
    """Operations/s of tile products from the second-level cache, in an order of csrc/ceiling.c; 0 without tiles.

    `isa` is "amx" (bf16) or "amx_int8"; a repeat is 64 products a thread.
    """
    number = _index("instruction set", isa, _ISAS)
    return float(_native().lib.kt_ceiling_tiles(pool._handle, number, order, repeats, _pointer("void", operands)))
