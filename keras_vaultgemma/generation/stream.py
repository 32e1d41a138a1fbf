"""Text of growing rows of ids: no incomplete characters and no part of a stop string."""

REPLACEMENT = "\ufffd"
"""The character that incomplete UTF-8 is decoded to."""


class TextStream:
    """Text of one growing row of ids.

    Args:
        detokenize: function from a list of ids to a string.
        stop: strings. The text ends before the first occurrence of any. Defaults to none.

    Attributes:
        ids: list of the ids that were pushed.
        stop: tuple of the stop strings.
        stopped: bool. True once a stop string has occurred.
    """

    def __init__(self, detokenize, stop=()):
        self.ids = []
        self.stop = tuple(stop)
        self.stopped = False
        self._detokenize = detokenize
        self._text = ""
        self._sent = 0

    def push(self, ids):
        """Append ids and return the new text that later ids cannot change.

        Ids after the one that completes a stop string are dropped.
        """
        start = self._sent
        if ids and not self.stopped:
            text, count = self._detokenize([*self.ids, *ids]), len(ids)
            end = find_first(text, self.stop)
            if end is not None:
                text, end, count = self._first_with_stop(ids)
                self.stopped, text = True, text[:end]
            self.ids += ids[:count]
            self._text = text
        final = len(self._text) if self.stopped else self._final_length()
        self._sent = max(self._sent, final)
        return self._text[start : self._sent]

    def _first_with_stop(self, ids):
        """Return the text with the fewest of `ids` that has a stop string, its index, and how many.

        Detokenizing takes longest, so it is called for one id after the other only here.
        """
        for count in range(1, len(ids) + 1):
            text = self._detokenize([*self.ids, *ids[:count]])
            end = find_first(text, self.stop)
            if end is not None:
                break
        return text, end, count

    def flush(self):
        """Return the rest of the text, when no more ids follow."""
        rest = self._text[self._sent :]
        self._sent = len(self._text)
        return rest

    @property
    def text(self):
        """The whole text, up to a stop string."""
        return self._text

    def _final_length(self):
        """Return the length without incomplete characters and starts of stop strings."""
        text = self._text.rstrip(REPLACEMENT)
        lengths = [n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return len(text) - max(lengths, default=0)


def find_first(text, strings):
    """Return the index in `text` of the first occurrence of any of `strings`, or None."""
    found = (text.find(string) for string in strings)
    return min((index for index in found if index >= 0), default=None)


class Stream:
    """Iterator over pieces of the text that follows one prompt, while it is generated.

    Joined, the pieces are what `generate` returns for the prompt. No piece ends within a character
    or contains a part of a stop string. An interrupt (Ctrl-C) during a decoding step ends the text;
    the text generated so far is returned and the model stays usable.

    Args:
        generator: has `stream`, as `generator.Generator`.
        request: `requests.Request` of one prompt.
        preprocessor: `VaultGemmaCausalLMPreprocessor`.

    Attributes:
        ids: list of the tokens generated so far.
        finish_reason: "stop", "length" or "interrupted" once the text has ended, until then None.
    """

    def __init__(self, generator, request, preprocessor):
        self.finish_reason = None
        self._text = TextStream(detokenizer(request, preprocessor), request.stop)
        self._stop_token_ids = request.stop_token_ids
        arguments = (
            request.prompts.rows,
            request.limits,
            request.stop_token_ids,
            request.settings,
        )
        if hasattr(generator, "stream"):
            self._steps = generator.stream(*arguments, interval=1)
        else:  # a search may revise all tokens until its end
            ends = stop_finder(request, preprocessor)
            self._steps = (generator.generate(*arguments, ends)[:2] for _ in range(1))
        self._pieces = self._run()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._pieces)

    @property
    def ids(self):
        return list(self._text.ids)

    def _run(self):
        reason = "length"
        while True:
            try:
                new = next(self._steps)[0][0]
                piece = self._text.push(new)
            except StopIteration:
                break
            except KeyboardInterrupt:
                reason = "interrupted"
                break
            if self._text.stopped or (new and new[-1] in self._stop_token_ids):
                reason = "stop"
            if piece:
                yield piece
            if self._text.stopped:
                break
        self._steps.close()
        self.finish_reason = reason
        if rest := self._text.flush():
            yield rest


def turn_end_stripper(request, preprocessor):
    """Return a function that removes `<end_of_turn>` from a row of ids if the request is a chat."""
    turn_end = preprocessor.tokenizer.end_of_turn_id if request.prompts.form == "chat" else None
    if turn_end not in request.stop_token_ids:
        return list
    return lambda row: [i for i in row if i != turn_end]


def detokenizer(request, preprocessor):
    """Return a function from a generated row of ids to the text that the user is given."""
    strip = turn_end_stripper(request, preprocessor)
    return lambda row: preprocessor.detokenize([strip(row)])[0]


def stop_finder(request, preprocessor):
    """Return a function of a row's index and its new ids that finds a stop string; None without."""
    if not request.stop:
        return None
    detokenize = detokenizer(request, preprocessor)
    return lambda _, row: find_first(detokenize(row), request.stop) is not None
