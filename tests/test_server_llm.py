"""The command `llm` against the server, told of it by its own file of models."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from served import KEY, Served

Llm = Callable[..., str]


@pytest.fixture
def llm(served: Served, tmp_path: Path) -> Llm:
    """Runs `llm ARGS`, which has a home of its own."""
    model = f"- model_id: local\n  model_name: tiny\n  api_base: {served.base}/v1\n  api_key_name: local\n"
    model += "  supports_schema: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(model)
    (tmp_path / "keys.json").write_text(f'{{"local": "{KEY}"}}')
    home = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | {"LLM_USER_PATH": str(tmp_path)}

    def run(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *args], env=home, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("how", [(), ("--no-stream",)])
def test_a_prompt(llm: Llm, how: tuple[str, ...]) -> None:
    said = llm("-m", "local", "-o", "temperature", "0", *how, "What is the capital of France?")
    assert said == "The capital of France is Paris.\n"


def test_an_answer_has_the_form(llm: Llm) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    schema = json.dumps(city | {"additionalProperties": False})
    said = llm("-m", "local", "-o", "temperature", "0", "--schema", schema, "A city?")
    assert json.loads(said)["city"] in ("Paris", "Rome")


def test_a_conversation_goes_on(llm: Llm) -> None:
    ask = ("-m", "local", "-o", "temperature", "0", "-o", "max_tokens", "8")
    llm(*ask, "-s", "Be brief.", "What is the capital of France?")
    assert llm("-c", "-o", "temperature", "0", "-o", "max_tokens", "8", "And of Spain?").strip()
    assert llm("logs", "-n", "0").count("## Prompt") == 2
