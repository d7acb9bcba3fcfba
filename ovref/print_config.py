"""Every setting of a configuration with its value and its meaning, as YAML to change."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from pathlib import Path
from typing import Any

import yaml

from ovref.config import filled, overridden, owner_of

WIDTH = 100
"""Maximum length of a line of comment."""


def print_config(
    cls: type, path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()
) -> str:
    """The effective settings of `cls` as YAML that `config.load` accepts; above each setting its
    docstring as a comment. Required settings that are not given yet are empty.

    Args:
        path, overrides: as in `config.load`.

    Raises:
        ConfigError: like `config.load`, but not for missing settings.
    """
    return "\n".join(_lines(cls, overridden(cls, path, overrides), "")) + "\n"


def _lines(cls: Any, tree: dict[str, Any], indent: str) -> list[str]:
    hints, meanings = typing.get_type_hints(cls), _docstrings(cls)
    lines: list[str] = []
    for field in dataclasses.fields(cls):
        comment = " ".join(meanings.get(field.name, "").split())
        lines += textwrap.wrap(comment, WIDTH, initial_indent=f"{indent}# ",
                               subsequent_indent=f"{indent}# ")  # fmt: skip
        hint: Any = hints[field.name]
        value: Any = tree.get(field.name)
        if field.name not in tree:
            if not dataclasses.is_dataclass(hint):
                lines.append(f"{indent}{field.name}:  # required")
                continue
            value = filled(hint, {})
        inner = owner_of(hint, value) if isinstance(value, dict) else None
        if inner is None:
            text = yaml.safe_dump({field.name: value}, allow_unicode=True, sort_keys=False)
            lines += textwrap.indent(text.rstrip("\n"), indent).splitlines()
        else:
            lines += [f"{indent}{field.name}:", *_lines(inner, value, f"{indent}  ")]
    return lines


def _docstrings(cls: Any) -> dict[str, str]:
    """The docstring below each field of a dataclass and of its bases."""
    found: dict[str, str] = {}
    owners: list[Any] = [one for one in reversed(cls.__mro__) if dataclasses.is_dataclass(one)]
    for owner in owners:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        body = typing.cast(ast.ClassDef, tree).body
        for one, below in itertools.pairwise(body):
            if isinstance(one, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(one.target)] = ast.literal_eval(below.value)
    return found
