"""Ranges of hyperparameters, and the errors that name them."""

import pytest
from common import RELEASE_LIKE

from keras_vaultgemma.layers.hyperparameters import check_hyperparameters

pytestmark = pytest.mark.any_backend

HYPERPARAMETERS = dict(
    RELEASE_LIKE,
    query_pre_attn_scalar=16,
    attention_logit_soft_cap=None,
    final_logit_soft_cap=None,
    layer_types=["full_attention"] * 3,
    sliding_window_size=None,
    rope_theta=10_000.0,
    layer_norm_epsilon=1e-6,
)


def test_legal_values():
    check_hyperparameters(HYPERPARAMETERS)
    check_hyperparameters(
        HYPERPARAMETERS
        | dict(
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            sliding_window_size=2,
        )
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(num_query_heads=3, num_key_value_heads=2),
            "`num_query_heads` must be a multiple of num_key_value_heads=2. Received: num_query_heads=3",
        ),
        (dict(head_dim=15), "`head_dim` must be even.*head_dim=15"),
        (
            dict(vocabulary_size=0),
            "`vocabulary_size` must be a positive integer. Received: vocabulary_size=0",
        ),
        (dict(num_layers=2.5), "`num_layers` must be a positive integer. Received: num_layers=2.5"),
        (
            dict(hidden_dim="48"),
            "`hidden_dim` must be a positive integer. Received: hidden_dim='48'",
        ),
        (
            dict(rope_theta=0),
            "`rope_theta` must be a finite number above 0. Received: rope_theta=0",
        ),
        (dict(query_pre_attn_scalar=-1), "`query_pre_attn_scalar` must be a finite number above 0"),
        (
            dict(layer_norm_epsilon="small"),
            "`layer_norm_epsilon` must be a finite number above 0. Received.*'small'",
        ),
        (
            dict(final_logit_soft_cap=0.0),
            "`final_logit_soft_cap` must be None or a finite number above 0",
        ),
        (
            dict(layer_types=["full_attention"]),
            r"`layer_types` must be 3 \(num_layers\) of .*Received: layer_types=",
        ),
        (dict(layer_types=["full_attention"] * 2 + ["local"]), "`layer_types` must be .*'local'"),
        (
            dict(layer_types=["sliding_attention"] * 3),
            "`sliding_window_size` must be a positive integer. Received.*None",
        ),
    ],
)
def test_illegal_values_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        check_hyperparameters(HYPERPARAMETERS | changes)
