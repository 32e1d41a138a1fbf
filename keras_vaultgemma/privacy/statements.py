"""Statements of a ledger about what no guarantee covers: training without privacy, unknown weights.

Every type is checked when they are read, because the metadata.json of others may state anything.
"""

import uuid

WITHOUT_PRIVACY = "without privacy"
UNKNOWN = "weights of unknown history"


def plain_training(steps: int, name: str | None = None) -> dict:
    """Return the statement that one call of `fit` did some steps without privacy.

    Args:
        steps: int.
        name: str. Unique name, which keeps two calls with equal numbers of steps apart. Defaults to
            a new one.
    """
    return {"training": WITHOUT_PRIVACY, "steps": steps, "name": name or uuid.uuid4().hex}


def unknown_history(source: str) -> dict:
    """Return the statement that weights came without a ledger, such as by `set_weights`."""
    return {"weights": UNKNOWN, "source": source}


def is_plain_training(statement) -> bool:
    """Return True if a statement is one of `plain_training`."""
    return _plain_steps(statement) is not None


def describe_uncovered(statements) -> str:
    """Describe what no guarantee covers; "" if there is nothing."""
    steps = sum(_plain_steps(statement) or 0 for statement in statements)
    sources = dict.fromkeys(map(_unknown_source, statements))
    return "; ".join(
        [
            *([f"{steps:,} steps, whose records no guarantee covers"] if steps else []),
            *(f"{UNKNOWN} ({source})" for source in sources if source is not None),
        ]
    )


def _plain_steps(statement):
    """Return the number of steps of a `plain_training`, or None for another statement."""
    if isinstance(statement, dict) and statement.get("training") == WITHOUT_PRIVACY:
        steps = statement.get("steps")
        return steps if isinstance(steps, int) else None
    return None


def _unknown_source(statement):
    """Return the source of an `unknown_history`, or None for another statement."""
    if isinstance(statement, dict) and statement.get("weights") == UNKNOWN:
        return str(statement.get("source"))
    return None


def is_of_users(unit: str) -> bool:
    """Return True if what a run protects is a user (`DPSGD(unit="user")`) and not a row."""
    return unit.startswith("one user")
