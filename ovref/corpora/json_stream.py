"""Streams the arrays of one large JSON object without holding the object in memory."""

import json
from collections.abc import Iterator
from typing import Any, TextIO

_DECODER = json.JSONDecoder()
_BLANKS = " \t\n\r"
FIRST_READ = 1 << 16
LONGEST_VALUE = 1 << 28
"""Maximum length of a value in characters; a longer one means that the file is broken."""


def stream_items(file: TextIO, *wanted: str) -> Iterator[tuple[str, Any]]:
    """Iterates over arrays of the top-level object of a JSON text, one element at a time.

    Args:
        file: the text, read in blocks from its current position.
        wanted: names of the members whose elements are yielded, for instance `annotations`.

    Yields:
        The member's name and the value of each element, in the order of the text. At most one value
        is in memory (other arrays are streamed too).

    Raises:
        ValueError: the text is not a JSON object, ends early, or a wanted member is missing or not
            an array.
    """
    window, names = _Window(file), list[str]()
    if window.peek() != "{":
        raise ValueError(f"expected a JSON object, found {window.peek() or 'an empty file'!r}")
    window.skip(1)
    while window.peek() != "}":
        if names:
            window.expect(",")
        name = window.value()
        if not isinstance(name, str):
            raise ValueError(f"expected a member name, found {name!r}")
        names.append(name)
        window.expect(":")
        if window.peek() == "[":
            yield from ((name, item) for item in _elements(window) if name in wanted)
        elif name in wanted:
            raise ValueError(f"expected {name} to be an array, found {window.value()!r:.80}")
        else:
            window.value()
    if missing := [name for name in wanted if name not in names]:
        found = ", ".join(names) or "none"
        raise ValueError(f"expected the member `{missing[0]}`, found {found}")


def _elements(window: "_Window") -> Iterator[Any]:
    window.expect("[")
    if window.peek() == "]":
        window.skip(1)
        return
    while True:
        yield window.value()
        if window.peek() == "]":
            window.skip(1)
            return
        window.expect(",")


class _Window:
    """The part of the text that has been read but not consumed."""

    def __init__(self, file: TextIO):
        self._file, self._text, self._at, self._ended = file, "", 0, False

    def _more(self, characters: int) -> None:
        block = self._file.read(characters)
        self._text, self._at = self._text[self._at :] + block, 0
        self._ended = not block

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the text."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANKS:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._more(FIRST_READ)

    def skip(self, characters: int) -> None:
        self._at += characters

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"expected {character!r}, found {self.peek() or 'the end'!r}")
        self.skip(1)

    def value(self) -> Any:
        """The next JSON value."""
        self.peek()
        block = FIRST_READ
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                # A number at the end of the window may continue in the next block: `-6`, `e-`, `3`.
                if end + 2 < len(self._text) or self._ended or self._text[end - 1] in '"]}':
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if self._ended or len(self._text) - self._at > LONGEST_VALUE:
                    raise ValueError(f"broken or cut-off JSON: {error.msg}") from error
            self._more(block)
            block *= 2  # so that a long value is not decoded from its start too often
