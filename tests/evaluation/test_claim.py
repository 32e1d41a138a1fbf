"""What a ledger claims."""

import pytest

from keras_vaultgemma.evaluation.claim import find_claim
from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.ledger import Ledger, Run
from keras_vaultgemma.privacy.statements import plain_training, unknown_history

pytestmark = pytest.mark.any_backend

RUN = Run(
    rows=100,
    sampling_probability=0.2,
    max_batch_size=40,
    noise_multiplier=2.0,
    clip_norm=0.1,
    delta=1e-5,
    planned_steps=10,
    unit="one row of at most 64 tokens",
    dataset="key:data",
    package_version="1",
    name="a",
)
RELEASE = {"epsilon": 2.0, "delta": 1.1e-10, "unit": "one sequence"}


def test_a_claim_is_that_of_the_ledger():
    ledger = Ledger((RELEASE,), ((RUN, 10), (RUN._replace(name="b", rows=99), 3)))
    claim, spent = find_claim(ledger), ledger.spent_on("key:data")
    assert (claim.status, claim.reason) == ("claim", "")
    assert (claim.epsilon, claim.delta, claim.steps) == (spent.epsilon, spent.delta, 13)
    assert (claim.unit, claim.records) == (RUN.unit, 100)
    assert [run["steps"] for run in claim.runs] == [10, 3]
    assert claim.statements == (RELEASE,)
    assert 0.5 < claim.limits.accuracy < claim.limits.auc < 1


@pytest.mark.parametrize(
    "ledger, reason",
    [
        (Ledger(), "has no privacy ledger"),
        (Ledger((RELEASE,)), "ledger has no private run"),
        (Ledger((), ((RUN, 0),)), "ledger has no private run"),
        (Ledger((), ((RUN._replace(mechanism=accounting.SEEDED), 5),)), "seeded for tests"),
    ],
)
def test_no_claim(ledger, reason):
    claim = find_claim(ledger)
    assert claim.status == "none" and reason in claim.reason and claim.limits is None


@pytest.mark.parametrize("statement", [plain_training(7), unknown_history("set_weights")])
def test_a_condition(statement):
    claim = find_claim(Ledger((statement,), ((RUN, 5),)))
    assert claim.status == "conditional" and claim.reason.startswith("It does not cover ")
    assert claim.statements == ()


@pytest.mark.parametrize(
    "dataset, match",
    [("key:data", "yes"), ("key:more", "no"), ("new:data", "unknown"), (None, "unknown")],
)
def test_the_records_of_the_claim(dataset, match):
    ledger = Ledger((), ((RUN, 5), (RUN._replace(name="b", dataset="key:other"), 2)))
    claim = find_claim(ledger, dataset)
    assert claim.data_match == match
    assert claim.steps == (5 if match == "yes" else 2)
