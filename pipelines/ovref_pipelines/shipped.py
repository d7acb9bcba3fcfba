"""The configurations that ship with ovref, by name (`--config fossil`)."""

from pathlib import Path

from ovref.errors import ConfigError

PREFIX = "config:"
"""Prefix of the place of a file beside the configurations: `config:miniature_captions.txt`."""


def folder() -> Path:
    """Folder of the configurations: in the installed package, or at the top of a checkout."""
    here = Path(__file__).parent / "configs"
    return here if here.is_dir() else Path(__file__).parents[2] / "configs"


def names() -> list[str]:
    """The names of all shipped configurations."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a configuration: a path, or the name of a shipped one.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name in names():
        return folder() / f"{name}.yaml"
    raise ConfigError(
        f"cannot read the configuration {name}: there is no such file, and the ones that come with "
        f"ovref are {', '.join(names())}"
    )


def beside(place: str) -> str:
    """Resolves `config:<name>` to a file beside the shipped configurations."""
    if not place.startswith(PREFIX):
        return place
    return str(folder() / place.removeprefix(PREFIX))


def is_shipped(place: str) -> bool:
    """Whether a place is a file beside the shipped configurations."""
    return Path(beside(place)).parent == folder()
