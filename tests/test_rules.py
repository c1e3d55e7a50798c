"""Rules files: whatever is not exactly right is a RulesError with file:line, and never anything else."""

import re
import time
from pathlib import Path

import pytest
from conftest import Golden
from hypothesis import example, given, settings
from models import GPU, captured, rewritten
from strategies import RULES, mutated_rules

from ktcompile import Context, RulesError, load_rules
from ktcompile.pipeline import Pipeline, parse_rules, shipped

MISTAKES = {
    "typo in a key": "extend: base\n",
    "typo in a pass": "pipeline:\n  - fold\n  - plaec\n",
    "typo in an option": "pipeline:\n  - fold\n  - place:\n      rule: {'*': cpu}\n",
    "a key twice": "extends: base\npipeline: []\nextends: base\n",
    "a rule twice": "pipeline:\n  - place:\n      rules:\n        '*': cpu\n        '*': gpu\n",
    "a pass twice": "pipeline:\n  - fold\n  - place\n  - fold\n",
    "two passes in one entry": "pipeline:\n  - place: {}\n    fold: {}\n",
    "text for a number": "pipeline:\n  - prune-experts: {keep: six}\n",
    "a yes for a number": "pipeline:\n  - prune-experts: {keep: yes}\n",
    "no such choice": "pipeline:\n  - prune-experts: {keep: 6, ranking: luck}\n",
    "a word for a list": "pipeline:\n  - choose-kernels: {moe: reference}\n",
    "a list for a mapping": "pipeline:\n  - place:\n      rules: [cpu]\n",
    "a pipeline that is no list": "pipeline:\n  fold: {}\n",
    "options that are no mapping": "pipeline:\n  - place: cpu\n",
    "a list as a file": "- fold\n",
    "nothing": "",
    "not YAML": "pipeline:\n  - place: {rules: [\n",
    "a tab": "pipeline:\n\t- fold\n",
    "two documents": "pipeline: [fold]\n---\npipeline: []\n",
    "an alias": "pipeline:\n  - choose-kernels:\n      moe: &list [reference]\n      mla: *list\n",
    "a Python object": "pipeline:\n  - prune-experts:\n      keep: !!python/object/apply:os.system [id]\n",
    "a tag for a pass": "pipeline:\n  - !!python/name:os.system x\n",
    "extends nothing": "extends: deepseek\n",
    "extends a file that is not there": "extends: ./none.yaml\n",
    "extends a list": "extends: [base]\n",
}


def error_of(text: str, file: str = "my.yaml") -> str:
    with pytest.raises(RulesError) as error:
        parse_rules(text, file)
    return str(error.value)


def test_messages(golden: Golden) -> None:
    golden("messages", "".join(f"# {what}\n{error_of(text)}\n" for what, text in MISTAKES.items()))


@pytest.mark.parametrize("what", MISTAKES)
def test_every_message_says_where(what: str) -> None:
    assert re.match(r"my\.yaml(:\d+)?: ", error_of(MISTAKES[what]))
    assert what == "nothing" or re.match(r"my\.yaml:\d+: ", error_of(MISTAKES[what]))


def refused(text: str) -> str:
    """The error of a file that parses and does not fit the model or the machine."""
    pipeline = parse_rules(text, "my.yaml")
    with pytest.raises(RulesError) as error:
        pipeline.run(captured("deepseek_v3"), Context(GPU))
    return f"{error.value}\n"


def test_what_only_the_model_can_tell(golden: Golden) -> None:
    rules = "extends: base\npipeline:\n  - place:\n      rules:\n        {}\n        '*': gpu\n"
    golden(
        "against_the_model",
        "".join(
            (
                refused(rules.format("'*.mlp.expert': cpu")),
                refused(rules.format("'layers.{7..9}.mlp.experts': cpu")),
                refused(rules.format("'*.experts': cuda:1")),
                refused(rules.format("'*.experts': cpu0")),
                refused("extends: base\npipeline:\n  - prune-experts:\n      ranking: weight\n      keep: 0\n"),
                refused("extends: base\npipeline:\n  - choose-kernels:\n      mla: [reference]\n      moe: [avx]\n"),
                refused("pipeline:\n  - fold\n  - insert-copies\n"),
            )
        ),
    )


def test_a_missing_file_is_named() -> None:
    with pytest.raises(RulesError, match=r"cannot read rules './nowhere.yaml'"):
        load_rules("./nowhere.yaml")
    with pytest.raises(RulesError, match="no rules 'bsae'; did you mean 'base'"):
        load_rules("bsae")


def test_a_circle_ends(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{one}.yaml").write_text(f"extends: ./{other}.yaml\n")
    with pytest.raises(RulesError, match=r"[ab]\.yaml: `extends` goes round in a circle or is deeper than 8 files"):
        load_rules(tmp_path / "a.yaml")


def test_a_file_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"pipeline: [fold] # \xe9\n")
    with pytest.raises(RulesError, match=r"latin\.yaml"):
        load_rules(tmp_path / "latin.yaml")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{chr(ord(c) - 1)}'] * 9)}]\n" for c in "bcdefghijk"
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "pipeline:\n  - choose-kernels:\n      ops:\n" + "".join(f"        {line}\n" for line in BOMB.splitlines()),
        "pipeline: " + "[" * 5000,
        "pipeline: " + "[" * 900 + "]" * 900 + "\n",
        "pipeline: &p [*p]\n",
        "pipeline:\n  - place: &p\n      rules: *p\n",
        "pipeline:\n  - choose-kernels: {moe: &m [*m]}\n",
    ],
    ids=["outside", "inside", "deep", "nested", "itself", "rules of itself", "list of itself"],
)
def test_bombs_end_quickly(text: str) -> None:
    start = time.perf_counter()
    error_of(text)
    assert time.perf_counter() - start < 5


@given(text=mutated_rules())
@example(text="pipeline:\n  - prune-experts: {keep: 2026-13-45}\n")
@example(text="? [a]\n: b\n")
@example(text="extends: my\n")
@settings(max_examples=300)
def test_accidents_are_loaded_or_refused(text: str) -> None:
    try:
        made = parse_rules(text, "my.yaml")
    except RulesError as error:
        said = str(error)
    else:
        said = "my.yaml: fine" if isinstance(made, Pipeline) else ""
    assert re.match(r"my\.yaml(:\d+)?: .", said), said


@pytest.mark.parametrize("name", shipped())
def test_shipped_rules_survive_a_round_trip(name: str) -> None:
    pipeline = load_rules(name)
    assert parse_rules(pipeline.dump(), "again.yaml") == pipeline
    assert [p.name for p in pipeline.passes][:3] == ["fold", "widen", "place"]


def test_the_example_has_one_of_everything() -> None:
    pipeline = parse_rules(RULES, "my.yaml")
    names = ["fold", "prune-experts", "widen", "place", "stream-experts", "fuse-norms", "insert-copies"]
    assert [p.name for p in pipeline.passes] == [*names, "choose-kernels"]
    assert pipeline.where("place", "rules.*") == "my.yaml:8"


def test_an_override_keeps_the_order_of_base() -> None:
    pipeline = parse_rules("extends: base\npipeline:\n  - choose-kernels: {moe: [reference]}\n  - place\n", "my.yaml")
    assert [p.name for p in pipeline.passes] == [p.name for p in load_rules("base").passes]
    gm, _ = rewritten(captured("qwen3_moe"), GPU, *pipeline.passes)
    assert gm is not None
