from itertools import chain

import keras
import numpy as np
import pytest
from common import random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.data import packing
from keras_vaultgemma.data.token_ids import pad_rows

pytestmark = pytest.mark.first_backend

TEXTS = [
    "Once upon a time there was a king.",
    "The fox",
    "",
    "It ran and ran, and nobody ever saw it again in the wood.",
]
ROWS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [], [16, 17]]
"""Documents as ids; the preset's `<bos>` is 2 and its `<eos>` 1."""


@pytest.fixture
def preprocessor(tiny):
    return tiny.preprocessor


def stacked(batches):
    """The arrays of all batches: token_ids, padding_mask, y, sample_weight."""
    flat = [(x["token_ids"], x["padding_mask"], y, weight) for x, y, weight in batches]
    return [np.concatenate(arrays) for arrays in zip(*flat, strict=True)]


def test_rows_by_hand(preprocessor):
    """[2 5 6 7 1] [2 8 1] [2 9..15 1] [2 1] [2 16 17 1] in rows of six."""
    token_ids, segments, y, weights = stacked(
        packing.batches(ROWS, preprocessor, 2, sequence_length=6)
    )
    assert token_ids.tolist() == [
        [2, 5, 6, 7, 1, 2],
        [8, 1, 2, 9, 10, 11],
        [12, 13, 14, 15, 1, 2],
        [1, 2, 16, 17, 1, 0],
    ]
    assert segments.tolist() == [
        [1, 1, 1, 1, 1, 2],
        [1, 1, 2, 2, 2, 2],
        [1, 1, 1, 1, 1, 2],
        [1, 2, 2, 2, 2, 0],
    ]
    assert y.tolist() == [
        [5, 6, 7, 1, 0, 8],
        [1, 0, 9, 10, 11, 12],
        [13, 14, 15, 1, 0, 1],
        [0, 16, 17, 1, 0, 0],
    ]
    assert weights.tolist() == [
        [1, 1, 1, 1, 0, 1],
        [1, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 1],
        [0, 1, 1, 1, 0, 0],
    ]


@pytest.mark.parametrize("length", [1, 2, 7, 20, 23, 24, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_token_and_no_label_is_lost(preprocessor, length, batch_size):
    batches = list(packing.batches(ROWS, preprocessor, batch_size, length))
    assert (
        all(len(y) == batch_size for _, y, _ in batches[:-1])
        and 1 <= len(batches[-1][1]) <= batch_size
    )
    token_ids, segments, y, weights = stacked(batches)
    assert {array.dtype.name for array in (token_ids, segments, y, weights)} == {"int32"}
    documents = [[2, *row, 1] for row in ROWS]
    assert token_ids[segments > 0].tolist() == [*chain(*documents)]
    assert y[weights == 1].tolist() == [*chain(*(document[1:] for document in documents))]
    assert (segments == 0).sum() < length and segments[:-1].all()


def test_one_long_document_fills_many_batches(preprocessor):
    token_ids, segments, _, weights = stacked(packing.batches([range(3, 103)], preprocessor, 2, 8))
    assert token_ids.shape == (13, 8)
    assert token_ids.ravel()[:102].tolist() == [2, *range(3, 103), 1]
    assert weights.sum() == 101 and set(segments[:-1].ravel()) == {1}


def test_texts_ids_and_bytes_give_the_same_batches(preprocessor):
    expected = stacked(packing.batches(TEXTS, preprocessor, 2, 8))
    rows = preprocessor.tokenizer.tokenize(TEXTS)
    for documents in (
        iter(TEXTS),
        (t.encode() for t in TEXTS),
        rows,
        [np.array(row, "int64") for row in rows],
    ):
        for found, array in zip(
            stacked(packing.batches(documents, preprocessor, 2, 8)), expected, strict=True
        ):
            np.testing.assert_array_equal(found, array)


def test_batches_are_packed_as_documents_are_read(preprocessor):
    read = []
    batches = packing.batches((read.append(i) or [5] * 6 for i in range(100)), preprocessor, 2, 8)
    next(batches)
    assert read == [0, 1, 2]


@pytest.mark.parametrize("sliding", [False, pytest.param(True, marks=pytest.mark.every_backend)])
def test_packed_segments_equal_separate_rows(preprocessor, sliding):
    options = (
        dict(layer_types=["sliding_attention", "full_attention"], sliding_window_size=3)
        if sliding
        else {}
    )
    model = VaultGemmaCausalLM(random_backbone(**{"num_layers": 2, **options}))
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 128, n).tolist() for n in (4, 9, 1, 14, 0, 6)]
    ((x, y, weights),) = packing.batches(documents, preprocessor, 8, 16)
    segments = [
        (i, row == n) for i, row in enumerate(x["padding_mask"]) for n in range(1, row.max() + 1)
    ]
    token_ids, mask = pad_rows([x["token_ids"][i, segment] for i, segment in segments], 16)
    targets, _ = pad_rows([y[i, segment] for i, segment in segments], 16)
    packed, alone = (
        to_numpy(model.backbone(x)),
        to_numpy(model.backbone({"token_ids": token_ids, "padding_mask": mask})),
    )
    scored, scored_alone = model.score(**x), model.score(token_ids, mask)
    for row, (i, segment) in enumerate(segments):
        np.testing.assert_allclose(packed[i, segment], alone[row, : segment.sum()], atol=2e-5)
        np.testing.assert_allclose(
            scored[i, segment], scored_alone[row, : segment.sum()], atol=2e-5
        )
    losses = model.score(token_ids, mask, target_ids=targets)
    labelled = [
        losses[row, : segment.sum()][weights[i, segment] == 1]
        for row, (i, segment) in enumerate(segments)
    ]
    model.compile()
    loss = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(np.concatenate(labelled).mean(), rel=1e-5)


def test_fit_takes_every_form(preprocessor):
    """An epoch on each from the same weights leads to the same weights."""
    model = VaultGemmaCausalLM(random_backbone(num_layers=1))
    model.compile(keras.optimizers.SGD(1e-3))
    start, ends = [to_numpy(v).copy() for v in model.variables], []
    forms = [packing.PackedDataset, packing.batches]
    forms += [packing.tensorflow_dataset] if keras.config.backend() == "tensorflow" else []
    for form in forms:
        for variable, value in zip(model.variables, start, strict=True):
            variable.assign(value)
        model.fit(form(ROWS, preprocessor, 2, 6), shuffle=False, verbose=0)
        ends.append([to_numpy(v) for v in model.variables])
    for first, *others in zip(*ends, strict=True):
        for other in others:
            np.testing.assert_array_equal(first, other)
    assert all(not np.array_equal(end, value) for end, value in zip(ends[0], start, strict=True))


@pytest.mark.every_backend
def test_packed_dataset_has_the_batches(preprocessor):
    dataset = packing.PackedDataset(TEXTS, preprocessor, 2, 8)
    batches = list(packing.batches(TEXTS, preprocessor, 2, 8))
    assert len(dataset) == dataset.num_batches == len(batches)
    for found, expected in zip(
        stacked(dataset[i] for i in range(len(dataset))), stacked(batches), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    x, _, _ = packing.PackedDataset(["The fox"], preprocessor, 1)[0]
    assert x["token_ids"].shape == (1, preprocessor.sequence_length)


@pytest.mark.every_backend
@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="imports TensorFlow, which other backends never do",
)
def test_tf_data(preprocessor):
    dataset = packing.tensorflow_dataset(TEXTS, preprocessor, 2, 8)
    expected = stacked(packing.batches(TEXTS, preprocessor, 2, 8))
    for _ in range(2):
        for found, array in zip(stacked(dataset.as_numpy_iterator()), expected, strict=True):
            np.testing.assert_array_equal(found, array)
    assert dataset.element_spec[0]["padding_mask"].shape.as_list() == [None, 8]


@pytest.mark.every_backend
@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="the other backends raise")
def test_tf_data_needs_tensorflow(preprocessor):
    with pytest.raises(ValueError, match="needs the TensorFlow backend. Received: the backend"):
        packing.tensorflow_dataset(TEXTS, preprocessor, 2)


@pytest.mark.parametrize(
    "documents, options, message",
    [
        (
            TEXTS,
            dict(batch_size=0),
            "`batch_size` must be a positive integer. Received: batch_size=0",
        ),
        (
            TEXTS,
            dict(batch_size=1, sequence_length=2.5),
            "`sequence_length` must be a positive integer.*=2.5",
        ),
        (
            TEXTS,
            dict(batch_size=1, sequence_length=0),
            "`sequence_length` must be a positive integer.*=0",
        ),
        (
            "one text",
            dict(batch_size=1),
            "`documents` must be an iterable of strings.*Received: documents='one text'",
        ),
    ],
)
def test_wrong_arguments_raise_at_once(preprocessor, documents, options, message):
    with pytest.raises(ValueError, match=message):
        packing.batches(documents, preprocessor, **options)


@pytest.mark.parametrize(
    "documents, message",
    [
        ([], "`documents` must have at least one document. Received: none"),
        (["a", None], "document 1 is None"),
        (["a", [["b"]]], r"document 1 is \[\['b'\]\]"),
        ([[5.0]], r"document 0 is \[5.0\]"),
        ([[5], [4096]], "from 0 to 4095. Received: 4096"),
    ],
)
def test_wrong_documents_raise(preprocessor, documents, message):
    with pytest.raises(ValueError, match=message):
        packing.PackedDataset(documents, preprocessor, 1, 8)
