"""Results of evaluations as JSON-able dicts."""

import dataclasses
import math
from typing import Any


class Result:
    """Base class of frozen dataclasses that hold the results of an evaluation."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON, with null where a number is not finite."""
        return _plain(self)


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
