"""What `ktrans bench` prints: rows as llama-bench has them, then the shares of a decode and of a prefill step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktcompile.bench import Row, Test, measure
from ktcompile.generate import CHUNK
from ktcompile.profile import Profile, profile
from ktcompile.target import Target

JSON_VERSION = 1
"""Version of `Report.json()`; fields may be added to one, never renamed or removed."""

Progress = Callable[[str, int, int], None]
"""Called before each test: (its name, tests done, tests in all)."""


@dataclass(frozen=True)
class Report:
    """What was measured, of which model, on what."""

    model: str
    target: Target
    context: int
    dtype: str
    chunk: int
    rows: tuple[Row, ...]
    profiles: tuple[Profile, ...] = ()
    lossy: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    version: str = ""

    def json(self) -> dict[str, Any]:
        """Plain data, stable and versioned."""
        devices = [
            {"name": d.name, "kind": d.kind, "bandwidth": d.bandwidth, "threads": d.threads}
            for d in self.target.devices
        ]
        return {
            "version": JSON_VERSION,
            "ktcompile": self.version,
            "model": self.model,
            "devices": devices,
            "dtype": self.dtype,
            "context": self.context,
            "chunk": self.chunk,
            "lossy": list(self.lossy),
            "notes": list(self.notes),
            "rows": [r.json() for r in self.rows],
            "profiles": {p.phase: p.json(self.target) for p in self.profiles},
        }

    def text(self) -> str:
        """The tables."""
        memories = ", ".join(f"{d.name} {d.bandwidth / 1e9:.0f} GB/s" for d in self.target.devices)
        lines = [
            f"# {self.model}, {self.dtype}, {self.context} of context, prefill in steps of {self.chunk}",
            f"# memory: {memories}",
        ]
        lines += [f"# lossy: {what}" for what in self.lossy] + [f"# {note}" for note in self.notes]
        rows = [("test", "runs", "tokens", "tok/s", "median", "ms a step", "10-90 %")]
        for r in self.rows:
            tokens, rate = str(r.test.tokens * r.test.batch), f"{_digits(r.mean)} ± {_digits(r.sd)}"
            low, high = r.step_s_10_90
            step = _ms(r.step_s), f"{_ms(low)} - {_ms(high)}"
            rows.append((r.test.name, str(len(r.seconds)), tokens, rate, _digits(r.median), *step))
        lines += ["", *_aligned(rows)]
        for p in self.profiles:
            lines += ["", *self._step(p), *self._shares(p)]
        return "\n".join(lines) + "\n"

    def _step(self, p: Profile) -> list[str]:
        """What the step takes as it runs."""
        tokens = "1 token" if p.tokens == 1 else f"{p.tokens} tokens"
        lines = [f"# a {p.phase} step of {tokens} after {p.depth}: {_ms(p.step_s)} ms"]
        for device, count in p.read().items():
            rate = count / p.step_s
            part = rate / self.target[device].bandwidth
            lines.append(
                f"#   reads {count / 1e6:.2f} MB from {device}: {rate / 1e9:.2f} GB/s, {part:.0%} of its bandwidth"
            )
        if p.gpu_s is not None:
            lines.append(f"#   GPU busy {_ms(p.gpu_s)} ms, regions on the CPU {_ms(p.host_s)} ms")
        if p.other_s is not None:
            least = "at least " * p.has_gpu
            lines.append(f"#   neither regions nor copies: {least}{_ms(p.other_s)} ms")
        return lines

    def _shares(self, p: Profile) -> list[str]:
        """The same step, serialised."""
        rows = [("op", "device", "regions", "ms", "share", "MB", "GB/s", "of device")]
        for s in p.shares():
            share, part = s.seconds / (p.seconds or 1.0), s.of(self.target)
            read = (
                (f"{s.nbytes / 1e6:.2f}", f"{s.nbytes / s.seconds / 1e9:.2f}") if s.nbytes and s.seconds else ("", "")
            )
            of = "" if part is None else f"{part:.0%}"
            rows.append((s.op, s.device, str(s.regions), _ms(s.seconds), f"{share:.1%}", *read, of))
        return [f"# serialised, each region waited for: {_ms(p.seconds)} ms", *_aligned(rows, left=2)]


def _digits(rate: float) -> str:
    return f"{rate:.{0 if rate >= 1000 else 1 if rate >= 100 else 2}f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _aligned(rows: Sequence[tuple[str, ...]], left: int = 1) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    cells = [
        [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows
    ]
    return ["  ".join(c).rstrip() for c in cells]


# ------------------------------------------------------------------------------------------------ measuring


def run(
    model: Any,
    name: str,
    tests: Sequence[Test],
    *,
    repetitions: int = 3,
    chunk: int = CHUNK,
    progress: Progress | None = None,
    version: str = "",
) -> Report:
    """Every test, then a step of the first that generates and one of the longest prompt, region by region."""
    tell = progress or (lambda name, done, total: None)
    rows = []
    for i, test in enumerate(tests):
        tell(test.name, i, len(tests) + 1)
        rows.append(measure(test, model, repetitions, chunk))
    tell("region by region", len(tests), len(tests) + 1)
    generating = next((t for t in tests if t.kind == "tg"), None)
    profiles = [profile(model, 1, generating.depth, generating.batch, repetitions, chunk)] if generating else []
    longest = max((t.tokens for t in tests if t.kind == "pp"), default=0)
    if longest > 1 or not profiles:  # a prompt of one token is a decode step
        profiles.append(profile(model, min(chunk, longest), 0, 1, repetitions, chunk))
    plan = model.plans["decode"]
    graphs: Mapping[int, str] = model.graphs
    notes = [f"decode steps of {n} tokens are no CUDA graph: {why}" for n, why in graphs.items() if why]
    if any(p.phase == "decode" and p.has_gpu and p.gpu_s is None for p in profiles):
        notes.append("how long the GPU is busy in a step is unknown: torch's profiler saw no kernel")
    return Report(
        name,
        model.store.target,
        plan.context,
        str(model.dtype).removeprefix("torch."),
        chunk,
        tuple(rows),
        tuple(profiles),
        tuple(plan.lossy),
        tuple(notes),
        version,
    )


__all__ = ["JSON_VERSION", "Progress", "Report", "run"]
