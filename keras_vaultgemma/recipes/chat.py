"""A chat with a model in a terminal, as a function: `keras-vaultgemma chat`."""

from keras_vaultgemma.data.text_inputs import apply_chat_template
from keras_vaultgemma.recipes.sources import is_run, load_with_sampler

PRE_TRAINED = "It is pre-trained only: it continues text, and has not been trained to answer."
"""What is said of a model without an adapter."""

COMMANDS = """\
/reset    forget the chat
/history  print the chat
/help     print this
/exit     end, like the end of the input"""

RESERVE = 16
"""Tokens that the model's reply can have at least."""


def chat(
    read_line,
    preset=None,
    max_new_tokens=256,
    *,
    adapter=None,
    sampler=None,
    temperature=None,
    top_k=None,
    top_p=None,
    repetition_penalty=None,
    seed=None,
    dtype=None,
    quantization=None,
    stop=(),
):
    """Load a preset and chat with it, one turn after the other.

    Lines that begin with "/" are commands: `COMMANDS`. Ctrl-C ends a reply, whose text so far stays
    in the chat. When the chat fills the model's context, its oldest turns are left out.

    Args:
        read_line: function without arguments that returns the user's next line, or None at the end.
        preset, adapter, sampler, temperature, top_k, top_p, repetition_penalty, seed, dtype,
            quantization, stop: as for `generate.generate`.
        max_new_tokens: int. Largest number of tokens of a reply. Defaults to 256.

    Returns:
        Iterator of strings: what to print.

    Raises:
        ValueError: If an argument is out of its range.
    """
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    model, source = load_with_sampler(preset, adapter, dtype, quantization, sampler, **sampling)
    options = {"stop": stop}
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    is_trained = source.adapter is not None or (preset is not None and is_run(preset))
    return _turns(read_line, Chat(model, max_new_tokens, options), source, is_trained)


class Chat:
    """The turns of a user and a model.

    Args:
        model: `VaultGemmaCausalLM`.
        max_new_tokens: int. Largest number of tokens of a reply.
        options: dict. Other arguments of `model.stream`.

    Attributes:
        messages: list of messages, as for `apply_chat_template`.
        dropped: int. Number of messages that the last reply did not see.
    """

    def __init__(self, model, max_new_tokens, options):
        self._model, self._limit, self._options = model, max_new_tokens, options
        self.messages, self.dropped = [], 0

    def reply(self, text):
        """Add a user's turn, and iterate over the pieces of the model's.

        Raises:
            ValueError: If the turn is longer than the context, or has a turn marker. It is then
                left out.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        context, self.dropped = self._model.backbone.max_sequence_length, 0
        while (room := context - self._length(messages[self.dropped :])) < RESERVE:
            self.dropped += 2
            if self.dropped >= len(messages):
                raise ValueError(
                    f"A message must leave {RESERVE} of the context's {context} tokens to the "
                    "reply. Received: a longer one"
                )
        stream = self._model.stream(
            messages[self.dropped :], max_new_tokens=min(self._limit, room), **self._options
        )
        pieces = []
        for piece in stream:
            pieces.append(piece)
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _length(self, messages):
        text = apply_chat_template(messages, add_generation_prompt=True)
        return len(self._model.preprocessor.tokenize_prompts([text])[0])


def _turns(read_line, chat, source, is_trained):
    name = f"{source.preset} with {source.adapter}" if source.adapter else str(source.preset)
    yield f"{name}. {'' if is_trained else f'{PRE_TRAINED} '}/help lists the commands.\n"
    while (line := read_line()) is not None:
        line = line.strip()
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            chat.messages = []
        elif line == "/history":
            for message in chat.messages:
                yield f"{message['role']}: {message['content'].strip()}\n"
        elif line.startswith("/"):
            yield f"{COMMANDS}\n"
        elif line:
            try:
                yield from chat.reply(line)
            except ValueError as error:
                yield str(error)
            yield "\n"
            if chat.dropped:
                yield f"[The {chat.dropped} oldest messages no longer fit and were left out.]\n"
