"""benchmarks/report.py: the table, the plot, and what it says of files that are none of bench_moe.py's."""

import importlib.util
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "report.py"
SHAPE = {"hidden": 7168, "width": 2048, "top_k": 8, "experts": 256, "threads": 16}
ABOUT = {
    "cpu": "A Processor",
    "threads": 16,
    "torch": "2.13.0",
    "read_gb_s": 100.0,
    "amx_tera_op_s_by_order": {"0": 8.0, "4": 10.0, "5": 14.0},
    "amx_int8_tera_op_s_by_order": {"0": 16.0, "4": 20.0, "5": 28.0},
}


@pytest.fixture
def report(monkeypatch):
    spec = importlib.util.spec_from_file_location("report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "report", module)
    spec.loader.exec_module(module)
    return module


def case(isa: str, type: str, tokens: int, bits: float, share: float) -> dict[str, object]:
    """A case that reaches `share` of its bound."""
    used = 256 * (1 - (1 - 8 / 256) ** tokens)
    nbytes, operations = used * 3 * 7168 * 2048 * bits / 8, 6 * tokens * 8 * 7168 * 2048
    tiles = 20.0 if isa == "amx_int8" else 10.0
    read_ms, tiles_ms = nbytes / 1e8, operations / tiles / 1e9
    ms = max(read_ms, tiles_ms) / share
    return {
        "isa": isa,
        "type": type,
        "tokens": tokens,
        "ms": round(ms, 3),
        "ms_10_90": [round(0.98 * ms, 3), round(1.05 * ms, 3)],
        "calls": 9,
        "weights_gb_s": round(nbytes / ms / 1e6, 1),
        "tera_op_s": round(operations / ms / 1e9, 3),
        "read_ceiling_gb_s": 100.0,
        "tile_ceiling_tera_op_s": tiles,
        "ratio_read": round(read_ms / ms, 3),
        "ratio_tiles": round(tiles_ms / ms, 3),
        "bound_ms": round(max(read_ms, tiles_ms), 3),
        **SHAPE,
    }


KINDS = (
    ("amx", "q4_k", 4.5, 0.9),
    ("amx_int8", "int8_row", 8, 0.7),
    ("amx", "bf16", 16, 0.6),
    ("amx", "fp8_block128", 8, 0.7),
)


def write(path: Path, *entries: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def two_runs(tmp_path: Path) -> list[Path]:
    few = [case(isa, type, tokens, bits, share) for isa, type, bits, share in KINDS for tokens in (1, 256, 4096)]
    torch = [
        {"isa": "torch bf16", "tokens": 16, "ms": 950.123, "tera_op_s": 0.011, **SHAPE},
        {"isa": "torch grouped_mm bf16", "tokens": 16, "error": "no such op | here", **SHAPE},
    ]
    scalar = {"cpu": "Another", "threads": 2, "torch": "2.13.0", "read_gb_s": 20.0, "amx_tera_op_s_by_order": {}}
    slow = case("avx2", "q4_k", 1, 4.5, 0.5) | {"tile_ceiling_tera_op_s": 0.0, "ratio_tiles": 0.0, "experts": 8}
    pack = {"pack": "q4_k to q4_k", "source_gb_s": 3.1, "seconds": 0.5}
    return [write(tmp_path / "a.jsonl", ABOUT, *few, *torch, pack), write(tmp_path / "b.jsonl", scalar, slow)]


def test_the_table(report, tmp_path, golden):
    peers = report.read_peers(report.PEERS)
    golden("table", "\n".join(report.table(run, peers) for run in report.read(two_runs(tmp_path))))
    assert "KTransformers" not in report.table(report.read(two_runs(tmp_path))[0])


def test_the_command_writes_a_table_and_a_png_a_run(tmp_path):
    plot = tmp_path / "roofline.png"
    command = [sys.executable, SCRIPT, *two_runs(tmp_path), "--peers", "--plot", plot]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| --- |") == 2
    for path in (plot, tmp_path / "roofline-2.png"):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and data[-8:-4] == b"IEND" and len(data) > 20_000


def test_labels_of_the_typical_set_meet_nothing(report, tmp_path):
    """Neither each other, nor the names of the roofs, nor the legend, nor the frame."""
    tokens = (1, 4, 16, 64, 256, 1024, 4096)
    cases = [case(isa, type, n, bits, share) for isa, type, bits, share in KINDS for n in tokens]
    figure = report.draw(report.read([write(tmp_path / "a.jsonl", ABOUT, *cases)])[0])
    (axes,), renderer = figure.axes, figure.canvas.get_renderer()
    labels = [text for text in axes.texts if text.get_text().isdigit()]
    assert len(labels) == len(cases)
    others = [t for t in axes.texts if t not in labels and not t.get_rotation()]
    assert len(others) == 2, "a name for each roof of tiles"

    def ink(text):  # a line of text is higher than its digits
        box = text.get_window_extent(renderer)
        return box.x0, box.y0 + 0.1 * box.height, box.x1, box.y1 - 0.1 * box.height

    for a, b in combinations([*labels, *others], 2):
        assert not report._meet(ink(a), ink(b)), (a, b)
    legend = axes.get_legend().get_window_extent(renderer).extents
    for label in labels:
        box = ink(label)
        assert not report._meet(box, legend), label
        assert box[0] > axes.bbox.x0 and box[1] > axes.bbox.y0 and box[2] < axes.bbox.x1, label


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json\n", ":1: not JSON"),
        ("[1]\n", ":1: '[1]' is no line of bench_moe.py"),
        ('{"isa": "amx"}\n', ":1: the line that names the CPU is missing"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, words):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    done = subprocess.run([sys.executable, SCRIPT, path], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"report.py: {path}{words}") and done.stderr.count("\n") == 1


def test_without_matplotlib_it_says_how_to_get_it(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(report.ReportError, match=r"pip install 'ktcompile\[bench\]'"):
        report.plot(report.read(two_runs(tmp_path))[0], tmp_path / "x.png")


def test_nothing_to_plot(report, tmp_path):
    with pytest.raises(report.ReportError, match="A Processor has no case to plot"):
        report.plot(report.read([write(tmp_path / "a.jsonl", ABOUT)])[0], tmp_path / "x.png")
