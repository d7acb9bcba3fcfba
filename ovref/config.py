"""Strict configuration: YAML and `key=value` overrides into frozen dataclasses.

Config classes are plain frozen dataclasses beside their owner, marked strict with
`__pydantic_config__ = STRICT`; a string under each field documents it. Settings of a nested
dataclass, in the file or in an override, change only those fields of its default.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from ovref.errors import ConfigError
from ovref_inference.ranges import STRICT as STRICT

Config = TypeVar("Config")
_ABSENT = object()


def load(
    cls: type[Config], path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()
) -> Config:
    """Reads a YAML file into `cls`, with `a.b=value` overrides.

    An override's value is YAML, except for text settings, which take it literally. List items are
    addressed by index (`builds.0.config=...`). Without a path, only the overrides apply.

    Raises:
        ConfigError: the file is missing or not a YAML mapping; a key is unknown, duplicate or
            missing; or a value has the wrong type or is out of range. The message names the file or
            override, the field and the value found.
    """
    where = "command line" if path is None else str(path)
    return load_tree(cls, read_tree(path), where, overrides)


def read_tree(path: str | Path | None) -> dict[str, Any]:
    """The mapping in a YAML file; empty without a path.

    Raises:
        ConfigError: the file is missing, not YAML or not a mapping, or has a duplicate key.
    """
    try:
        text = "" if path is None else Path(path).read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, found {type(tree).__name__}")
    return tree


def load_tree(
    cls: type[Config],
    tree: dict[str, Any],
    where: str,
    overrides: list[str] | tuple[str, ...] = (),
) -> Config:
    """Like `load`, for a mapping that was read from `where`."""
    tree, given = _with_overrides(cls, tree, overrides)
    return _parse(cls, tree, where, given)


def overridden(
    cls: type, path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()
) -> dict[str, Any]:
    """The settings that `load` parses, with defaults and overrides, as plain values; those that are
    required and missing are left out. Raises ConfigError like `load`, but not for those."""
    tree, given = _with_overrides(cls, read_tree(path), overrides)
    where = "command line" if path is None else str(path)
    _parse(cls, tree, where, given, allow_missing=True)
    return tree


def _with_overrides(
    cls: type, tree: dict[str, Any], overrides: list[str] | tuple[str, ...]
) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The filled tree with overrides applied, and each override by its keys."""
    tree = filled(cls, tree)
    given: dict[tuple[str, ...], str] = {}
    for override in overrides:
        keys = _set(cls, tree, override)
        for earlier, other in given.items():
            if earlier[: len(keys)] == keys:
                raise ConfigError(f"{override!r} would undo {other!r}: give one of them")
        given[keys] = override
    return tree, given


def parse(cls: type[Config], tree: dict[str, Any], where: str = "configuration") -> Config:
    """Converts a mapping of plain values to the dataclass `cls`. Raises ConfigError like `load`."""
    return _parse(cls, tree, where, {})


def part(config: Any, kind: type[Config]) -> Config:
    """The settings of `config` that `kind`, a base class of its own, has."""
    fields = dataclasses.fields(cast(Any, kind))
    return kind(**{one.name: getattr(config, one.name) for one in fields})


def dump(config: Any) -> dict[str, Any]:
    """The effective configuration as plain values for `yaml.safe_dump` or JSON."""
    cls: Any = type(config)
    return _adapter(cls).dump_python(config, mode="json")


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    """Cached, because making one takes longer than reading a file."""
    return TypeAdapter(cls)


def _parse(
    cls: Any, tree: Any, where: str, given: Mapping[tuple[str, ...], str], *,
    allow_missing: bool = False,
) -> Any:  # fmt: skip
    """The dataclass; with `allow_missing` None if required settings are missing."""
    try:
        # Through JSON, because strict validation of JSON accepts lists for tuples.
        text = json.dumps(filled(cls, tree), allow_nan=False)
        return _adapter(cls).validate_json(text)
    except ValidationError as error:
        seen: set[tuple[Any, ...]] = set()
        lines: dict[str, list[str]] = {}
        for item in error.errors():
            if allow_missing and item["type"] == "missing":
                continue
            line = _explain(cls, item, seen)
            lines.setdefault(_source(where, item, line, given), []).append(line)
        if not lines:
            return None
        message = "; ".join(f"{at}: {'; '.join(found)}" for at, found in lines.items())
        raise ConfigError(message) from error
    except (TypeError, ValueError) as error:  # such as a NaN or bytes
        raise ConfigError(f"{where}: {error}") from error


def _source(where: str, item: Any, line: str, given: Mapping[tuple[str, ...], str]) -> str:
    """The source of an error: the file, overrides, or both."""
    place = tuple(str(part) for part in item["loc"])
    exact = [text for keys, text in given.items() if place[: len(keys)] == keys]
    if exact:
        return exact[-1]
    # A check of several settings: the overrides below it that the message names.
    below = [(keys, text) for keys, text in given.items() if keys[: len(place)] == place]
    named = [text for keys, text in below if re.search(rf"\b{re.escape(keys[-1])}\b", line)]
    return f"{where} with {' '.join(named)}" if named else where


# -- defaults ----------------------------------------------------------------------------------


def filled(hint: Any, value: Any, default: Any = _ABSENT) -> Any:
    """`value` with missing settings of dataclasses filled in from the defaults of their fields."""
    if isinstance(value, list):
        return [filled(_hint_inside(hint, value, n), item) for n, item in enumerate(value)]
    owner = owner_of(hint, value, default) if isinstance(value, dict) else None
    if owner is None:
        return value
    tree, hints = dict(value), typing.get_type_hints(owner)
    for item in dataclasses.fields(owner):
        inner = _ABSENT
        if type(default) is owner:
            inner = getattr(default, item.name)
        elif item.default is not dataclasses.MISSING:
            inner = item.default
        elif item.default_factory is not dataclasses.MISSING:
            inner = item.default_factory()
        if item.name in tree:
            tree[item.name] = filled(hints[item.name], tree[item.name], inner)
        elif inner is not _ABSENT:
            tree[item.name] = to_jsonable_python(inner)
    return tree


def owner_of(hint: Any, value: Mapping[Any, Any], default: Any = _ABSENT) -> Any:
    """The dataclass that a mapping represents; among several, the default's or the only one with
    its keys; None if ambiguous."""
    found = [part for part in _alternatives(hint) if dataclasses.is_dataclass(part)]
    if len(found) > 1:
        found = [part for part in found if value.keys() <= part.__dataclass_fields__.keys()]
        found = [part for part in found if type(default) is part] or found
    return found[0] if len(found) == 1 else None


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a tuple of the hint itself otherwise."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _hint_inside(hint: Any, node: Any, key: Any) -> Any:
    """The type of the value at a key of a dataclass or dict, or at an index of a list."""
    if isinstance(node, dict) and (owner := owner_of(hint, node)) is not None:
        return typing.get_type_hints(owner).get(key)
    for part in _alternatives(hint):
        inner = [item for item in typing.get_args(part) if item is not Ellipsis]
        if isinstance(node, list) and typing.get_origin(part) in (tuple, list):
            return inner[min(key, len(inner) - 1)]
        if isinstance(node, dict) and typing.get_origin(part) is dict:
            return inner[1]
    return None


# -- overrides ---------------------------------------------------------------------------------


def _set(cls: type, tree: dict[str, Any], override: str) -> tuple[str, ...]:
    """Applies an override to a filled tree; returns its keys."""
    path, equals, text = override.partition("=")
    keys = tuple(path.split("."))
    if not equals or not all(keys):
        raise ConfigError(f"an override has the form key=value, found {override!r}")
    node: Any = tree
    hint: Any = cls
    for number, name in enumerate(keys):
        key: Any = name
        if isinstance(node, list):
            if not name.isdecimal() or int(name) >= len(node):
                raise ConfigError(
                    f"{override!r}: there is a list of {len(node)}, which has no {name} (the first "
                    "is 0)"
                )
            key = int(name)
        hint = _hint_inside(hint, node, key)
        if number == len(keys) - 1:
            node[key] = _value(hint, text, override)
            break
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(f"{override!r}: {name} is a single value without settings")
    return keys


def _value(hint: Any, text: str, override: str) -> Any:
    """The value of an override: literal for text settings, otherwise YAML."""
    kinds = _alternatives(hint)
    absent = type(None) in kinds and text in ("", "null", "~")
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if {*kinds} - {type(None)} == {str} and not quoted and not absent:
        return text
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {error}") from error
    comment = "" if node is None else text[node.end_mark.index :].strip()
    if comment.startswith("#"):
        raise ConfigError(
            f"{override!r}: YAML takes {comment!r} for a comment; put the value in quotation marks"
        )
    return value


# -- errors ------------------------------------------------------------------------------------


def _explain(cls: type, item: Any, seen: set[tuple[Any, ...]]) -> str:
    """Describes one error. Known keys are listed once per level; `seen` holds the listed levels."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "unexpected_keyword_argument":
        level = item["loc"][:-1]
        known = [] if level in seen else _fields_at(cls, level)
        seen.add(level)
        hint = f" (known here: {', '.join(known)})" if known else ""
        return f"unknown key {path}{hint}"
    if item["type"] == "missing":
        return f"missing key {path}"
    if item["type"] == "value_error":  # from a __post_init__, whose message has field and value
        return f"{path}: {item['ctx']['error']}" if path else str(item["ctx"]["error"])
    return f"{path}: {item['msg']}, found {item['input']!r}"


def _fields_at(cls: Any, path: tuple[Any, ...]) -> list[str]:
    """Field names of the dataclass at `path` in `cls`, if it is unambiguous."""
    for part in path:
        if isinstance(part, str):
            cls = _dataclass_in(typing.get_type_hints(cls).get(part))
        if cls is None:
            return []
    return [field.name for field in dataclasses.fields(cls)]


def _dataclass_in(hint: Any) -> type | None:
    """The only dataclass in `Inner`, `Inner | None`, `tuple[Inner, ...]`; None if ambiguous."""
    parts = (hint, *typing.get_args(hint))
    found = {part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)}
    return found.pop() if len(found) == 1 else None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, where YAML would silently take the last; dates are
    text, and `1e-3` is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in PyYAML)
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found the key {key} twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    [*"-+0123456789"],
)
