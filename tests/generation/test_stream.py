import pytest

from keras_vaultgemma.generation.stream import TextStream, find_first

pytestmark = pytest.mark.any_backend


def from_bytes(ids):
    """A tokenizer of bytes: ids below 256 are bytes, others are words."""
    words = {256: "once upon", 257: " a time"}
    parts = [words[i].encode() if i in words else bytes([i]) for i in ids]
    return b"".join(parts).decode("utf-8", errors="replace")


def pieces(ids, stop=(), at_once=1):
    stream = TextStream(from_bytes, stop)
    found = [stream.push(ids[i : i + at_once]) for i in range(0, len(ids), at_once)]
    return [piece for piece in [*found, stream.flush()] if piece], stream


def test_characters_are_never_split():
    text = "aé한𒀀z"
    found, stream = pieces(list(text.encode()))
    assert found == ["a", "é", "한", "𒀀", "z"]
    assert stream.text == text


def test_what_stays_incomplete_comes_at_the_end():
    ids = [ord("a"), *"한".encode()[:2]]
    assert pieces(ids)[0] == ["a", from_bytes(ids)[1:]]


@pytest.mark.parametrize("at_once", [1, 2, 3, 20])
@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo\n\n", ["\n\n"], "one\ntwo"),
        ("ababac", ["abac"], "ab"),
        ("stopping", ["stop!", "ping"], "stop"),
        ("STOP", ["STOP"], ""),
        ("end STO", ["STOP"], "end STO"),
        ("xbcabc", ["abc", "bc"], "x"),
        ("é한", ["한"], "é"),
    ],
)
def test_a_stop_string_is_cut_exactly_and_never_shown(text, stop, expected, at_once):
    found, stream = pieces(list(text.encode()), stop, at_once)
    assert "".join(found) == expected == stream.text
    assert stream.stopped == (expected != text)


def test_ids_end_with_the_one_that_completes_the_stop_string():
    stream = TextStream(from_bytes, [" a"])
    assert stream.push([256]) == "once upon"
    assert stream.push([257, 256, 10]) == ""
    assert stream.ids == [256, 257]
    assert stream.push([10]) == ""
    assert stream.ids == [256, 257]


def test_a_part_of_a_stop_string_waits_until_it_is_none():
    stream = TextStream(from_bytes, ["\n\n"])
    assert [stream.push([i]) for i in b"a\nb"] == ["a", "", "\nb"]


def test_find_first():
    assert find_first("abcabc", ["c", "bc"]) == 1
    assert find_first("abc", ["x"]) is None
    assert find_first("abc", []) is None
