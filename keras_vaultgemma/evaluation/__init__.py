"""Evaluation: how well a model predicts text, and what it reveals of its training data."""

# First, because it selects the Keras backend before Keras is imported.
from keras_vaultgemma import backend as backend
from keras_vaultgemma.evaluation.attack_limits import AttackLimits, attack_limits
from keras_vaultgemma.evaluation.canaries import insert_canaries
from keras_vaultgemma.evaluation.card_tasks import CardTask, card_tasks
from keras_vaultgemma.evaluation.claim import LedgerClaim, find_claim
from keras_vaultgemma.evaluation.intervals import Rate
from keras_vaultgemma.evaluation.likelihood import Likelihood, measure
from keras_vaultgemma.evaluation.lm_eval_model import lm_eval_model
from keras_vaultgemma.evaluation.membership import Membership, measure_membership
from keras_vaultgemma.evaluation.memorization import Memorization, measure_memorization
from keras_vaultgemma.evaluation.multiple_choice import (
    Accuracy,
    MultipleChoice,
    measure_multiple_choice,
)
from keras_vaultgemma.evaluation.pairs import PairScores, score_pairs
from keras_vaultgemma.evaluation.privacy_audit import Audit, audit
from keras_vaultgemma.evaluation.rolling import RollingLikelihood, measure_rolling
from keras_vaultgemma.evaluation.tasks import Metric, TaskResult, TaskResults, measure_tasks

__all__ = [
    "Accuracy",
    "AttackLimits",
    "Audit",
    "CardTask",
    "LedgerClaim",
    "Likelihood",
    "Membership",
    "Memorization",
    "Metric",
    "MultipleChoice",
    "PairScores",
    "Rate",
    "RollingLikelihood",
    "TaskResult",
    "TaskResults",
    "attack_limits",
    "audit",
    "card_tasks",
    "find_claim",
    "insert_canaries",
    "lm_eval_model",
    "measure",
    "measure_membership",
    "measure_memorization",
    "measure_multiple_choice",
    "measure_rolling",
    "measure_tasks",
    "score_pairs",
]
