"""Perplexity and bits per byte."""

import math

import numpy as np
import pytest
from common import LINES, check_schema

from keras_vaultgemma.data.text_files import TextRecords
from keras_vaultgemma.evaluation import Likelihood, measure


def test_perplexity_and_bits_per_byte():
    likelihood = Likelihood(math.log(2) * 30, 10, 20)
    assert likelihood.perplexity == pytest.approx(8)
    assert likelihood.bits_per_byte == pytest.approx(1.5)
    assert str(likelihood) == "perplexity 8, 1.5000 bits per byte"
    assert Likelihood(1e6, 10, 20).perplexity == math.inf
    assert math.isnan(Likelihood(math.nan, 10, 20).perplexity)


@pytest.mark.first_backend
@pytest.mark.parametrize("texts", [LINES, ["한국 𒀀𒁀 <table>\n\n\n a   b\t1234 <0x41>", "<bos>"]])
def test_every_byte_and_token_of_packed_text_counts_once(tiny, texts):
    data = TextRecords(texts, None).tokenize(tiny.preprocessor, packed=True)
    found = measure(tiny, **data)
    assert found.bytes == sum(len(text.encode()) for text in texts)
    assert found.tokens == sum(
        len(row) + 1 for row in tiny.preprocessor.tokenizer.tokenize(texts)
    )  # each with <eos>
    nats = 0.0
    for text in texts:
        ids = np.array([[2, *tiny.preprocessor.tokenizer.tokenize([text])[0], 1]])
        nats += tiny.score(ids).sum()
    if len(data["y"]) == 1:  # no text continues in another row
        assert found.nats == pytest.approx(nats, rel=1e-5)


@pytest.mark.first_backend
def test_only_responses_count(tiny):
    pairs = TextRecords(
        [" The tortoise.", " The hare, of course."], ["Who won the race?", "Who slept?"]
    )
    found = measure(tiny, **pairs.tokenize(tiny.preprocessor, packed=True))
    assert found.bytes == sum(len(text.encode()) for text in pairs.texts)
    nats = tokens = 0
    for prompt, response in zip(pairs.prompts, pairs.texts, strict=True):
        first, second = tiny.preprocessor.tokenizer.tokenize([prompt, response])
        nats += tiny.score(np.array([[2, *first, *second, 1]]))[0, len(first) :].sum()
        tokens += len(second) + 1
    assert found.tokens == tokens
    assert found.nats == pytest.approx(nats, rel=1e-5)


@pytest.mark.first_backend
@pytest.mark.filterwarnings("ignore:.*were truncated")
def test_truncated_labels_do_not_count(tiny):
    preprocessor = type(tiny.preprocessor)(
        tiny.preprocessor.tokenizer, sequence_length=8, truncate="row_end"
    )
    pairs = TextRecords(
        ["The tortoise.", "The hare."], ["Who?", "A much longer tale of a hare and a tortoise"]
    )
    found = measure(tiny, **pairs.tokenize(preprocessor, packed=True))
    assert found.bytes == len(b"The tortoise.")
    x, y, weights = preprocessor({"prompts": pairs.prompts[1:], "responses": pairs.texts[1:]})
    with pytest.raises(
        ValueError,
        match="must have a label that stands for text and is not truncated. Received: none",
    ):
        measure(tiny, x, y, weights)


def test_the_dict_for_json_follows_its_schema():
    for likelihood in (Likelihood(20.0, 10, 40), Likelihood(math.nan, 1, 1)):
        check_schema(likelihood.as_dict(), "likelihood")
    assert Likelihood(math.nan, 1, 1).as_dict()["perplexity"] is None
