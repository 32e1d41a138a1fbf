"""Checks of arguments. Every message names the argument, its legal range and what was received."""

import difflib
import math
import numbers


def is_integer(value, minimum=1, maximum=None):
    """Return True for a Python or NumPy integer from `minimum` to `maximum`. A bool is none."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return False
    return value >= minimum and (maximum is None or value <= maximum)


def check_integer(name, value, minimum=1, maximum=None, allow_none=False):
    """Raise ValueError unless `value` is an integer from `minimum` to `maximum`.

    Args:
        name: string. Name of the argument, for the message.
        value: the argument.
        minimum: int. Smallest legal value. Defaults to 1.
        maximum: int. Largest legal value. Defaults to None, for no limit.
        allow_none: bool. If True, None is legal too. Defaults to `False`.

    Raises:
        ValueError: If `value` is out of range, a bool or no integer.
    """
    if (value is None and allow_none) or is_integer(value, minimum, maximum):
        return
    if maximum is not None:
        legal = f"an integer from {minimum} to {maximum}"
    elif minimum == 1:
        legal = "a positive integer"
    else:
        legal = f"an integer of at least {minimum}"
    _reject(name, value, legal, allow_none)


def check_number(name, value, above=None, minimum=None, below=None, maximum=None, allow_none=False):
    """Raise ValueError unless `value` is a finite real number in an interval.

    Args:
        name: string. Name of the argument, for the message.
        value: the argument.
        above: float. Lower bound that is not legal itself.
        minimum: float. Smallest legal value. At most one of `above` and `minimum` is given.
        below: float. Upper bound that is not legal itself.
        maximum: float. Largest legal value. At most one of `below` and `maximum` is given.
        allow_none: bool. If True, None is legal too. Defaults to `False`.

    Raises:
        ValueError: If `value` is outside the interval, NaN, infinite, a bool or no number.
    """
    if value is None and allow_none:
        return
    # Each comparison is written so that NaN fails it.
    if (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and -math.inf < value < math.inf
        and (above is None or value > above)
        and (minimum is None or value >= minimum)
        and (below is None or value < below)
        and (maximum is None or value <= maximum)
    ):
        return
    bounds = [
        f"{words} {bound:g}"
        for words, bound in (
            ("above", above),
            ("of at least", minimum),
            ("below", below),
            ("at most", maximum),
        )
        if bound is not None
    ]
    if minimum is not None and maximum is not None:
        bounds = [f"from {minimum:g} to {maximum:g}"]
    has_upper_bound = below is not None or maximum is not None
    number = "a number" if has_upper_bound else "a finite number"
    _reject(name, value, " ".join([number, " and ".join(bounds)]).strip(), allow_none)


def check_choice(name, value, choices, allow_none=False):
    """Raise ValueError unless `value` is one of `choices`.

    Args:
        name: string. Name of the argument, for the message.
        value: the argument.
        choices: iterable of the legal values, in the order in which the message lists them.
        allow_none: bool. If True, None is legal too. Defaults to `False`.

    Raises:
        ValueError: If `value` is not a choice.
    """
    choices = list(choices)
    if (value is None and allow_none) or value in choices:
        return
    _reject(name, value, f"one of {', '.join(map(repr, choices))}", allow_none)


def check_exactly_one(**arguments):
    """Raise ValueError unless exactly one of the keyword arguments is not None."""
    if sum(value is not None for value in arguments.values()) == 1:
        return
    names = " and ".join(f"`{name}`" for name in arguments)
    received = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    raise ValueError(f"Exactly one of {names} must be given. Received: {received}")


def check_known(function, arguments, known):
    """Raise TypeError unless a function has all the given keyword arguments.

    Args:
        function: string. Name of the function, for the message.
        arguments: iterable of the names that were given.
        known: iterable of the names that the function has.

    Raises:
        TypeError: If it lacks one. The message has the nearest name, or else all of them.
    """
    known = list(known)
    for name in arguments:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        cure = f"Did you mean `{near[0]}`?" if near else f"It has {', '.join(known)}"
        raise TypeError(f"{function} has no argument `{name}`. {cure}")


def _reject(name, value, legal, allow_none):
    legal = f"None or {legal}" if allow_none else legal
    raise ValueError(f"`{name}` must be {legal}. Received: {name}={value!r}")
