"""Compiles grammars in a process of its own, as some take minutes, and nothing in one tells before.

Run as a script by `grammar.py`. It reads lines of JSON: arguments of LLTokenizer, then grammars. For each it writes a
line of JSON: what is wrong, "" if nothing is. A grammar is compiled and followed for STEPS tokens; if that takes
SECONDS the process ends.
"""

import json
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

SECONDS = 0.7
STEPS = 4
MEMORY_BYTES = 8 << 30
"""Of addresses: a process that wants more ends."""

LIMITS = LLParserLimits(verbose_errors=False)


def tried(tokenizer: LLTokenizer, grammar: str) -> str:
    """What goes wrong until the first tokens, each the first one that may be there."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    for _ in range(STEPS):
        if matcher.is_stopped():
            break
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        if not bits or not matcher.consume_token((bits & -bits).bit_length() - 1):
            break
    return matcher.get_error()


def main() -> None:
    """Answer until there is no more to read."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    source, size, stop = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(source, n_vocab=size, eos_token=stop)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        wrong = tried(tokenizer, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(wrong), flush=True)


if __name__ == "__main__":
    main()
