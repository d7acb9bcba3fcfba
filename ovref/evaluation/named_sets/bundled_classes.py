"""Class names: the lists in common use, verbatim.

A score depends on the class names: renaming "person" to "people" changes results by whole points.
So the lists are files (`classes/<set>_<list>.json`), each with its source, and every result has the
fingerprint of its list.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from ovref.class_files import ClassList


@cache
def bundled(set_name: str, list_name: str) -> dict[str, Any]:
    """The bundled file of a list: `source`, `classes`, and tables of the set (`ids`, ...)."""
    path = files("ovref.evaluation.named_sets") / "classes" / f"{set_name}_{list_name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def bundled_list(set_name: str, list_name: str) -> ClassList:
    """One of the bundled class lists."""
    found = bundled(set_name, list_name)
    return ClassList(
        name=list_name,
        source=found["source"],
        classes=tuple(tuple(names) for names in found["classes"]),
    )
