"""Conversion of prompts to rows of ids, and of rows of ids to the form of the prompts."""

from collections.abc import Mapping
from typing import NamedTuple

from keras_vaultgemma.data.containers import as_list
from keras_vaultgemma.data.text_inputs import apply_chat_template, as_chats, as_texts
from keras_vaultgemma.data.token_ids import check_ids, pad_rows, unpad_rows
from keras_vaultgemma.generation.validation import id_rows, padded_arrays


class Prompts(NamedTuple):
    """Prompts as ids, and the form in which they were given.

    Attributes:
        rows: list of non-empty lists of ids.
        form: "text", "chat", "ids" (lists of ints) or "padded" (a dict of arrays).
        is_single: bool. True if the input was one prompt instead of a batch. Defaults to False.
        length: int. Length T of padded arrays, else None.
    """

    rows: list
    form: str
    is_single: bool = False
    length: int | None = None


def read_prompts(inputs, preprocessor, vocabulary_size, add_generation_prompt=True):
    """Convert the inputs of `generate` or `score` to `Prompts`.

    Args:
        inputs: a string, a chat, a list of ids, or a batch of these.
        preprocessor: `VaultGemmaCausalLMPreprocessor`, or None if `inputs` are ids.
        vocabulary_size: int.
        add_generation_prompt: bool. True if a chat ends with the start of the model's next turn.
            Defaults to True.

    Raises:
        ValueError: If there are no prompts, a prompt is empty, an item is neither a string nor ids,
            an id is outside the vocabulary, or `inputs` are text and `preprocessor` is None.
    """
    inputs = inputs if isinstance(inputs, Mapping) else as_list(inputs)
    ids = None if isinstance(inputs, Mapping) else id_rows(inputs)
    if isinstance(inputs, Mapping):
        token_ids, mask = padded_arrays(inputs)
        prompts = Prompts(unpad_rows(token_ids, mask), "padded", length=token_ids.shape[1])
    elif ids is not None:
        prompts = Prompts(ids[0], "ids", ids[1])
    elif preprocessor is None:
        raise ValueError(
            "`inputs` must be ids, {'token_ids', 'padding_mask'} or lists of ints, if "
            f"`preprocessor` is None. Received: inputs={inputs!r}"
        )
    elif as_chats(inputs)[0]:
        chats, is_single = as_chats(inputs)
        texts = [apply_chat_template(chat, add_generation_prompt) for chat in chats]
        prompts = Prompts(preprocessor.tokenize_prompts(texts), "chat", is_single)
    else:
        texts, is_single = as_texts(inputs)
        prompts = Prompts(preprocessor.tokenize_prompts(texts), "text", is_single)

    if not prompts.rows:
        raise ValueError("`inputs` must have at least one prompt. Received: none")
    for i, row in enumerate(prompts.rows):
        if not row:
            raise ValueError(f"A prompt must have at least one token. Received: none in prompt {i}")
        check_ids(row, vocabulary_size)
    return prompts


def format_rows(prompts, generated, strip_prompt, preprocessor, cut):
    """Return generated rows of ids in the form of the prompts.

    Args:
        cut: list of ints. Number of characters to leave out at the end of each text.
    """
    if strip_prompt is None:
        strip_prompt = prompts.form == "chat"
    rows = (
        generated if strip_prompt else [a + b for a, b in zip(prompts.rows, generated, strict=True)]
    )
    if prompts.form == "padded":
        token_ids, padding_mask = pad_rows(rows, max(prompts.length, *map(len, rows)))
        return {"token_ids": token_ids, "padding_mask": padding_mask}
    if prompts.form == "ids":
        return rows[0] if prompts.is_single else rows
    texts = preprocessor.detokenize(rows)
    outputs = [text[: len(text) - n] for text, n in zip(texts, cut, strict=True)]
    return outputs[0] if prompts.is_single else outputs


def concatenate_rows(outputs):
    """Concatenate outputs of several batches, lists or dicts of padded arrays."""
    if not isinstance(outputs[0], dict):
        return [output for batch in outputs for output in batch]
    rows = [
        row for batch in outputs for row in unpad_rows(batch["token_ids"], batch["padding_mask"])
    ]
    token_ids, padding_mask = pad_rows(rows, max(batch["token_ids"].shape[1] for batch in outputs))
    return {"token_ids": token_ids, "padding_mask": padding_mask}
