"""Chat templates: as transformers renders them, and stopped where they would harm (SERVER.md, abuse 4)."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from ktcompile import template_process
from ktcompile.apart import Apart
from ktcompile.checkpoint import open_checkpoint
from ktcompile.errors import TemplateError
from ktcompile.template import render

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind. <b>&amp;</b>"},
    {"role": "user", "content": "Où est né Zoë? 漢字 🙂 \\n \x00", "name": None},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
    {"role": "tool", "content": "line\nline"},
    {"role": "assistant", "content": "Here.", "reasoning": "Hm."},
    {"role": "user", "content": "Thanks"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]

PROGRAMS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}{{ eos_token }}",
    "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ messages | tojson(sort_keys=true) }}",
    "{% set ns = namespace(i=0) %}{% for m in messages %}{% set ns.i = ns.i + 1 %}{% endfor %}{{ ns.i }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% if loop.index > 3 %}{% break %}"
    "{% endif %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}\n\n  x",
    "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.tool_calls is defined }}\n{% endfor %}",
    "{{ add_generation_prompt }} {{ documents }} {{ enable_thinking }} {{ dict(a=1) }} {{ nothing }}",
    "{{ strftime_now('%Y') }} {{ 'a' if messages[1].name is defined else 'b' }} {{ messages[-1]['content'][::-1] }}",
)

LIMIT = r"takes longer than 1\.5 s|needs more than 1073741824 bytes of memory|says more than 33554432 characters"
"""Which one depends on how busy the machine is."""

ATTACKS = {
    "{{ ''.__class__.__mro__ }}": "attribute '__class__' of 'str' object is unsafe",
    "{{ cycler.__init__.__globals__ }}": "is unsafe",
    "{% set n = namespace(__class__=1) %}": "begins with an underscore",
    "{{ messages.append(1) }}": "'append' of 'list' object is unsafe",
    "{% include '/etc/passwd' %}": "no loader",
    "{% extends 'base' %}": "no loader",
    "{% import 'os' as os %}": "no loader",
    "{{ raise_exception('roles must alternate') }}": "the model's chat template: roles must alternate",
    "{% if %}": "Expected an expression",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}": "RecursionError",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": LIMIT,
    "{{ range(10**9) | list }}": "Range too big",
    "{% set n = messages | length %}{{ 7 ** (n * 10**8) }}": LIMIT,
    "{% set n = messages | length %}{{ 'a' * (n * 10**9) }}": LIMIT,
    "{% set n = messages | length %}{{ [0] * (n * 10**9) }}": LIMIT,
    "{% set n = messages | length %}{{ 'a' * (n * 10**8) }}": LIMIT,
    "{% for i in range(10**5) %}{{ 'a' * 1000 }}{% endfor %}": LIMIT,
    "{% set ns = namespace(a='a') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}": LIMIT,
    "{{ '%999999999d' % 1 }}": LIMIT,
    "{{ 'a' | center(10**10) }}": LIMIT,
    "{{ lipsum(n=10**6) }}": LIMIT,
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return open_checkpoint().load_tokenizer()


@pytest.mark.parametrize("program", [None, *PROGRAMS])
def test_as_transformers_renders_it(tokenizer: PreTrainedTokenizerFast, program: str | None) -> None:
    tokenizer.chat_template = program or tokenizer.chat_template
    for tools in (None, TOOLS):
        variables: Any = {**tokenizer.special_tokens_map, "enable_thinking": False}
        (want,), _ = render_jinja_template(
            [MESSAGES], tools, None, tokenizer.chat_template, add_generation_prompt=True, **variables
        )
        assert render(tokenizer, MESSAGES, tools, {"enable_thinking": False}) == want


@pytest.mark.parametrize("program", ATTACKS, ids=lambda program: program[:60])
def test_attacks(tokenizer: PreTrainedTokenizerFast, program: str) -> None:
    """A clear error within two seconds, and the next conversation is rendered."""
    good, tokenizer.chat_template = tokenizer.chat_template, program
    start = time.perf_counter()
    with pytest.raises(TemplateError, match="chat template") as error:
        render(tokenizer, MESSAGES)
    assert time.perf_counter() - start < 2 + 1  # a process may have to start, beside other tests
    assert re.search(ATTACKS[program], str(error.value)) and len(str(error.value)) < 2000
    tokenizer.chat_template = good
    assert render(tokenizer, MESSAGES).endswith("Thanks<｜Assistant｜>")


def test_no_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="the model has no chat template"):
        render(tokenizer, MESSAGES)


def test_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no keys, is not in reach of Ctrl-C, is started again, serves threads in turn, and ends with its owner."""
    monkeypatch.setenv("KTRANS_API_KEY", "secret")
    own = Apart(Path(template_process.__file__))

    def say(what: object) -> str:
        return str(json.loads(own.ask(json.dumps(["{{ i }}", {"messages": [], "i": what}])))[1])

    assert say(1) == "1"
    first = own._running
    assert first is not None
    seen = Path(f"/proc/{first.pid}")
    assert b"KTRANS_API_KEY" not in (seen / "environ").read_bytes() and os.getpgid(first.pid) != os.getpgid(0)
    assert int((seen / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") < 64 << 20
    first.kill()
    first.wait()
    assert say(2) == "2"
    with ThreadPoolExecutor(8) as pool:
        asked = [str(i) for i in range(200)]
        assert list(pool.map(say, asked)) == asked
    second = own._running
    assert second is not None and second is not first and second.stdin is not None
    second.stdin.close()
    assert second.wait(5) == 0
