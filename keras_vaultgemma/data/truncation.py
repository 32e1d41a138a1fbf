"""Truncation of pairs and chats, in tokens, so that their answers stay. Plain Python only."""

from typing import NamedTuple

TRUNCATE = ("prompt_start", "prompt_end", "row_end")
"""Where a pair or chat that is longer than a row may be cut."""


class TurnMarkers(NamedTuple):
    """Tokens of a chat's prompts that are kept.

    Attributes:
        first: list of ints at the beginning of the first prompt.
        later: list of ints at the beginning of each later one.
        end: list of ints at the end of each prompt.
    """

    first: list
    later: list
    end: list


def fit_parts(parts, room, cuts_start, markers=None):
    """Shorten what precedes the last answer of a sample until the sample fits.

    Prompts are only cut as far as needed. Leading turns, a prompt and its answer, are left out
    where cutting the whole prompt would not be enough. What precedes an answer that does not fit
    by itself gets half of the room, so that the answer is not learned without its prompt.

    Args:
        parts: list of lists of ints. Tokens of prompts and answers in turn, an answer last.
        room: int. Number of tokens that fit.
        cuts_start: bool. True to cut the beginning of a prompt, False to cut its end.
        markers: `TurnMarkers` if the sample is a chat, or None.

    Returns:
        List of lists of ints like `parts`. It is still too long if the last answer is.
    """
    first, later, end = markers or TurnMarkers([], [], [])
    answer = len(parts[-1])
    room -= answer if answer <= room else room - room // 2
    while True:
        excess = sum(map(len, parts[:-1])) - room
        if excess <= 0:
            return parts
        head, tail = len(first), len(parts[0]) - len(end)
        cut = min(excess, max(0, tail - head))
        if cut < excess and len(parts) > 2:
            parts = [first + parts[2][len(later) :], *parts[3:]]
            continue
        begin = head if cuts_start else tail - cut
        return [parts[0][:begin] + parts[0][begin + cut :], *parts[1:]]
