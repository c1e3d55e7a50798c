"""benchmarks/bench_serve.py: what it asks is the same for every server, and what it says follows from what it saw."""

import asyncio
import sys
from itertools import count
from pathlib import Path

import pytest
from matplotlib import image
from served import KEY, Served

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import bench_serve
from bench_serve import Asked, Load, arrivals, body, percentiles, plot, row, table, together


def test_prompts_repeat_and_share_no_beginning() -> None:
    bodies = [body(i) for i in range(100)]
    assert bodies == [body(i) for i in range(100)]
    prompts = [b["messages"][0]["content"].split() for b in bodies]
    assert len({words[0] for words in prompts}) == 100
    assert {len(words) - 10 for words in prompts} == set(bench_serve.PROMPTS) and {
        b["max_tokens"] for b in bodies
    } == set(bench_serve.ANSWERS)


def test_percentiles() -> None:
    assert percentiles([i / 1000 for i in range(101)]) == pytest.approx((50, 95, 99))
    assert percentiles([0.25]) == (250, 250, 250) and percentiles([]) == (0, 0, 0)


def asked(first: float, gap: float) -> Asked:
    """A request due at 5 whose ten pieces are twenty tokens."""
    return Asked(5.0, tuple(5.0 + first + i * gap for i in range(10)), 20)


ROWS = [
    row(server, load, users, rate, [asked(0.1 * k * users, 0.01 * k)] * users, 5.0, 5.0 + 2 * k)
    for k, server in enumerate(bench_serve.SERVERS, 1)
    for load, rate in (("together", 0.0), ("arrivals", 1.5))
    for users in (1, 8)
]


def test_a_row_is_what_was_seen() -> None:
    times = pytest.approx((800, 800, 800)), pytest.approx((10, 10, 10))
    assert ROWS[1] == Load("together", "together", 8, 0.0, 8, 2.0, 80.0, *times)
    cut = row("a", "together", 1, 0.0, [asked(0.5, 0.1)], 5.0, 5.86)  # four of the ten pieces came in time
    assert cut.tok_s == pytest.approx(8 / 0.86)


def test_table_and_plot(tmp_path: Path) -> None:
    lines = table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert lines[3] == "| together | 8 users | 8 | 80 | 800, 800, 800 | 10.0, 10.0, 10.0 |"
    assert lines[4].startswith("| together | 1.50 requests/s | 1 | 10 |")
    plot(ROWS, tmp_path / "plot.png")
    assert image.imread(tmp_path / "plot.png").shape[:2] == (396, 990)


def test_both_loads_over_http(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_serve, "PROMPTS", (16,))
    numbers = count()
    done, start, end = asyncio.run(together(served.base, 3, 0.1, numbers, KEY))
    assert len(done) >= 3 and all(a.first > 0 and 0 < a.tokens <= 128 and len(a.gaps) < a.tokens for a in done)
    assert end - start == pytest.approx(0.1)
    assert served.idle()  # the engine has counted its last step
    assert served.state.engine.statistics.said >= sum(a.tokens for a in done) > 0
    again = [asyncio.run(arrivals(served.base, 10.0, 0.5, numbers, KEY))[0] for _ in range(2)]
    assert len(again[0]) == len(again[1]) > 0  # the same times for every server
    assert all(a.first > 0 for done in again for a in done)
    assert served.idle()
