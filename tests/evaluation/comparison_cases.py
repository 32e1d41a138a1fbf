"""A comparison as a dict, without a model."""

import copy
import functools

import numpy as np

from keras_vaultgemma.evaluation import report, verdict
from keras_vaultgemma.evaluation.attack_limits import AttackLimits
from keras_vaultgemma.evaluation.claim import LedgerClaim
from keras_vaultgemma.evaluation.intervals import Rate
from keras_vaultgemma.evaluation.membership import Membership, measure_attack
from keras_vaultgemma.evaluation.memorization import (
    Excess,
    Extraction,
    Memorization,
    Probabilistic,
    Stratum,
)
from keras_vaultgemma.evaluation.privacy_audit import Audit, Claim
from keras_vaultgemma.evaluation.provenance import describe_code
from keras_vaultgemma.evaluation.shift import DistributionShift

MODELS = ("base", "plain", "private")
SHA256 = "0123456789abcdef" * 4


def comparison(**changes):
    """A comparison of three models; `changes` replace its sections before the verdict is made."""
    found = {**copy.deepcopy(_comparison()), **changes}
    found["verdict"] = verdict.verdict(found)
    return found


@functools.cache
def _comparison():
    limits = AttackLimits(0.7, 0.8, {0.01: 0.2, 0.001: 0.05})
    claim = LedgerClaim(
        "claim",
        epsilon=7.9,
        delta=1e-5,
        unit="one row of at most 64 tokens",
        neighbouring="zero-out",
        mechanism="DP-SGD",
        records=200,
        steps=10,
        runs=(
            {
                "name": "abcdef012345",
                "rows": 200,
                "steps": 10,
                "sampling_probability": 0.2,
                "noise_multiplier": 1.1,
                "clip_norm": 0.1,
            },
        ),
        data_match="yes",
        limits=limits,
    )
    return {
        "format": report.FORMAT,
        "unprotected": report.UNPROTECTED,
        "created": "2026-11-30T12:00:00+00:00",
        "name": "dialogues",
        "claim": claim.as_dict(),
        "models": {
            name: {
                "preset": "vaultgemma_tiny",
                "adapter": None,
                "files": {"config.json": SHA256},
                "sha256": SHA256,
            }
            for name in MODELS
        },
        "data": {
            name: {"records": 200, "canaries": 0, "measured": 200, "fingerprint": "key:data"}
            for name in ("train", "held_out")
        },
        "code": describe_code(),
        "tasks": {},
        "likelihood": {
            name: {"nats": 1.0, "tokens": 9, "bytes": 30, "perplexity": 3.0, "bits_per_byte": bits}
            for name, bits in zip(MODELS, (3.0, 1.0, 2.0), strict=True)
        },
        "memorization": {
            name: memorization(count, name) for name, count in zip(MODELS, (0, 12, 0), strict=True)
        },
        "membership": {
            name: membership(gain) for name, gain in zip(MODELS, (0.0, 2.0, 0.1), strict=True)
        },
        "audit": {"plain": audit(3.0, None), "private": audit(0.4, 7.9)},
        "closest": {name: [{"record": 4, "distance": 0.5, "text": None}] for name in MODELS},
        "notes": [],
    }


def memorization(count, name="private", total=200):
    """A `Memorization` in which `count` training records are repeated, and no unseen one."""
    members, unseen = _extraction(count, total), _extraction(0, 100)
    excess = [
        Excess(over, measure, count / total, 0.0, 0.1, members.exact, unseen.exact)
        for over in ("baseline", "controls")
        for measure in ("exact", "approximate")
    ]
    strata = [
        Stratum("entropy", low, low + 0.1, members.exact, members.exact, None, None)
        for low in (0.6, 0.7)
    ]
    return Memorization(
        prefix_length=25,
        suffix_length=25,
        top_k=40,
        confidence=0.95,
        members=members,
        controls=unseen,
        baseline_members=None,
        baseline_controls=None,
        excess=tuple(excess if name != "base" else excess[2:]),
        strata=tuple(strata),
        left_out={},
        is_claim=total >= 30,
        warnings=() if total >= 30 else ("few records",),
    ).as_dict()


def _extraction(count, total):
    rate = Rate.of(count, total)
    return Extraction(rate, rate, (Probabilistic(100, 0.5, rate),), 0.5, 1e9)


def membership(gain, total=200):
    """A `Membership` of an attack whose scores of training records are larger by `gain`."""
    generator = np.random.default_rng(0)
    members, controls = generator.normal(gain, 1, total), generator.normal(0, 1, total)
    return Membership(
        members=total,
        controls=total,
        truncated=0,
        confidence=0.95,
        attacks=(measure_attack("loss", members, controls),),
        shift=DistributionShift(0.5, 0.5, None, False),
        left_out={},
        is_claim=total >= 30,
        warnings=(),
    ).as_dict()


def audit(bound, epsilon):
    """An `Audit` that shows that ε is at least `bound`."""
    claim = None if epsilon is None else Claim(epsilon, 1e-5)
    is_consistent = None if epsilon is None else bound <= epsilon
    return Audit(
        "random", 200, 100, 50, 30, bound, 1e-5, 0.95, 0.6, claim, is_consistent, ()
    ).as_dict()
