"""The machine compiled for: devices, links between them, and how to find or imagine one."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml

from ktcompile.errors import RulesError

CONTEXT_BYTES = 600 << 20
"""What CUDA takes of a GPU before the first tensor: the driver's context and the code of kernels.

It lies outside of torch's allocator. Nominal: `nvidia-smi` shows 400 to 600 MiB, by driver and GPU.
"""

LIBRARY_BYTES = 64 << 20
"""cuBLAS' workspaces, in torch's allocator: 32 MiB (on Hopper; 8 MiB elsewhere) for each of the two streams in use."""

MOST_GPUS = 16

_SUFFIX = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Device:
    """A place that holds weights and runs kernels.

    `capacity` in bytes, `bandwidth` of its memory in bytes/s, `flops` that matrix products reach, per second (nominal:
    predictions use it, nothing else), `threads` for kernels on a CPU (0: all this process may use), `reserved` bytes
    of the capacity that its driver and libraries take.
    """

    name: str
    kind: str
    capacity: int
    bandwidth: float
    features: frozenset[str] = frozenset()
    flops: float = 1e12
    threads: int = 0
    reserved: int = 0

    @property
    def torch(self) -> torch.device:
        """The torch device that this one is."""
        return torch.device(self.name)


@dataclass(frozen=True)
class Link:
    """How one device reaches another: `bandwidth` in bytes/s, `latency` in seconds a copy."""

    bandwidth: float
    latency: float


_RESERVED = CONTEXT_BYTES + LIBRARY_BYTES
_PCIE = Link(bandwidth=25e9, latency=10e-6)


@dataclass(frozen=True)
class Target:
    """The devices that a plan may use. The first one is the default of a rule that names none."""

    devices: tuple[Device, ...]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    about: str = ""  # what the page says of a machine that is imagined

    def __post_init__(self) -> None:
        names = [d.name for d in self.devices]
        if not names or len(set(names)) != len(names):
            raise RulesError(f"a target needs one or more devices with different names, got {names}")

    def __contains__(self, name: str) -> bool:
        return any(d.name == name for d in self.devices)

    def __getitem__(self, name: str) -> Device:
        """The device of this name; `cpu` and `gpu` also mean the host, and the first GPU or else the host."""
        for device in self.devices:
            if device.name == name:
                return device
        if name in ("cpu", "gpu"):
            return self.host if name == "cpu" else self.main
        known = dict.fromkeys(["cpu", "gpu", *(d.name for d in self.devices)])
        close = get_close_matches(name, known, 1, 0.6)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RulesError(f"no device {name!r}; {hint}this target has {', '.join(known)}")

    @property
    def host(self) -> Device:
        """The CPU that drives the others."""
        return next((d for d in self.devices if d.kind == "cpu"), self.devices[0])

    @property
    def main(self) -> Device:
        """The device for everything that is not said: the first GPU, or the CPU where there is none."""
        return next((d for d in self.devices if d.kind == "cuda"), self.host)

    def link(self, source: str, to: str) -> Link:
        return self.links.get((source, to), _PCIE)


def size(text: str | int) -> int:
    """Bytes of `24G`, `512M`, `1.5T` (powers of 1024), or of a whole number. Raises RulesError."""
    if isinstance(text, int):
        return text
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    try:
        value = float(number[:-1]) * _SUFFIX[number[-1:]]
    except (ValueError, KeyError):
        raise RulesError(f"{text!r} is no size; write a number with K, M, G or T, such as 24G") from None
    if not 0 < value < 1 << 60:
        raise RulesError(f"{text!r} is no possible size of a memory; allowed is 1 to 1048575T")
    return int(value)


def cpu_features() -> frozenset[str]:
    """Feature names of this CPU as the kernel lists them (avx2, avx512f, avx512_bf16, amx_bf16, ...)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((x.split(":", 1)[1].split() for x in lines if x.startswith(("flags", "Features"))), []))


def cpu_name() -> str:
    """The processor's name as the kernel lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "unknown CPU")


def memory() -> int:
    """Bytes of RAM this process may use: the machine's, or its cgroup's limit if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return total


def _read_bandwidth() -> float:
    """Bytes/s that torch reads from RAM here: the best sum over 64 MiB, until eight in a row were no better.

    Takes 30 to 200 ms. The first ones are slow where torch's threads have yet to wake, or others are busy: a machine
    that had just started gave 15 GB/s three times, and 167 a minute later.
    """
    data = torch.ones(16 << 20)
    best, since, end = float("inf"), 0, time.perf_counter() + 0.2
    while since < 8 and time.perf_counter() < end:
        start = time.perf_counter()
        data.sum()
        took = time.perf_counter() - start
        best, since = (took, 0) if took < 0.98 * best else (min(took, best), since + 1)
    return data.nbytes / best


LEAST_BANDWIDTH = 4e9
"""Bytes/s of RAM a thread: a CPU that seems slower was busy while it was measured."""

_FLOPS = {"amx_bf16": 0.5e12, "avx512_bf16": 0.15e12, "avx2": 0.05e12}
"""What matrix products reach a thread, by the best that a CPU has: half of what a layer of experts was measured at."""


def _cpu_flops(features: frozenset[str], threads: int) -> float:
    return threads * next((rate for name, rate in _FLOPS.items() if name in features), 0.01e12)


def _link(props: Any) -> Link:
    """The link of a GPU to the CPU: 85 % of what the system says its PCIe lanes carry, if it says that."""
    domain, bus, slot = (getattr(props, f"pci_{part}_id", 0) for part in ("domain", "bus", "device"))
    folder = Path(f"/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.0")
    try:
        speed = float((folder / "max_link_speed").read_text().split()[0])  # 10^9 transfers/s, a bit a lane each
        lanes = int((folder / "max_link_width").read_text())
    except (OSError, ValueError, IndexError):
        return _PCIE
    rate = 0.85 * speed * lanes / 8 * 1e9
    return replace(_PCIE, bandwidth=rate) if 1e9 <= rate <= 1e12 else _PCIE


def default_threads() -> int:
    """Threads for the experts' kernels: the cores this process may use; of 8 and more one is left free.

    The system, the GPU's driver and Python run there. Where they interrupt one of the kernels' threads, the
    others wait: with 16 of 16 cores one token was 8 % slower than with 15, and 4096 were 5 % slower (docs/design.md).
    """
    most = len(os.sched_getaffinity(0))
    return most if most < 8 else most - 1


def detect(threads: int | None = None) -> Target:
    """The machine this runs on: its GPUs, if torch sees any, and its CPU; `threads` of it, or 0: `default_threads`."""
    most = len(os.sched_getaffinity(0))
    if threads is not None and not 1 <= threads <= most:
        raise RulesError(f"{threads} CPU threads: this process may use 1 to {most}")
    devices, links = [], {}
    for i in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(i)
        # memory_clock_rate is in kHz and counts one edge; both edges carry data.
        rate = getattr(props, "memory_clock_rate", 0) * 1e3 * 2 * getattr(props, "memory_bus_width", 0) / 8
        sm = f"sm{props.major}{props.minor}"
        name, capacity = f"cuda:{i}", props.total_memory
        links[name, "cpu"] = links["cpu", name] = _link(props)
        devices.append(Device(name, "cuda", capacity, rate or 1e12, frozenset({sm}), 100e12, reserved=_RESERVED))
    features, count = cpu_features(), threads or default_threads()
    flops = _cpu_flops(features, count)
    bandwidth = max(_read_bandwidth(), LEAST_BANDWIDTH * count)
    devices.append(Device("cpu", "cpu", memory(), bandwidth, features, flops, threads=threads or 0))
    return Target(tuple(devices), links)


def fake(gpu: str | int | None = "24G", ram: str | int = "512G") -> Target:
    """A machine one does not have: `gpu` bytes of GPU memory (None: no GPU; `2x24G`: two) and `ram` bytes of RAM.

    Bandwidths are of a common desktop: 1 TB/s on the GPU, 250 GB/s in RAM, PCIe 4 x16 between them; a CPU with AMX and
    16 threads.
    """
    avx = {
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512_bf16",
        "avx512_vnni",
        "avx512_fp16",
    }
    features = frozenset({*avx, "amx_tile", "amx_bf16", "amx_int8"})
    cpu = Device("cpu", "cpu", size(ram), 250e9, features, _cpu_flops(features, 16))
    if gpu is None:
        return Target((cpu,), about="imagined: RAM at 250 GB/s, a CPU with AMX, no GPU")
    count, capacity = _several(gpu)
    card = Device("cuda:0", "cuda", capacity, 1e12, frozenset({"sm89"}), 100e12, reserved=_RESERVED)
    cards = tuple(replace(card, name=f"cuda:{i}") for i in range(count))
    what = "GPU" if count == 1 else f"{count} GPUs"
    return Target((*cards, cpu), about=f"imagined: {what} at 1 TB/s, RAM at 250 GB/s, a CPU with AMX, PCIe 4 x16")


def _several(gpu: str | int) -> tuple[int, int]:
    """How many GPUs, and the bytes of each, of `24G` or `2x24G`."""
    count, found, each = str(gpu).lower().partition("x")
    if not found:
        return 1, size(gpu)
    if not count.isdigit() or not 1 <= int(count) <= MOST_GPUS:
        raise RulesError(f"{gpu!r}: write the memory of a GPU, 24G, or of several, 2x24G, up to {MOST_GPUS} of them")
    return int(count), size(each)


def with_sizes(real: Target, gpu: str | None = None, ram: str | None = None) -> Target:
    """`real` with an imagined GPU of `gpu` bytes (`none`: without its GPUs) or with `ram` bytes of RAM, or both."""
    devices = list(real.devices)
    if gpu is not None:
        devices = [d for d in devices if d.kind != "cuda"]
        if gpu.lower() != "none":
            devices = [d for d in fake(gpu).devices if d.kind == "cuda"] + devices
    if ram is not None:
        devices = [replace(d, capacity=size(ram)) if d.kind == "cpu" else d for d in devices]
    count, _, each = (gpu or "").rpartition("x")
    what = f"{count} GPUs of {each}" if count else f"a GPU of {gpu}"
    told = [f"{what} at 1 TB/s, PCIe 4 x16" if gpu and gpu.lower() != "none" else "no GPU" if gpu else ""]
    told.append(f"{ram} of RAM" if ram else "")
    return Target(tuple(devices), about=f"imagined: {', '.join(filter(None, told))}; the rest is this machine")


def with_vram(target: Target, vram: str | int) -> Target:
    """The target with at most `vram` bytes of each GPU's memory, for what is planned as for what is kept there."""
    most = size(vram)
    devices = tuple(replace(d, capacity=min(d.capacity, most)) if d.kind == "cuda" else d for d in target.devices)
    told = f"at most {vram} of each GPU's memory" if target.main.kind == "cuda" else f"no GPU that {vram} would limit"
    return replace(target, devices=devices, about="; ".join(filter(None, (target.about, told))))


def load(path: Path | str) -> Target:
    """A target from YAML: `devices: [{name, kind, capacity, bandwidth, features}]`, sizes as `24G`."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        devices = tuple(
            Device(d["name"], d["kind"], size(d["capacity"]), float(d["bandwidth"]), frozenset(d.get("features", ())))
            for d in data["devices"]
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise RulesError(
            f"{path}: no target: {error}; wanted devices: [{{name, kind, capacity, bandwidth}}]"
        ) from error
    return Target(devices)
