"""TODO."""

import numpy as np

from keras_vaultgemma import backend

TURN_START, TURN_END = "<start_of_turn>", "<end_of_turn>"


ROLES = {"user": "user", "assistant": "model", "model": "model"}
"""The roles of a chat, as users write them and as Gemma does."""


def apply_chat_template(messages, add_generation_prompt=False):
    """A conversation in Gemma's format: each turn `<start_of_turn>role\\ncontent<end_of_turn>\\n`.

    `<bos>` is not part of the string: tokenizing adds it.

    Args:
        messages: list of `{"role": …, "content": …}`; roles alternate, "user" first, then "assistant" (or "model").
        add_generation_prompt: open the model's next turn at the end.

    Raises:
        ValueError: names the message that is empty of a key, out of turn, or holds a turn marker in its content (which
            would let one speaker write another's turn).
    """
    return "".join(chat_parts(messages)) + (f"{TURN_START}model\n" if add_generation_prompt else "")


def chat_parts(messages):
    """What `apply_chat_template` joins: strings, by turns what is given and what the model answers.

    An answer ends with its `<end_of_turn>`. What is given before it is, to the character, what `generate` continues.
    """
    if not messages:
        raise ValueError(
            "`messages` must be a list of one or more messages. Received: an empty one"
        )
    parts = [""]
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"`messages[{i}]` must be a dict with 'role' and 'content'. Received: {message!r}"
            )
        role, content = ROLES.get(message["role"]), message["content"]
        if role != ("user", "model")[i % 2]:
            raise ValueError(
                f"`messages[{i}]` must have the role {('user', 'assistant')[i % 2]!r}: Gemma knows no system role, and "
                f"its turns alternate. Received: role={message['role']!r}"
            )
        if not isinstance(content, str) or TURN_START in content or TURN_END in content:
            raise ValueError(
                f"The content of `messages[{i}]` must be a string without {TURN_START} or {TURN_END}. "
                f"Received: {content!r}"
            )
        opening, said = f"{TURN_START}{role}\n", f"{content.strip()}{TURN_END}"
        if role == "model":
            parts[-1] += opening
            parts += [said, "\n"]
        else:
            parts[-1] += f"{opening}{said}\n"
    return parts


def as_chats(x):
    """(list of chats, whether `x` was a single one) from a chat or a list of chats; (None, False) for anything else."""
    if not isinstance(x, (list, tuple)) or not len(x) or not isinstance(x[0], (dict, list, tuple)):
        return None, False
    return ([x], True) if isinstance(x[0], dict) else (x, False)


def as_samples(x):
    """What the preprocessor is called on, as `(samples, has_end, is_single)`.

    Returns:
        samples: a list of strings for each sample, by turns what is given and what is to be learnt.
        has_end: whether they end with `<eos>`.
        is_single: whether `x` was a single sample.
    """
    if isinstance(x, dict):
        if set(x) != {"prompts", "responses"}:
            raise ValueError(
                "A dict must have the keys 'prompts' and 'responses', or 'token_ids' and 'padding_mask'. "
                f"Received: {sorted(x)}"
            )
        (prompts, is_single), (responses, _) = as_texts(x["prompts"]), as_texts(x["responses"])
        if len(prompts) != len(responses):
            raise ValueError(
                "`prompts` and `responses` must be as many as each other. "
                f"Received: {len(prompts)} prompts and {len(responses)} responses"
            )
        return [list(pair) for pair in zip(prompts, responses, strict=True)], True, is_single
    chats, is_single = as_chats(x)
    if not chats:
        texts, is_single = as_texts(x)
        return [["", text] for text in texts], True, is_single
    # What follows the last answer teaches nothing.
    samples = [chat_parts(chat)[:-1] for chat in chats]
    for i, parts in enumerate(samples):
        if not parts:
            raise ValueError(
                f"A chat must have a message of the model to learn. Received: none in chat {i}"
            )
    return samples, False, is_single


def as_texts(x):
    """(list of strings, whether `x` was a single one) from a string, bytes, a list or tuple or array of them.

    Raises:
        ValueError: for an empty list or an item that is not a string, which it names.
    """
    if backend.is_tensorflow(x):
        x = x.numpy()
    if isinstance(x, np.ndarray):
        x = x.tolist()
    is_single = isinstance(x, (str, bytes))
    items = [x] if is_single else x
    if not isinstance(items, (list, tuple)) or not len(items):
        raise ValueError(f"Input must be a string or a non-empty list of strings. Received: {x!r}")
    texts = [item.decode("utf-8") if isinstance(item, bytes) else item for item in items]
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"Every item must be a string. Received: item {i} is {text!r} ({type(text).__name__})"
            )
    return texts, is_single
