"""Many mixed requests to a server of its own, with clients that go away: nothing may be lost, no token be wrong. JSON.

    python benchmarks/soak_serve.py
    python benchmarks/soak_serve.py --requests 300 --model FILE

Chat, completions, fill-in-the-middle and infill, whole and streamed, with several answers, stop strings, logarithms,
seeds, wrong fields; one in six is left before its end. Greedy ones must say what they said alone, before the others.
Exit code 1, and why in `failed`, where an answer is wrong, a status is strange, a page or a descriptor is not given
back, or resident memory is not within 5 % of its level after the first fifth.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

SUBJECTS = ("dog", "cat", "bird", "fish", "girl named Lily", "boy named Tim", "boat", "tree", "king", "small red car")
WRONG = ({"temperature": -1}, {"n": 10**6}, {"max_tokens": 0}, {"logit_bias": {"99999999": 1}}, {"stop": [""]})


@dataclass(frozen=True)
class Asked:
    """One kind of request: where, what, and which fields of the answer hold its text."""

    path: str
    body: Mapping[str, Any]

    def texts(self, answer: Mapping[str, Any]) -> list[str]:
        """Of a whole answer."""
        if self.path == "/infill":
            return [answer["content"]]
        return [c["message"]["content"] if "message" in c else c["text"] for c in answer["choices"]]

    def streamed(self, events: Sequence[Mapping[str, Any]]) -> list[str]:
        """Of the events of a stream."""
        found = [""] * int(self.body.get("n", 1))
        for event in events:
            if self.path == "/infill":
                found[0] += event["content"]
            for choice in event.get("choices", ()):
                found[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        return found


def greedy() -> list[Asked]:
    """Requests whose answer is known once they were answered alone."""
    found = []
    for i, subject in enumerate(SUBJECTS):
        turns = [{"role": "user", "content": f"Tell me a story about a {subject}."}]
        rules = {"role": "system", "content": "Be kind. " * 4 * i}
        more: list[dict[str, Any]] = [{}, {"n": 2}, {"stop": [" a", "was"]}, {"logprobs": True, "top_logprobs": 3}]
        chat = {"messages": [rules, *turns] if i % 2 else turns, "max_tokens": 4 + 2 * i, **more[i % 4]}
        found.append(Asked("/v1/chat/completions", chat))
        found.append(Asked("/v1/completions", {"prompt": f"Once upon a time, a {subject} " * (1 + i), "max_tokens": 9}))
        middle = {"prompt": f"def {subject[:3]}(a, b):\n    return ", "suffix": "\n\nprint(1)\n", "max_tokens": 6}
        found.append(Asked("/v1/completions", middle))
        hole = {"input_prefix": f"# {subject}\nx = ", "input_suffix": "\ny = x\n", "n_predict": 6}
        found.append(Asked("/infill", hole))
    return [Asked(a.path, {**a.body, "temperature": 0}) for a in found]


@dataclass
class Soak:
    """A client: what it saw so far."""

    http: httpx.AsyncClient
    chance: random.Random
    wanted: dict[int, list[str]] = field(default_factory=dict)  # by place in `greedy()`
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def whole(self, asked: Asked, **more: Any) -> list[str]:
        """The texts of an answer."""
        answer = await self.http.post(asked.path, json={**asked.body, **more})
        self.seen[str(answer.status_code)] += 1
        if answer.status_code != 200:
            self.wrong.append(f"{asked.path}: {answer.status_code} {answer.text[:200]}")
            return []
        return asked.texts(answer.json())

    async def stream(self, asked: Asked, most: int | None = None, **more: Any) -> list[str] | None:
        """The texts of a streamed answer; None where it was left after `most` events."""
        events: list[Mapping[str, Any]] = []
        body = {**asked.body, **more, "stream": True}
        async with self.http.stream("POST", asked.path, json=body) as answer:
            self.seen[str(answer.status_code)] += 1
            async for line in answer.aiter_lines():
                if most is not None and len(events) >= most:
                    self.seen["left"] += 1
                    return None
                if line.startswith("data: {"):
                    events.append(json.loads(line.removeprefix("data: ")))
        return asked.streamed(events)

    async def one(self, kinds: Sequence[Asked]) -> None:
        """A request of some kind."""
        chance, at = self.chance, self.chance.randrange(len(kinds))
        what, asked = chance.random(), kinds[at]
        if what < 0.08:
            await self.stream(asked, chance.randrange(1, 4))
        elif what < 0.16:  # leaves a whole answer: in the queue, while its prompt is read, or later
            try:
                await asyncio.wait_for(self.whole(asked, max_tokens=60, n_predict=60), chance.random() * 0.2)
            except TimeoutError:
                self.seen["left"] += 1
        elif what < 0.2:
            answer = await self.http.post("/v1/chat/completions", json={**kinds[0].body, **chance.choice(WRONG)})
            self.seen[str(answer.status_code)] += 1
            if answer.status_code != 400:
                self.wrong.append(f"a wrong field: {answer.status_code} {answer.text[:200]}")
        elif what < 0.4:
            most = chance.randrange(1, 16)
            hot = {"temperature": 0.9, "seed": chance.randrange(99), "max_tokens": most, "n_predict": most}
            await (self.stream if chance.random() < 0.5 else self.whole)(asked, **hot)
        else:
            texts = await (self.stream if chance.random() < 0.5 else self.whole)(asked)
            if texts != self.wanted[at]:
                self.wrong.append(f"{asked.path} {dict(asked.body)}: {texts}, alone {self.wanted[at]}")


def held(process: int) -> dict[str, int]:
    """Resident bytes and open descriptors of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return {"bytes": pages * os.sysconf("SC_PAGE_SIZE"), "descriptors": len(os.listdir(f"/proc/{process}/fd"))}


async def at_rest(base: str, process: int) -> dict[str, int]:
    """What the server holds once it has nothing to do and no connection."""
    end, now = time.monotonic() + 30, {}
    async with httpx.AsyncClient(base_url=base) as http:
        while time.monotonic() < end:
            now = (await http.get("/stats")).json()
            if not (now["running"] or now["waiting"] or now["pages_used"]):
                break
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    return {"pages": now["pages_used"], **held(process)}


async def soak(base: str, process: int, args: argparse.Namespace) -> dict[str, Any]:
    """All requests, and what was found."""
    kinds, chance = greedy(), random.Random(args.seed)
    wanted: dict[int, list[str]] = {}
    parts: list[dict[str, int]] = []
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    start = time.monotonic()
    for count in (args.requests // 5, args.requests - args.requests // 5):
        limits = httpx.Limits(max_connections=args.users)
        async with httpx.AsyncClient(base_url=base, timeout=300, limits=limits) as http:
            client = Soak(http, chance, wanted, seen, wrong)
            if not wanted:
                wanted.update([(at, await client.whole(asked)) for at, asked in enumerate(kinds)])
            left = iter(range(count))

            async def user(client: Soak, left: Any) -> None:
                for _ in left:
                    await client.one(kinds)

            await asyncio.gather(*(user(client, left) for _ in range(args.users)))
        parts.append(await at_rest(base, process))
    warm, end = parts
    growth = end["bytes"] / warm["bytes"] - 1
    failed = wrong[:5]
    failed += [f"{end['pages']} pages are still used"] * bool(end["pages"])
    failed += [f"descriptors: {warm['descriptors']}, then {end['descriptors']}"] * (
        end["descriptors"] > warm["descriptors"]
    )
    failed += [f"resident memory grew by {growth:.1%}"] * (growth > 0.05)
    return {
        "requests": args.requests,
        "users": args.users,
        "seconds": round(time.monotonic() - start, 1),
        "answers": dict(seen),
        "wrong": len(wrong),
        "warm": warm,
        "end": end,
        "growth": round(growth, 4),
        "failed": failed,
    }


def main() -> int:
    """Start a server, ask it, end it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=24, help="requests at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = [args.model] if args.model else []
    code = "from ktcompile.cli import script; script()"
    command = [sys.executable, "-c", code, "serve", *model, "--port", "0", "--cache-lens", "4096"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        base = next(line.split(" at ")[1].split("/,")[0] for line in server.stderr if line.startswith("serving "))
        try:
            found = asyncio.run(soak(base, server.pid, args))
        finally:
            server.send_signal(signal.SIGTERM)
    found["exit"] = server.returncode
    print(json.dumps(found))
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
