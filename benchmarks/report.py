"""A table and a roofline plot of what bench_moe.py wrote: python benchmarks/report.py FILE... --peers --plot plot.png

Markdown goes to stdout, a table a run (a run begins with the line that names its CPU). "Of the bound" is the share of
what the ceiling that governs a case allows: the longer of reading its weights once and doing its products by tiles.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

PEERS = Path(__file__).parent / "peers.yaml"
TILES = {"amx": "bf16 tiles", "amx_int8": "int8 tiles"}
COLOURS = ("#0b6fa4", "#c8472b", "#3c8d40", "#7a4fa3", "#b07d00", "#4d4d4d", "#c2477f", "#00878a")
MARKERS = "osD^vPX*"


class ReportError(Exception):
    """A file or a package that is not as it has to be; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """One start of bench_moe.py: its first line, and its cases."""

    file: str
    about: dict[str, Any]
    cases: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tile_roofs(self) -> dict[str, float]:
        """T op/s of tile products in the best order from the caches; the last order is of registers only."""
        found = {isa: self.about.get(f"{isa}_tera_op_s_by_order") or {} for isa in TILES}
        return {isa: max(rate for order, rate in by.items() if int(order) < 5) for isa, by in found.items() if by}


def read(paths: Sequence[Path]) -> list[Run]:
    """The runs in files of JSON lines; ReportError names file and line of what is none."""
    runs: list[Run] = []
    for path in paths:
        begun = False
        try:
            lines = path.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise ReportError(f"{path}: cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ReportError(f"{path}:{number}: not JSON: {error}; wanted: the output of bench_moe.py") from error
            if not isinstance(entry, dict):
                raise ReportError(f"{path}:{number}: {line[:40]!r} is no line of bench_moe.py")
            if "cpu" in entry:
                runs.append(Run(str(path), entry))
                begun = True
            elif not begun:
                raise ReportError(f"{path}:{number}: the line that names the CPU is missing before this one")
            elif "isa" in entry:
                runs[-1].cases.append(entry)
    return runs


# ------------------------------------------------------------------------------------------------ table


def table(run: Run, peers: dict[str, Any] | None = None) -> str:
    """Markdown: a heading, a row a case, and where the peers' figures come from."""
    heads = ["case", "tokens", "ms", "10-90 %", "GB/s", "T op/s", "read GB/s", "tiles T op/s", "of the bound"]
    if peers:
        heads += [f"{peers['name']} ms", "times as fast"]
    rows = [_row(case, peers) for case in run.cases]
    about = run.about
    text = f"## {about['cpu']}, {about.get('threads', '?')} threads\n\n"
    if not run.cases:
        return text + "no case was measured\n"
    shapes = dict.fromkeys(_shape(c) for c in run.cases)
    text += f"torch {about.get('torch', '?')}; {'; '.join(shapes)}\n\n"
    text += "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows))
    return text + (f"\n{peers['name']}: {' '.join(peers['source'].split())}\n" if peers else "")


def _shape(case: dict[str, Any]) -> str:
    return "{experts} experts of {hidden} x {width}, top {top_k}".format_map({k: case.get(k, "?") for k in _SHAPE})


_SHAPE = ("hidden", "width", "top_k", "experts")


def _row(case: dict[str, Any], peers: dict[str, Any] | None) -> list[str]:
    name = f"{case['type']}, {case['isa']}" if "type" in case else case["isa"]
    spread = " - ".join(_number(ms) for ms in case.get("ms_10_90", ()))
    numbers = ("weights_gb_s", "tera_op_s", "read_ceiling_gb_s", "tile_ceiling_tera_op_s")
    cells = [
        name,
        str(case["tokens"]),
        _number(case.get("ms")),
        spread or "-",
        *(_number(case.get(n)) for n in numbers),
    ]
    if "error" in case:
        cells[2] = case["error"].replace("|", "/")
    bound = case.get("bound_ms")
    which = "tiles" if case.get("ratio_tiles", 0) > case.get("ratio_read", 0) else "reading"
    cells.append("-" if bound is None else f"{bound / case['ms']:.0%} {which}")
    if not peers:
        return cells
    same = all(case.get(k) == peers["shape"][k] for k in _SHAPE)
    theirs = peers["ms"].get(case.get("type"), {}).get(case["tokens"]) if same else None
    return [*cells, *(("-", "-") if theirs is None else (_number(theirs), f"{theirs / case['ms']:.2f}"))]


def _number(value: float | None) -> str:
    """Three digits; a dash for what was not measured or cannot be."""
    if not value:
        return "-"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def read_peers(path: Path) -> dict[str, Any]:
    """Peers' figures: name, source, shape, and milliseconds by type and tokens."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict) or not {"name", "source", "shape", "ms"} <= set(found):
        raise ReportError(f"{path}: wanted name, source, shape and ms, as in {PEERS.name}")
    return found


# ------------------------------------------------------------------------------------------------ plot


def plot(run: Run, path: Path) -> None:
    """A roofline as PNG: operations per byte of weights read and per second; two kinds of roofs, a marker a case."""
    draw(run).savefig(path, format="png")


def draw(run: Run) -> Any:
    """The plot as a matplotlib figure; the last texts of its axes are the labels of the markers."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError("--plot needs matplotlib: pip install 'ktcompile[bench]' (or matplotlib alone)") from error
    series: dict[str, list[tuple[float, float, int]]] = {}
    for case in run.cases:
        if case.get("weights_gb_s") and case.get("tera_op_s"):
            at = 1e3 * case["tera_op_s"] / case["weights_gb_s"], case["tera_op_s"], case["tokens"]
            series.setdefault(f"{case['type']}, {case['isa']}", []).append(at)
    if not series:
        raise ReportError(f"{run.file}: {run.about['cpu']} has no case to plot")
    points = [point for each in series.values() for point in each]
    rate, roofs = run.about["read_gb_s"] / 1e3, run.tile_roofs
    highest = max(roofs.values(), default=1.2 * max(y for _, y, _ in points))
    left = min(x for x, _, _ in points) / 1.8
    right = max(2 * max(x for x, _, _ in points), 6 * highest / rate)
    low = min(min(y for _, y, _ in points), left * rate) / 1.5

    figure = Figure(figsize=(10, 6.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log", xlim=(left, right), ylim=(low, 1.8 * highest))
    _frame(axes, f"Routed experts, {run.about['cpu']}, {run.about.get('threads', '?')} threads")
    roof = {"color": "#333333", "lw": 1.6, "zorder": 2}
    lines = axes.plot([left, highest / rate], [left * rate, highest], **roof)
    for isa, most in roofs.items():
        lines += axes.plot([most / rate, right], [most, most], **roof)
        name = f"{TILES[isa]} from the caches: {most:.3g} T op/s"
        axes.annotate(name, (right, most), (-6, 4), textcoords="offset points", ha="right", fontsize=9)
    for i, (name, each) in enumerate(series.items()):
        each.sort(key=lambda point: point[2])
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "label": name}
        xy = [x for x, _, _ in each], [y for _, y, _ in each]
        lines += axes.plot(*xy, ms=6, lw=1, mec="white", mew=0.7, zorder=3, **style)
    axes.legend(loc="upper left", frameon=False, title="type, instruction set; numbers are tokens", alignment="left")
    figure.canvas.draw()  # settles the layout: what follows is in pixels
    named = [(point, COLOURS[i % len(COLOURS)]) for i, each in enumerate(series.values()) for point in each]
    _label(axes, named, _name_slope(axes, highest / rate, rate), lines)
    return figure


def _frame(axes: Any, title: str) -> None:
    axes.set_xlabel("operations per byte of weights read")
    axes.set_ylabel("T op/s")
    axes.set_title(title, loc="left", fontsize=12)
    axes.grid(True, which="major", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")


Box = tuple[float, float, float, float]


def _name_slope(axes: Any, ridge: float, rate: float) -> list[Box]:
    """Writes along the slanted roof, left of where it ends, what it is; returns boxes that cover the text."""
    (ax, ay), (bx, by) = axes.transData.transform([(ridge / 30, ridge / 30 * rate), (ridge / 1.6, ridge / 1.6 * rate)])
    angle = math.atan2(by - ay, bx - ax)
    unit = axes.figure.dpi / 72
    at = bx - 5 * unit * math.sin(angle), by + 5 * unit * math.cos(angle)
    text = f"reading memory: {1e3 * rate:.3g} GB/s"
    drawn = axes.text(*at, text, transform=None, fontsize=9, rotation_mode="anchor", ha="right", va="bottom")
    size = drawn.get_window_extent(axes.figure.canvas.get_renderer())
    drawn.set_rotation(math.degrees(angle))
    steps = range(0, int(size.width), max(1, int(size.height / 2)))
    along = [(at[0] - s * math.cos(angle), at[1] - s * math.sin(angle)) for s in steps]
    return [(x - size.height, y, x, y + size.height) for x, y in along]


def _label(axes: Any, points: Sequence[tuple[tuple[float, float, int], str]], texts: list[Box], lines: Any) -> None:
    """The tokens beside each marker, at the nearest place that meets no marker, no text and, if possible, no line."""
    from matplotlib.patheffects import withStroke

    renderer, unit = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    at = axes.transData.transform([point[:2] for point, _ in points])
    legend = axes.get_legend().get_window_extent(renderer)
    others = [t.get_window_extent(renderer).extents for t in axes.texts if not t.get_rotation()]
    taken = [
        *texts,
        legend.extents,
        *others,
        *((x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit) for x, y in at),
    ]
    crossed = [box for line in lines for box in _along(axes.transData.transform(line.get_xydata()), unit)]
    frame = axes.bbox.extents
    for (x, y), ((_, _, tokens), colour) in zip(at, points, strict=True):
        text = axes.text(
            x, y, str(tokens), color=colour, fontsize=8, transform=None, ha="center", va="center", zorder=4
        )
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        size = text.get_window_extent(renderer)
        w, h = size.width / 2, 0.4 * size.height  # digits are lower than a line of text
        places = [(x + dx, y + dy) for dx, dy in _around(w + 4.5 * unit, h + 4.5 * unit)]
        boxes = [(px - w - unit, py - h, px + w + unit, py + h) for px, py in places]
        inside = [i for i, b in enumerate(boxes) if b[0] > frame[0] and b[1] > frame[1] and b[2] < frame[2]]
        free = [i for i in inside if not any(_meet(boxes[i], other) for other in taken)] or [0]
        best = next((i for i in free if not any(_meet(boxes[i], other) for other in crossed)), free[0])
        taken.append(boxes[best])
        text.set_position(places[best])


def _along(corners: Any, unit: float) -> Iterator[Box]:
    """Small boxes along a line through `corners`, in pixels."""
    for (ax, ay), (bx, by) in pairwise(corners):
        steps = max(1, int(math.hypot(bx - ax, by - ay) / (3 * unit)))
        for i in range(steps + 1):
            x, y = ax + (bx - ax) * i / steps, ay + (by - ay) * i / steps
            yield x - unit / 2, y - unit / 2, x + unit / 2, y + unit / 2


def _around(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Places around a point: below, above, right, left and between these, then farther."""
    for far in (1.0, 1.3, 1.7, 2.2, 2.8, 3.5):
        for turn in (270, 90, 0, 180, 315, 225, 45, 135, 292, 247, 67, 112):
            yield far * width * math.cos(math.radians(turn)), far * height * math.sin(math.radians(turn))


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="what bench_moe.py wrote")
    parser.add_argument(
        "--peers", nargs="?", type=Path, const=PEERS, help=f"beside others' figures: {PEERS.name}, or a file"
    )
    parser.add_argument("--plot", type=Path, help="a PNG; of several runs NAME-2.png and so on")
    options = parser.parse_args()
    try:
        peers = read_peers(options.peers) if options.peers else None
        runs = read(options.files)
        sys.stdout.write("\n".join(table(run, peers) for run in runs))
        for i, run in enumerate(runs, 1):
            if options.plot:
                plot(run, options.plot if i == 1 else options.plot.with_stem(f"{options.plot.stem}-{i}"))
    except (ReportError, OSError) as error:
        parser.exit(2, f"report.py: {error}\n")


if __name__ == "__main__":
    main()
