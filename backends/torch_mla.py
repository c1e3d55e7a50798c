"""mla on a CPU, in torch: each request attends to its own pages alone.

The captured code pads all requests of a step to the longest, and makes keys and values of every head for all of that.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ktcompile import Region, Target, value_of
from ktcompile.backends.mla import TritonMLA
from ktcompile.backends.triton_mla import absorb
from ktcompile.backends.triton_mla_expanded import expands
from ktcompile.ops.mla import MLAShape, append_reference, parts_of, rope_reference, unpacked
from ktcompile.symbols import PAGE, Sizes, concrete, nbytes

SCORES = 1 << 22
"""Scores in memory at once, of one request: its queries are taken so many at a time."""


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention in float32 of the last positions over all of them, `[heads, n, v]`.

    `queries [heads, n, d]`; `keys [heads or 1, L, d]` and `values [heads or 1, L, v]`, of which the last n are the
    queries' own.
    """
    heads, count, _ = queries.shape
    length, step = keys.shape[1], max(1, SCORES // (heads * keys.shape[1]))
    mixed = []
    for at in range(0, count, step):
        some = queries[:, at : at + step] * scale
        end = length - count + at + some.shape[1]  # what its last query sees
        scores = some @ keys[:, :end].mT
        own = scores[..., end - some.shape[1] :]
        own.masked_fill_(torch.ones(own.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
        mixed.append(scores.softmax(-1) @ values[:, :end])
    return torch.cat(mixed, 1)


class TorchMLA(TritonMLA):
    """Ragged latent attention, request by request, absorbed or expanded. Weights decoded once."""

    name = "torch_mla"
    device = "cpu"

    def refuses(self, region: Region, target: Target) -> str | None:
        return None

    def missing(self) -> str | None:
        return None

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        """Of one call, everything that it makes: scores twice, a request's context in its larger form, projections."""
        shape, roles = region.binding.shape, region.binding.roles
        hidden, table = (value_of(region.inputs[roles[r]]) for r in ("hidden", "page_table"))
        pages = concrete(table.shape[1], sizes)
        tokens = nbytes(hidden, sizes) // int(hidden.shape[-1] * hidden.element_size())
        context = PAGE * (pages if isinstance(pages, int) else 1)
        per_head = shape.nope + shape.rope + shape.v
        scores = min(tokens * shape.heads * context, max(SCORES, shape.heads * context))
        row = 4 * shape.heads * (per_head + shape.lora) + 2 * sum(
            int(value_of(w).shape[0]) for w in region.weights.values() if value_of(w).dim() > 1
        )
        return int(4 * (2 * scores + context * shape.heads * per_head + tokens * row))

    def run(
        self,
        weights: Mapping[str, Any],
        shape: MLAShape,
        inputs: Sequence[Tensor],
        project: Callable[[Any, Any, Tensor | None], Tensor] = functional.linear,
        share: Callable[[Tensor], Any] = torch.Tensor.detach,
    ) -> Tensor:
        """The whole block, from `inputs` in the order of the op's roles."""
        hidden, cos, sin, pool, page_table, seq_len, query_start = inputs
        x, (cos, sin) = hidden.reshape(-1, hidden.shape[-1]), parts_of(cos, sin)

        def linear(x: Tensor, role: str) -> Tensor:
            return project(x, weights[role], weights.get(f"{role}.bias"))

        def norm(x: Tensor, role: str) -> Tensor:
            return functional.rms_norm(x, weights[role].shape, weights[role], shape.eps)

        plain = "q_proj" in weights
        query = linear(x, "q_proj") if plain else linear(norm(linear(x, "q_a_proj"), "q_a_layernorm"), "q_b_proj")
        nope, turned = query.view(len(x), shape.heads, -1).split_with_sizes([shape.nope, shape.rope], -1)
        latent, key = linear(x, "kv_a_proj_with_mqa").split_with_sizes([shape.lora, shape.rope], -1)
        rows = torch.cat([norm(latent, "kv_a_layernorm"), rope_reference(key, cos, sin, shape)], -1)
        append_reference(pool, page_table, seq_len, query_start, rows)
        turned = rope_reference(turned, cos, sin, shape)

        w_uk, w_uv = (w.float() for w in absorb(weights["kv_b_proj"], shape))  # [heads, nope or v, lora]
        values = torch.zeros(shape.heads, len(x), shape.v)
        for r, (start, end) in enumerate(pairwise(query_start.tolist())):
            if start == end:
                continue
            length = int(seq_len[r]) + end - start
            stored = pool[page_table[r, : -(-length // pool.shape[1])]].flatten(0, 1)[:length]
            latents, keys = (part.float()[None] for part in unpacked(stored, shape.lora))  # [1, L, lora], [1, L, rope]
            own, own_turned = (part[start:end].transpose(0, 1).float() for part in (nope, turned))
            if expands(end - start, 1, length, shape):
                own_keys = torch.cat([latents @ w_uk.mT, keys.expand(shape.heads, -1, -1)], -1)
                found = attend(torch.cat([own, own_turned], -1), own_keys, latents @ w_uv.mT, shape.scale)
            else:
                queries = torch.cat([own @ w_uk, own_turned], -1)
                found = attend(queries, torch.cat([latents, keys], -1), latents, shape.scale) @ w_uv.mT
            values[:, start:end] = found
        return linear(values.transpose(0, 1).reshape(len(x), -1).to(x.dtype), "o_proj").view(hidden.shape)
