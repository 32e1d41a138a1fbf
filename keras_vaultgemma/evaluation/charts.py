"""Inline SVG charts for a page that a lawyer reads: labels in words, no library, no script.

Horizontal positions are percentages, so that a chart takes the width of its column and its text
stays legible on a telephone and on paper. Colours are CSS classes of the page, for light and dark.
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

ROW, TOP, AXIS = 50, 22, 26
"""Heights in pixels of a row, of the label of a reference line, and of the axis."""

LEFT, WIDTH = 1.5, 97.0
"""The scale in per cent of the width; the rest is for the radius of a mark."""


class Mark(NamedTuple):
    """A measured value.

    Attributes:
        value: float.
        style: str. CSS class: "base", "plain", "private", each also with "control" after a space.
        lower, upper: floats or None. Ends of its interval.
    """

    value: float
    style: str
    lower: float | None = None
    upper: float | None = None


class Row(NamedTuple):
    """A line of a chart: a label on the left, a value in words on the right, marks below."""

    label: str
    text: str
    marks: Sequence[Mark]


class Reference(NamedTuple):
    """A vertical line that marks are compared with."""

    value: float
    label: str
    style: str = "limit"


class Scale(NamedTuple):
    """A horizontal scale; `ticks` are pairs of a value and its text."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def at(self, value: float) -> float:
        """Return the position of a value in per cent of the width."""
        share = (value - self.low) / (self.high - self.low)
        return LEFT + WIDTH * min(1.0, max(0.0, share))


def dot_chart(
    rows: Sequence[Row], scale: Scale, description: str, references: Sequence[Reference] = ()
) -> str:
    """Return a chart of dots with their intervals.

    Args:
        rows: list of `Row`.
        scale: `Scale`.
        description: str. The chart in a sentence, for readers who do not see it.
        references: list of `Reference`. Defaults to none.

    Returns:
        str of an `<svg>` element.
    """
    parts = []
    for row, top in _tops(rows, references):
        parts += [*_words(row, top), _line(LEFT, LEFT + WIDTH, top + 35, top + 35, "track")]
        for i, mark in enumerate(row.marks):
            # Several marks of a row are below one another, because their intervals overlap.
            y = top + 35 + 12 * i - 6 * (len(row.marks) - 1)
            if mark.lower is not None and mark.upper is not None:
                ends = scale.at(mark.lower), scale.at(mark.upper)
                parts.append(_line(*ends, y, y, f"interval {escape(mark.style)}"))
            x = scale.at(mark.value)
            parts.append(
                f'<circle class="mark {escape(mark.style)}" cx="{x:.2f}%" cy="{y}" r="5"/>'
            )
    return _chart(rows, scale, description, references, parts)


def bar_chart(
    rows: Sequence[Row], scale: Scale, description: str, references: Sequence[Reference] = ()
) -> str:
    """Return a chart of bars that begin at the low end of the scale; as `dot_chart`."""
    parts = []
    for row, top in _tops(rows, references):
        parts += _words(row, top)
        for mark in row.marks:
            width = scale.at(mark.value) - LEFT
            parts.append(
                f'<rect class="bar {escape(mark.style)}" x="{LEFT}%" y="{top + 26}" '
                f'width="{width:.2f}%" height="14" rx="2"/>'
            )
    return _chart(rows, scale, description, references, parts)


def hundred(count: int, style: str, description: str) -> str:
    """Return a square of 100 dots, of which `count` are filled.

    Args:
        count: int from 0 to 100.
        style: str. CSS class of the filled ones.
        description: str. The square in a sentence.
    """
    dots = (
        f'<circle class="{escape(style) if i < count else "empty"}" '
        f'cx="{10 * (i % 10) + 5}" cy="{10 * (i // 10) + 5}" r="3.9"/>'
        for i in range(100)
    )
    label = escape(description, quote=True)
    return (
        f'<svg class="hundred" viewBox="0 0 100 100" role="img" aria-label="{label}">'
        f"{''.join(dots)}</svg>"
    )


def _tops(rows, references):
    """Yield each row with its upper edge in pixels."""
    start = TOP * len(references)
    for i, row in enumerate(rows):
        yield row, start + ROW * i


def _words(row, top):
    return [
        f'<text class="label" x="{LEFT}%" y="{top + 18}">{escape(row.label)}</text>',
        f'<text class="value" x="{LEFT + WIDTH}%" y="{top + 18}" text-anchor="end">'
        f"{escape(row.text)}</text>",
    ]


def _line(x1, x2, y1, y2, style):
    return f'<line class="{style}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1}" y2="{y2}"/>'


def _chart(rows, scale, description, references, parts):
    """Return the `<svg>` of a chart: grid and reference lines first, so that marks cover them."""
    start, bottom = TOP * len(references), TOP * len(references) + ROW * len(rows)
    lines = []
    for value, text in scale.ticks:
        x = scale.at(value)
        anchor = "start" if value <= scale.low else "end" if value >= scale.high else "middle"
        lines.append(_line(x, x, start, bottom + 4, "grid"))
        lines.append(
            f'<text class="tick" x="{x:.2f}%" y="{bottom + 19}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )
    for i, reference in enumerate(references):
        x, style = scale.at(reference.value), escape(reference.style)
        anchor, shift = ("start", 5) if x < 50 else ("end", -5)
        lines.append(_line(x, x, TOP * i + 4, bottom + 4, f"reference {style}"))
        lines.append(
            f'<text class="note {style}" x="{x:.2f}%" dx="{shift}" y="{TOP * i + 15}" '
            f'text-anchor="{anchor}">{escape(reference.label)}</text>'
        )
    label = escape(description, quote=True)
    return (
        f'<svg class="chart" width="100%" height="{bottom + AXIS}" role="img" aria-label="{label}">'
        f"{''.join(lines)}{''.join(parts)}</svg>"
    )
