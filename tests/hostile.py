"""Files that were made to do harm: each a few bytes, with a part of the message that must refuse it."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

# ------------------------------------------------------------------------------------------------ GGUF


def number(value: int) -> bytes:
    """A 32-bit number as GGUF stores it."""
    return struct.pack("<I", value)


def count(value: int) -> bytes:
    """A 64-bit count, length or offset."""
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    """A string: its length, then its bytes."""
    raw = value.encode() if isinstance(value, str) else value
    return count(len(raw)) + raw


def entry(key: str | bytes, code: int, value: bytes) -> bytes:
    """A metadata entry of value type `code`."""
    return text(key) + number(code) + value


def array(key: str, code: int, values: bytes, length: int) -> bytes:
    """A metadata entry that holds an array of `length` elements of type `code`."""
    return entry(key, 9, number(code) + count(length) + values)


def tensor(
    name: str | bytes,
    dims: tuple[int, ...] = (32,),
    code: int = 0,
    offset: int = 0,
    dim_count: int | None = None,
) -> bytes:
    """What a GGUF header says of a tensor; `dims` in the file's order, columns first."""
    head = text(name) + number(len(dims) if dim_count is None else dim_count)
    return head + struct.pack(f"<{len(dims)}Q", *dims) + number(code) + count(offset)


ARCHITECTURE = entry("general.architecture", 8, text("deepseek2"))
EMBEDDING = tensor("token_embd.weight")


def gguf_file(
    entries: tuple[bytes, ...] = (ARCHITECTURE,),
    tensors: tuple[bytes, ...] = (EMBEDDING,),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    entry_count: int | None = None,
    data_bytes: int = 128,
) -> bytes:
    """A GGUF file with one tensor of 32 zeros; counts as they are unless given."""
    tensor_count = len(tensors) if tensor_count is None else tensor_count
    entry_count = len(entries) if entry_count is None else entry_count
    raw = magic + struct.pack("<IQQ", version, tensor_count, entry_count) + b"".join(entries) + b"".join(tensors)
    return raw + bytes(-len(raw) % 32) + bytes(data_bytes)


SCALARS = {
    code: entry(f"of.type.{code}", code, value)
    for code, value in {
        0: b"\7",
        1: b"\xff",
        2: b"\1\2",
        3: b"\xff\xff",
        4: number(5),
        5: b"\xff" * 4,
        6: struct.pack("<f", 1e-6),
        7: b"\1",
        8: text("grün"),
        10: count(1 << 40),
        11: b"\xff" * 8,
        12: struct.pack("<d", 0.1),
    }.items()
}
"""One metadata entry of every scalar type."""

EVERYTHING = gguf_file(
    (
        ARCHITECTURE,
        *SCALARS.values(),
        array("of.strings", 8, text("a") + text("") + text("é"), 3),
        array("of.floats", 6, struct.pack("<2f", 1, 2), 2),
        array("of.nothing", 4, b"", 0),
        entry("general.alignment", 4, number(64)),
    ),
    (EMBEDDING, tensor("blk.0.ffn_norm.weight", (8, 2, 2), offset=128), tensor("q", (32, 3), 8, offset=256)),
    data_bytes=512,
)
"""A valid file with every kind of value in its header."""

METADATA: Mapping[str, object] = {
    "general.architecture": "deepseek2",
    "general.name": "Small",
    "deepseek2.block_count": 2,
    "deepseek2.context_length": 64,
    "deepseek2.embedding_length": 8,
    "deepseek2.feed_forward_length": 4,
    "deepseek2.vocab_size": 5,
    "deepseek2.attention.head_count": 2,
    "deepseek2.attention.kv_lora_rank": 4,
    "deepseek2.attention.key_length": 4,
    "deepseek2.attention.value_length": 2,
    "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
    "deepseek2.rope.dimension_count": 2,
    "deepseek2.rope.freq_base": 10000.0,
    "deepseek2.rope.scaling.type": "yarn",
    "deepseek2.rope.scaling.factor": 4.0,
    "deepseek2.rope.scaling.original_context_length": 16,
    "deepseek2.rope.scaling.yarn_log_multiplier": 0.1,
    "deepseek2.leading_dense_block_count": 1,
    "deepseek2.expert_count": 4,
    "deepseek2.expert_used_count": 2,
    "deepseek2.expert_group_count": 2,
    "deepseek2.expert_group_used_count": 1,
    "deepseek2.expert_shared_count": 1,
    "deepseek2.expert_feed_forward_length": 4,
    "deepseek2.expert_gating_func": 2,
    "deepseek2.expert_weights_norm": True,
    "deepseek2.expert_weights_scale": 2.5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "deepseek-v3",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}
"""Of a model of two layers, one dense and one with four experts."""

_SHAPES = {  # columns first
    "token_embd.weight": (8, 5),
    "output_norm.weight": (8,),
    "blk.0.ffn_gate.weight": (8, 4),
    "blk.0.ffn_up.weight": (8, 4),
    "blk.0.ffn_down.weight": (4, 8),
    "blk.1.ffn_gate_inp.weight": (8, 4),
    "blk.1.exp_probs_b.bias": (4,),
    "blk.1.ffn_gate_exps.weight": (8, 4, 4),
    "blk.1.ffn_up_exps.weight": (8, 4, 4),
    "blk.1.ffn_down_exps.weight": (4, 8, 4),
    "blk.1.ffn_gate_shexp.weight": (8, 4),
    "blk.1.ffn_up_shexp.weight": (8, 4),
    "blk.1.ffn_down_shexp.weight": (4, 8),
} | {
    f"blk.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "attn_norm.weight": (8,),
        "attn_q.weight": (8, 8),
        "attn_kv_a_mqa.weight": (8, 6),
        "attn_kv_a_norm.weight": (4,),
        "attn_k_b.weight": (2, 4, 2),
        "attn_v_b.weight": (4, 2, 2),
        "attn_output.weight": (4, 8),
        "ffn_norm.weight": (8,),
    }.items()
}


def value(key: str, given: object) -> bytes:
    """A metadata entry of the type that fits the value: uint32, float32, bool, string, or an array of one of them."""
    if isinstance(given, bool):
        return entry(key, 7, bytes([given]))
    if isinstance(given, list):
        if all(isinstance(v, str) for v in given):
            return array(key, 8, b"".join(map(text, given)), len(given))
        return array(key, 5, b"".join(struct.pack("<i", v) for v in given), len(given))
    if isinstance(given, str):
        return entry(key, 8, text(given))
    return (
        entry(key, 6, struct.pack("<f", given)) if isinstance(given, float) else entry(key, 4, number(int(str(given))))
    )


def gguf_model(**changes: object) -> bytes:
    """A whole model in F32, all zeros; `changes` to its metadata as `expert_count=…`, None to leave a key out."""
    new = {next(k for k in METADATA if k.endswith(f".{name}")): v for name, v in changes.items()}
    entries = tuple(value(k, v) for k, v in (METADATA | new).items() if v is not None)
    tensors, offset = [], 0
    for name, shape in _SHAPES.items():
        tensors.append(tensor(name, shape, 0, offset))
        offset += -(-4 * math.prod(shape) // 32) * 32
    return gguf_file(entries, tuple(tensors), data_bytes=offset)


ESCAPE = "\x1b]0;title\x07\x1b[2J\r\u202e"
"""What clears a terminal, renames its window and turns its text around."""

_HUGE = count(1 << 60)
GGUF: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "another format": (b"PK\3\4" + bytes(60), "magic: b'PK"),
    "only zeros": (bytes(4096), "magic: b'"),
    "big endian by version": (gguf_file(version=3 << 24), "version: a big-endian file"),
    "big endian by magic": (gguf_file(magic=b"FUGG"), "magic: a big-endian file"),
    "version 0": (gguf_file(version=0), "version: 0 is not known"),
    "version 1": (gguf_file(version=1), "version: 1 is not known"),
    "version 99": (gguf_file(version=99), "version: 99 is not known"),
    "2^63 tensors": (gguf_file(tensor_count=1 << 63), "tensor_count: 9223372036854775808"),
    "2^64-1 tensors": (gguf_file(tensor_count=(1 << 64) - 1), "tensor_count: 18446744073709551615"),
    "more tensors than bytes": (gguf_file(tensor_count=1 << 16), "tensor_count: 65536 is more than the 16384"),
    "one tensor too many": (gguf_file(tensor_count=2), "tensor '': 0 dimensions"),
    "2^63 entries": (gguf_file(entry_count=1 << 63), "metadata_kv_count: 9223372036854775808"),
    "2^64-1 entries": (gguf_file(entry_count=(1 << 64) - 1), "metadata_kv_count: 18446744073709551615"),
    "one entry too many": (gguf_file(entry_count=2), "tensor '': 0 dimensions"),
    "key length 2^60": (gguf_file((_HUGE,)), "metadata key: length 1152921504606846976"),
    "key of 2 KB": (gguf_file((entry("k" * 2048, 0, b"\0"),)), "metadata key: length 2048"),
    "string length 2^60": (gguf_file((text("a") + number(8) + _HUGE,)), "a: length 1152921504606846976"),
    "string longer than the file": (gguf_file((text("a") + number(8) + count(1 << 20),)), "a: needs 1048576 bytes"),
    "string length 2^64-1": (gguf_file((text("a") + number(8) + b"\xff" * 8,)), "a: length 18446744073709551615"),
    "value type 13": (gguf_file((entry("a", 13, b""),)), "a: value type 13"),
    "value type 2^32-1": (gguf_file((entry("a", (1 << 32) - 1, b""),)), "a: value type 4294967295"),
    "a bool of 2": (gguf_file((entry("a", 7, b"\2"),)), "a: 2 is not a bool"),
    "a string that is not UTF-8": (gguf_file((entry("a", 8, text(b"\xff\xfe")),)), "a: is not UTF-8"),
    "a string with a surrogate": (gguf_file((entry("a", 8, text(b"\xed\xa0\x80")),)), "a: is not UTF-8"),
    "a key that is not UTF-8": (gguf_file((entry(b"\xff", 0, b"\0"),)), "metadata key: is not UTF-8"),
    "a tensor name that is not UTF-8": (gguf_file(tensors=(tensor(b"\xff"),)), "tensor name: is not UTF-8"),
    "a tensor name of 2 KB": (gguf_file(tensors=(tensor("n" * 2048),)), "tensor name: length 2048"),
    "a key twice": (gguf_file((ARCHITECTURE, ARCHITECTURE)), "metadata key: 'general.architecture' occurs twice"),
    "an array of arrays": (gguf_file((array("a", 9, number(4) + count(1) + number(1), 1),)), "a: an array of arrays"),
    "an array of 2^60 arrays": (gguf_file((array("a", 9, b"", 1 << 60),)), "a: an array of arrays"),
    "arrays 1000 deep": (gguf_file((entry("a", 9, (number(9) + count(1)) * 1000),)), "a: an array of arrays"),
    "array of type 50": (gguf_file((array("a", 50, b"", 1),)), "a: element type 50"),
    "array length 2^60": (gguf_file((array("a", 4, b"", 1 << 60),)), "a: length: 1152921504606846976"),
    "string array length 2^60": (gguf_file((array("a", 8, b"", 1 << 60),)), "a: length: 1152921504606846976"),
    "array longer than the file": (gguf_file((array("a", 12, b"", 1 << 16),)), "a: length: 65536 need"),
    "string array longer than the file": (gguf_file((array("a", 8, b"", 1 << 16),)), "a: length: 65536 need"),
    "alignment 0": (gguf_file((ARCHITECTURE, entry("general.alignment", 4, number(0)))), "general.alignment: 0"),
    "alignment 3": (gguf_file((ARCHITECTURE, entry("general.alignment", 4, number(3)))), "general.alignment: 3"),
    "alignment -32": (
        gguf_file((ARCHITECTURE, entry("general.alignment", 5, struct.pack("<i", -32)))),
        "general.alignment: -32",
    ),
    "alignment 2^31": (
        gguf_file((ARCHITECTURE, entry("general.alignment", 4, number(1 << 31)))),
        "general.alignment: 2147483648",
    ),
    "alignment 32.0": (
        gguf_file((ARCHITECTURE, entry("general.alignment", 6, struct.pack("<f", 32)))),
        "general.alignment: 32.0",
    ),
    "alignment true": (gguf_file((ARCHITECTURE, entry("general.alignment", 7, b"\1"))), "general.alignment: True"),
    "alignment of much text": (
        gguf_file((ARCHITECTURE, entry("general.alignment", 8, text("x" * (1 << 20))))),
        "general.alignment: 'x",
    ),
    "0 dimensions": (gguf_file(tensors=(tensor("x", ()),)), "tensor 'x': 0 dimensions"),
    "9 dimensions": (gguf_file(tensors=(tensor("x", (1,) * 9),)), "tensor 'x': 9 dimensions"),
    "2^32-1 dimensions": (gguf_file(tensors=(tensor("x", dim_count=(1 << 32) - 1),)), "tensor 'x': 4294967295 dim"),
    "a dimension of 0": (gguf_file(tensors=(tensor("x", (32, 0)),)), "tensor 'x': dimensions [32, 0]"),
    "a dimension of 2^64-1": (gguf_file(tensors=(tensor("x", ((1 << 64) - 1,)),)), "tensor 'x': dimensions ["),
    "a product of 2^64": (gguf_file(tensors=(tensor("x", (1 << 32, 1 << 31, 2)),)), "tensor 'x': dimensions ["),
    "a product of 2^128": (gguf_file(tensors=(tensor("x", (1 << 32,) * 4),)), "tensor 'x': dimensions ["),
    "a product of 2^64, which is 0": (gguf_file(tensors=(tensor("x", (1 << 32,) * 2),)), "tensor 'x': dimensions ["),
    "a product with 0 after overflow": (gguf_file(tensors=(tensor("x", (1 << 63, 2)),)), "tensor 'x': dimensions ["),
    "a tensor larger than any disk": (gguf_file(tensors=(tensor("x", (1 << 40, 1 << 10)),)), "tensor 'x': ends at"),
    "type 999": (gguf_file(tensors=(tensor("x", code=999),)), "tensor 'x': type 999"),
    "type 2^32-1": (gguf_file(tensors=(tensor("x", code=(1 << 32) - 1),)), "tensor 'x': type 4294967295"),
    "type 4, removed from ggml": (gguf_file(tensors=(tensor("x", code=4),)), "tensor 'x': type 4"),
    "type 15, of activations": (gguf_file(tensors=(tensor("x", (256,), 15),)), "tensor 'x': type 15 cannot be decoded"),
    "a broken block": (gguf_file(tensors=(tensor("x", (33,), 2),)), "tensor 'x': rows of 33 values"),
    "an odd offset": (gguf_file(tensors=(tensor("x", offset=1),)), "tensor 'x': offset 1"),
    "an offset past the end": (gguf_file(tensors=(tensor("x", offset=1 << 40),)), "tensor 'x': ends at byte"),
    "an offset of 2^64-32": (gguf_file(tensors=(tensor("x", offset=(1 << 64) - 32),)), "tensor 'x': ends at byte"),
    "a tensor twice": (
        gguf_file(tensors=(tensor("x"), tensor("x", offset=128)), data_bytes=256),
        "tensor 'x': occurs twice",
    ),
    "two tensors in one place": (gguf_file(tensors=(tensor("x"), tensor("y"))), "tensor 'y': offset 0 lies inside"),
    "a tensor inside another": (
        gguf_file(tensors=(tensor("x", (64,)), tensor("y", offset=128)), data_bytes=512),
        "tensor 'y': offset 128 lies inside tensor 'x'",
    ),
    "65536 entries with one key": (
        gguf_file((ARCHITECTURE, *[entry("k", 0, b"\0")] * 65_535)),
        "metadata key: 'k' occurs twice",
    ),
    "a vocabulary of 2^20 + 1": (
        gguf_file((array("a", 8, bytes(8 * ((1 << 20) + 1)), (1 << 20) + 1),)),
        "a: length: 1048577 is more than",
    ),
    "no architecture": (gguf_file(()), "general.architecture"),
    "an unknown architecture": (gguf_file((entry("general.architecture", 8, text("mamba")),)), "'mamba'; known are"),
    "an architecture that is a number": (
        gguf_file((entry("general.architecture", 4, number(1)),)),
        "architecture is 1",
    ),
    "an architecture that is a list": (gguf_file((array("general.architecture", 8, text("a"), 1),)), "['a']"),
    "an architecture of much text": (
        gguf_file((entry("general.architecture", 8, text("a" * (1 << 20))),)),
        "architecture is 'aaaa",
    ),
    "a key that moves the cursor": (gguf_file((entry(ESCAPE, 13, b""),)), r"'\x1b]0;title\x07\x1b[2J\r\u202e': value"),
    "such a key twice": (gguf_file((entry(ESCAPE, 0, b"\0"),) * 2), r"'\x1b]0;title\x07\x1b[2J\r\u202e' occurs twice"),
    "a tensor name that moves the cursor": (
        gguf_file(tensors=(tensor(ESCAPE, code=999),)),
        r"tensor '\x1b]0;title\x07\x1b[2J\r\u202e': type 999",
    ),
    "such a tensor in another": (
        gguf_file(tensors=(tensor(ESCAPE), tensor(ESCAPE + "2"))),
        r"lies inside tensor '\x1b]0",
    ),
    "an architecture that moves the cursor": (
        gguf_file((entry("general.architecture", 8, text(ESCAPE)),)),
        r"architecture is '\x1b]0",
    ),
}
"""GGUF files that must be refused, and what the message says."""

NO_OFFSET = {
    "empty",
    "no architecture",
    "an unknown architecture",
    "an architecture that is a number",
    "an architecture that is a list",
    "an architecture of much text",
    "an architecture that moves the cursor",
}
"""Those of GGUF that are wrong as a whole, not at a byte."""


# ------------------------------------------------------------------------------------------------ safetensors


def safetensors_file(header: object, data_bytes: int = 32, length: int | None = None) -> bytes:
    """A safetensors file of a header (an object, or its bytes) and `data_bytes` zeros."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return count(len(raw) if length is None else length) + raw + bytes(data_bytes)


def stored(begin: object = 0, end: object = 32, shape: object = (8,), dtype: object = "F32") -> dict[str, object]:
    """What a safetensors header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


_MANY = b'{"a": [' + b"{}," * 1_000_000 + b"{}]}"
SAFETENSORS: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "seven bytes": (bytes(7), "7 bytes"),
    "only zeros": (bytes(64), "header"),
    "a header of 2^63": (safetensors_file({}, length=1 << 63), "header length 9223372036854775808"),
    "a header of 2^64-1": (safetensors_file({}, length=(1 << 64) - 1), "header length 18446744073709551615"),
    "a header past the end": (safetensors_file({}, length=100), "header length 100"),
    "bad JSON": (safetensors_file(b'{"a": '), "not valid JSON"),
    "not UTF-8": (safetensors_file(b'{"\xff": 1}'), "not valid JSON"),
    "deep lists": (safetensors_file(b"[" * 100_000), "not valid JSON"),
    "deep objects": (safetensors_file(b'{"a":' * 100_000), "not valid JSON"),
    "a million objects": (safetensors_file(_MANY), "values"),
    "a list": (safetensors_file([]), "must be a JSON object"),
    "a number of 10,000 digits": (safetensors_file(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "NaN": (safetensors_file(b'{"a": NaN}'), "NaN"),
    "Infinity by overflow": (safetensors_file(b'{"a": 1e999}'), "1e999"),
    "half a surrogate pair": (safetensors_file(b'{"\\ud800": 1}'), "surrogate"),
    "a name twice": (safetensors_file(b'{"a": {}, "a": {}}'), "'a' occurs twice"),
    "a tensor that is a number": (safetensors_file({"a": 3}), "must be an object"),
    "an unknown dtype": (safetensors_file({"a": stored(dtype="F7")}), "dtype 'F7'"),
    "a dtype that is a list": (safetensors_file({"a": stored(dtype=["F32"])}), "dtype"),
    "a negative size": (safetensors_file({"a": stored(shape=[-8])}), "shape"),
    "a size of 8.0": (safetensors_file({"a": stored(shape=[8.0])}), "shape"),
    "a size of true": (safetensors_file({"a": stored(shape=[True])}), "shape"),
    "a size of 2^62": (safetensors_file({"a": stored(shape=[1 << 62])}), "shape"),
    "9 dimensions": (safetensors_file({"a": stored(shape=[1] * 9)}), "shape"),
    "a product that overflows": (safetensors_file({"a": stored(shape=[1 << 61, 8, 1 << 61])}), "bits"),
    "reversed offsets": (safetensors_file({"a": stored(32, 0)}), "must be in order"),
    "negative offsets": (safetensors_file({"a": stored(-32, 0)}), "must be in order"),
    "offsets past the end": (safetensors_file({"a": stored(0, 64, [16])}), "cut off or damaged"),
    "offsets that are text": (safetensors_file({"a": stored("0", "32")}), "two integers"),
    "one offset": (safetensors_file({"a": stored() | {"data_offsets": [0]}}), "two integers"),
    "too few bytes": (safetensors_file({"a": stored(0, 32, [16])}), "F32 [16] takes 512 bits, its data 256"),
    "too many bytes": (safetensors_file({"a": stored(0, 32, [4])}), "F32 [4] takes 128 bits, its data 256"),
    "two tensors in one place": (safetensors_file({"a": stored(), "b": stored()}), "the tensor before it ends"),
    "overlapping tensors": (safetensors_file({"a": stored(), "b": stored(16, 48)}, 48), "the tensor before it ends"),
    "a hole": (safetensors_file({"a": stored(16, 48)}, 48), "the tensor before it ends"),
    "bytes after the last tensor": (safetensors_file({"a": stored()}, 64), "the last tensor ends"),
    "a name that moves the cursor": (safetensors_file({ESCAPE: 3}), r"'\x1b]0;title\x07\x1b[2J\r\u202e': must be"),
    "such a name twice": (
        safetensors_file(f"{{{json.dumps(ESCAPE)}: 1, {json.dumps(ESCAPE)}: 2}}".encode()),
        r"'\x1b]0;title\x07\x1b[2J\r\u202e' occurs twice",
    ),
    "such a name in one place with another": (
        safetensors_file({ESCAPE: stored(), "b": stored()}),
        "the tensor before it ends",
    ),
    "a dtype that moves the cursor": (safetensors_file({"a": stored(dtype=ESCAPE)}), r"dtype '\x1b]0"),
    "offsets of 4,000 digits": (safetensors_file({"a": stored(0, 10**4000)}), "must be in order"),
}
"""safetensors files that must be refused, and what the message says."""

OUTSIDE = (
    "../../etc/passwd",
    "../x.safetensors",
    "/etc/passwd",
    "/etc/x.safetensors",
    "a/b.safetensors",
    "a\\b.safetensors",
    "..",
    "",
    "x.bin",
    "x\0.safetensors",
    "x\x1b[2J.safetensors",
    7,
    None,
    ["x.safetensors"],
)
"""What an index may not name as a shard."""


def write_index(folder: Path, weight_map: object) -> Path:
    """An index file in the folder."""
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


# ------------------------------------------------------------------------------------------------ rules

_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{chr(ord(c) - 1)}'] * 9)}]\n" for c in "bcdefghijk"
)
_PLACE = "extends: base\npipeline:\n  - place:\n      rules:\n"
RULES: Mapping[str, bytes] = {
    "a Python object": b"pipeline:\n  - prune-experts:\n      keep: !!python/object/apply:os.system ['touch marker']\n",
    "a Python name as a pass": b"pipeline:\n  - !!python/name:os.system x\n",
    "a Python module at the top": b"!!python/module:os\n",
    "an unknown tag": b"pipeline:\n  - place:\n      rules: !include /etc/passwd\n",
    "a tag that lies": b"pipeline: [fold, {prune-experts: {keep: !!int abc}}]\n",
    "a timestamp that is none": b"pipeline: [{prune-experts: {keep: 2026-13-45}}]\n",
    "a bomb of aliases": _BOMB.encode(),
    "a bomb inside a pass": (
        "pipeline:\n  - choose-kernels:\n      ops:\n" + "".join(f"        {line}\n" for line in _BOMB.splitlines())
    ).encode(),
    "an alias to itself": b"pipeline: &p [*p]\n",
    "merge keys": b"x: &x {a: 1}\npipeline:\n  - place: {<<: *x}\n",
    "lists 100,000 deep": b"pipeline: " + b"[" * 100_000,
    "mappings 2,000 deep": b"pipeline: " + b"{a: " * 2_000 + b"}" * 2_000,
    "lists 100,000 deep by indent": b"pipeline:\n" + b"- " * 100_000 + b"x\n",
    "a key twice": b"extends: base\npipeline: []\nextends: base\n",
    "a rule twice": (_PLACE + "        '*': cpu\n        '*': gpu\n").encode(),
    "Latin-1": b"pipeline: [fold] # \xe9\n",
    "UTF-16": "pipeline: [fold]\n".encode("utf-16"),
    "zeros": bytes(64),
    "a control character": b"pipeline: [\x07]\n",
    "extends a device": b"extends: /dev/zero\n",
    "extends a password file": b"extends: ../../../../../../etc/passwd\n",
    "a number of 10,000 digits": b"pipeline: [{prune-experts: {keep: " + b"9" * 10_000 + b"}}]\n",
    "a number in base 60": b"pipeline: [{prune-experts: {keep: " + b":".join([b"59"] * 1_000) + b"}}]\n",
}
"""Rules files that must be refused before they meet a model."""

RULES_LINES: Mapping[str, bytes] = {
    "comments": b"# nothing\n",
    "passes": b"- fold\n",
    "one line": b"fold, ",
    "one word": b"x",
    "brackets": b"[",
}
"""What ten megabytes of rules can be made of."""

RULES_AGAINST_A_MODEL: Mapping[str, str] = {
    "a rule that matches nothing": _PLACE + "        '*.expertz': cpu\n        '*': gpu\n",
    "a slow pattern": _PLACE + f"        '{'*a' * 40}b': cpu\n        '*': gpu\n",
    "a slow class": _PLACE + f"        '{'*[!x]' * 40}zz': cpu\n        '*': gpu\n",
    "a range of 10^12": _PLACE + "        'layers.{0..1000000000000}.mlp.expertz': cpu\n        '*': gpu\n",
    "ranges in ranges": _PLACE + f"        'x{'.{0..99}' * 9}': cpu\n        '*': gpu\n",
    "a number of 5,000 digits in a range": _PLACE + f"        'x.{{0..{'9' * 5000}}}': cpu\n        '*': gpu\n",
    "a device that is not there": _PLACE + "        '*': cuda:99\n",
}
"""Rules that parse, and must be refused by the model, with the line."""
