"""`ktrans tune`: what follows from measured times, the file it writes, and where it declines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native.report import ran

from ktcompile.backends import native, tune
from ktcompile.backends.tile_tokens import shipped, tile_tokens, user_file

TILES = [isa for isa in shipped() if native.isas()[isa] is None]
TINY = tune.Effort(hidden=256, width=256, weight_bytes=8 << 20, runs=1, tokens=(2, 8, 32))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def crossing(streamed: list[float], tiled: list[float]) -> tune.Crossing:
    tokens = (2, 4, 8, 16, 32)
    ways = (dict(zip(tokens, times, strict=True)) for times in (streamed, tiled))
    return tune.Crossing("amx", "q4_k", *ways)


@pytest.mark.parametrize(
    ("streamed", "tiled", "expected"),
    [
        ([1, 2, 4, 8, 16], [5, 5, 5, 5, 5], 16),
        ([9, 9, 9, 9, 16], [5, 5, 5, 5, 5], 2),
        ([1, 2, 3, 4, 5], [9, 9, 9, 9, 9], 0),
        ([1, 2, 4, 8, 16], [5, 1.9, 5, 5, 5], 16),  # one disturbed measurement is not believed
        ([1, 2, 4, 4.9, 16], [5, 5, 3, 5, 5], 8),
    ],
)
def test_the_count_that_costs_least(streamed, tiled, expected):
    assert crossing(streamed, tiled).tile_tokens == expected


@given(first=st.sampled_from((2, 4, 8, 16, 32, 64)), factor=st.floats(1.01, 100))
def test_where_times_are_clean_it_is_the_first_count_at_which_tiles_are_faster(first, factor):
    tokens = (2, 4, 8, 16, 32)
    found = crossing([1.0] * 5, [1 / factor if n >= first else factor for n in tokens])
    assert found.tile_tokens == (first if first in tokens else 0)


def test_tune_measures_here_and_the_next_load_uses_it(ktrans, monkeypatch):
    """Where tiles run; elsewhere the same command is what the next test is about, and the summary says so."""
    monkeypatch.setattr(tune, "QUICK", TINY)
    code, out, err = ktrans("tune", "--quick", "--types", "q4_k,int8_row", "--threads", "1")
    if not TILES:
        for isa in shipped():
            ran(isa, native.isas()[isa] or "native")
        assert code == 2 and "nothing to tune" in err and not user_file().exists()
        return
    assert code == 0, err
    assert f"wrote {user_file()}" in err
    pairs = [(i, t) for i in TILES for t in ("q4_k", "int8_row") if native.refuses(i, [t]) is None]
    for (isa, type), line in zip(pairs, out.splitlines()[2:], strict=True):
        count = tile_tokens(isa, (type,) * 3)
        assert line.split()[:3] == [isa, type, str(count or "never")]
        assert count in (0, *TINY.tokens)
    head, about, *entries = user_file().read_text().splitlines()
    assert head.startswith("# Experts with so many tokens")
    assert about.endswith(": ktrans tune --types q4_k,int8_row --threads 1 --quick")
    assert [e for e in entries if e.startswith("  ")] == [
        f"  {type}: {tile_tokens(isa, (type,) * 3)}" for isa, type in pairs
    ]


def test_without_tiles_it_says_so_and_writes_nothing(ktrans, monkeypatch):
    missing = dict.fromkeys(native.isas(), "the CPU has no amx_tile")
    monkeypatch.setattr(native, "isas", lambda: missing)
    code, out, err = ktrans("tune", "--quick")
    assert code == 2 and not out and not user_file().exists()
    assert err == (
        "ktrans: nothing to tune: no instruction set with tiles runs here (amx: the CPU has no amx_tile; "
        "amx_int8: the CPU has no amx_tile). Experts are streamed\n"
    )


@pytest.mark.parametrize("name", ["q9", "f32", ""])
def test_a_type_that_no_tiles_take(ktrans, monkeypatch, name):
    monkeypatch.setattr(native, "isas", lambda: dict.fromkeys(native.FAMILY))
    code, _, err = ktrans("tune", "--types", f"q4_k,{name}")
    assert code == 2 and not user_file().exists()
    assert f"no tiles for weights of type '{name}'; amx and amx_int8 take bf16, q8_0" in err


def test_experts_that_do_not_fit_the_memory(ktrans, monkeypatch):
    monkeypatch.setattr(native, "isas", lambda: dict.fromkeys(native.FAMILY))
    monkeypatch.setattr(tune, "memory", lambda: 1 << 30)
    code, _, err = ktrans("tune", "--types", "bf16", "--threads", "1")
    assert code == 2 and not user_file().exists()
    assert "16 experts of bf16 are 1.3 GiB, more than a quarter of this machine's 1.0 GiB; --quick takes" in err


def test_a_folder_that_cannot_be_written(ktrans, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tune, "_pairs", lambda types: [])
    code, _, err = ktrans("tune")
    assert code == 2 and "cannot write" in err and "XDG_CACHE_HOME" in err
