"""Every printed configuration parses, names the server, and asks for no more than a request may hold."""

import json

import pytest
import yaml

from ktcompile.server.editors import EDITORS, Served

SERVED = Served("http://127.0.0.1:8000", "deepseek-v3", 32768, has_key=False)


@pytest.mark.parametrize("name", EDITORS)
def test_it_parses_and_names_the_server(name: str) -> None:
    text = EDITORS[name](SERVED)
    parsed = yaml.safe_load(text) if name in ("continue", "aider") else json.loads(text)
    assert parsed
    assert "http://127.0.0.1:8000" in text and "deepseek-v3" in text
    assert "YOUR-API-KEY" not in text


@pytest.mark.parametrize("name", ["vscode", "continue", "aider"])
def test_a_key_is_asked_for(name: str) -> None:
    assert "YOUR-API-KEY" in EDITORS[name](Served("http://127.0.0.1:8000", "m", 4096, has_key=True))


@pytest.mark.parametrize("context", [1, 1024, 4096, 131072])
def test_question_and_answer_fit(context: int) -> None:
    (group,) = json.loads(EDITORS["vscode"](Served("http://h:1", "m", context, has_key=False)))
    (model,) = group["models"]
    assert (group["vendor"], group["apiType"], model["toolCalling"]) == ("customendpoint", "chat-completions", True)
    assert model["maxInputTokens"] + model["maxOutputTokens"] == context
