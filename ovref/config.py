"""Strict configuration: YAML and `key=value` overrides into frozen dataclasses, nothing ignored.

Config classes are plain frozen dataclasses beside their owner, marked strict with
`__pydantic_config__ = STRICT`; a string under each field says what it means.
"""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from ovref.errors import ConfigError

STRICT = {"extra": "forbid", "strict": True}
"""Marks a config dataclass: unknown keys and values of another type are refused."""

Config = TypeVar("Config")


def load(
    cls: type[Config], path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()
) -> Config:
    """Reads a YAML file into `cls`, with `a.b=value` overrides (values in YAML syntax).

    Without a path there are the overrides alone.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, a key is unknown, given twice or
            missing, or a value has the wrong type or is out of range; the message names file,
            field and what was found.
    """
    try:
        text = "" if path is None else Path(path).read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, found {type(tree).__name__}")
    for override in overrides:
        _set(tree, override)
    return parse(cls, tree, where="command line" if path is None else str(path))


def parse(cls: type[Config], tree: dict[str, Any], where: str = "configuration") -> Config:
    """A mapping of plain values into the dataclass `cls`. Raises ConfigError like `load`."""
    try:
        # Through JSON, because strict validation of JSON accepts lists for tuples.
        return TypeAdapter(cls).validate_json(json.dumps(tree, allow_nan=False))
    except ValidationError as error:
        told: set[tuple[Any, ...]] = set()
        lines = [_explain(cls, item, told) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error
    except (TypeError, ValueError) as error:  # a date, a NaN: no value of a setting
        raise ConfigError(f"{where}: {error}") from error


def dump(config: Any) -> dict[str, Any]:
    """The effective configuration as plain values, fit for `yaml.safe_dump` or JSON."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def _set(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"an override has the form key=value, found {override!r}")
    *parents, last = path.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{override!r}: {name} is a single value and has no settings in it")
    try:
        node[last] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {error}") from error


def _explain(cls: type, item: dict[str, Any], told: set[tuple[Any, ...]]) -> str:
    """One error in words. At each level the known keys are told once; `told` has those levels."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "unexpected_keyword_argument":
        level = item["loc"][:-1]
        known = [] if level in told else _fields_at(cls, level)
        told.add(level)
        hint = f" (known here: {', '.join(known)})" if known else ""
        return f"unknown key {path}{hint}"
    if item["type"] == "missing":
        return f"missing key {path}"
    if item["type"] == "value_error":  # of a __post_init__, which says field and value itself
        return f"{path}: {item['ctx']['error']}" if path else str(item["ctx"]["error"])
    return f"{path}: {item['msg']}, found {item['input']!r}"


def _fields_at(cls: Any, path: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the dataclass that stands at `path` of `cls`, if one alone does."""
    for part in path:
        if isinstance(part, str):
            cls = _dataclass_in(typing.get_type_hints(cls).get(part))
        if cls is None:
            return []
    return [field.name for field in dataclasses.fields(cls)]


def _dataclass_in(hint: Any) -> type | None:
    """The one dataclass in `Inner`, `Inner | None`, `tuple[Inner, ...]`; None if not one alone."""
    found = {part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)}
    return found.pop() if len(found) == 1 else None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, where YAML would silently take the last."""

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
