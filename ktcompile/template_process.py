"""What renders chat templates, as a program: lines `[template, variables]` in, lines `["text" or "error", text]` out.

It imports nothing of ktcompile, so it starts in a tenth of a second. The system ends it after SECONDS, whatever it
does, and gives it no more than MEMORY_BYTES. The environment is that of transformers' `render_jinja_template`, whose
results the tests compare.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 1.5
"""Of one conversation."""

MEMORY_BYTES = 1 << 30
"""Of addresses, the interpreter's own among them."""

TEXT_CHARS = 32 << 20
"""Of one prompt: twice the largest body that the server takes."""


class Generation(Extension):
    """`{% generation %}` marks what an assistant said, for training; here it is what is inside."""

    tags: set[str] = {"generation"}  # noqa: RUF012  jinja reads it from the class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `endgeneration`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Names(Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __init__(*args: Any, **names: Any) -> None:  # `self` may be a name
        for name in dict(*args[1:], **names):
            _check(name)
        Namespace.__init__(*args, **names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        super().__setitem__(name, value)


def _check(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(1)
def compiled(template: str) -> Template:
    """The template in its environment, which has no loader: nothing is included."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": Names,
    }
    return environment.from_string(template)


THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names that a message's thought has, the usual one first; templates read that, or the second."""


def rendered(template: str, given: dict[str, Any]) -> str:
    """The text of a conversation. Raises whatever a template raises, and ValueError beyond TEXT_CHARS."""
    for message in given["messages"]:
        thought = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
        if thought is not None:
            message.setdefault("thinking", thought)
            message["reasoning_content"] = thought
    pieces, size = [], 0
    for piece in compiled(template).generate(**given):
        size += len(piece)
        if size > TEXT_CHARS:
            raise ValueError(f"it says more than {TEXT_CHARS} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(line: str) -> list[str]:
    """The text, or what went wrong."""
    try:
        return ["text", rendered(*json.loads(line))]
    except MemoryError:
        return ["error", f"it needs more than {MEMORY_BYTES} bytes of memory"]
    except TemplateError as error:
        return ["error", error.message or type(error).__name__]
    except Exception as error:  # of a stranger's program: anything
        return ["error", f"{type(error).__name__}: {error}"[:1000]]


def main(write: Callable[[str], object]) -> None:
    """Answer until nobody asks."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # nobody handles it, so it ends this process
        write(json.dumps(answer(line)) + "\n")
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.stdout.write)
