"""Output of `ovref`: results to stdout, messages to stderr, as text or JSON lines."""

import datetime
import json
import logging
import os
import select
import sys
import warnings
from typing import Any


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


class Console:
    """Prints messages and results; with `json`, one JSON object per line."""

    def __init__(self) -> None:
        self.json = False

    def use_json(self) -> None:
        """Switches to JSON lines, also for results and the log records of libraries."""
        self.json = True
        os.environ["TQDM_DISABLE"] = "1"
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_JsonFormatter())

    def say(self, message: str, event: str = "build") -> None:
        """Prints a message for people."""
        if self.json:
            message = json_line(message.partition(":")[0], event, message, {})
        print(message, file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """Prints a result."""
        print(json_line(None, "result", text, {}) if self.json else text)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json_line(None, "log", f"{record.name}: {record.getMessage()}", {})


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
        except (OSError, ValueError):  # no file of the system's
            continue
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            gone = True
    return gone
