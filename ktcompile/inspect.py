"""Say what is in a model file, from its headers alone: `ktrans inspect`."""

import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ktcompile.errors import ModelFileError
from ktcompile.gguf_config import config_fields
from ktcompile.kernel import available
from ktcompile.tokenizer import PRE_TOKENIZERS
from ktcompile.verify import gib
from ktcompile.weights import GGUFSource, SafetensorsSource
from ktcompile.weights.collection import no_collection
from ktcompile.weights.file import ModelFile
from ktcompile.weights.gguf import shards as gguf_shards
from ktcompile.weights.gguf_header import Header, Value, read_header
from ktcompile.weights.json import load_json
from ktcompile.weights.names import ARCHITECTURES, expected_unused
from ktcompile.weights.quantization import scale_block
from ktcompile.weights.quoted import plain

MAX_JSON_BYTES = 16 << 20
WIDTH = 110  # columns of the page

Fields = Mapping[str, object]

_GROUPS = (  # name -> what the names of its tensors hold, GGUF's and Hugging Face's; the first that fits is taken
    ("embedding", re.compile(r"token_embd\.|(.*\.)?embed_tokens\.")),
    ("output", re.compile(r"output\.(weight|bias)|(.*\.)?lm_head\.")),
    ("norms", re.compile(r".*norm")),
    ("shared experts", re.compile(r".*(_shexp\.|\.shared_experts?[._])")),
    ("router", re.compile(r".*(ffn_gate_inp\.|exp_probs_b|\.gate\.(weight|bias|e_score)|\.router\.)")),
    ("routed experts", re.compile(r".*(_exps\.|\.ffn_(gate|up|down)\.\d+\.|\.experts[._])")),
    ("attention", re.compile(r".*(\.attn_|self_attn\.|\.attention\.)")),
    ("dense ffn", re.compile(r".*(\.ffn_(gate|up|down)\.|\.mlp\.)")),
)
_ORDER = (
    "embedding",
    "attention",
    "router",
    "routed experts",
    "shared experts",
    "dense ffn",
    "norms",
    "output",
    "other",
    "prediction layers",
)
_PREDICTION = _ORDER[-1]
"""Layers for multi-token prediction: stored, and not run."""

_GENERIC = {  # what every GGUF architecture says of itself -> the field of config.json
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "rope.freq_base": "rope_theta",
}


@dataclass(frozen=True, slots=True)
class Item:
    """A stored tensor, or one parameter's share of several: its name decides the group."""

    name: str
    encoding: str
    values: int
    nbytes: int


@dataclass
class Group:
    """Tensors with one part in the model. `types`: encoding -> tensors, values, bytes."""

    name: str
    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    types: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def add(self, item: Item) -> None:
        """Count one more tensor."""
        count, values, nbytes = self.types.get(item.encoding, (0, 0, 0))
        self.types[item.encoding] = (count + 1, values + item.values, nbytes + item.nbytes)
        self.tensors += 1
        self.parameters += item.values
        self.nbytes += item.nbytes


@dataclass(frozen=True)
class Report:
    """Everything that the page says. Counts of parameters leave prediction layers out; `problem`: why it cannot run."""

    name: str
    path: str
    form: str
    files: int
    file_bytes: int
    architecture: str
    model_class: str
    parameters: int
    active: int
    config: Fields
    groups: tuple[Group, ...]
    tokenizer: Mapping[str, object]
    template: Mapping[str, object]
    unused: tuple[str, ...]
    cpu: Mapping[str, object]
    problem: str | None


def inspect_json(path: str) -> dict[str, object]:
    """The facts of `inspect_text` as JSON values. ModelFileError as for it."""
    report = asdict(_report(Path(path)))
    groups = [
        {
            **g,
            "types": {e: dict(zip(("tensors", "parameters", "nbytes"), t, strict=True)) for e, t in g["types"].items()},
        }
        for g in report["groups"]
    ]
    return {"version": 1, **report, "groups": groups, "unused": list(report["unused"])}


def inspect_text(path: str) -> str:
    """One screen about a .gguf file (any of a split model's), a .safetensors file or a model's folder.

    Reads headers and small JSON files only. Raises ModelFileError for a file that is missing or damaged; a model that
    is not known is described as far as its header goes.
    """
    report = _report(Path(path))
    sections = (_head(report), _table(report.groups), _rest(report))
    return "\n".join("\n".join(line.rstrip() for line in section) + "\n" for section in sections if section)


def _report(path: Path) -> Report:
    with no_collection():
        return _described(path)


def _described(path: Path) -> Report:
    if path.is_dir() or path.suffix == ".safetensors":
        return _safetensors(path)
    if not path.exists():
        raise ModelFileError(f"{path}: no such file or folder")
    return _gguf(path)


# ------------------------------------------------------------------------------------------------ GGUF


def _gguf(path: Path) -> Report:
    files = [ModelFile(p) for p in gguf_shards(path)]
    headers = [read_header(file) for file in files]
    metadata = headers[0].metadata
    items = [_stored(header, name) for header in headers for name in header.tensors]
    architecture = str(metadata.get("general.architecture", "not said"))
    config, problem, unused, beyond = _gguf_config(path, metadata, architecture)
    groups = _grouped(items, frozenset(beyond))
    parameters, active = _parameters(groups, config)
    name = metadata.get("general.name")
    return Report(
        name=name if isinstance(name, str) and name else path.stem,
        path=str(path),
        form="GGUF",
        files=len(files),
        file_bytes=sum(file.size_bytes for file in files),
        architecture=architecture,
        model_class=_first(config.get("architectures")),
        parameters=parameters,
        active=active,
        config=_shown_config(config, metadata),
        groups=groups,
        tokenizer=_gguf_tokenizer(metadata),
        template=_template(metadata.get("tokenizer.chat_template")),
        unused=unused,
        cpu=_cpu(groups),
        problem=problem,
    )


def _stored(header: Header, name: str) -> Item:
    stored = header.tensors[name]
    return Item(name, stored.type.name, math.prod(stored.shape), stored.nbytes)


def _gguf_config(
    path: Path, metadata: Mapping[str, Value], architecture: str
) -> tuple[Fields, str | None, tuple[str, ...], tuple[str, ...]]:
    """Fields of the config, why the model cannot run, tensors that nothing reads, tensors of prediction layers."""
    prefix = f"{architecture}."
    generic = {field: metadata[prefix + key] for key, field in _GENERIC.items() if prefix + key in metadata}
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        return generic, f"architecture {architecture!r} is not known; known are {known}", (), ()
    try:
        source = GGUFSource(path)
        fields = config_fields(metadata, str(path), source.stored())
    except ModelFileError as error:
        return generic, str(error), (), ()
    unread = source.unused()
    beyond = expected_unused(architecture, metadata, unread)
    return fields, None, tuple(name for name in unread if name not in set(beyond)), beyond


def _gguf_tokenizer(metadata: Mapping[str, Value]) -> dict[str, object]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return {}
    found: dict[str, object] = {"model": metadata.get("tokenizer.ggml.model"), "tokens": len(tokens)}
    if (pre := metadata.get("tokenizer.ggml.pre")) is not None:
        found |= {"pre": pre, "pre_known": pre in PRE_TOKENIZERS}
    for role in ("bos", "eos"):
        number = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[role] = tokens[number]
    return found


# ------------------------------------------------------------------------------------------------ safetensors


def _safetensors(path: Path) -> Report:
    folder = path if path.is_dir() else path.parent
    config_path = folder / "config.json"
    fields: Fields = load_json(config_path, MAX_JSON_BYTES) if config_path.is_file() else {}
    if path.is_dir() and not fields:
        inside = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; give the file itself: {path}/{plain(inside[0])}" if inside else ""
        raise ModelFileError(f"{path}: no config.json in this folder{hint}")
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        return _config_only(path, fields)
    problem = None if fields else f"there is no config.json beside {path.name}; give the model's folder"
    shard = re.search(r"-\d{5}-of-(\d{5})\.safetensors$", path.name)
    if problem is None and shard and int(shard[1]) > 1:
        problem = f"this is one of {int(shard[1])} files; give the model's folder"
    try:
        block = scale_block(fields.get("quantization_config"), str(config_path))
    except ModelFileError as error:
        block, problem = 128, str(error)
    source = SafetensorsSource(path, block=block)
    layers = _integer(fields, "num_hidden_layers")
    items: list[Item] = []
    unused: tuple[str, ...] = ()
    try:
        for key in source.keys():  # noqa: SIM118  (a weight source is no mapping)
            items += [Item(key, p.spec.encoding, math.prod(p.spec.shape), p.spec.nbytes) for p in source.parts(key)]
        unused = source.unused()
    except ModelFileError as error:  # a tensor that cannot be decoded: what came before it is still shown
        problem = problem or str(error)
    names = dict.fromkeys(i.name for i in items)
    beyond = frozenset(n for n in names if layers and (m := _LAYER.match(n)) and int(m[1]) >= layers)
    groups = _grouped(items, beyond)
    parameters, active = _parameters(groups, fields)
    return Report(
        name=folder.resolve().name if path.is_dir() else path.stem,
        path=str(path),
        form="safetensors",
        files=len(source.files),
        file_bytes=sum(file.size_bytes for file in source.files),
        architecture=str(fields.get("model_type", "not said")),
        model_class=_first(fields.get("architectures")),
        parameters=parameters,
        active=active,
        config=_shown_config(fields, {}),
        groups=groups,
        tokenizer=_folder_tokenizer(folder),
        template=_template(_folder_template(folder)),
        unused=unused,
        cpu=_cpu(groups),
        problem=problem,
    )


_LAYER = re.compile(r"(?:.*\.)?layers\.(\d{1,6})\.")


def _config_only(path: Path, fields: Fields) -> Report:
    return Report(
        name=path.resolve().name,
        path=str(path),
        form="a configuration without weights",
        files=0,
        file_bytes=0,
        architecture=str(fields.get("model_type", "not said")),
        model_class=_first(fields.get("architectures")),
        parameters=0,
        active=0,
        config=_shown_config(fields, {}),
        groups=(),
        tokenizer=_folder_tokenizer(path),
        template=_template(_folder_template(path)),
        unused=(),
        cpu={},
        problem="there are no weights (*.safetensors) in the folder: it can be explained, not run",
    )


def _folder_tokenizer(folder: Path) -> dict[str, object]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    settings = _settings(folder)
    found: dict[str, object] = {"model": "tokenizer.json", "nbytes": file.stat().st_size}
    for role in ("bos", "eos"):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            found[role] = token
    return found


def _folder_template(folder: Path) -> object:
    beside = folder / "chat_template.jinja"
    if not beside.is_file():
        return _settings(folder).get("chat_template")
    with beside.open("rb") as file:
        return file.read(MAX_JSON_BYTES).decode("utf-8", "replace")


def _settings(folder: Path) -> Fields:
    path = folder / "tokenizer_config.json"
    return load_json(path, MAX_JSON_BYTES) if path.is_file() else {}


# ------------------------------------------------------------------------------------------------ facts of both


def _grouped(items: Iterable[Item], beyond: frozenset[str]) -> tuple[Group, ...]:
    """Items by their part in the model, in the order of the page; `beyond` names those of prediction layers."""
    groups = {name: Group(name) for name in _ORDER}
    kinds: dict[str, str] = {}  # experts that are stored one by one have the name of one parameter
    for item in items:
        if item.name not in kinds:
            found = next((name for name, pattern in _GROUPS if pattern.match(item.name)), "other")
            kinds[item.name] = _PREDICTION if item.name in beyond else found
        groups[kinds[item.name]].add(item)
    return tuple(group for group in groups.values() if group.tensors)


def _parameters(groups: Iterable[Group], config: Fields) -> tuple[int, int]:
    """All parameters, and those that one token uses: of the routed experts only its share."""
    total = active = 0
    experts, used = _experts(config), _integer(config, "num_experts_per_tok")
    for group in groups:
        if group.name == _PREDICTION:
            continue
        total += group.parameters
        is_routed = group.name == "routed experts" and experts and used
        active += group.parameters * used // experts if is_routed else group.parameters
    return total, active


def _experts(config: Fields) -> int:
    return next((n for k in ("n_routed_experts", "num_experts", "num_local_experts") if (n := _integer(config, k))), 0)


def _integer(fields: Fields, name: str) -> int:
    value = fields.get(name)
    return value if type(value) is int and value > 0 else 0


def _first(value: object) -> str:
    return str(value[0]) if isinstance(value, list) and value else ""


def _shown_config(config: Fields, metadata: Mapping[str, Value]) -> dict[str, object]:
    """The fields that the page and its JSON show, plain values only."""
    names = (
        *dict.fromkeys(_GENERIC.values()),
        "n_routed_experts",
        "num_local_experts",
        "n_group",
        "topk_group",
        "intermediate_size",
        "first_k_dense_replace",
        "num_nextn_predict_layers",
        "head_dim",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "sliding_window",
        "tie_word_embeddings",
        "rope_parameters",
        "rope_scaling",
    )
    found = {n: config[n] for n in names if config.get(n) is not None and not isinstance(config[n], np.ndarray)}
    tokens = metadata.get("tokenizer.ggml.tokens")
    if "vocab_size" not in found and isinstance(tokens, list):
        found["vocab_size"] = len(tokens)
    return found


def _template(text: object) -> dict[str, object]:
    if not isinstance(text, str) or not text.strip():
        return {}
    first = next(line.strip() for line in text.splitlines() if line.strip())
    return {
        "first_line": first if len(first) <= 48 else f"{first[:47]}…",
        "characters": len(text),
        "system": re.search(r"""['"]system['"]""", text) is not None,
        "tools": re.search(r"\btools\b", text) is not None,
        "thinking": re.search(r"\b(enable_)?thinking\b", text) is not None,
    }


def _cpu(groups: Iterable[Group]) -> dict[str, object]:
    """What becomes of the routed experts in the CPU kernels: types they read as they are, types widened to fp32."""
    routed = next((g for g in groups if g.name == "routed experts"), None)
    if routed is None:
        return {}
    kernels = [k for k in available().values() if k.op == "moe" and k.device == "cpu"]
    reads = set[str]().union(*(k.reads for k in kernels))
    kept = {t: nbytes for t, (_, _, nbytes) in routed.types.items() if t in reads}
    widened = {t: 4 * values for t, (_, values, _) in routed.types.items() if t not in reads}
    return {
        "as_stored": list(kept),
        "widened": list(widened),
        "nbytes": sum(kept.values()) + sum(widened.values()),
        "nbytes_bf16": sum(kept.values()) + sum(widened.values()) // 2,
    }


# ------------------------------------------------------------------------------------------------ the page


def _head(r: Report) -> list[str]:
    c = r.config
    bits = 8 * sum(g.nbytes for g in r.groups) / max(1, sum(g.parameters for g in r.groups))
    files = f"{r.files} files" if r.files != 1 else "1 file"
    size = f"{gib(r.file_bytes)} in {files}, {r.form}, {bits:.2f} bits a weight" if r.files else r.form
    lines = [
        ("file", size),
        ("architecture", f"{r.architecture} -> {r.model_class}" if r.model_class else r.architecture),
        ("parameters", f"{_count(r.parameters)}, {_count(r.active)} active a token" if r.parameters else ""),
        ("layers", _layers(c)),
        ("attention", _attention(c)),
        ("experts", _expert_text(c)),
        ("context", _context(c)),
        ("vocabulary", f"{c['vocab_size']:,} tokens" if "vocab_size" in c else ""),
        ("tokenizer", _tokenizer_text(r.tokenizer)),
        ("template", _template_text(r.template)),
    ]
    return [_line(r.name), "", *_rows(lines)]


def _rows(lines: Iterable[tuple[str, str]]) -> list[str]:
    rows = []
    for name, text in lines:
        wrapped = textwrap.wrap(_line(text), WIDTH - 16, break_long_words=False, break_on_hyphens=False)
        rows += [f"  {name if i == 0 else '':<13} {part}" for i, part in enumerate(wrapped)]
    return rows


def _layers(c: Fields) -> str:
    parts = [str(c["num_hidden_layers"]) if "num_hidden_layers" in c else ""]
    if dense := _integer(c, "first_k_dense_replace"):
        parts[0] += f" (the first{f' {dense}' if dense > 1 else ''} dense)" if _experts(c) else ""
    if more := _integer(c, "num_nextn_predict_layers"):
        parts[0] += f" + {more} for MTP (not run)"
    for name, label in (("hidden_size", "hidden"), ("intermediate_size", "dense ffn")):
        parts += [f"{label} {c[name]:,}"] if _integer(c, name) else []
    return ", ".join(p for p in parts if p)


def _attention(c: Fields) -> str:
    heads, kv = _integer(c, "num_attention_heads"), _integer(c, "num_key_value_heads")
    if not heads:
        return ""
    if latent := _integer(c, "kv_lora_rank"):
        query = f"query rank {c['q_lora_rank']}, " if _integer(c, "q_lora_rank") else ""
        sizes = "/".join(str(c.get(n, "?")) for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        return f"MLA, {heads} heads of {sizes} (nope/rope/value), {query}latent {latent}"
    size = f" of {c['head_dim']}" if _integer(c, "head_dim") else ""
    window = f", window {c['sliding_window']:,}" if _integer(c, "sliding_window") else ""
    return f"{heads} heads{size}, {kv or heads} for keys and values{window}"


def _expert_text(c: Fields) -> str:
    experts = _experts(c)
    if not experts:
        return ""
    parts = [f"{experts}, {c.get('num_experts_per_tok', '?')} a token"]
    if _integer(c, "n_group") > 1:
        parts.append(f"from {c.get('topk_group', '?')} of {c['n_group']} groups")
    if _integer(c, "n_shared_experts"):
        parts.append(f"{c['n_shared_experts']} shared")
    if _integer(c, "moe_intermediate_size"):
        parts.append(f"width {c['moe_intermediate_size']:,}")
    return ", ".join(parts)


def _context(c: Fields) -> str:
    length = _integer(c, "max_position_embeddings")
    given = c.get("rope_parameters") or c.get("rope_scaling")
    rope = given if isinstance(given, Mapping) else {}
    theta = rope.get("rope_theta", c.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    parts = [f"{length:,} tokens" if length else ""]
    if isinstance(theta, int | float):
        parts.append(f"rope base {theta:,.0f}")
    if kind != "default":
        origin = rope.get("original_max_position_embeddings", "?")
        factor = rope.get("factor", "?")
        parts.append(f"{kind} x {f'{factor:g}' if isinstance(factor, int | float) else factor} from {origin}")
    return ", ".join(p for p in parts if p)


def _tokenizer_text(t: Mapping[str, object]) -> str:
    if not t:
        return "none here: give the original model's folder as well"
    parts = [str(t["model"])]
    if "pre" in t:
        parts[0] += f" / {t['pre']}{'' if t['pre_known'] else ' (not known)'}"
    parts += [f"{t['tokens']:,} tokens"] if "tokens" in t else []
    parts += [gib(nbytes)] if isinstance(nbytes := t.get("nbytes"), int) else []
    parts += [f"{role.upper()} {t[role]}" for role in ("bos", "eos") if role in t]
    return ", ".join(parts)


def _template_text(t: Mapping[str, object]) -> str:
    if not t:
        return "none: `ktrans chat` has no way to write a conversation"
    takes = [name for name in ("system", "tools", "thinking") if t[name]]
    return f"{t['characters']:,} characters, takes {', '.join(takes) or 'plain messages only'}: {t['first_line']}"


def _table(groups: Sequence[Group]) -> list[str]:
    if not groups:
        return []
    rows = [("tensors", "count", "parameters", "bytes", "bits", "types")]
    for g in groups:
        mix = ", ".join(f"{t} {n:,}" for t, n in sorted(((t, v[0]) for t, v in g.types.items()), key=lambda x: -x[1]))
        rows.append((g.name, f"{g.tensors:,}", _count(g.parameters), gib(g.nbytes), _bits(g), mix))
    if len(groups) > 1:
        mix_all = Counter[str]()
        for g in groups:
            mix_all.update({t: nbytes for t, (_, _, nbytes) in g.types.items()})
        whole = Group("all", *(sum(getattr(g, n) for g in groups) for n in ("tensors", "parameters", "nbytes")))
        share = (
            ", ".join(f"{t} {100 * n / whole.nbytes:.0f} %" for t, n in mix_all.most_common(4)) if whole.nbytes else ""
        )
        rows.append(("all", f"{whole.tensors:,}", _count(whole.parameters), gib(whole.nbytes), _bits(whole), share))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        f"  {name:<{widths[0]}}  " + "  ".join(f"{v:>{w}}" for v, w in zip(rest, widths[1:], strict=True)) + f"  {mix}"
        for name, *rest, mix in rows
    ]


def _rest(r: Report) -> list[str]:
    lines = []
    if r.problem is not None:
        lines.append(("cannot run", r.problem))
    if r.unused:
        more = f" and {len(r.unused) - 3} more" if len(r.unused) > 3 else ""
        found = f"{len(r.unused)} tensor{'s' * (len(r.unused) > 1)}"
        lines.append(("unused", f"{found} that nothing reads: {', '.join(r.unused[:3])}{more}"))
    if r.cpu and r.problem is None:
        lines += _cpu_lines(r.cpu)
    path = r.path if Path(r.path).suffix != ".safetensors" else str(Path(r.path).parent)
    shown = path if re.fullmatch(r"[\w./+-]+", path) else json.dumps(path, ensure_ascii=False)
    if r.problem is None or not r.files:
        lines.append(("next", f"ktrans explain {shown}"))
    return _rows(lines)


def _cpu_lines(cpu: Mapping[str, object]) -> list[tuple[str, str]]:
    kept, widened = cpu["as_stored"], cpu["widened"]
    assert isinstance(kept, list) and isinstance(widened, list)
    nbytes, half = cpu["nbytes"], cpu["nbytes_bf16"]
    assert isinstance(nbytes, int) and isinstance(half, int)
    kept_text = f"{', '.join(kept)} as stored" if kept else ""
    wide_text = f"{', '.join(widened)} widened to fp32" if widened else ""
    lines = [
        ("on a CPU", f"routed experts take {gib(nbytes)} of RAM: {'; '.join(filter(None, (kept_text, wide_text)))}")
    ]
    if widened:
        lines.append(("", f"widened to bf16, with --dtype bf16: {gib(half)}"))
    return lines


def _bits(group: Group) -> str:
    return f"{8 * group.nbytes / max(1, group.parameters):.2f}"


def _count(number: int) -> str:
    """A number of parameters: 671.0B, 21.2M, 3.1K."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _line(text: str) -> str:
    """Text of unknown origin on one line of the page: nothing that moves a cursor, not too long."""
    clean = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: 4 * WIDTH])  # escape codes are text
    most = 3 * WIDTH
    return clean if len(clean) <= most else f"{clean[: most - 1]}…"
