"""benchmarks/bench_model.py: a tiny model at three numbers of layers, and the line through them."""

import importlib
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = {"hidden": 256, "heads": 4, "experts": 8, "used": 2, "width": 256, "vocabulary": 6200, "layers": 10}
LATENT = {"q_lora": 256, "kv_lora": 256, "rope": 32, "nope": 32, "value": 32, "dense": 512, "groups": 1}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    synthetic, module = importlib.import_module("synthetic"), importlib.import_module("bench_model")
    monkeypatch.setattr(synthetic, "_STEP_BYTES", 1 << 20)
    tiny = replace(synthetic.SHAPES["v3"], **TINY, **LATENT, groups_used=1, name="Tiny", context=256)
    monkeypatch.setitem(synthetic.SHAPES, "tiny", tiny)
    return module


def run(bench, capsys, *args):
    code = bench.main(["--model", "tiny", *map(str, args)])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_three_numbers_of_layers_and_the_line(bench, monkeypatch, tmp_path, capsys):
    loaded, real = [], bench.ktcompile.load

    def load(*args, **kwargs):
        model = real(*args, **kwargs)
        loaded.append(weakref.ref(model.store))
        return model

    monkeypatch.setattr(bench.ktcompile, "load", load, raising=False)
    code, lines = run(
        bench, capsys, "--layers", "3,1,2", "--out", tmp_path, "-p", "32", "-n", "4", "--runs", 2, "--cpu-threads", 1
    )
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    assert len(loaded) == 3 and not any(store() for store in loaded)  # what one held is free for the next
    models = [line for line in lines if line["step"] == "model"]
    assert [m["n"] for m in models] == [1, 2, 3]
    for m in models:
        assert m["load_s"] > 0 and m["weights_gb"]["cpu"] > 0 and m["rss_gb"] > 0 and m["max_allocated_gb"] == {}
        assert set(m["tests"]) == {"pp32", "tg4"}
        for test in m["tests"].values():
            low, high = test["step_s_10_90"]
            assert 0 < low <= test["step_s"] <= high and test["tok_s"] > 0
    assert models[0]["weights_gb"]["cpu"] < models[2]["weights_gb"]["cpu"]
    fit = lines[-1]
    assert fit["step"] == "fit" and fit["measured"] == [1, 2, 3]
    assert (fit["moe_layers"], fit["dense_layers"]) == (10, 1)
    for name in ("pp32", "tg4"):
        found = fit["tests"][name]
        assert found["step_s"] == pytest.approx(found["a_s"] + 10 * found["b_s"])
        assert found["step_s_se"] >= 0 and found["r2"] <= 1


def test_what_there_is_no_room_or_time_for_is_told(bench, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(bench.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
        code, lines = run(bench, capsys, "--layers", "1,2,3", "--out", tmp_path, "-p", "32")
    assert code == 1
    assert [line["step"] for line in lines] == ["about", "skip", "skip", "skip", "fit"]
    assert "GB left" in lines[1]["why"] and "three" in lines[-1]["why"]
    _, lines = run(bench, capsys, "--layers", "1,2,3", "--out", tmp_path, "-p", "32", "--seconds", "0")
    assert "--seconds is 0" in lines[1]["why"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--layers", "0,1"), "--layers '0,1': '0' is not"),
        (("-p", "512"), "-p 512: pp512 comes to 512 tokens; the context holds 256"),
        (("--vram", "24X"), "24X"),
    ],
)
def test_a_mistake_names_option_and_value(bench, args, words):
    with pytest.raises(SystemExit, match="bench_model: ") as told:
        bench.main(["--model", "tiny", "--out", "/tmp", *args])
    assert words in str(told.value)


def test_the_line(bench):
    line = bench.fit([1, 2, 4], [3.0, 5.0, 9.0])
    assert (line.a, line.b, line.r2) == pytest.approx((1, 2, 1))
    assert line.at(58) == pytest.approx((117, 0))
    noisy = bench.fit([1, 2, 3], [3.0, 5.3, 7.0])  # residuals -0.1, 0.2, -0.1
    assert (noisy.a, noisy.b, noisy.se) == pytest.approx((1.1, 2.0, 0.06**0.5))
    assert noisy.at(2)[1] == pytest.approx((0.06 / 3) ** 0.5)
    assert noisy.r2 == pytest.approx(1 - 0.06 / 8.06)
    told = bench.extrapolated(bench.Test("pp", 1024), line, 58, 512)
    assert told["tok_s"] == pytest.approx(512 / 117)
