"""Plan: text, difference, JSON and HTML of a two-layer model and of the embedded one."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import models
import pytest
from conftest import Golden

from ktcompile.checkpoint import open_checkpoint
from ktcompile.model import explain, settings_for
from ktcompile.plan import JSON_VERSION, Plan, Row, group_notes, html_page, spans
from ktcompile.target import fake


@pytest.fixture(scope="module")
def tiny() -> list[Plan]:
    """The plans after each pass of a two-layer model with a GPU."""
    return models.plan("deepseek_v3_tied", models.GPU, *models.placed({"*.experts": "cpu", "*": "gpu"}), every=True)


@pytest.fixture(scope="module")
def embedded() -> list[Plan]:
    checkpoint = open_checkpoint()
    return explain(checkpoint, settings_for(checkpoint, target=fake("24G", "512G")))


# ------------------------------------------------------------------------------------------------ text


def test_text(tiny: list[Plan], golden: Golden) -> None:
    golden("text", tiny[-1].text())


def test_layers_folded(embedded: list[Plan]) -> None:
    """Equal layers are one line, and the page of a whole model is one page."""
    text = embedded[-1].text()
    lines = text.splitlines()
    assert "L3-L4 as L1" in lines
    assert "L5 as L2" in lines
    assert len(lines) <= 60
    shown = {m[1] for line in lines if (m := re.match(r"(L\d+)\.", line))}
    assert shown == {"L0", "L1", "L2"}


def test_every_row_is_told(embedded: list[Plan]) -> None:
    """A line of the page, or a layer that a line says is as another, for every row; widths agree."""
    lines = embedded[-1].text().splitlines()
    named = {line.split()[0] for line in lines if line and not line.startswith("#")}
    for row in embedded[-1].rows:
        if not row.name.startswith(("L3.", "L4.", "L5.")):
            assert row.name in named
    assert not any(line != line.rstrip() for line in lines)


def test_totals(embedded: list[Plan]) -> None:
    """Bytes of the rows add up to those of the devices; what is copied is the sum of the copies."""
    plan = embedded[-1]
    for use in plan.uses:
        assert sum(r.nbytes for r in plan.rows if r.device == use.device) == use.weights
        assert sum(r.device == use.device and r.op != "copy" for r in plan.rows) == use.regions
        assert use.weights + use.cache <= use.capacity
    assert sum(r.nbytes for r in plan.rows if r.op == "copy") == plan.copied_bytes > 0
    times = [(r.device, r.us or 0.0) for r in plan.rows]
    least = max(sum(us for device, us in times if device == d) for d, _ in times)
    assert least <= (plan.us or 0.0) <= sum(us for _, us in times)


def test_what_runs_at_the_same_time(embedded: list[Plan]) -> None:
    """A device has one row at a time; a row waits for what it reads, of several results for the last."""
    like = next(r for r in embedded[-1].rows if r.op == "moe")

    def time(*rows: tuple[str, str, float, str]) -> float | None:
        made = (replace(like, name=n, device=d, us=us, reads=tuple(reads.split())) for n, d, us, reads in rows)
        return replace(embedded[-1], rows=tuple(made)).us

    assert time(("a", "cpu", 3, ""), ("b", "cuda:0", 5, ""), ("c", "cuda:0", 1, "a b")) == 6
    assert time(("a", "cpu", 3, ""), ("b", "cuda:0", 5, "a"), ("c", "cpu", 4, "")) == 8
    assert time(("a#0@cpu", "-> cpu", 1, ""), ("a#1@cpu", "-> cpu", 2, ""), ("b", "cpu", 4, "a@cpu")) == 7


# ------------------------------------------------------------------------------------------------ differences


def test_diff(tiny: list[Plan], golden: Golden) -> None:
    """What each pass changed, equal changes of several layers on one line."""
    golden("diff", "".join(f"# {b.after}\n{b.diff(a)}\n\n" for a, b in pairwise(tiny)))


def test_diff_of_equals(tiny: list[Plan]) -> None:
    assert tiny[-1].diff(tiny[-1]) == "nothing changed"


def test_diff_of_one_row(tiny: list[Plan]) -> None:
    """A changed field, an added and a missing row are named, each once."""
    plan = tiny[-1]
    first = plan.rows[0]
    other = replace(plan, rows=(replace(first, kernel="mine"), *plan.rows[1:]))
    assert other.diff(plan) == f"~ {first.name}  kernel {first.kernel or '-'} -> mine"
    less = replace(plan, rows=plan.rows[1:])
    assert less.diff(plan) == f"- {first.name}  {first.device} {first.op} {' '.join(first.reads)} {first.type}"
    assert plan.diff(less).startswith(f"+ {first.name}  ")


def test_grouped_notes() -> None:
    """Notes that differ by layer alone are one."""
    notes = [("fold", f"L{i}.attn", "too wide") for i in (0, 1, 2, 4)]
    notes += [("fold", "L3.attn", "too long"), ("place", "", "off")]
    assert list(group_notes(notes)) == [
        ("fold", "L0-L2, L4 attn", "too wide"),
        ("fold", "L3 attn", "too long"),
        ("place", "", "off"),
    ]
    assert spans([5, 1, 2, 2, 3]) == "L1-L3, L5"


# ------------------------------------------------------------------------------------------------ JSON


def test_json(tiny: list[Plan], golden: Golden) -> None:
    """Plain data that survives a round trip, with every field of the plan and a version."""
    data = tiny[-1].json()
    assert data["version"] == JSON_VERSION == 1
    assert Plan(**{k: v for k, v in data.items() if k not in ("version", "predicted_us")}).model == tiny[-1].model
    again = json.loads(json.dumps(data))
    assert [Row(**{**r, "reads": tuple(r["reads"])}) for r in again["rows"]] == list(tiny[-1].rows)
    assert again["predicted_us"] == tiny[-1].us
    rows = again.pop("rows")
    told = [json.dumps(again, indent=1, sort_keys=True), *(json.dumps(r, sort_keys=True) for r in rows)]
    golden("json", "\n".join(told[:1] + told[1:12]) + "\n")


def test_json_is_stable(embedded: list[Plan]) -> None:
    """The same model gives the same plan, captured anew."""
    checkpoint = open_checkpoint()
    again = explain(checkpoint, settings_for(checkpoint, target=fake("24G", "512G")))
    assert [json.dumps(p.json()) for p in again] == [json.dumps(p.json()) for p in embedded]


# ------------------------------------------------------------------------------------------------ HTML

_VOID = {"meta", "input", "br"}
_IMPLIED = {"html", "p"}  # HTML5 lets their end tags be left out


class _Page(HTMLParser):
    """Tags and attributes of a page; `wrong` names end tags without a start."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] != tag and self.open[-1] in _IMPLIED:
            self.open.pop()
        if not self.open or self.open[-1] != tag:
            self.wrong.append(tag)
            return
        self.open.pop()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag]


def test_html(embedded: list[Plan]) -> None:
    """One file without scripts or addresses; a radio button and a section a pass, the last one shown; two lanes."""
    text = html_page(embedded)
    page = _Page(text)
    assert page.wrong == []
    assert page.open == []
    assert "http" not in text
    assert "script" not in text
    assert not any("src" in a or "href" in a or any(k.startswith("on") for k in a) for _, a in page.tags)
    assert "url(" not in text
    assert "@import" not in text
    radios = [a for a in page.all("input") if a["type"] == "radio"]
    assert len(radios) == len(embedded) == len(page.all("section")) == len(page.all("label")) > 3
    assert ["checked" in a for a in radios] == [False] * (len(embedded) - 1) + [True]
    assert [a["for"] for a in page.all("label")] == [a["id"] for a in radios]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    lanes = [(a.get("class") or "").split() for a in page.all("div")]
    assert any("lane0" in c for c in lanes)
    assert any("lane1" in c for c in lanes)
    assert any("copy" in c for c in lanes)
    assert any("new" in c for c in lanes)
    for plan in embedded:
        assert f">{plan.after}</label>" in text


def test_html_escapes(tiny: list[Plan]) -> None:
    """Names come from model files: none of them is markup."""
    nasty = '<script>alert("x")</script>'
    row = Row(nasty, nasty, nasty, nasty, (nasty,), nasty, nasty, 1, nasty, None)
    copy = replace(row, op="copy")
    plan = replace(tiny[-1], model=nasty, after=nasty, rows=(row, copy), notes=((nasty, nasty, nasty),))
    text = html_page([plan, plan])
    assert "<script" not in text
    assert _Page(text).wrong == []


# ------------------------------------------------------------------------------------------------ the machine


def test_two_pages_of_one_machine(embedded: list[Plan]) -> None:
    """Prefill and decode hold the same bytes: they are two plans of one store."""
    checkpoint = open_checkpoint()
    decode = embedded[-1]
    prefill = explain(checkpoint, settings_for(checkpoint, target=fake("24G", "512G")), "prefill")[-1]
    assert [(u.device, u.weights) for u in decode.uses] == [(u.device, u.weights) for u in prefill.uses]
    assert (decode.tokens, prefill.tokens) == (1, 1024)  # 2048, but for the model's context
