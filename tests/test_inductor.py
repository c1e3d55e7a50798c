"""Regions through Inductor compute what their captured code does, are compiled once, and write nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import GPU, captured, rewritten
from test_triton_mla import DEVICE
from torch import fx

from ktcompile import Call, Packed, Target, load, regions
from ktcompile.backends.inductor import Inductor
from ktcompile.kernel import available, refusal
from ktcompile.passes.fold import Fold
from ktcompile.passes.place import Place
from ktcompile.target import detect


def test_what_it_refuses() -> None:
    kernel = Inductor()
    assert type(available()["inductor"]) is Inductor
    gm = rewritten(captured("deepseek_v3"), GPU, Fold(), Place())[0]
    by_op = {r.op: r for r in regions(gm)}
    assert refusal(kernel, by_op["mla"], GPU) == (
        "it changes one of its inputs in place, which Inductor would do to a copy"
    )
    assert refusal(kernel, by_op["glue"], GPU) is None
    on_cpu = rewritten(captured("deepseek_v3"), Target((GPU.host,)), Fold(), Place())[0]
    glue = next(r for r in regions(on_cpu, op="glue"))
    assert refusal(kernel, glue, GPU) == "runs on cuda, the region is on cpu"


def test_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[fx.GraphModule] = []

    def compile(body: Any, **options: Any) -> Any:
        assert options == {"fullgraph": True}
        made.append(body)
        return body

    monkeypatch.setattr(torch, "compile", compile)
    graph = fx.Graph()
    graph.output(graph.call_function(torch.add, (graph.placeholder("x"), graph.placeholder("w"))))
    body = fx.GraphModule(torch.nn.Module(), graph)
    kernel, call = Inductor(), Call("layers.0.sum", "glue", None, body, ("w",))
    for _ in range(2):
        assert kernel(Packed("plain", {"w": torch.ones(2)}), call, torch.ones(2)).tolist() == [2, 2]
    assert made == [body]


@pytest.mark.skipif(DEVICE != "cuda", reason="Inductor is used on a GPU, and there is none")
def test_a_whole_model(tmp_path: Any) -> None:
    rules = tmp_path / "rules.yaml"
    lists = "choose-kernels: {other: [inductor, encoded, reference]}"
    rules.write_text(f"extends: deepseek-v3\npipeline:\n  - {lists}\n")
    found = []
    for given in (rules, None):
        model: Any = load(target=detect(), dtype="bf16", context=64, rules=given)
        assert ("inductor" in {r.kernel for r in model.plans["decode"].rows}) == (given is not None)
        cache = model.new_cache(1)
        ids = torch.arange(20, 30)
        logits = [model.step(ids, torch.arange(10), [10], torch.arange(10), cache)]
        for i in (10, 11):
            logits.append(model.step(torch.tensor([7 + i]), torch.tensor([i]), [1], torch.tensor([0]), cache))
        assert model.graphs == {1: ""}
        found.append(torch.cat(logits).float().cpu())
    off = (found[0] - found[1]).norm(dim=-1) / found[1].norm(dim=-1)
    assert float(off.median()) <= 1e-2
