"""Requests of completions and of chats, as rows to decode."""

import dataclasses
import secrets

from keras_vaultgemma.generation import sampling
from keras_vaultgemma.generation.batch_rows import Row
from keras_vaultgemma.generation.prompts import read_prompts
from keras_vaultgemma.generation.requests import Request
from keras_vaultgemma.generation.state import Settings
from keras_vaultgemma.generation.validation import read_stop_ids
from keras_vaultgemma.serving.errors import RequestError
from keras_vaultgemma.serving.fields import CHAT, COMPLETION, read_fields

DEFAULT_MAX_TOKENS = 16
"""Largest number of new tokens of a completion, as OpenAI has it. A chat may fill the context."""

SYSTEM_ROLES = ("system", "developer")


@dataclasses.dataclass(frozen=True)
class Call:
    """A checked request.

    Attributes:
        model: string. Name of the model.
        is_chat: bool. True for a chat, False for a completion.
        choices: int. Number of answers to each prompt.
        stream: bool. True if the answer is sent while it is generated.
        include_usage: bool. True if a stream ends with the number of tokens.
        echo: bool. True if the text of an answer begins with its prompt.
        log_probs: int or None. Number of likely tokens that are reported with each token; None if
            no log-probabilities are.
        request: `generation.requests.Request`, with a row for each answer.
        rows: list of `Row`, one for each answer.
    """

    model: str
    is_chat: bool
    choices: int
    stream: bool
    include_usage: bool
    echo: bool
    log_probs: int | None
    request: Request
    rows: list

    @property
    def scores_prompts(self):
        """True if log-probabilities of the prompt's tokens are reported, too."""
        return self.echo and self.log_probs is not None


def read_completion(body, model, max_rows):
    """Return the `Call` of the JSON object that is sent to `/v1/completions`.

    Args:
        body: the JSON value.
        model: `VaultGemmaCausalLM`.
        max_rows: int. Largest number of answers.

    Raises:
        RequestError: If a field is missing, unknown or out of its range.
    """
    fields = read_fields(body, COMPLETION)
    prompt = fields["prompt"]
    items = prompt if isinstance(prompt, list) else [prompt]
    if not items or not all(isinstance(item, (str, int, list)) for item in items):
        raise RequestError(
            400, "`prompt` must be a string, a list of ids, or a list of these", "prompt"
        )
    if isinstance(fields["logprobs"], bool):
        raise RequestError(400, "`logprobs` of a completion must be a number", "logprobs")
    limit = DEFAULT_MAX_TOKENS if fields["max_tokens"] is None else fields["max_tokens"]
    return _call(fields, prompt, limit, fields["logprobs"], model, max_rows)


def read_chat(body, model, max_rows):
    """Return the `Call` of the JSON object that is sent to `/v1/chat/completions`.

    Args:
        body: the JSON value.
        model: `VaultGemmaCausalLM`.
        max_rows: int. Largest number of answers.

    Raises:
        RequestError: If a field is missing, unknown or out of its range.
    """
    fields = read_fields(body, CHAT)
    if not isinstance(fields["logprobs"], bool):
        raise RequestError(400, "`logprobs` of a chat must be true or false", "logprobs")
    limits = [fields[name] for name in ("max_completion_tokens", "max_tokens")]
    limit = next((limit for limit in limits if limit is not None), None)
    log_probs = fields["top_logprobs"] if fields["logprobs"] else None
    return _call(fields, _read_messages(fields["messages"]), limit, log_probs, model, max_rows)


def _read_messages(messages):
    """Return messages as `apply_chat_template` takes them.

    Gemma has no system role: what it says precedes the user's first message.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "`messages` must be a non-empty list", "messages")
    system, chat = [], []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(400, f"`messages[{i}]` must have a role and a content", "messages")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if not isinstance(content, str):
            raise RequestError(
                400, f"The content of `messages[{i}]` must be a string or parts of text", "messages"
            )
        if message["role"] in SYSTEM_ROLES and not chat:
            system.append(content)
        else:
            chat.append({"role": message["role"], "content": content})
    if not chat or chat[-1]["role"] != "user":
        raise RequestError(400, "The last message must be the user's", "messages")
    chat[0]["content"] = "\n\n".join([*system, chat[0]["content"]])
    return chat


def _call(fields, inputs, limit, log_probs, model, max_rows):
    is_chat = "messages" in fields
    name = "messages" if is_chat else "prompt"
    try:
        prompts = read_prompts(inputs, model.preprocessor, model.backbone.vocabulary_size)
    except ValueError as error:
        raise RequestError(400, str(error)[:1000], name) from error
    limits = [_limit(len(row), limit, model.backbone.max_sequence_length) for row in prompts.rows]
    choices = fields["n"]
    if len(prompts.rows) * choices > max_rows:
        raise RequestError(
            400,
            f"A request must have at most {max_rows} answers. "
            f"Received: {len(prompts.rows)} prompts with n={choices}",
            "n",
        )
    rows = [row for row in prompts.rows for _ in range(choices)]
    limits = [limit for limit in limits for _ in range(choices)]
    stop_token_ids = read_stop_ids(
        "auto", model.preprocessor, is_chat, model.backbone.vocabulary_size
    )
    temperature = float(fields["temperature"])
    draws = [()] * len(rows)
    if temperature:
        seed = secrets.randbits(128) if fields["seed"] is None else fields["seed"] % 2**64
        draws = sampling.uniforms([seed], rows, max(limits))
    stop = fields["stop"]
    return Call(
        model=fields["model"],
        is_chat=is_chat,
        choices=choices,
        stream=fields["stream"],
        include_usage=bool((fields["stream_options"] or {}).get("include_usage")),
        echo=fields.get("echo", False),
        log_probs=log_probs,
        request=Request(
            prompts=prompts._replace(rows=rows),
            limits=limits,
            stop_token_ids=stop_token_ids,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            settings=Settings(),
        ),
        rows=[
            Row(
                prompt=row,
                limit=limit,
                stop_token_ids=stop_token_ids,
                temperature=temperature,
                top_p=float(fields["top_p"]),
                min_p=float(fields["min_p"]),
                repetition_penalty=float(fields["repetition_penalty"]),
                uniforms=uniforms,
                top=bool(log_probs),
            )
            for row, limit, uniforms in zip(rows, limits, draws, strict=True)
        ],
    )


def _limit(length, limit, context):
    """Return the largest number of new tokens after a prompt of `length` tokens."""
    room = context - length
    if room < (limit or 0) or (limit is None and room < 1):
        wanted = "" if limit is None else f" and asks for {limit} more"
        raise RequestError(
            400,
            f"The context of the model has {context} tokens. The prompt has {length}{wanted}",
            code="context_length_exceeded",
        )
    return room if limit is None else limit
