"""The progress bar."""

import io
import sys

import pytest

from keras_vaultgemma.recipes import progress
from keras_vaultgemma.recipes.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, enabled=True):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "PAUSE", 0)
    with Progress(4_000_000_000, enabled) as bar:
        bar.report("model.norm.weight", 1_000_000_000)
        bar.report("lm_head.weight", 3_000_000_000)
    assert bar.done == 4_000_000_000
    return stream and stream.getvalue()


def test_a_terminal_sees_bytes_and_names(monkeypatch):
    first, second, last = shown(monkeypatch, Terminal()).split("\r\033[K")[1:]
    assert first == "[#####...............]  25%  1.00 of 4.00 GB  model.norm.weight"
    assert second == "[####################] 100%  4.00 of 4.00 GB  lm_head.weight"
    assert last == ""


@pytest.mark.parametrize("stream, enabled", [(io.StringIO(), True), (Terminal(), False)])
def test_nobody_else_does(monkeypatch, stream, enabled):
    assert shown(monkeypatch, stream, enabled) == ""


def test_without_standard_error(monkeypatch):
    assert shown(monkeypatch, None) is None


def test_lines_keep_a_pause(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(0) as bar:
        for _ in range(100):
            bar.report("x" * 500, 1)
    assert terminal.getvalue().count("100%") == 1
    assert max(map(len, terminal.getvalue().split("\r\033[K"))) < 120
