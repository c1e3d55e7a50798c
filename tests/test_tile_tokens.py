"""From how many tokens on an expert is computed by tiles: whose table counts, and what is told of a damaged one."""

import pytest

from ktcompile import RulesError
from ktcompile.backends import native
from ktcompile.backends.tile_tokens import shipped, tile_tokens, user_file, write


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache folder of its own: the table of the person who runs the tests has no part in them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def keep(text: str) -> None:
    user_file().parent.mkdir(parents=True, exist_ok=True)
    user_file().write_text(text)


def test_the_shipped_table_is_complete():
    assert list(shipped()) == ["amx", "amx_int8"]
    for isa, counts in shipped().items():
        assert list(counts) == [t for t in native.TYPES if native.refuses(isa, [t]) is None]


def test_the_largest_of_the_three_types_counts():
    keep("amx:\n  q4_k: 5\n  q6_k: 9\n  bf16: 3\n  q5_k: 0\n")
    assert tile_tokens("amx", ("q4_k",) * 3) == 5
    assert tile_tokens("amx", ("q4_k", "q4_k", "q6_k")) == 9
    assert tile_tokens("amx", ("q6_k", "bf16", "q4_k")) == 9
    assert tile_tokens("amx", ("q4_k", "q4_k", "q5_k")) == 0, "never is the largest"


def test_the_users_table_is_before_the_shipped_one():
    told = shipped()["amx"]["q4_k"], shipped()["amx_int8"]["int8_row"]
    assert tile_tokens("amx", ("q4_k",) * 3) == told[0]
    keep(f"amx:\n  q4_k: {told[0] + 1}\n")
    assert tile_tokens("amx", ("q4_k",) * 3) == told[0] + 1
    assert tile_tokens("amx_int8", ("int8_row",) * 3) == told[1]
    for isa in ("scalar", "avx2", "avx512_bf16"):
        assert tile_tokens(isa, ("q4_k",) * 3) == 0, "it has no tiles"


DAMAGED = {
    "no YAML": ("amx: [", "not YAML"),
    "a list": ("- amx\n", "the file: ['amx'] is no mapping"),
    "empty": ("", "the file: None is no mapping"),
    "an unknown instruction set": ("amy:\n  q4_k: 3\n", "the file: 'amy' is not an instruction set; there are scalar"),
    "an unknown type": ("amx:\n  q4_9: 3\n", "amx: 'q4_9' is not a storage type; there are f32"),
    "a word": ("amx:\n  q4_k: six\n", "amx: q4_k: 'six' is not 0 to"),
    "a fraction": ("amx:\n  q4_k: 6.5\n", "amx: q4_k: 6.5 is not 0 to"),
    "a truth": ("amx:\n  q4_k: true\n", "amx: q4_k: True is not 0 to"),
    "below zero": ("amx:\n  q4_k: -1\n", "amx: q4_k: -1 is not 0 to"),
    "too large": ("amx:\n  q4_k: 1e99\n  bf16: 99999999999999999999\n", "amx: q4_k: '1e99' is not 0 to"),
    "no counts": ("amx: 6\n", "amx: 6 is no mapping from a storage type"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_table_is_named_with_entry_and_fix(what):
    text, words = DAMAGED[what]
    keep(text)
    with pytest.raises(RulesError) as told:
        tile_tokens("amx", ("q4_k",) * 3)
    assert str(told.value).startswith(f"{user_file()}: {words}")
    assert "`ktrans tune` writes the file anew" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_table_that_is_no_text_is_named():
    user_file().mkdir(parents=True)
    with pytest.raises(RulesError, match=r"tile_tokens\.yaml: cannot be read"):
        tile_tokens("amx", ("q4_k",) * 3)


def test_a_written_table_is_read_again_and_keeps_what_was_measured_before():
    write(user_file(), {"amx": {"q4_k": 5, "bf16": 0}}, "this machine")
    assert write(user_file(), {"amx": {"q4_k": 7}, "amx_int8": {"int8_row": 4}}, "this machine, again") == (
        "# Experts with so many tokens in a call are computed by tiles, not by streaming their weights; 0: never.\n"
        "# this machine, again\n"
        "amx:\n"
        "  bf16: 0  # from a run before\n"
        "  q4_k: 7\n"
        "amx_int8:\n"
        "  int8_row: 4\n"
    )
    assert tile_tokens("amx", ("q4_k",) * 3) == 7
    assert tile_tokens("amx", ("bf16",) * 3) == 0


def test_a_damaged_table_is_replaced():
    keep("amx: [")
    write(user_file(), {"amx": {"q4_k": 5}}, "this machine")
    assert tile_tokens("amx", ("q4_k",) * 3) == 5
