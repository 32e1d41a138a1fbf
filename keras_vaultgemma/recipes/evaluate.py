"""Likelihood of a data file under a model: what `keras-vaultgemma evaluate --data` does."""

import json

from keras_vaultgemma._validation import check_integer
from keras_vaultgemma.data.text_files import read_records
from keras_vaultgemma.evaluation.likelihood import measure
from keras_vaultgemma.recipes.sources import find_source, load_model


def evaluate(
    data,
    preset=None,
    *,
    adapter=None,
    text_column=None,
    prompt_column=None,
    response_column=None,
    sequence_length=None,
    dtype=None,
    quantization=None,
    as_json=False,
):
    """Measure perplexity and bits per byte of a data file under a model.

    Args:
        data: string or path of a file, as for `finetune`. Of prompts and responses, only the
            responses count.
        preset: string or path, as for `sources.find_source`. Defaults to the base of `adapter`, and
            to "vaultgemma_tiny" without one.
        adapter: string or path, as for `sources.find_source`. Defaults to None.
        text_column: string, as for `finetune`.
        prompt_column: string, as for `finetune`.
        response_column: string, as for `finetune`.
        sequence_length: int. Tokens of a row. Defaults to the preset's.
        dtype: string. Dtype of the weights. Defaults to that of the preset.
        quantization: string, "int8" or "int4". Quantize the weights. Defaults to None.
        as_json: bool. If True, return a JSON object: `perplexity`, `bits_per_byte`, `nats`,
            `tokens`, `bytes` and `rows`, null where a number is not finite. Defaults to `False`.

    Returns:
        String of two lines, or of the JSON object.

    Raises:
        ValueError: If the data is malformed or an argument is out of its range.
        OSError: If the file cannot be read.
    """
    check_integer("sequence_length", sequence_length, allow_none=True)
    records = read_records(data, text_column, prompt_column, response_column)
    source = find_source(preset, adapter)
    model = load_model(source, dtype, quantization)
    if sequence_length is not None:
        model.preprocessor.sequence_length = sequence_length
    likelihood = measure(model, **records.tokenize(model.preprocessor, packed=True))
    if as_json:
        return json.dumps({**likelihood.as_dict(), "rows": len(records.texts)})
    with_adapter = "" if source.adapter is None else f" with {source.adapter}"
    return (
        f"{source.preset}{with_adapter} on {data}: {len(records.texts):,} rows, "
        f"{likelihood.tokens:,} tokens\n{likelihood}"
    )
