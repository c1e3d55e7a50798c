"""The embedded model on this machine's GPU against the CPU in fp32: one JSON object. Run by `make gpu-test`."""

import json
import platform
import sys
import time

import torch

from ktcompile.checkpoint import open_checkpoint
from ktcompile.generate import Sampling, Session, stop_tokens
from ktcompile.model import load
from ktcompile.target import Target, detect

PROMPTS = (
    "What is the capital of France?",
    "Tell me a story about a dog named Max.",
    "Write a Python function that reverses a string.",
)


def answer(model, checkpoint, prompt: str, most: int) -> tuple[list[int], str]:
    """Greedy answer to one prompt: everything the cache holds after it, and the text."""
    session = Session(
        model, checkpoint.tokenizer, Sampling(temperature=0), stop_tokens(checkpoint.tokenizer, checkpoint.generation)
    )
    text = checkpoint.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids = checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(session.stream(ids, most))
    return list(session.seen), "".join(pieces)


def forced(model, ids: list[int]) -> torch.Tensor:
    """Log-probabilities `[T, vocabulary]` with the sequence forced, in one step."""
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1).cpu()


def main() -> int:
    if not torch.cuda.is_available():
        print(json.dumps({"gpu": None, "why": "torch sees no CUDA device; nothing was checked"}))
        return 0
    checkpoint = open_checkpoint()
    host = detect().host
    cpu = load(checkpoint, target=Target((host,)), dtype="fp32")
    start = time.perf_counter()
    gpu = load(checkpoint)
    report = {
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_s": round(time.perf_counter() - start, 2),
        "kernels": sorted(
            {f"{r.op}:{r.kernel}@{r.device}" for r in gpu.plans["decode"].rows if r.op in ("mla", "moe")}
        ),
        "prompts": [],
    }
    good = True
    for prompt in PROMPTS:
        ids, text = answer(cpu, checkpoint, prompt, 64)
        _, on_gpu = answer(gpu, checkpoint, prompt, 64)
        a, b = forced(cpu, ids), forced(gpu, ids)
        chosen = torch.tensor(ids[1:])
        rows = torch.arange(len(ids) - 1)
        difference = (a[:-1][rows, chosen] - b[:-1][rows, chosen]).abs().mean().item()
        same = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
        good &= difference < 0.05 and same > 0.9
        report["prompts"].append(
            {
                "prompt": prompt,
                "cpu": text,
                "gpu": on_gpu,
                "mean_logprob_difference": round(difference, 5),
                "same_argmax": round(same, 4),
            }
        )
    report["paris"] = "Paris" in report["prompts"][0]["gpu"]
    report["ok"] = bool(good and report["paris"])
    print(json.dumps(report, indent=1, ensure_ascii=False))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
