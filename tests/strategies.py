"""What hypothesis draws: tiny models, placements, devices that are nearly full, rules files with mistakes in them."""

from collections.abc import Mapping
from functools import cache

from hypothesis import strategies as st
from models import CONFIGS, GPU, TWO, captured, rewritten, with_capacity

from ktcompile import Target, regions
from ktcompile.graph import matches
from ktcompile.passes.fold import Fold

FAST = ("deepseek_v3", "deepseek_v3_tied", "qwen3_moe", "mixtral", "glm4_moe")
"""One model of each shape of graph: a property that ran on all of them rarely needs another."""

_GLOBS = (
    "*.experts",
    "*.self_attn",
    "layers.0.*",
    "layers.{0..1}.*",
    "layers.1.*",
    "*.mlp.*",
    "*norm*",
    "*embed_tokens",
    "lm_head",
    "*residual*",
    "*.{gate,router}",
    "*rotary_emb",
    "mask",
    "*layernorm",
    "layers.{1..2}.mlp.*",
)

models = st.sampled_from(FAST)
any_model = st.sampled_from(tuple(CONFIGS))
phases = st.sampled_from(("prefill", "decode"))
devices = st.sampled_from([d.name for d in TWO.devices])


@cache
def paths(name: str) -> tuple[str, ...]:
    """The module paths of a folded model."""
    gm, _ = rewritten(captured(name), GPU, Fold())
    return tuple(r.path for r in regions(gm))


@st.composite
def placements(draw: st.DrawFn, name: str, names: st.SearchStrategy[str] = devices) -> Mapping[str, str]:
    """Rules of `place` that each match something: globs to devices, the last one for everything."""
    useful = [g for g in _GLOBS if any(matches(path, g) for path in paths(name))]
    chosen = draw(st.lists(st.sampled_from(useful), unique=True, max_size=6))
    one = draw(st.lists(st.sampled_from(paths(name)), unique=True, max_size=2))
    return {glob: draw(names) for glob in (*chosen, *one, "*")}


@st.composite
def tight_targets(draw: st.DrawFn) -> Target:
    """The two devices with 1 KiB to 1 MiB each: tiny models fit sometimes."""
    size = st.integers(10, 20).map(lambda bits: 1 << bits)
    return with_capacity(TWO, cpu=draw(size), cpu_1=draw(size))


RULES = """extends: base
pipeline:
  - prune-experts: {keep: 6, ranking: weight}
  - place:
      rules:
        "layers.{3..5}.mlp.experts": cpu
        "*.experts": cpu
        "*": gpu
  - choose-kernels:
      moe: [avx2, reference]
      ops: {norm: [reference]}
"""
"""A valid rules file with one of everything."""

_WORDS = (
    "extends",
    "base",
    "pipeline",
    "place",
    "rules",
    "keep",
    "6",
    "cpu",
    "[",
    "]",
    "{",
    "}",
    ":",
    "- ",
    "null",
    "~",
    "\t",
    '"',
    "'",
    "&a ",
    "*a",
    "!!int ",
    "!!python/object:os.system ",
    "<<",
    "?",
    "|",
    ">",
    "#",
    "---\n",
    "%",
    "\u2028",
    "\x00",
    "\U0001f600",
    "1e400",
    "0x",
    "2026-11-23",
    "true",
    ".inf",
    "-1",
    "9" * 20,
    "=",
    "..",
)


@st.composite
def mutated_rules(draw: st.DrawFn) -> str:
    """The text of RULES after one to four small accidents."""
    text = RULES
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        kind = draw(st.sampled_from(("insert", "delete", "swap", "line", "random")))
        if kind == "insert":
            text = text[:at] + draw(st.sampled_from(_WORDS)) + text[at:]
        elif kind == "random":
            text = text[:at] + draw(st.text(max_size=3)) + text[at:]
        elif kind == "delete":
            text = text[:at] + text[at + draw(st.integers(1, 12)) :]
        else:
            lines = text.splitlines(keepends=True) or [""]
            i, j = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
            if kind == "swap":
                lines[i], lines[j] = lines[j], lines[i]
            else:
                lines.insert(i, lines[j])
            text = "".join(lines)
    return text
