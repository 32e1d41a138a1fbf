"""Checks of arguments: what is legal, and what the message says."""

import math

import numpy as np
import pytest

from keras_vaultgemma._validation import (
    check_choice,
    check_exactly_one,
    check_integer,
    check_number,
)

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize("value", [1, 7, np.int64(3), 2**70])
def test_legal_integers(value):
    check_integer("rank", value)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, np.float32(2), "1", None, math.nan])
def test_illegal_integers(value):
    with pytest.raises(ValueError) as error:
        check_integer("rank", value)
    assert str(error.value) == f"`rank` must be a positive integer. Received: rank={value!r}"


@pytest.mark.parametrize(
    ("bounds", "legal", "illegal", "message"),
    [
        (dict(minimum=0), 0, -1, "an integer of at least 0"),
        (dict(minimum=2, maximum=9), 9, 10, "an integer from 2 to 9"),
        (dict(allow_none=True), None, 0, "None or a positive integer"),
    ],
)
def test_the_range_of_an_integer(bounds, legal, illegal, message):
    check_integer("count", legal, **bounds)
    with pytest.raises(ValueError) as error:
        check_integer("count", illegal, **bounds)
    assert str(error.value) == f"`count` must be {message}. Received: count={illegal}"


@pytest.mark.parametrize(
    ("bounds", "legal", "illegal", "message"),
    [
        (dict(), [-1e300, 0], ["1"], "a finite number"),
        (dict(above=0), [1e-300, 2, np.float32(1)], [0, -1], "a finite number above 0"),
        (dict(minimum=0, below=1), [0, 0.99], [1, -0.1], "a number of at least 0 and below 1"),
        (dict(above=0, maximum=1), [1, 0.1], [0, 1.1], "a number above 0 and at most 1"),
        (dict(minimum=0, maximum=1), [0, 1], [-0.1, 1.1], "a number from 0 to 1"),
        (dict(above=0, allow_none=True), [None], [0], "None or a finite number above 0"),
    ],
)
def test_the_range_of_a_number(bounds, legal, illegal, message):
    for value in legal:
        check_number("rate", value, **bounds)
    for value in [*illegal, math.nan, math.inf, -math.inf, True, "1"]:
        with pytest.raises(ValueError) as error:
            check_number("rate", value, **bounds)
        assert str(error.value) == f"`rate` must be {message}. Received: rate={value!r}"


def test_a_choice():
    check_choice("to", "hf", ["keras", "hf"])
    check_choice("to", None, ["keras"], allow_none=True)
    with pytest.raises(ValueError) as error:
        check_choice("to", "onnx", ("keras", "hf"))
    assert str(error.value) == "`to` must be one of 'keras', 'hf'. Received: to='onnx'"


def test_exactly_one():
    check_exactly_one(epsilon=0, noise_multiplier=None)
    for values in (dict(epsilon=None, noise_multiplier=None), dict(epsilon=1, noise_multiplier=2)):
        with pytest.raises(
            ValueError, match="Exactly one of `epsilon` and `noise_multiplier` must be given"
        ) as error:
            check_exactly_one(**values)
        assert f"Received: epsilon={values['epsilon']}" in str(error.value)
