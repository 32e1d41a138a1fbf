"""Texts, pairs of prompts and responses, and chats, in the forms in which users pass them."""

import keras
import numpy as np

from keras_vaultgemma.data.containers import as_chat, as_list, as_plain

TURN_START, TURN_END = "<start_of_turn>", "<end_of_turn>"

ROLES = {"user": "user", "assistant": "model", "model": "model"}
"""Gemma's role for each role that a message may have."""


def apply_chat_template(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """Format a chat as Gemma was trained on it.

    Each turn becomes `<start_of_turn>role\\ncontent<end_of_turn>\\n`. `<bos>` is not included,
    because tokenization adds it.

    Args:
        messages: list of dicts with the keys `"role"` and `"content"`. Roles alternate, starting
            with "user"; the other is "assistant" or "model".
        add_generation_prompt: bool. If True, end with the start of the model's next turn. Defaults
            to `False`.

    Returns:
        String.

    Raises:
        ValueError: If there are no messages, or one of them lacks a key, is out of turn, or has a
            turn marker in its content, with which one speaker could write the other's turn.

    Example:

    ```python
    from keras_vaultgemma import apply_chat_template

    messages = [{"role": "user", "content": "Who won the race?"}]
    print(apply_chat_template(messages, add_generation_prompt=True))
    ```
    """
    return "".join(chat_parts(messages)) + (f"{TURN_START}model\n" if add_generation_prompt else "")


def chat_parts(messages):
    """Split a formatted chat into alternating parts: given text and the model's answers.

    An answer ends with its `<end_of_turn>`. The text before it equals the prompt that `generate`
    continues, character by character.

    Args:
        messages: list of dicts, as for `apply_chat_template`.

    Returns:
        List of strings, which join to the formatted chat. The first is given text.

    Raises:
        ValueError: As `apply_chat_template`.
    """
    messages = as_chat(messages)
    if not messages:
        raise ValueError("`messages` must be a list of at least one message. Received: none")
    parts = [""]
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"`messages[{i}]` must be a dict with 'role' and 'content'. Received: {message!r}"
            )
        role, content = message["role"], message["content"]
        role = ROLES.get(role) if isinstance(role, str) else None
        if role != ("user", "model")[i % 2]:
            way = " (put its text before the user's)" if message["role"] == "system" else ""
            raise ValueError(
                f"`messages[{i}]` must have the role {('user', 'assistant')[i % 2]!r}, because "
                f"Gemma has no system role and its turns alternate{way}. "
                f"Received: role={message['role']!r}"
            )
        if not isinstance(content, str) or TURN_START in content or TURN_END in content:
            raise ValueError(
                f"The content of `messages[{i}]` must be a string without {TURN_START} or "
                f"{TURN_END}. Received: {content!r}"
            )
        check_unicode(content, f"The content of `messages[{i}]`")
        opening, answer = f"{TURN_START}{role}\n", f"{content.strip()}{TURN_END}"
        if role == "model":
            parts[-1] += opening
            parts += [answer, "\n"]
        else:
            parts[-1] += f"{opening}{answer}\n"
    return parts


def as_chats(x):
    """Return a chat or a list of chats as a list.

    Args:
        x: a list of messages, a list of such lists, or anything else.

    Returns:
        Tuple `(chats, is_single)`. `is_single` is True if `x` was one chat. `(None, False)` if `x`
        is not of chats.
    """
    if not isinstance(x, (list, tuple)) or not len(x) or not isinstance(x[0], (dict, list, tuple)):
        return None, False
    return ([x], True) if isinstance(x[0], dict) else (x, False)


def as_samples(x):
    """Return texts, pairs or chats as samples for training.

    Args:
        x: a string, a chat, a dict of `"prompts"` and `"responses"` that are strings or chats, a
            list of these, or any container of them that `containers.as_plain` takes.

    Returns:
        Tuple `(samples, has_end, is_single)`. `samples` has a list of strings for each sample,
        alternating between given text and text to train on. `has_end` is True if samples end with
        `<eos>`. `is_single` is True if `x` was one sample.

    Raises:
        ValueError: If a table lacks the columns, prompts and responses differ in number, a chat has
            no answer of the model, or an item is no string.
    """
    x = as_plain(x)
    if not isinstance(x, dict):
        chats, is_single = as_chats(x)
        if chats:
            return _chat_samples(chats, [[]] * len(chats)), False, is_single
        texts, is_single = as_texts(x)
        return [["", text] for text in texts], True, is_single
    (prompts, is_single), (responses, _) = as_chats(x["prompts"]), as_chats(x["responses"])
    are_chats = bool(prompts or responses)
    if are_chats and not (prompts and responses):
        raise ValueError(
            "`prompts` and `responses` must be both strings or both lists of messages. "
            f"Received: {str(x)[:200]}"
        )
    if not are_chats:
        (prompts, is_single), (responses, _) = as_texts(x["prompts"]), as_texts(x["responses"])
    if len(prompts) != len(responses):
        raise ValueError(
            "`prompts` and `responses` must have the same length. "
            f"Received: {len(prompts)} prompts and {len(responses)} responses"
        )
    if are_chats:
        return _chat_samples(responses, prompts), False, is_single
    return [list(pair) for pair in zip(prompts, responses, strict=True)], True, is_single


def as_records(x):
    """Return the samples of data as one string each, or None if they are token ids.

    Args:
        x: samples as for `as_samples`, or a `keras.utils.PyDataset` of batches of them.
    """
    batches = [x]
    if isinstance(x, keras.utils.PyDataset):
        batches = (x[i] for i in range(x.num_batches or 0))
        batches = (batch[0] if isinstance(batch, tuple) else batch for batch in batches)
    records = []
    for batch in batches:
        if isinstance(batch, dict) and "token_ids" in batch:
            return None
        records += ["\0".join(parts) for parts in as_samples(batch)[0]]
    return records


def _chat_samples(chats, given):
    """Return the alternating parts of chats, of which the messages in `given` come first."""
    samples = []
    for i, (before, chat) in enumerate(zip(given, chats, strict=True)):
        try:
            parts = chat_parts([*before, *(chat if isinstance(chat, (list, tuple)) else [chat])])
        except ValueError as error:
            raise ValueError(f"Chat {i}: {error}") from error
        # Answers that are given are no answers to train on.
        count = 2 * sum(message["role"] != "user" for message in before) + 1
        # Text after the last answer has no label, so it is left out.
        parts = ["".join(parts[:count]), *parts[count:-1]]
        if len(parts) == 1:
            raise ValueError(
                f"A chat must have an answer of the model to train on. Received: none in chat {i}"
            )
        samples.append(parts)
    return samples


def as_texts(x):
    """Return a string or a sequence of strings as a list.

    Args:
        x: a string or bytes, or a list, tuple or column of them, as `containers.as_list` takes it.

    Returns:
        Tuple `(texts, is_single)`. `texts` is a list of strings; `is_single` is True if `x` was one
        string.

    Raises:
        ValueError: If `x` is empty or has an item that is not a string.
    """
    x = as_list(x)
    if isinstance(x, np.ndarray):
        x = x.tolist()
    is_single = isinstance(x, (str, bytes))
    items = [x] if is_single else x
    if not isinstance(items, (list, tuple)) or not len(items):
        raise ValueError(f"Input must be a string or a non-empty list of strings. Received: {x!r}")
    texts = [_decode(item, i) if isinstance(item, bytes) else item for i, item in enumerate(items)]
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                "Every item must be a string. "
                f"Received: item {i} is {text!r} ({type(text).__name__})"
            )
        check_unicode(text, f"Item {i}")
    return texts, is_single


def check_unicode(text, what):
    """Raise ValueError if a string has a surrogate, half of a character, which is no text.

    Args:
        text: string.
        what: string. Subject of the message.
    """
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} must be text that UTF-8 can encode. Received: the surrogate "
            f"{text[error.start]!r} at character {error.start}; decode bytes with "
            'errors="replace" to avoid them'
        ) from None


def _decode(item, number):
    try:
        return item.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Item {number} must be text in UTF-8. Received: {error}") from None
