"""Streams of batches and of single samples, in the order that they have."""

import pytest

from keras_vaultgemma.data.streams import Stream, as_batches, read_batches

pytestmark = pytest.mark.any_backend

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Again:
    """An iterable that can be read again, without a length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Sized(Again):
    def __len__(self):
        return len(self.items)


def batches(dataset):
    return [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize(
    "items, expected",
    [
        ("abcde", [["a", "b"], ["c", "d"], ["e"]]),
        ([["a", "b"], ["c"]], [["a", "b"], ["c"]]),
        ([{"text": "a"}] * 3, [["a", "a"], ["a"]]),
        ([{"text": ["a"]}] * 3, [["a"]] * 3),
        ([[{"text": "a"}]] * 3, [["a"]] * 3),
        ([{"messages": CHAT}] * 3, [[CHAT, CHAT], [CHAT]]),
        ([CHAT] * 3, [[CHAT, CHAT], [CHAT]]),
        ([[CHAT, CHAT]], [[CHAT, CHAT]]),
        (
            [{"prompt": p, "completion": c} for p, c in ("ab", "cd")],
            [{"prompts": ["a", "c"], "responses": ["b", "d"]}],
        ),
        ([(["a"],), (["b"], 1)], [(["a"],), (["b"], 1)]),
        ([[{"token_ids": 1}, 2, 3]], [({"token_ids": 1}, 2, 3)]),
    ],
)
@pytest.mark.parametrize("kind", [Again, Sized, iter])
def test_batches(items, expected, kind):
    found = as_batches(kind([*items]), batch_size=2)
    if kind is iter:
        assert [*found] == expected
    else:
        assert batches(found) == expected and found.num_batches == len(expected)
        assert batches(found) == expected  # in the next epoch


def test_batches_are_read_as_they_are_needed():
    read = []
    stream = read_batches((read.append(i) or "a" for i in range(10)), 2)
    next(stream)
    assert read == [0, 1]


def test_a_pass_begins_with_the_first_batch():
    """Keras reads some batches in advance, to see what they are."""
    stream = Stream(Again("abcdef"), 2)
    assert stream[0] == ["a", "b"]
    assert batches(stream) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert stream[0] == ["a", "b"] and stream[2] == ["e", "f"] and stream[1] == ["c", "d"]


def test_an_endless_stream_goes_on_with_the_next_pass():
    read = []

    class Counted(Again):
        def __iter__(self):
            read.append(1)
            return super().__iter__()

    stream = as_batches(Counted("abc"), batch_size=2, steps=5)
    assert stream.num_batches is None and not read
    assert [stream[i] for i in range(4)] == [["a", "b"], ["c"], ["a", "b"], ["c"]]
    with pytest.raises(ValueError, match="at least one; .* Received: no batch 0"):
        Stream(Again([]), 2, is_endless=True)[0]


def test_a_stream_that_ends_early():
    class Once(Again):
        def __iter__(self):
            return self.items

    stream = Stream(Once(iter("abc")), 2)
    with pytest.raises(ValueError, match="A Once must have as many batches in each pass.*batch 0"):
        stream[0]
    assert Stream(Again([]), 2).num_batches == 0


@pytest.mark.parametrize(
    "items, message",
    [
        (["a", None], "Element 1 of the data, counted from 0: Every sample.*Received: None"),
        ([{"text": "a"}] * 2 + [{"text": None}], "Element 2 .*'text' must have.*Received: None"),
        ([{"note": "a"}], r"Element 0 .*'messages'.*Received: \['note'\]"),
        ([("a", "b")], r"Element 0 .*Pairs must be .*Received: \('a', 'b'\)"),
    ],
)
def test_wrong_elements(items, message):
    with pytest.raises(ValueError, match=message):
        [*read_batches(items, 2)]
