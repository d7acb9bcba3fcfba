"""Tasks that a reduction might have, for Ray's workers to import."""

import os
import time
from pathlib import Path

from ovref.errors import StorageError


def square_of(number: int, seconds: float | None) -> int:
    time.sleep(seconds or 0.0)
    return number * number


def die_once(sign: Path) -> str:
    """Takes its process along at the first call."""
    if not sign.exists():
        sign.touch()
        os._exit(1)
    return "alive"


def fails(message: str) -> None:
    raise StorageError(message)
