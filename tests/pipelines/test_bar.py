"""The progress of a loop over items: a bar on a terminal, lines elsewhere."""

import io
import sys

import pytest

from ovref import meter
from ovref_pipelines import bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def monotonic(self):
        self.now += 4
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(meter, "time", Clock())


def test_a_log_gets_a_line_every_few_seconds(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    said = []
    with bar.bar("images", 9, said.append) as step:
        for _ in range(9):
            step()
    assert said == [
        "4 of 9 images, 0.25 images/s, 20 s to go",
        "7 of 9 images, 0.25 images/s, 8 s to go",
    ]
    assert sys.stderr.getvalue() == ""


def test_a_terminal_shows_a_bar_that_is_gone_at_the_end(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    said = []
    with (
        pytest.raises(ValueError, match="an item fails"),
        bar.bar("images", 3, said.append) as step,
    ):
        step()
        step()
        raise ValueError("an item fails")
    text = terminal.getvalue()
    assert "0 of 3 images" in text and "2 of 3 images, 0.25 images/s, 4 s to go" in text
    assert text.endswith("\x1b[1A\x1b[2K") and "\x1b[?25h" in text and not said
