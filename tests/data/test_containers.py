"""Containers of other libraries hold the same samples as lists."""

import collections
import importlib

import numpy as np
import pytest

from keras_vaultgemma import apply_chat_template
from keras_vaultgemma.data.containers import as_plain, is_stream
from keras_vaultgemma.data.text_inputs import as_samples

pytestmark = pytest.mark.any_backend

TEXTS = ["The fox.", "A hare", ""]
PROMPTS, ANSWERS = ["Who won?", "Who slept?"], ["The tortoise.", "The hare."]
CHATS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
]
PAIRS = {"prompts": PROMPTS, "responses": ANSWERS}


def library(name):
    return pytest.importorskip(name)


def frame(**columns):
    return library("pandas").DataFrame(columns)


def dataset(**columns):
    return library("datasets").Dataset.from_dict(columns)


def arrow(**columns):
    return library("pyarrow").table(columns)


def polars_frame(**columns):
    return library("polars").DataFrame(columns)


def columns(**columns):
    return columns


def rows(**columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class Indexed:
    """A dataset as torch's `Dataset` and many others are: a length, and items by number."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


TABLES = [frame, dataset, arrow, polars_frame, columns, rows, lambda **c: Indexed(rows(**c))]
SERIES = {
    "Series": lambda items: library("pandas").Series(items, index=[5, 3, 3][: len(items)]),
    "Column": lambda items: dataset(some=items)["some"],
    "Column of arrays": lambda items: dataset(some=items).with_format("numpy")["some"],
    "Arrow": lambda items: library("pyarrow").array(items),
    "polars": lambda items: library("polars").Series(items),
    "deque": collections.deque,
    "indexed": Indexed,
    "objects": lambda items: np.array([*items, None], object)[:-1],
}


@pytest.mark.parametrize("make", TABLES)
def test_tables(make):
    ids = [7, 8, 9]
    assert as_plain(make(id=ids, text=TEXTS)) == TEXTS
    for response in ("response", "completion"):
        assert as_plain(make(id=ids[:2], prompt=PROMPTS, **{response: ANSWERS})) == PAIRS
    assert as_plain(make(id=ids[:2], messages=CHATS)) == CHATS
    assert as_plain(make(prompts=PROMPTS, responses=ANSWERS)) == PAIRS


@pytest.mark.parametrize("make", SERIES.values(), ids=SERIES)
def test_columns(make):
    assert as_plain(make(TEXTS)) == TEXTS
    assert as_plain(make(CHATS)) == CHATS
    assert as_plain({"prompts": make(PROMPTS), "responses": make(ANSWERS)}) == PAIRS


@pytest.mark.parametrize(
    "make",
    [
        np.array,
        lambda texts: np.array(texts, np.dtypes.StringDType()),
        lambda texts: library("pandas").Series(texts, dtype="string"),
        lambda texts: library("pandas").Series(texts, dtype="category"),
        lambda texts: library("pandas").Index(texts),
    ],
)
def test_columns_of_strings(make):
    assert as_plain(make(TEXTS)) == TEXTS


def test_bytes():
    expected = [["", "Hé"]], True, False
    assert as_samples(np.array(["Hé".encode()])) == as_samples(["Hé".encode()]) == expected
    assert as_samples({"text": ["Hé".encode()]}) == expected


@pytest.mark.parametrize("make", [frame, dataset, arrow, columns, rows])
def test_prompts_and_completions_of_messages(make):
    """TRL's conversational rows: answers in the prompt are given, those of the completion trained on."""
    earlier = [*CHATS[1], {"role": "user", "content": "And?"}]
    prompts, completions = [CHATS[0][:1], earlier], [CHATS[0][1:], CHATS[0][1:]]
    samples, has_end, _ = as_samples(make(prompt=prompts, completion=completions))
    (whole,), _, _ = as_samples([CHATS[0]])
    assert samples[0] == whole and not has_end
    (long,), _, _ = as_samples([[*earlier, *CHATS[0][1:]]])
    assert samples[1] == ["".join(long[:3]), long[3]] and len(long) == 4


def test_one_row_is_one_sample():
    chat = CHATS[0]
    for row, plain in (
        ({"text": "a", "id": 3}, "a"),
        ({"messages": chat}, chat),
        ({"prompt": "a", "completion": "b"}, {"prompts": "a", "responses": "b"}),
        (
            {"prompt": chat[:1], "completion": chat[1:]},
            {"prompts": chat[:1], "responses": chat[1:]},
        ),
    ):
        assert as_plain(row) == plain and as_samples(row)[2]


def test_chats_in_other_forms():
    """Hugging Face's `Sequence` of dicts is a dict of lists, and a frame from Parquet has arrays."""
    of_lists = [{name: [m[name] for m in chat] for name in ("role", "content")} for chat in CHATS]
    arrays = [np.array(chat, object) for chat in CHATS]
    assert as_plain({"messages": of_lists}) == as_plain(of_lists) == CHATS
    assert as_plain({"messages": arrays}) == as_plain(arrays) == CHATS
    text = apply_chat_template(CHATS[0])
    assert apply_chat_template(arrays[0]) == apply_chat_template(of_lists[0]) == text


def test_parquet(tmp_path):
    frame(messages=CHATS).to_parquet(tmp_path / "a.parquet")
    assert as_plain(library("pandas").read_parquet(tmp_path / "a.parquet")) == CHATS


def test_what_is_no_container_is_unchanged():
    ids = {"token_ids": np.ones((2, 3)), "padding_mask": np.ones((2, 3))}
    for x in (None, 3, "a", b"a", [], [[1, 2], [3]], np.ones((2, 3)), ids, iter([]), [None]):
        assert as_plain(x) is x


def test_streams():
    class Again:
        def __iter__(self):
            return iter(TEXTS)

    for stream in (iter(TEXTS), (t for t in TEXTS), map(str, TEXTS), Again(), {"a": 1}.values()):
        assert is_stream(stream) and as_plain(stream) is stream
    for x in ("a", TEXTS, {"text": TEXTS}, np.array(TEXTS), Indexed(TEXTS), None, 3):
        assert not is_stream(x)


@pytest.mark.parametrize("name", ["datasets", "grain"])
def test_streams_of_libraries(name):
    module = importlib.import_module(name) if library(name) else None
    if name == "datasets":
        stream = module.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    else:
        stream = module.MapDataset.source(TEXTS)
    assert is_stream(stream) and as_plain(stream) is stream


@pytest.mark.parametrize("make", [frame, dataset, arrow, columns, rows])
@pytest.mark.parametrize(
    "data, message",
    [
        (
            {"note": ["a"], "label": [1]},
            r"'text', 'messages', 'prompt' and 'completion'.*Received: \['note', 'label'\]",
        ),
        (
            {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]},
            r"Received: \['prompt', 'chosen', 'rejected'\]",
        ),
        ({"input_ids": [[1, 2]]}, r"token ids: 'token_ids'.*Received: \['input_ids'\]"),
        ({"text": ["a", "b", None]}, "'text' must have a value.*Received: (None|nan) in row 2"),
        (
            {"prompt": ["a", "b"], "completion": ["c", None]},
            "'completion' must have a value.*Received: (None|nan) in row 1",
        ),
        ({"messages": [CHATS[0], None]}, "'messages' must have a value.*in row 1"),
        (
            {"messages": [str(CHATS[0])]},
            r"'messages' must have a list of messages.*json.loads.*in row 0",
        ),
    ],
)
def test_wrong_tables(make, data, message):
    with pytest.raises(ValueError, match=message):
        as_plain(make(**data))


def test_missing_values_of_pandas():
    pandas = library("pandas")
    for missing in (None, float("nan"), pandas.NA, pandas.NaT):
        with pytest.raises(ValueError, match=r"Received: (None|nan|<NA>|NaT) in row 1"):
            as_plain(pandas.DataFrame({"text": ["a", missing]}))
        with pytest.raises(ValueError, match=r"item 1 is (None|nan|<NA>|NaT)"):
            as_samples(pandas.Series(["a", missing]))


@pytest.mark.parametrize(
    "x, message",
    [
        ([("a", "b"), ("c", "d")], r"Pairs must be \{'prompts'.*Received: \('a', 'b'\)"),
        ([{"text": "a"}, {"note": "b"}], r"columns \['text'\]. Received: \['note'\] in row 1"),
        ([{"text": "a"}, "b"], r"Every row must have.* Received: str in row 1"),
        (
            {**PAIRS, "sample_weight": [1, 0]},
            r"just the keys.*Received: \['prompts', 'responses', 'sample_weight'\]",
        ),
    ]
    + [
        (
            # As torch's `default_collate` does with messages.
            {"messages": [{"role": ["user"] * n}, {"role": ["assistant"] * n}]},
            "`collate_fn=list`",
        )
        for n in (1, 2)
    ]
    + [
        (
            {"prompt": [{"role": ["user"] * 2}], "completion": [{"role": ["assistant"] * 2}]},
            "`collate_fn=list`",
        ),
        ([CHATS[0], None], r"Chat 1: `messages\[0\]` must be a dict.*Received: None"),
        (
            [[{"role": "system", "content": "Be kind."}, *CHATS[0]]],
            "Chat 0: .*Gemma has no system role.*put its text before the user's.*'system'",
        ),
        ({"prompts": CHATS[0][:1], "responses": "b"}, "both strings or both lists of messages"),
        (
            {"prompt": [CHATS[0][:1]], "completion": [CHATS[0][:1]]},
            "`messages.1.` must have the role 'assistant'",
        ),
    ],
)
def test_wrong_samples(x, message):
    with pytest.raises(ValueError, match=message):
        as_samples(x)


def test_a_dataset_with_splits():
    datasets = library("datasets")
    splits = datasets.DatasetDict(train=dataset(text=TEXTS), test=dataset(text=TEXTS))
    with pytest.raises(ValueError, match=r"one split.*\['train'\]. Received: .*'train', 'test'"):
        as_plain(splits)
