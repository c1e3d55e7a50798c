"""Times the engine over the embedded model, or another one: one user and eight, its own share, a prefix again. JSON.

    python benchmarks/bench_engine.py
    python benchmarks/bench_engine.py --model FILE --users 1,8 --prompt 512 --new 128

Each user asks for `new` tokens after a prompt of `prompt` random tokens that nobody else has, all at the same time;
`tok_s` are tokens of answers over the whole time, prompts included, the median of `runs`. `overhead` is the share of a
step that is not the model's. `prefix` is the milliseconds to the first token of a prompt of `prefix` tokens and of a
second one that begins with these. `grammar` is the last of `users` again, whose answers are JSON by a schema. `beside`
says how long the gaps in one answer were while a prompt of `beside` tokens was read: of `runs` the one whose longest
gap, as a multiple of its median gap, is the median.
"""

import argparse
import json
import statistics
import time
from itertools import pairwise
from typing import Any

import torch

import ktcompile
from ktcompile.checkpoint import open_checkpoint
from ktcompile.engine import Engine
from ktcompile.generate import stop_tokens
from ktcompile.grammar import Grammar, Grammars, json_of
from ktcompile.model import torch_threads
from ktcompile.request import Piece, Request
from ktcompile.sampling import Sampling
from ktcompile.target import detect

GREEDY = Sampling(0.0, seed=0)


def prompt(count: int, vocabulary: int, seed: int) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def users(
    engine: Engine, count: int, args: argparse.Namespace, vocabulary: int, grammar: Grammar | None = None
) -> dict[str, float]:
    """`count` of them at once, `runs` times after one that does not count."""
    rates, shares, per_step = [], [], []
    for run in range(args.runs + 1):
        prompts = [prompt(args.prompt, vocabulary, 1000 * count + 100 * run + user) for user in range(count)]
        before = engine.statistics
        start = time.perf_counter()
        handles = [engine.submit(Request(ids, args.new, GREEDY, grammar=grammar)) for ids in prompts]
        said = sum(len(h.result()[1]) for h in handles)
        took = time.perf_counter() - start
        after = engine.statistics
        step_s, model_s = after.step_s - before.step_s, after.model_s - before.model_s
        rates.append(said / took)
        shares.append(1 - model_s / step_s)
        per_step.append(1e3 * (step_s - model_s) / (after.steps - before.steps))
    middle = statistics.median
    return {"tok_s": middle(rates[1:]), "overhead": middle(shares[1:]), "own_ms_a_step": middle(per_step[1:])}


def first_token_ms(engine: Engine, ids: tuple[int, ...]) -> float:
    """Of one prompt, alone."""
    return engine.submit(Request(ids, 1, GREEDY)).result()[2].usage.first_token_ms


def beside(engine: Engine, length: int, vocabulary: int) -> dict[str, float]:
    """Milliseconds between the tokens of one answer, in which another prompt of `length` tokens is read.

    `gap_ms` is the median of all, `most` the longest as a multiple of it, and `meanwhile_ms` the median while the other
    was read, whose first token came after `first_token_ms`, or alone after `alone_ms`.
    """
    engine.clear_prefixes()
    handle = engine.submit(Request(prompt(16, vocabulary, 7), 200, GREEDY))
    other = None
    times: list[tuple[float, bool]] = []
    for event in handle:
        if isinstance(event, Piece):
            times.append((time.perf_counter(), other is not None and other.finished is None))
        if other is None and len(times) == 40:
            other = engine.submit(Request(prompt(length, vocabulary, 8), 1, GREEDY))
    assert other is not None
    first_ms = other.result()[2].usage.first_token_ms
    gaps = [1e3 * (b - a) for (a, _), (b, _) in pairwise(times)]
    meanwhile = [gap for gap, (_, busy) in zip(gaps, times[1:], strict=True) if busy]
    middle = statistics.median(gaps)
    engine.clear_prefixes()
    return {
        "tokens": length,
        "gap_ms": middle,
        "meanwhile_ms": statistics.median(meanwhile),
        "most_ms": max(gaps),
        "most": max(gaps) / middle,
        "first_token_ms": first_ms,
        "alone_ms": first_token_ms(engine, prompt(length, vocabulary, 8)),
    }


def main() -> None:
    """Everything, as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--users", default="1,8")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--prefix", type=int, default=800)
    parser.add_argument("--beside", type=int, default=900)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    counts = [int(part) for part in args.users.split(",")]
    opened = open_checkpoint(args.model) if args.model else open_checkpoint()
    context = max(args.prefix + 64, args.beside + 320, max(counts) * (args.prompt + args.new + 16))
    model: Any = ktcompile.load(opened, context=min(context, opened.config.max_position_embeddings))
    torch.set_num_threads(torch_threads(model.plans["decode"], detect()))
    vocabulary = int(opened.config.vocab_size)
    engine = Engine(model, opened.tokenizer, cache_tokens=context, max_batch=max(counts))
    engine.start()
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "users": {}}
    for count in counts:
        found["users"][count] = users(engine, count, args, vocabulary)
    rates = [row["tok_s"] for row in found["users"].values()]
    found["gain"] = rates[-1] / rates[0]
    stop = stop_tokens(opened.tokenizer, opened.generation)
    numbers = {"type": "array", "items": {"type": "integer"}, "minItems": args.new}
    grammar = Grammars(engine.tokenizer, vocabulary, stop).grammar(f"answer: {json_of(numbers, True)}")
    found["grammar"] = users(engine, counts[-1], args, vocabulary, grammar)
    times: list[tuple[float, float]] = []
    for run in range(args.runs):
        engine.clear_prefixes()
        ids = prompt(args.prefix, vocabulary, run)
        times.append((first_token_ms(engine, (*ids, 5)), first_token_ms(engine, (*ids, 6))))
    first, again = (statistics.median(column) for column in zip(*times, strict=True))
    found["prefix"] = {"tokens": args.prefix, "first_ms": first, "again_ms": again, "share": again / first}
    runs = sorted((beside(engine, args.beside, vocabulary) for _ in range(args.runs)), key=lambda run: run["most"])
    found["beside"] = runs[len(runs) // 2]
    engine.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
