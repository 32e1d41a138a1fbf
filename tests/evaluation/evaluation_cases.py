"""What several tests of evaluations share."""

import json
from pathlib import Path

import jsonschema

import keras_vaultgemma

SCHEMAS = Path(keras_vaultgemma.__file__).parent / "evaluation/schemas"


def check_schema(name, result):
    """Check that a result, as JSON, has the schema that the package publishes."""
    schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(result.as_dict(), allow_nan=False)
    jsonschema.validate(json.loads(text), schema)
