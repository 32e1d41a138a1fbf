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
