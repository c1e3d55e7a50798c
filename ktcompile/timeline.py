"""Pictures of profiles: a Chrome trace, and one self-contained HTML page of a step."""

import html
from collections.abc import Sequence
from typing import Any

from ktcompile.profile import Profile


def chrome_trace(profiles: Sequence[Profile]) -> dict[str, Any]:
    """For chrome://tracing and Perfetto: a process a step, a track a device, times in microseconds."""
    out: list[dict[str, Any]] = []
    for pid, p in enumerate(profiles, 1):
        name = f"{p.phase}, {p.tokens} tokens, serialised"
        out.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}})
        lanes = {device: i for i, device in enumerate(_devices(p))}
        for device, tid in lanes.items():
            out.append({"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": device}})
        for e in p.events:
            about = {"op": e.op, "kernel": e.kernel, "bytes": e.nbytes}
            place = {"ph": "X", "pid": pid, "tid": lanes[e.device], "ts": e.start * 1e6, "dur": e.seconds * 1e6}
            out.append({"name": e.name, "cat": e.op, **place, "args": about})
    return {"traceEvents": out, "displayTimeUnit": "ms"}


def _devices(p: Profile) -> list[str]:
    """The CPU last."""
    return sorted({e.device for e in p.events}, key=lambda d: (d == "cpu", d))


_COLOURS = ("#4878a8", "#d08030", "#5a9e5a", "#b05070", "#8064a8", "#3a9a9a", "#a08040", "#888")
_CSS = """
body{font:13px/1.45 ui-monospace,Menlo,Consolas,monospace;margin:2em;color:#222;background:#fff}h1{font-size:17px}
.scroll{overflow-x:auto}.lanes{position:relative;width:max(100%,1400px)}
.lane{position:relative;height:46px;background:#f0f0f0;margin:4px 0}
.lane>b{position:sticky;left:4px;font-weight:400;color:#666;z-index:1}
.lane>i{position:absolute;top:18px;height:26px;min-width:1px}
i.key{display:inline-block;width:.9em;height:.9em;margin:0 .4em 0 1em}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}.lane{background:#282828}.lane>b{color:#aaa}}
"""


def timeline(p: Profile, model: str) -> str:
    """A lane a device, a bar a region as wide as it is long; what it is shows under the pointer. No script."""
    ops = list(dict.fromkeys(s.op for s in p.shares()))
    colours = {op: _COLOURS[min(i, len(_COLOURS) - 1)] for i, op in enumerate(ops)}
    end = max((e.start + e.seconds for e in p.events), default=0.0) or 1.0
    title = html.escape(f"{model}: one {p.phase} step")
    out = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{title}</title><style>{_CSS}</style><h1>{title}</h1>",
        f"<p>{p.tokens} token{'s' * (p.tokens > 1)} after {p.depth}. Serialised, each region waited for: "
        f"{p.seconds * 1e3:.2f} ms in regions; as it runs: {p.step_s * 1e3:.2f} ms.</p>",
        "<div class=scroll><div class=lanes>",
    ]
    for device in _devices(p):
        out.append(f"<div class=lane><b>{html.escape(device)}</b>")
        for e in p.events:
            if e.device != device:
                continue
            facts = (e.name, e.op, e.kernel, f"{e.seconds * 1e6:.0f} µs", f"{e.nbytes / 1e6:.2f} MB" * bool(e.nbytes))
            tip = html.escape(", ".join(filter(None, facts)), quote=True)
            where = f"left:{100 * e.start / end:.4f}%;width:{100 * e.seconds / end:.4f}%;background:{colours[e.op]}"
            out.append(f'<i title="{tip}" style="{where}"></i>')
        out.append("</div>")
    keys = "".join(
        f"<i class=key style='background:{colours[s.op]}'></i>"
        f"{html.escape(f'{s.op} on {s.device}')} {s.seconds * 1e3:.2f} ms"
        for s in p.shares()
    )
    return "\n".join([*out, f"</div></div><p>{keys}</p></html>"]) + "\n"


__all__ = ["chrome_trace", "timeline"]
