"""Output of `ovref`: results to stdout, messages to stderr, as text or JSON lines."""

import datetime
import io
import json
import logging
import os
import select
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable
from typing import Any, TextIO, cast

TABLE_WIDTH = 110
"""Width of a table if stdout is not a terminal."""


def prepare() -> None:
    """Makes every character printable in any encoding, and silences other libraries."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it prints its notices itself
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in Ray's workers; see engine
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars clutter a log


def drawn(table: Any, **options: Any) -> str:
    """A table of rich as text, as wide as the terminal, or TABLE_WIDTH if stdout is none.

    Args:
        options: of rich's Console.
    """
    from rich import console  # only tables need it

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else TABLE_WIDTH
    written = io.StringIO()
    console.Console(file=written, width=width, **options).print(table)
    return written.getvalue().rstrip()


class Console:
    """Prints messages and results; with `json`, one JSON object per line."""

    def __init__(self) -> None:
        self.json = False
        self._streams: tuple[TextIO, TextIO] | None = None

    def use_json(self) -> None:
        """Switches all output to JSON lines: messages, results, logs, warnings and prints of
        libraries, and unexpected errors. `close` ends it."""
        self.json = True
        os.environ["TQDM_DISABLE"] = "1"
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(_json_lines, self._streams)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_JsonFormatter())
        logging.captureWarnings(True)

    def close(self) -> None:
        """Restores stdout and stderr."""
        if self._streams is not None:
            logging.captureWarnings(False)
            for stream in (sys.stdout, sys.stderr):
                print(file=stream, flush=True)  # ends an unfinished line
            sys.stdout, sys.stderr = self._streams
            self._streams = None

    def say(self, message: str, event: str = "build") -> None:
        """Prints a message for people."""
        if self.json:
            message = json_line(message.partition(":")[0], event, message, {})
        print(message, file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """Prints a result."""
        print(json_line(None, "result", text, {}) if self.json else text)

    def unforeseen(self, error: BaseException) -> None:
        """Prints an unexpected error with its traceback as one line of JSON."""
        fields = {"traceback": "".join(traceback.format_exception(error))}
        message = f"{type(error).__name__}: {error}"
        print(json_line(None, "error", message, fields), file=sys.stderr, flush=True)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {} if record.exc_info is None else {"traceback": super().format(record)}
        return json_line(None, "log", f"{record.name}: {record.getMessage()}", fields)


def _json_lines(stream: TextIO) -> TextIO:
    return cast(TextIO, _JsonLines(stream))


class _JsonLines:
    """A text stream that passes on lines of JSON and converts every other line to one.

    Each thread has a line of its own, since `print` writes a line and its end one after the other.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._begun, "line", "") + text).split("\n")
        self._begun.line = rest
        if lines:
            self._stream.write("".join(map(self._as_json, lines)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._stream.flush()

    @staticmethod
    def _as_json(line: str) -> str:
        if not line.strip():
            return ""
        if not line.startswith(_HEAD):
            line = json_line(None, "log", line, {})
        return line + "\n"


_HEAD = '{"time": '


def json_line(step: str | None, event: str, message: str, fields: dict[str, Any]) -> str:
    """One line of a structured log: `time` (UTC, ISO 8601), `step`, `event`, `message`, fields."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    head = {"time": now, "step": step, "event": event, "message": message}
    return json.dumps(head | fields, ensure_ascii=False)


def is_reader_gone() -> bool:
    """Whether the reader of stdout or stderr has closed it (`ovref status | head`); if so, further
    output is discarded."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            poll = select.poll()
            poll.register(stream.fileno(), 0)
        except (OSError, ValueError):  # not a file of the operating system
            continue
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            gone = True
    return gone
