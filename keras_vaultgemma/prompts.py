"""What users hand to `generate`, as rows of ids, and what they get back for it."""

from typing import NamedTuple

import numpy as np
from keras import ops

from keras_vaultgemma import ids
from keras_vaultgemma.preprocessor import as_texts
from keras_vaultgemma.tokenizer import apply_chat_template, as_chats


class Prompts(NamedTuple):
    """Prompts as ids, and the form they came in.

    Attributes:
        rows: list of non-empty lists of ids.
        form: "text", "chat", "ids" (lists of ints) or "padded" (a dict of arrays).
        is_single: whether the input was one prompt and not a batch of them.
        width: T of padded arrays, else None.
    """

    rows: list
    form: str
    is_single: bool = False
    width: int | None = None


def read(inputs, preprocessor, vocabulary_size):
    """`Prompts` from a string, a chat or ids, or from a batch of one of these.

    Raises:
        ValueError: for no prompts, an empty one, items that are neither strings nor ids, ids outside the vocabulary, or
            text without a preprocessor.
    """
    if isinstance(inputs, dict) and "token_ids" in inputs:
        token_ids, mask = (ops.convert_to_numpy(inputs[key]) for key in ("token_ids", "padding_mask"))
        prompts = Prompts(ids.unpad(token_ids, mask), "padded", width=token_ids.shape[1])
    elif _are_ids(inputs):
        is_single = (inputs.ndim if hasattr(inputs, "ndim") else np.ndim(inputs[0]) + 1) == 1
        prompts = Prompts([list(map(int, row)) for row in ([inputs] if is_single else inputs)], "ids", is_single)
    elif preprocessor is None:
        raise ValueError(
            "Without a preprocessor, `inputs` must be ids: {'token_ids', 'padding_mask'} or lists of ints. "
            f"Received: {inputs!r}"
        )
    elif as_chats(inputs)[0]:
        chats, is_single = as_chats(inputs)
        texts = [apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        prompts = Prompts(preprocessor.tokenize_prompts(texts), "chat", is_single)
    else:
        texts, is_single = as_texts(inputs)
        prompts = Prompts(preprocessor.tokenize_prompts(texts), "text", is_single)

    if not prompts.rows:
        raise ValueError("`inputs` must have at least one prompt. Received: none")
    for i, row in enumerate(prompts.rows):
        if not row:
            raise ValueError(f"A prompt must have at least one token. Received: none in prompt {i}")
        ids.check_range(row, vocabulary_size)
    return prompts


def answer(prompts, generated, strip_prompt, preprocessor, cut):
    """What `generate` returns for rows of generated ids: in the form of the prompts, with or without them.

    Args:
        cut: list of ints, how many characters to leave out at the end of each text.
    """
    if strip_prompt is None:
        strip_prompt = prompts.form == "chat"
    rows = generated if strip_prompt else [a + b for a, b in zip(prompts.rows, generated, strict=True)]
    if prompts.form == "padded":
        token_ids, padding_mask = ids.pad(rows, max(prompts.width, *map(len, rows)))
        return {"token_ids": token_ids, "padding_mask": padding_mask}
    if prompts.form == "ids":
        return rows[0] if prompts.is_single else rows
    texts = preprocessor.detokenize(rows)
    outputs = [text[: len(text) - n] for text, n in zip(texts, cut, strict=True)]
    return outputs[0] if prompts.is_single else outputs


def concatenate(outputs):
    """One output for several batches' outputs, each a list or a dict of padded arrays."""
    if not isinstance(outputs[0], dict):
        return [output for batch in outputs for output in batch]
    rows = [row for batch in outputs for row in ids.unpad(batch["token_ids"], batch["padding_mask"])]
    token_ids, padding_mask = ids.pad(rows, max(batch["token_ids"].shape[1] for batch in outputs))
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def _are_ids(inputs):
    """Whether `inputs` is one row of ints or a batch of rows, as lists or arrays."""
    if hasattr(inputs, "dtype"):
        return "int" in str(inputs.dtype) and inputs.ndim in (1, 2)
    if not isinstance(inputs, (list, tuple)) or not len(inputs):
        return False
    first = inputs[0]
    if isinstance(first, (list, tuple)) and len(first):
        first = first[0]
    return hasattr(first, "__index__") or (hasattr(first, "dtype") and "int" in str(first.dtype))
