"""Keys carry kind and iteration; whatever does not follow the grammar is refused."""

import pytest

from megatron_moetion.vault.entry import checksum, split_key


def test_kind_and_iteration_are_read_from_a_key() -> None:
    assert split_key("frame/12/stage1/full") == ("frame", 12)
    assert split_key("header/0") == ("header", 0)


@pytest.mark.parametrize("key", ["frame", "frame/", "frame/x/1", "frame/-1/a", "other/1/a", ""])
def test_a_key_outside_the_grammar_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="vault key"):
        split_key(key)


def test_the_checksum_tells_a_flipped_bit() -> None:
    data = bytearray(1000)
    before = checksum(data)
    data[999] ^= 1
    assert checksum(data) != before
