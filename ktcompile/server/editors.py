"""Ready configuration for editors: what to paste where, so that a server here is their model."""

import json
from dataclasses import dataclass

import yaml


@dataclass(frozen=True)
class Served:
    """A server as an editor sees it. `base`: http://127.0.0.1:8000, no slash behind. `context`: tokens of a request."""

    base: str
    model: str
    context: int
    has_key: bool

    @property
    def output(self) -> int:
        """Tokens of an answer that an editor may ask for; the prompt has the rest."""
        return max(1, min(8192, self.context // 4))


def vscode(served: Served) -> str:
    """`chatLanguageModels.json` of VS Code 1.122 and later: the vendor "customendpoint", no sign-in.

    Without `toolCalling` the model picker leaves a model out. A key is entered in VS Code, which keeps it.
    """
    model = {
        "id": served.model,
        "name": served.model,
        "url": f"{served.base}/v1/chat/completions",
        "toolCalling": True,
        "vision": False,
        "maxInputTokens": served.context - served.output,
        "maxOutputTokens": served.output,
    }
    group = {"name": "ktrans", "vendor": "customendpoint", "apiKey": _key(served), "apiType": "chat-completions"}
    return json.dumps([group | {"models": [model]}], indent=2)


def continue_dev(served: Served) -> str:
    """`~/.continue/config.yaml` of Continue: chat and edit, and completion by fill-in-the-middle."""
    model = {
        "name": served.model,
        "provider": "openai",
        "model": served.model,
        "apiBase": f"{served.base}/v1",
        "apiKey": _key(served),
        "roles": ["chat", "edit", "apply"],
        "defaultCompletionOptions": {"contextLength": served.context, "maxTokens": served.output},
    }
    completion = {
        "name": f"{served.model} completion",
        "provider": "llama.cpp",
        "model": served.model,
        "apiBase": served.base,
        "apiKey": _key(served),
        "roles": ["autocomplete"],
    }
    config = {"name": "ktrans", "version": "1.0.0", "schema": "v1", "models": [model, completion]}
    return yaml.safe_dump(config, sort_keys=False).rstrip()


def zed(served: Served) -> str:
    """What goes into Zed's `settings.json`. A key is entered in Zed, or is in KTRANS_API_KEY when it starts."""
    model = {
        "name": served.model,
        "display_name": served.model,
        "max_tokens": served.context,
        "max_output_tokens": served.output,
        "capabilities": {"tools": True, "images": False, "parallel_tool_calls": False, "prompt_cache_key": False},
    }
    provider = {"api_url": f"{served.base}/v1", "available_models": [model]}
    return json.dumps({"language_models": {"openai_compatible": {"ktrans": provider}}}, indent=2)


def aider(served: Served) -> str:
    """`.aider.conf.yml`: aider takes any server that speaks OpenAI's API for "openai/NAME"."""
    config = {
        "model": f"openai/{served.model}",
        "openai-api-base": f"{served.base}/v1",
        "openai-api-key": _key(served),
        "max-chat-history-tokens": served.context // 2,
    }
    return yaml.safe_dump(config, sort_keys=False).rstrip()


def _key(served: Served) -> str:
    return "YOUR-API-KEY" if served.has_key else "none"


EDITORS = {"vscode": vscode, "continue": continue_dev, "zed": zed, "aider": aider}
"""By the names of `ktrans serve --print-NAME`."""

__all__ = ["EDITORS", "Served", "aider", "continue_dev", "vscode", "zed"]
