"""`ktrans bench`: its page, its files, its mistakes; small real runs on the CPU and on a GPU that is the CPU."""

import json
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from test_simulated_gpu import gpu, without_planes

from ktcompile import Device, RulesError, Target, bench, cli
from ktcompile.profile import Event, Profile, covered
from ktcompile.report import Report
from ktcompile.timeline import chrome_trace, timeline

TARGET = Target(
    (Device("cuda:0", "cuda", 24 << 30, 1e12), Device("cpu", "cpu", 512 << 30, 250e9, threads=15)), about="imagined"
)
EVENTS = (
    Event("L0.attn", "mla", "cuda:0", "triton_planes", 0.0, 1e-3, 100_000_000),
    Event("L0.attn -> cpu", "copy", "cpu", "", 1e-3, 2e-5, 14_336),
    Event("L0.experts", "moe", "cpu", "amx_int8", 1.1e-3, 4e-3, 800_000_000),
    Event("L0.experts -> cuda:0", "copy", "cuda:0", "", 5.2e-3, 1e-5, 14_336),
    Event("lm<head>", "linear", "cuda:0", "triton_linear", 5.3e-3, 5e-4, 400_000_000),
)
DECODE = Profile("decode", 1, 4096, 5.6e-3, {"cuda:0": 70_000_000}, EVENTS, gpu_s=1.2e-3, has_gpu=True)
PREFILL = Profile("prefill", 512, 0, 0.25, {}, EVENTS[:3], has_gpu=True)
REPORT = Report(
    "Imagined <model>",
    TARGET,
    4352,
    "bfloat16",
    512,
    (
        bench.Row(bench.Test("pp", 512), (0.25, 0.26, 0.24), (0.25, 0.26, 0.24)),
        bench.Row(bench.Test("tg", 4, 4096), (0.02, 0.03), (4e-3, 5e-3, 5e-3, 6e-3, 7e-3, 7e-3, 7e-3, 9e-3)),
        bench.Row(bench.Test("tg", 4, 0, 4), (0.04,), (0.01,) * 4),
    ),
    (DECODE, PREFILL),
    ("6 of 8 experts a token, ranked by choice",),
    ("decode steps of 4 tokens are no CUDA graph: of a reason",),
    "0.1.0",
)


def test_the_page(golden):
    golden("report", REPORT.text())


def test_json_is_stable(golden):
    golden("json", "".join(f"{key}: {json.dumps(value)}\n" for key, value in REPORT.json().items()))


def test_a_trace_has_a_process_a_step_and_a_track_a_device():
    events = json.loads(json.dumps(chrome_trace(REPORT.profiles)))["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(names.values()) == ["cuda:0", "cpu", "cuda:0", "cpu"]
    regions = [e for e in events if e["ph"] == "X"]
    assert len(regions) == len(EVENTS) + 3
    assert all((e["pid"], e["tid"]) in names and e["dur"] > 0 for e in regions)
    for pid in (1, 2):  # serialised: one ends before the next begins
        spans = [(e["ts"], e["ts"] + e["dur"]) for e in regions if e["pid"] == pid]
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


class _Page(HTMLParser):
    """Tags that are open, bars with what they tell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.bars: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)
        if tag == "i" and "title" in dict(attrs):
            self.bars.append(dict(attrs)["title"])

    def handle_endtag(self, tag):
        while self.open.pop() != tag:  # a <p> may stay open
            continue


def test_the_timeline_is_one_page_with_a_bar_a_region():
    text = timeline(DECODE, REPORT.model)
    page = _Page(text)
    assert page.open == []
    assert page.bars[0] == "L0.attn, mla, triton_planes, 1000 µs, 100.00 MB"
    assert len(page.bars) == len(EVENTS) and any("lm<head>" in bar for bar in page.bars)
    assert "<model>" not in text and "http" not in text and "<script" not in text


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("text", "found"), [("512,2048", [512, 2048]), (" 4 , 1,4", [4, 1]), ("0", [0])])
def test_numbers(text, found):
    assert bench.numbers(text, "-p", 0) == found


@pytest.mark.parametrize("text", ["", "1,", "x", "-1", "1.5", "1e3", "²", "٣", "99999999999"])
def test_what_are_no_numbers(text):
    with pytest.raises(RulesError) as told:
        bench.numbers(text, "-d", 0)
    assert str(told.value).startswith(f"-d {text!r}: ")


def names(*args):
    return [t.name for t in bench.tests_for(*args)]


def test_rows_fit_the_context():
    assert names(None, None, [0], [1], 4096) == ["pp512", "pp2048", "tg64"]
    assert names(None, None, [0], [1], 1024) == ["pp512", "tg64"]
    assert names(None, None, [0], [1], 40) == ["pp40", "tg40"]
    assert names([128], [8], [0, 4096], [1, 4], 8192) == [
        "pp128", "tg8", "tg8 @ d4096", "tg8 x 4", "tg8 x 4 @ d4096"
    ]  # fmt: skip
    assert names([0], [8], [0], [1], 8) == ["tg8"]
    for args in (([0], [0], [0], [1], 64), ([65], None, [0], [1], 64), (None, [8], [60], [1], 64)):
        with pytest.raises(RulesError, match=r"-p|-n"):
            names(*args)
    found = bench.tests_for(None, None, [0], [1], 1000)
    assert bench.context_for(found, 1000) == 512
    assert bench.context_for(bench.tests_for([900], [0], [0], [1], 1000), 1000) == 1000


def test_what_is_neither_region_nor_copy():
    """Alone on the CPU, the rest of the step; with a GPU, what neither it nor the CPU takes, if that is known."""
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert DECODE.other_s == pytest.approx(5.6e-3 - 1.2e-3 - 4e-3)
    assert PREFILL.other_s is None
    alone = Profile("decode", 1, 0, 5e-3, {}, EVENTS[2:3])
    assert alone.other_s == pytest.approx(1e-3)
    assert Profile("decode", 1, 0, 3e-3, {}, EVENTS[2:3]).other_s is None


# ------------------------------------------------------------------------------------------------ real runs


def test_the_embedded_model(ktrans, tmp_path):
    files = {name: tmp_path / "new" / name for name in ("b.json", "t.json", "t.html")}
    args = ("-p", "20", "-n", "3", "-d", "0,16", "-b", "1,2", "-r", "2", "--chunk-size", "8", "--cpu-threads", "1")
    code, out, err = ktrans(
        "bench", *args, "--json", files["b.json"], "--trace", files["t.json"], "--timeline", files["t.html"]
    )
    assert code == 0, err
    rows = ["pp20", "tg3", "tg3 @ d16", "tg3 x 2", "tg3 x 2 @ d16"]
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith(("pp", "tg"))] == rows
    assert "prefill in steps of 8" in out and "a decode step of 1 token after 0" in out
    assert "loaded in" in err and all(str(f) in err for f in files.values())
    told = json.loads(files["b.json"].read_text())
    assert [r["test"] for r in told["rows"]] == rows and told["context"] == 256
    for r in told["rows"]:
        assert len(r["seconds"]) == 2 and all(s > 0 for s in r["seconds"])
        assert r["tok_s_mean"] > 0 and 0 < r["step_s_10_90"][0] <= r["step_s_median"] <= r["step_s_10_90"][1]
    decode, prefill = told["profiles"]["decode"], told["profiles"]["prefill"]
    assert (decode["tokens"], prefill["tokens"]) == (1, 8)
    for p in (decode, prefill):
        by_op = {s["op"]: s for s in p["shares"]}
        assert by_op["moe"]["regions"] == 5 and by_op["mla"]["regions"] == 6
        assert sum(s["share"] for s in p["shares"]) == pytest.approx(1)
    moe = {name: next(s for s in p["shares"] if s["op"] == "moe") for name, p in told["profiles"].items()}
    assert 0 < moe["decode"]["nbytes"] < moe["prefill"]["nbytes"]  # more tokens choose more experts
    assert len(_Page(files["t.html"].read_text()).bars) == sum(s["regions"] for s in decode["shares"])
    assert json.loads(files["t.json"].read_text())["traceEvents"]


def test_on_a_simulated_gpu(ktrans, monkeypatch, tmp_path):
    """Copies are told, devices are apart, and what the profiler cannot see is not claimed."""
    monkeypatch.setattr(cli, "_machine", lambda *_: gpu(32 << 20))
    file = tmp_path / "b.json"
    args = ("-p", "4", "-n", "2", "-r", "1", "--dtype", "fp32", "--context", "64", "--rules", without_planes(tmp_path))
    code, out, err = ktrans("bench", *args, "--json", file)
    assert code == 0, err
    assert "# memory: cpu:1 1000 GB/s, cpu " in out
    told = json.loads(file.read_text())
    assert told["context"] == 64
    shares = {(s["op"], s["device"]): s for s in told["profiles"]["decode"]["shares"]}
    assert shares["moe", "cpu"]["regions"] == 5 and shares["mla", "cpu:1"]["regions"] == 6
    assert shares["copy", "cpu:1"]["regions"] > 4 and shares["copy", "cpu"]["nbytes"] > 0
    assert all(s["of_bandwidth"] is None for (op, _), s in shares.items() if op == "copy")
    assert told["profiles"]["decode"]["step"]["gpu_busy_seconds"] is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("-p", "12x"), ("-p '12x'", "whole number")),
        (("-n", "-3"), ("-n '-3'", "from 0 up")),
        (("-d", "1,,2"), ("-d '1,,2'",)),
        (("-b", "0"), ("-b '0'", "from 1 up")),
        (("-p", ""), ("-p ''",)),
        (("-p", "0", "-n", "0"), ("-p 0", "-n 0")),
        (("-p", "5000"), ("-p 5000", "1024")),
        (("-n", "64", "-d", "1000"), ("-n 64", "-d 1000", "1024")),
        (("-p", "100", "--context", "64"), ("-p 100", "64")),
        (("--context", "0"), ("context 0", "1024")),
        (("--dtype", "fp23"), ("fp23",)),
        (("--rules", "bse"), ("did you mean 'base'",)),
        (("-r", "0"), ("--repetitions",)),
        (("--chunk-size", "0"), ("--chunk-size",)),
        (("--json", "/dev/null/x.json"), ("--json '/dev/null/x.json'",)),
        (("--trace", "/"), ("--trace '/'",)),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(ktrans, args, words):
    code, out, err = ktrans("bench", *args)
    assert (code, out) == (2, "")
    assert "loading" not in err
    for word in words:
        assert word in err.splitlines()[-1]
