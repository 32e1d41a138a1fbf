"""Accuracies of multiple-choice items, by the definitions of lm-evaluation-harness written out."""

import math
import statistics

import numpy as np
import pytest
from common import LINES, one_layer_preset

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.evaluation import Accuracy, measure_multiple_choice, score_pairs

pytestmark = pytest.mark.first_backend

ITEMS = [
    {"context": line[: len(line) // 2].rstrip(), "choices": [*choices], "gold": gold}
    for line in LINES
    for gold, choices in enumerate(
        [("the wolf", "한국 𒀀𒁀", "a"), ("no", "yes it was long ago"), ("été", "ete", "x y z")]
    )
    if gold < len(choices)
]


@pytest.fixture(scope="module")
def model():
    return VaultGemmaCausalLM.from_preset(one_layer_preset())


def test_accuracies_are_those_of_the_definitions(model):
    found = measure_multiple_choice(model, ITEMS, mutual_information=True, verbose=False)
    expected = {"acc": [], "acc_norm": [], "acc_bytes": [], "acc_mutual_info": []}
    for item, log_probs in zip(ITEMS, found.log_probs, strict=True):
        choices = item["choices"]
        pairs = [(item["context"], f" {choice}") for choice in choices]
        x = score_pairs(model, pairs, verbose=False).log_probs
        # Absolute, too: a likely choice is a small difference of logits of about 20.
        np.testing.assert_allclose(log_probs, x, rtol=1e-5, atol=1e-5)
        y = score_pairs(model, [("", text) for _, text in pairs], verbose=False).log_probs
        values = {
            "acc": x,
            "acc_norm": x / [len(choice) for choice in choices],
            "acc_bytes": x / [len(choice.encode()) for choice in choices],
            "acc_mutual_info": x - y,
        }
        for name, value in values.items():
            expected[name].append(
                int(max(range(len(choices)), key=value.__getitem__) == item["gold"])
            )
    for name, correct in expected.items():
        accuracy = getattr(found, name)
        assert accuracy.value == pytest.approx(statistics.mean(correct))
        error = statistics.stdev(correct) / math.sqrt(len(correct))
        assert accuracy.standard_error == pytest.approx(error)
        assert (accuracy.correct, accuracy.items) == (sum(correct), len(ITEMS))


def test_one_item_has_no_standard_error():
    accuracy = Accuracy.of([True])
    assert accuracy.value == 1 and math.isnan(accuracy.standard_error)
    assert accuracy.as_dict()["standard_error"] is None


def test_errors(model):
    with pytest.raises(ValueError, match="`items` must have at least one item. Received: none"):
        measure_multiple_choice(model, [])
    with pytest.raises(ValueError, match="Received: item 0 without 'choices', 'gold'"):
        measure_multiple_choice(model, [{"context": "a"}])
    with pytest.raises(ValueError, match="`gold` must be the index of one of the 2 choices"):
        measure_multiple_choice(model, [{"context": "a", "choices": ["b", "c"], "gold": 2}])
