"""Ids to text, piece by piece: never half a character, never a part of a stop string."""

REPLACEMENT = "\ufffd"
"""What incomplete UTF-8 is decoded to."""


class TextStream:
    """Text of a growing row of ids.

    Args:
        detokenize: list of ids to a string.
        stop: strings; the text ends before the first that occurs.

    Attributes:
        ids: what was pushed.
        stopped: whether a stop string has occurred.
    """

    def __init__(self, detokenize, stop=()):
        self.ids = []
        self.stopped = False
        self._detokenize = detokenize
        self._stop = tuple(stop)
        self._text = ""
        self._sent = 0

    def push(self, ids):
        """Append ids and return the text that is certain by now; none once it has stopped.

        All ids up to and with the one that completes a stop string are kept in `ids`, those behind it are not.
        """
        before = self._sent
        for i in ids:
            if self.stopped:
                break
            self.ids.append(i)
            self._text = self._detokenize(self.ids)
            end = find_first(self._text, self._stop)
            if end is not None:
                self.stopped = True
                self._text = self._text[:end]
        self._sent = max(self._sent, len(self._text) if self.stopped else self._certain())
        return self._text[before : self._sent]

    def flush(self):
        """The rest, when no more ids come."""
        rest = self._text[self._sent :]
        self._sent = len(self._text)
        return rest

    @property
    def text(self):
        """All of the text, up to a stop string."""
        return self._text

    def _certain(self):
        """Length of the text without what may become another character or a stop string."""
        text = self._text.rstrip(REPLACEMENT)
        lengths = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return len(text) - max(lengths, default=0)


def find_first(text, strings):
    """Where the first of `strings` begins in `text`, or None."""
    return min((at for at in (text.find(string) for string in strings) if at >= 0), default=None)


class Stream:
    """Pieces of the text that follows one prompt, as it is generated; joined, they are what `generate` returns for it.

    No piece ends within a character, and none has a part of a stop string. An interrupt (Ctrl-C) while the model works
    ends the text there; what was generated so far is returned, and the model stays usable.

    Attributes:
        ids: the tokens generated so far.
        finish_reason: None at first; "stop", "length" or "interrupted" once it has ended.
    """

    def __init__(self, generator, request, preprocessor):
        self.finish_reason = None
        self._text = TextStream(detokenizer(request, preprocessor), request.stop)
        self._stop_token_ids = request.stop_token_ids
        self._parts = generator.stream(
            request.asked.rows, request.limits, request.stop_token_ids, request.settings, length=1
        )
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
                new = next(self._parts)[0][0]
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
        self._parts.close()
        self.finish_reason = reason
        if rest := self._text.flush():
            yield rest


def shown(request, preprocessor):
    """A function of a generated row of ids: without the `<end_of_turn>` that ends a chat's reply."""
    turn_end = preprocessor.tokenizer.end_of_turn_id if request.asked.form == "chat" else None
    if turn_end not in request.stop_token_ids:
        return list
    return lambda row: [i for i in row if i != turn_end]


def detokenizer(request, preprocessor):
    strip = shown(request, preprocessor)
    return lambda row: preprocessor.detokenize([strip(row)])[0]
