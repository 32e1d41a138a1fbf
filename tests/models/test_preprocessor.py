import keras
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma import VaultGemmaCausalLMPreprocessor, apply_chat_template
from keras_vaultgemma.data.text_inputs import as_texts

TEXTS = ["Once upon a time", "The fox"]
PAIRS = {"prompts": ["The fox", "Once upon"], "responses": [" ran.", " a time"]}
CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "The fox"},
    {"role": "user", "content": "And?"},
    {"role": "model", "content": "It ran."},
]


@pytest.fixture(scope="module")
def preprocessor():
    return VaultGemmaCausalLMPreprocessor.from_preset("vaultgemma_tiny", sequence_length=8)


def ids_of(preprocessor, text):
    return [int(i) for i in preprocessor.tokenizer(text)]


def test_training_rows(preprocessor):
    x, y, weight = preprocessor(TEXTS)
    for i, text in enumerate(TEXTS):
        row = [2, *ids_of(preprocessor, text), 1]
        n = len(row) - 1
        assert n < 8
        assert x["token_ids"][i].tolist() == (row + [0] * 8)[:8]
        assert x["padding_mask"][i].tolist() == ([1] * (n + 1) + [0] * 8)[:8]
        assert y[i].tolist() == row[1:] + [0] * (8 - n)
        assert weight[i].tolist() == [1] * n + [0] * (8 - n)
    assert {a.dtype.name for a in (*x.values(), y, weight)} == {"int32"}
    assert all(isinstance(a, np.ndarray) for a in (*x.values(), y, weight))


def test_a_single_string_has_no_batch(preprocessor):
    x, y, weight = preprocessor(TEXTS[0])
    batch = preprocessor(TEXTS[:1])
    assert x["token_ids"].tolist() == batch[0]["token_ids"][0].tolist()
    assert y.tolist() == batch[1][0].tolist() and weight.tolist() == batch[2][0].tolist()


def test_a_text_that_is_cut_gets_no_end(preprocessor):
    text = "Once upon a time there was a king who had three sons and a garden"
    x, y, weight = preprocessor(text, sequence_length=5)
    row = [2, *ids_of(preprocessor, text)]
    assert x["token_ids"].tolist() == row[:5] and y.tolist() == row[1:6]
    assert weight.tolist() == [1] * 5


def test_pairs_teach_the_response_and_its_end(preprocessor):
    x, y, weight = preprocessor(PAIRS, sequence_length=16)
    for i in range(2):
        prompt = [2, *ids_of(preprocessor, PAIRS["prompts"][i])]
        answer = [*ids_of(preprocessor, PAIRS["responses"][i]), 1]
        row = prompt + answer
        assert x["token_ids"][i].tolist() == row + [0] * (16 - len(row))
        assert x["padding_mask"][i].tolist() == [1] * len(row) + [0] * (16 - len(row))
        assert y[i][weight[i] == 1].tolist() == answer
        assert weight[i].tolist() == [0] * (len(prompt) - 1) + [1] * len(answer) + [0] * (
            17 - len(row)
        )
    single = preprocessor({key: values[0] for key, values in PAIRS.items()}, sequence_length=16)
    assert single[0]["token_ids"].tolist() == x["token_ids"][0].tolist()
    assert single[2].tolist() == weight[0].tolist()


def test_chats_teach_what_the_model_says(preprocessor):
    """What is given is what `generate` reads before each answer; the user's last word teaches nothing."""
    first, second = (apply_chat_template(CHAT[:n], add_generation_prompt=True) for n in (1, 3))
    x, y, weight = preprocessor(CHAT, sequence_length=64)
    row = [2, *ids_of(preprocessor, apply_chat_template(CHAT))[:-1]]  # "\n" follows the last answer
    assert row[-1] == preprocessor.tokenizer.end_of_turn_id
    assert x["token_ids"].tolist() == row + [0] * (64 - len(row))
    answers = [ids_of(preprocessor, text + "<end_of_turn>") for text in ("The fox", "It ran.")]
    assert y[weight == 1].tolist() == answers[0] + answers[1]
    for prompt, answer in zip((first, second), answers, strict=True):
        start = len(ids_of(preprocessor, prompt))
        assert row[: start + 1] == preprocessor.tokenize_prompts([prompt])[0]
        assert weight[start : start + len(answer)].all() and not weight[start - 1]
    batch = preprocessor([CHAT, CHAT + CHAT[:1]], sequence_length=64)
    assert batch[0]["token_ids"].tolist() == [x["token_ids"].tolist()] * 2
    assert batch[2].tolist() == [weight.tolist()] * 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"prompts": ["a"], "responses": ["b", "c"]}, "Received: 1 prompts and 2 responses"),
        ({"prompts": ["a", 3], "responses": ["b", "c"]}, r"item 1 is 3 \(int\)"),
        ({"prompts": ["a"]}, r"keys 'prompts' and 'responses'.*Received: \['prompts'\]"),
        ([CHAT, CHAT[:1]], "answer of the model to train on. Received: none in chat 1"),
        ([CHAT, []], "at least one message"),
        ([CHAT[1:]], "must have the role 'user'"),
    ],
)
def test_samples_that_are_refused(preprocessor, wrong, message):
    with pytest.raises(ValueError, match=message):
        preprocessor(wrong)


def test_without_special_tokens(preprocessor):
    plain = VaultGemmaCausalLMPreprocessor(
        preprocessor.tokenizer, sequence_length=8, add_start_token=False, add_end_token=False
    )
    x, _, weight = plain("The fox")
    ids = ids_of(preprocessor, "The fox")
    assert x["token_ids"].tolist() == ids + [0] * (8 - len(ids))
    assert weight.sum() == len(ids) - 1


@pytest.mark.parametrize(
    "kind",
    [list, tuple, np.array, lambda x: np.array(x, object), lambda x: [s.encode() for s in x]],
)
def test_kinds_of_input(preprocessor, kind):
    expected = preprocessor(TEXTS)
    x, y, weight = preprocessor(list(kind(TEXTS)) if kind is tuple else kind(TEXTS))
    assert x["token_ids"].tolist() == expected[0]["token_ids"].tolist()
    assert y.tolist() == expected[1].tolist() and weight.tolist() == expected[2].tolist()


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="imports TensorFlow, which other backends never do",
)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_tf_data_map(preprocessor, batch_size):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(TEXTS)
    dataset = dataset.batch(batch_size) if batch_size else dataset
    mapped = list(dataset.map(preprocessor).as_numpy_iterator())
    expected = preprocessor(TEXTS)
    stack = (lambda rows: rows[0]) if batch_size else np.stack
    assert (
        stack([x["token_ids"] for x, _, _ in mapped]).tolist() == expected[0]["token_ids"].tolist()
    )
    assert stack([y for _, y, _ in mapped]).tolist() == expected[1].tolist()
    spec = dataset.map(preprocessor).element_spec
    assert spec[1].shape.as_list() == ([None, 8] if batch_size else [8])
    pairs = tf.data.Dataset.from_tensor_slices(PAIRS)
    pairs = pairs.batch(batch_size) if batch_size else pairs
    mapped = list(pairs.map(preprocessor).as_numpy_iterator())
    assert stack([weight for _, _, weight in mapped]).tolist() == preprocessor(PAIRS)[2].tolist()


def test_generate_preprocess_and_postprocess(preprocessor):
    x = preprocessor.generate_preprocess(TEXTS)
    for i, text in enumerate(TEXTS):
        row = [2, *ids_of(preprocessor, text)]
        assert x["token_ids"][i].tolist() == row + [0] * (8 - len(row))
        assert x["padding_mask"][i].sum() == len(row)
    assert preprocessor.generate_postprocess(x) == TEXTS
    tensors = {key: keras.ops.convert_to_tensor(value) for key, value in x.items()}
    assert preprocessor.generate_postprocess(tensors) == TEXTS
    assert preprocessor.generate_preprocess("The fox", sequence_length=20)["token_ids"].shape == (
        20,
    )


def test_a_prompt_that_is_too_long(preprocessor):
    with pytest.raises(ValueError, match=r"max_length=3 tokens.*Received: \d+ tokens in prompt 1"):
        preprocessor.generate_preprocess(["a", "Once upon a time there was"], sequence_length=3)


def test_config_round_trip(preprocessor, tmp_path):
    preprocessor.save_to_preset(str(tmp_path / "preset"))
    again = VaultGemmaCausalLMPreprocessor.from_config(preprocessor.get_config())
    assert again.sequence_length == 8
    assert (
        tmp_path / "preset/assets/tokenizer/vocabulary.spm"
    ).read_bytes() == preprocessor.tokenizer.proto


@pytest.mark.parametrize(
    "wrong, message",
    [
        ([], "non-empty list of strings"),
        (3, "must be a string or a non-empty list of strings. Received: 3"),
        (["a", 5], r"item 1 is 5 \(int\)"),
        ([["a"]], r"item 0 is \['a'\] \(list\)"),
        (np.array([1, 2]), r"item 0 is 1"),
        (None, "Received: None"),
    ],
)
def test_as_texts_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        as_texts(wrong)


def test_empty_string_is_a_row_of_its_own(preprocessor):
    x, y, weight = preprocessor("")
    assert (
        x["token_ids"].tolist()[:2] == [2, 1]
        and y.tolist()[0] == 1
        and weight.tolist() == [1] + [0] * 7
    )
    assert to_numpy(preprocessor.generate_preprocess("")["token_ids"]).tolist() == [2] + [0] * 7


# Rows that are too long.


def rows_of(preprocessor, x, y, weight):
    """Whole rows and the ids that are trained on."""
    row = [*x["token_ids"][x["padding_mask"] > 0].tolist()]
    trained = y[weight > 0].tolist()
    if weight[-1]:
        row.append(int(y[-1]))  # the label of the last token
    return row, trained


@pytest.mark.first_backend
@pytest.mark.parametrize("truncate", ["prompt_start", "prompt_end", "row_end"])
@pytest.mark.parametrize("length", range(4, 22))
def test_pairs_that_are_too_long(preprocessor, truncate, length):
    """The answer stays while it fits beside `<bos>` and `<eos>`; the prompt gets what is left."""
    prompt, answer = "Once upon a time a Fox saw the Crow", "The Hare ran."
    cut = VaultGemmaCausalLMPreprocessor(
        preprocessor.tokenizer, sequence_length=length, truncate=truncate
    )
    given, wanted = ids_of(preprocessor, prompt), ids_of(preprocessor, answer)
    row, trained = rows_of(cut, *cut({"prompts": prompt, "responses": answer}))
    room = length + 1 - 2 - len(wanted)
    if truncate == "row_end":
        expected = [2, *given, *wanted, 1][: length + 1]
        assert row == expected[: len(row)] and trained == expected[1 + len(given) :]
    elif room >= 0:
        kept = given[max(0, len(given) - room) :] if truncate == "prompt_start" else given[:room]
        assert row == [2, *kept, *wanted, 1] and trained == [*wanted, 1]
    else:
        half = (length - 1) // 2
        kept = given[len(given) - half :] if truncate == "prompt_start" else given[:half]
        assert row == [2, *kept, *wanted][: length + 1] and trained == wanted[: length - half]


@pytest.mark.first_backend
@pytest.mark.parametrize("truncate", ["prompt_start", "prompt_end"])
def test_chats_that_are_too_long(preprocessor, truncate):
    """Turn markers stay; first turns go before the prompt of the last answer is cut."""
    long = [
        *CHAT[:2],
        {"role": "user", "content": "Once upon a time a Fox saw the Crow. Who was it?"},
        {"role": "assistant", "content": "The Fox."},
    ]
    cut = VaultGemmaCausalLMPreprocessor(
        preprocessor.tokenizer, sequence_length=64, truncate=truncate
    )
    whole, _ = rows_of(cut, *cut(long))
    last = ids_of(preprocessor, apply_chat_template(long[2:]))[:-1]
    answers = [ids_of(preprocessor, text + "<end_of_turn>") for text in ("The fox", "The Fox.")]
    start, end = (
        ids_of(preprocessor, t) for t in ("<start_of_turn>user\n", "<start_of_turn>model\n")
    )
    for length in range(len(whole) - 2, len(start) + len(end) + len(answers[1]) + 4, -1):
        row, trained = rows_of(cut, *cut(long, sequence_length=length))
        assert len(row) == length + 1 or len(row) <= len(last) + 1
        assert row[: 1 + len(start)] == [2, *start]
        assert row[-len(answers[1]) - len(end) :] == [*end, *answers[1]]
        assert trained in (answers[0] + answers[1], answers[1])
        if len(row) == len(last) + 1:
            assert row == [2, *last]


def test_truncate_is_checked_and_saved(preprocessor):
    with pytest.raises(ValueError, match="`truncate` must be one of .*prompt_start"):
        VaultGemmaCausalLMPreprocessor(preprocessor.tokenizer, truncate="left")
    cut = VaultGemmaCausalLMPreprocessor(preprocessor.tokenizer, truncate="prompt_end")
    assert VaultGemmaCausalLMPreprocessor.from_config(cut.get_config()).truncate == "prompt_end"
    assert preprocessor.truncate == "prompt_start"
