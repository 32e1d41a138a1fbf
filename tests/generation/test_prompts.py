import numpy as np
import pytest

from keras_vaultgemma import apply_chat_template
from keras_vaultgemma.generation.prompts import (
    Prompts,
    concatenate_rows,
    format_rows,
    read_prompts,
)

pytestmark = pytest.mark.any_backend


@pytest.fixture
def preprocessor(tiny):
    return tiny.preprocessor


def rows_of(preprocessor, *texts):
    return [[2, *map(int, preprocessor.tokenizer(text))] for text in texts]


def test_texts(preprocessor):
    both = rows_of(preprocessor, "Once upon", "a time")
    assert read_prompts("Once upon", preprocessor, 4096) == Prompts(both[:1], "text", True)
    for batch in (["Once upon", "a time"], np.array(["Once upon", "a time"])):
        assert read_prompts(batch, preprocessor, 4096) == Prompts(both, "text", False)


def test_chats(preprocessor):
    chat = [{"role": "user", "content": "Hello"}]
    rows = rows_of(preprocessor, apply_chat_template(chat, add_generation_prompt=True))
    assert read_prompts(chat, preprocessor, 4096) == Prompts(rows, "chat", True)
    assert read_prompts([chat, chat], preprocessor, 4096) == Prompts(rows * 2, "chat", False)


@pytest.mark.parametrize(
    "inputs, expected",
    [
        ([2, 5], Prompts([[2, 5]], "ids", True)),
        ([[2, 5], [7]], Prompts([[2, 5], [7]], "ids", False)),
        (np.array([2, 5], "int64"), Prompts([[2, 5]], "ids", True)),
        (np.array([[2, 5], [7, 8]]), Prompts([[2, 5], [7, 8]], "ids", False)),
        ([np.array([2, 5]), np.array([7])], Prompts([[2, 5], [7]], "ids", False)),
        (
            {
                "token_ids": np.array([[0, 2, 5], [7, 8, 0]]),
                "padding_mask": np.array([[0, 1, 1], [1, 1, 0]]),
            },
            Prompts([[2, 5], [7, 8]], "padded", False, 3),
        ),
        (
            {"token_ids": [[0, 2, 5], [7, 8, 0]], "padding_mask": [[0, 1, 1], [1, 1, 0]]},
            Prompts([[2, 5], [7, 8]], "padded", False, 3),
        ),
    ],
)
def test_ids(inputs, expected):
    assert read_prompts(inputs, None, 10) == expected


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([], "non-empty list of strings"),
        (np.zeros((0, 4), "int32"), "`inputs` must have at least one prompt. Received: none"),
        (np.zeros(0, "int32"), "at least one token. Received: none in prompt 0"),
        (
            {"token_ids": np.zeros((0, 4), "int32"), "padding_mask": np.zeros((0, 4), "int32")},
            "`inputs` must have at least one prompt. Received: none",
        ),
        (["a", 3], r"item 1 is 3"),
        ({"prompt": "a"}, "must have the keys 'token_ids' and 'padding_mask'.*\\['prompt'\\]"),
        ([[2, 4096]], "from 0 to 4095. Received: 4096"),
        ([[2], []], "at least one token. Received: none in prompt 1"),
        (
            {"token_ids": np.zeros((2, 3), "int32"), "padding_mask": np.zeros((2, 3), "int32")},
            "at least one token. Received: none in prompt 0",
        ),
        ([[{"role": "system", "content": "x"}]], "role 'user'"),
    ],
)
def test_invalid_prompts_are_rejected(preprocessor, inputs, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(inputs, preprocessor, 4096)


def test_text_without_preprocessor():
    with pytest.raises(ValueError, match="`inputs` must be ids.*if `preprocessor` is None.*'Once'"):
        read_prompts("Once", None, 10)


def test_rows_are_returned_in_the_form_of_the_prompts(preprocessor):
    once = rows_of(preprocessor, "Once")
    more = [[*map(int, preprocessor.tokenizer(" upon")), 1]]
    assert format_rows(Prompts(once, "text", True), more, None, preprocessor, [0]) == "Once upon"
    assert format_rows(Prompts(once, "text", True), more, None, preprocessor, [3]) == "Once u"
    assert format_rows(Prompts(once, "text", False), more, True, preprocessor, [0]) == [" upon"]
    reply = [list(map(int, preprocessor.tokenizer("Hello<end_of_turn>")))]
    assert (
        format_rows(Prompts(once, "chat", True), reply, None, preprocessor, [0])
        == "Hello<end_of_turn>"
    )
    assert format_rows(Prompts([[2, 5]], "ids", True), [[7, 8]], None, None, [0]) == [2, 5, 7, 8]
    padded = format_rows(
        Prompts([[2, 5], [3]], "padded", False, 5), [[7], [8, 9]], None, None, [0, 0]
    )
    assert padded["token_ids"].tolist() == [[2, 5, 7, 0, 0], [3, 8, 9, 0, 0]]
    assert padded["padding_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]


def test_batches_are_concatenated():
    assert concatenate_rows([["a", "b"], ["c"]]) == ["a", "b", "c"]
    first = {"token_ids": np.array([[1, 2]]), "padding_mask": np.array([[1, 1]])}
    second = {"token_ids": np.array([[3, 0, 0]]), "padding_mask": np.array([[1, 0, 0]])}
    together = concatenate_rows([first, second])
    assert together["token_ids"].tolist() == [[1, 2, 0], [3, 0, 0]]
    assert together["padding_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
