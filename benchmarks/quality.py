"""Perplexity of the tiny DeepSeek-V3 on held-out text, for each lossy mode: JSON lines.

    python benchmarks/quality.py

Every line says what was asked for and what the page calls lossy. The text and the reference numbers are in tests/data.
"""

import json
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from heldout import DATA, perplexity  # noqa: E402

import ktcompile  # noqa: E402
from ktcompile.checkpoint import EMBEDDED, open_checkpoint  # noqa: E402
from ktcompile.target import Target, detect  # noqa: E402

FP8 = DATA / "tiny-deepseek-v3"
GGUF = Path(ktcompile.__file__).parent / "assets" / EMBEDDED
RUNS = (
    {"model": FP8},
    {"model": GGUF},
    {"model": FP8, "gguf": GGUF},
    {"model": FP8, "quantize": "int8"},
    {"model": FP8, "quantize": "q6_k"},
    {"model": FP8, "quantize": "q5_0"},
    {"model": FP8, "quantize": "int4"},
    {"model": FP8, "dtype": "bf16"},
    {"model": FP8, "experts": 6},
    {"model": FP8, "experts": 4},
)


def main() -> None:
    host = Target((detect().host,))
    first = None
    for run in RUNS:
        settings = dict(run)
        checkpoint = open_checkpoint(settings.pop("model"), settings.pop("gguf", None))
        with torch.inference_mode():
            model = ktcompile.load(checkpoint, target=host, **settings)
            found = perplexity(model, checkpoint.tokenizer)
        first = first or found
        experts = [r for r in model.plans["decode"].rows if r.op == "moe"]
        print(
            json.dumps(
                {
                    **{k: Path(v).name if isinstance(v, Path) else v for k, v in run.items()},
                    "perplexity": round(found, 4),
                    "change": f"{100 * (found / first - 1):+.2f} %",
                    "stored": sorted({r.encoding for r in experts}),
                    "packed_mb": round(sum(r.nbytes for r in experts) / 1e6, 2),
                    "kernels": sorted({r.kernel for r in experts}),
                    "lossy": list(model.plans["decode"].lossy),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
