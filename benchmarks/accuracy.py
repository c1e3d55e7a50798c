"""Where the error of bf16 comes from: the embedded model in float32, with single values rounded to bf16. A table.

    python benchmarks/accuracy.py [--windows 22]

The forward pass is written out here, since no kernel rounds one thing alone; with nothing rounded it agrees with
`ktcompile.load` in fp32, which is checked first. Then `load` in bf16, with the pass `widen` and without it. Of each:
tokens of held-out text whose most likely next token is fp32's, and the error |got - want| / |want| of a token's logits.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from gpu_check import HELD_OUT, WINDOW, compare, logits
from torch import Tensor
from torch.nn import functional

from ktcompile.checkpoint import open_checkpoint
from ktcompile.model import load
from ktcompile.pipeline import Pipeline, load_rules
from ktcompile.target import Target, detect
from ktcompile.weights import values

PLACES = {
    "logits": "logits",
    "sums of layers (residual stream)": "stream",
    "queries, latents, heads of attention": "query latent heads",
    "latent cache": "cache",
    "weights of attention": "w_attention",
    "output of attention": "attention",
    "norms, as all read them": "norm",
    "x of the router": "router_x",
    "x of the routed experts": "experts_x",
    "hidden layer of the routed experts": "experts_h",
    "output of the routed experts": "experts",
    "routed + shared experts": "experts_sum",
    "shared expert, hidden layer and output": "shared_h shared",
    "dense MLP, hidden layer and output": "dense_h dense",
    "weights of routed experts": "w_experts",
    "weights of shared expert and dense MLP": "w_shared w_dense",
    "weights of the head": "w_head",
    "embedding": "w_embed",
    "weights of router and norms": "w_router w_norm",
}
"""What is rounded, and by which names `Model` knows it."""

TOGETHER = {
    "all": "",
    "all but logits": "logits",
    "all but sums": "stream",
    "all but logits, sums": "logits stream",
    "and but routed + shared": "logits stream experts_sum",
    "and but x of the router": "logits stream router_x",
    "and but outputs of attention, experts, MLP": "logits stream experts_sum experts shared attention dense",
    "and but insides of attention": "logits stream query latent heads",
    "and but all weights": "logits stream w_attention w_experts w_shared w_dense w_head w_embed",
}


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


class Model:
    """The embedded DeepSeek-V3 on one text, in float32 but for the places in `narrow`."""

    def __init__(self, config, weights: dict[str, Tensor], narrow: set[str]) -> None:
        self.config, self.weights, self.narrow = config, weights, narrow
        angle = torch.arange(WINDOW)[:, None] / 10000.0 ** (torch.arange(0, config.qk_rope_head_dim, 2) / 32)
        self.cos, self.sin = angle.cos(), angle.sin()

    def at(self, place: str, x: Tensor) -> Tensor:
        return rounded(x) if place in self.narrow else x

    def weight(self, name: str, place: str) -> Tensor:
        return self.at(place, self.weights[name])

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self.weight(f"{name}.weight", "w_norm")

    def turned(self, x: Tensor) -> Tensor:
        """Rotated, in pairs of neighbours: `[T, ..., rope]`."""
        cos, sin = (t.view(len(x), *(1,) * (x.dim() - 2), -1) for t in (self.cos, self.sin))
        return torch.cat([x[..., ::2] * cos - x[..., 1::2] * sin, x[..., 1::2] * cos + x[..., ::2] * sin], -1)

    def attention(self, x: Tensor, path: str) -> Tensor:
        c = self.config
        heads, lora, nope = c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim

        def times(x: Tensor, name: str) -> Tensor:
            return x @ self.weight(f"{path}.{name}.weight", "w_attention").T

        query = self.at("query", times(x, "q_a_proj"))
        query = self.at("query", self.norm(query, f"{path}.q_a_layernorm"))
        query = self.at("query", times(query, "q_b_proj")).view(len(x), heads, -1)
        latent, key = self.at("latent", times(x, "kv_a_proj_with_mqa")).split_with_sizes([lora, c.qk_rope_head_dim], -1)
        latent = self.at("cache", self.at("latent", self.norm(latent, f"{path}.kv_a_layernorm")))
        key = self.at("cache", self.at("latent", self.turned(key)))
        turned = self.at("query", self.turned(query[..., nope:]))
        up = self.weight(f"{path}.kv_b_proj.weight", "w_attention").view(heads, -1, lora)
        keys, values_ = (torch.einsum("tl,hnl->thn", latent, w) for w in (up[:, :nope], up[:, nope:]))
        scores = torch.einsum("thn,shn->hts", query[..., :nope], keys) + torch.einsum("thn,sn->hts", turned, key)
        scores = scores * (nope + c.qk_rope_head_dim) ** -0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        mixed = torch.einsum("hts,shv->thv", scores.masked_fill(later, -torch.inf).softmax(-1), values_)
        return self.at("attention", times(self.at("heads", mixed.flatten(1)), "o_proj"))

    def mlp(self, x: Tensor, path: str, place: str) -> Tensor:
        gate, up = (
            self.at(f"{place}_h", x @ self.weight(f"{path}.{n}_proj.weight", f"w_{place}").T) for n in ("gate", "up")
        )
        hidden = self.at(f"{place}_h", self.at(f"{place}_h", functional.silu(gate)) * up)
        return self.at(place, hidden @ self.weight(f"{path}.down_proj.weight", f"w_{place}").T)

    def experts(self, x: Tensor, path: str) -> Tensor:
        """`x`: the norm, not rounded."""
        c = self.config
        score = (self.at("router_x", x) @ self.weight(f"{path}.gate.weight", "w_router").T).sigmoid()
        grouped = (score + self.weights[f"{path}.gate.e_score_correction_bias"]).unflatten(1, (c.n_group, -1))
        best = grouped.topk(2, -1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter(1, best.topk(c.topk_group, -1)[1], 1).bool()
        ids = grouped.masked_fill(~kept[..., None], 0.0).flatten(1).topk(c.num_experts_per_tok, -1)[1]
        scores = score.gather(1, ids)
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        share = torch.zeros_like(score).scatter(1, ids, scores)  # [T, E]
        both, down = (self.weight(f"{path}.experts.{n}_proj", "w_experts") for n in ("gate_up", "down"))
        given, out = self.at("experts_x", x), torch.zeros_like(x)
        for e in range(c.n_routed_experts):
            rows = share[:, e].nonzero()[:, 0]
            gate, up = (given[rows] @ both[e].T).chunk(2, -1)
            hidden = self.at("experts_h", functional.silu(gate) * up)
            out.index_add_(0, rows, share[rows, e, None] * (hidden @ down[e].T))
        shared = self.mlp(self.at("norm", x), f"{path}.shared_experts", "shared")
        return self.at("experts_sum", self.at("experts", out) + shared)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits `[T, vocabulary]`."""
        x = self.weight("model.embed_tokens.weight", "w_embed")[ids]
        for i in range(self.config.num_hidden_layers):
            path = f"model.layers.{i}"
            normed = self.at("norm", self.norm(x, f"{path}.input_layernorm"))
            x = self.at("stream", x + self.attention(normed, f"{path}.self_attn"))
            normed = self.norm(x, f"{path}.post_attention_layernorm")
            if i < self.config.first_k_dense_replace:
                x = self.at("stream", x + self.mlp(self.at("norm", normed), f"{path}.mlp", "dense"))
            else:
                x = self.at("stream", x + self.experts(normed, f"{path}.mlp"))
        normed = self.at("norm", self.norm(x, "model.norm"))
        return self.at("logits", normed @ self.weight("lm_head.weight", "w_head").T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=22, help="of 512 tokens; the text has 22")
    count = parser.parse_args().windows
    checkpoint, host = open_checkpoint(), Target((detect().host,))
    ids = torch.tensor(checkpoint.tokenizer(HELD_OUT.read_text(), add_special_tokens=False)["input_ids"])
    windows = ids[: count * WINDOW].view(count, WINDOW)
    source = checkpoint.source
    weights = {key: values(source, key, torch.float32) for key in source.keys()}  # noqa: SIM118

    want = logits(load(checkpoint, target=host, dtype="fp32"), checkpoint, windows=count)

    def line(name: str, got: list[Tensor]) -> None:
        found = compare(want, got)
        same, middle, tenth = (found[key] for key in ("same_argmax", "median_error", "error_90"))
        print(f"| {name} | {same:.2%} | {middle:.5f} | {tenth:.5f} |", flush=True)

    def narrowed(places: set[str]) -> list[Tensor]:
        return list(map(Model(checkpoint.config, weights, places), windows))

    print(f"{windows.numel()} tokens\n")
    print("| rounded to bf16 | same argmax | median error | of one in ten |\n|---|---|---|---|")
    line("nothing", narrowed(set()))
    for name, places in PLACES.items():
        line(name, narrowed(set(places.split())))
    every = {place for places in PLACES.values() for place in places.split()}
    for name, places in TOGETHER.items():
        line(name, narrowed(every - set(places.split())))
    line("`load` in bf16", logits(load(checkpoint, target=host, dtype="bf16"), checkpoint, windows=count))
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "rules.yaml"
        rules.write_text(Pipeline(tuple(p for p in load_rules("deepseek-v3").passes if p.name != "widen")).dump())
        model = load(checkpoint, target=host, dtype="bf16", rules=rules)
    line("the same without `widen`", logits(model, checkpoint, windows=count))


if __name__ == "__main__":
    with torch.no_grad():
        main()
