"""A family of models: one table that says which metadata is which field of the config, read in both directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ktcompile.gguf_config.access import Config, Fields, Metadata
from ktcompile.gguf_config.rope import rope_fields, rope_metadata
from ktcompile.weights.gguf_header import Value

SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3  # expert_gating_func; gpt-oss has the last


@dataclass(frozen=True)
class Row:
    """`<architecture>.<key>` is the field `field`.

    `default` is what llama.cpp takes if a file leaves the key out, or what the models of before the key had; without
    it the key must be there. `alias` is the field's other name.
    """

    key: str
    field: str
    kind: Literal["integer", "number", "flag"] = "integer"
    default: Callable[[Metadata], int | float | bool | None] | None = None
    alias: str = ""

    def read(self, m: Metadata) -> object:
        """The field's value."""
        if self.default is not None and not m.has(self.key):
            return self.default(m)
        if self.kind == "integer":
            return m.integer(self.key)
        return m.number(self.key) if self.kind == "number" else m.flag(self.key)

    def write(self, c: Config) -> dict[str, Value]:
        """The key and its value; nothing for a field that is None where files may leave the key out."""
        names = (self.field, self.alias) if self.alias else (self.field,)
        if self.default is not None and c.first(*names) is None:
            return {}
        if self.kind == "integer":
            return {self.key: c.integer(*names)}
        return {self.key: c.number(*names) if self.kind == "number" else c.flag(*names)}


@dataclass(frozen=True)
class Family:
    """What one `model_type` needs of the metadata of one architecture.

    `fixed(layers)`: fields that the architecture leaves no choice about. `shown_by`: flags that no key says, each with
    a tensor that only models with the flag have, and the flag of the published models for when names are not known.
    """

    architecture: str
    model_type: str
    model_class: str
    rows: tuple[Row, ...]
    fixed: Callable[[int], Fields]
    gating: int
    shown_by: Mapping[str, tuple[str, bool]]
    rotary: Literal["whole", "partial", "mla"] = "whole"
    yarn_truncates: bool = True
    has_head_dim: bool = True  # a field of the config, not always hidden_size / num_attention_heads
    has_nextn: bool = False

    def fields(self, m: Metadata) -> Fields:
        """Fields of the config class."""
        if m.integer("expert_gating_func", 0) not in (0, self.gating):
            raise m.wrong("expert_gating_func", f"{self.gating} is needed for {self.model_type}")
        nextn = m.integer("nextn_predict_layers", 0)
        layers = m.integer("block_count") - nextn
        out: Fields = {
            "model_type": self.model_type,
            "architectures": [self.model_class],
            "vocab_size": _vocabulary(m),
            "num_hidden_layers": layers,
        }
        out |= {row.field: row.read(m) for row in self.rows}
        out |= self.fixed(max(0, min(layers, 4096)))
        out["rope_parameters"] = rope_fields(m, is_mla=self.rotary == "mla", truncate=self.yarn_truncates)
        out |= {flag: _shown(m, tensor, usual) for flag, (tensor, usual) in self.shown_by.items()}
        out["tie_word_embeddings"] = not _shown(m, "output.weight", True)
        if self.has_nextn:
            out["num_nextn_predict_layers"] = nextn
        return out if self.rotary == "mla" else out | self._head(m, out["rope_parameters"])

    def metadata(self, c: Config) -> dict[str, Value]:
        """Keys after `<architecture>.`; ModelFileError for a field that this architecture cannot say."""
        layers = c.integer("num_hidden_layers")
        for field, value in self.fixed(layers).items():
            if c.first(field) not in (None, value):
                raise c.wrong(field, f"{self.architecture} can only say {str(value)[:80]}")
        out: dict[str, Value] = {"vocab_size": c.integer("vocab_size"), "block_count": layers}
        for row in self.rows:
            out |= row.write(c)
        if self.gating == SIGMOID or self.rotary == "mla":
            out["expert_gating_func"] = self.gating
        out |= rope_metadata(c, is_mla=self.rotary == "mla", truncate=self.yarn_truncates)
        return out if self.rotary == "mla" else out | self._head_metadata(c)

    def _head(self, m: Metadata, rope: object) -> Fields:
        """head_dim, and which part of it is turned."""
        hidden, heads = m.integer("embedding_length"), m.integer("attention.head_count")
        if heads < 1:
            raise m.wrong("attention.head_count", "1 or more is needed")
        width = m.integer("attention.key_length", hidden // heads)
        turned = m.integer("rope.dimension_count", width)
        if m.integer("attention.value_length", width) != width:
            raise m.wrong("attention.value_length", f"attention.key_length is {width}: they must be the same")
        if not self.has_head_dim and width != hidden // heads:
            raise m.wrong("attention.key_length", f"embedding_length / head_count = {hidden // heads} is needed")
        out: Fields = {"head_dim": width} if self.has_head_dim else {}
        if self.rotary == "whole" and turned != width:
            raise m.wrong("rope.dimension_count", f"all {width} of a head must be turned")
        if self.rotary == "partial":
            if not 0 < turned <= width:
                raise m.wrong("rope.dimension_count", f"1 to {width} of a head can be turned")
            assert isinstance(rope, dict)
            rope["partial_rotary_factor"] = _share(turned, width)
        return out

    def _head_metadata(self, c: Config) -> dict[str, Value]:
        usual = c.integer("hidden_size") // c.integer("num_attention_heads")
        width = usual if c.first("head_dim") is None else c.integer("head_dim")
        if not self.has_head_dim and width != usual:
            raise c.wrong("head_dim", f"hidden_size / num_attention_heads = {usual} is needed")
        p = c.inner("rope_parameters")
        share = 1.0 if p.first("partial_rotary_factor") is None else p.number("partial_rotary_factor")
        if self.rotary == "whole" and share != 1.0:
            raise p.wrong("partial_rotary_factor", f"{self.architecture} turns whole heads")
        turned = int(width * share)
        return {"attention.key_length": width, "attention.value_length": width, "rope.dimension_count": turned}


def gqa_rows(experts: str, *, alias: str = "") -> tuple[Row, ...]:
    """What all families with grouped queries have; `experts` is the field that counts the routed experts."""
    return (
        Row("context_length", "max_position_embeddings"),
        Row("embedding_length", "hidden_size"),
        Row("attention.head_count", "num_attention_heads"),
        Row("attention.head_count_kv", "num_key_value_heads", default=lambda m: m.integer("attention.head_count")),
        Row("attention.layer_norm_rms_epsilon", "rms_norm_eps", "number"),
        Row("expert_count", experts, alias=alias),
        Row("expert_used_count", "num_experts_per_tok"),
    )


def guessed_expert_width(m: Metadata) -> int:
    """llama.cpp's expert_feed_forward_length for Qwen files without the key."""
    return m.integer("feed_forward_length") // max(1, m.integer("expert_used_count"))


def _vocabulary(m: Metadata) -> int:
    """vocab_size, or the number of tokens: llama.cpp writes the key for some architectures only."""
    tokens = m.values.get("tokenizer.ggml.tokens")
    return m.integer("vocab_size", len(tokens)) if isinstance(tokens, list) else m.integer("vocab_size")


def _shown(m: Metadata, tensor: str, usual: bool) -> bool:
    """Whether the file has a tensor; `usual` if its names are not known."""
    return tensor in m.tensors if m.tensors else usual


def _share(part: int, whole: int) -> float:
    """The fraction that `int(whole * fraction)` makes `part` of again."""
    share = part / whole
    return share if int(whole * share) == part else (part + 0.5) / whole
