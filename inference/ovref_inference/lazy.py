"""Lazy exports: a package names what slow modules define without importing them, and a missing
optional package gives an error that says what to install."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from ovref_inference.errors import MissingPackageError

EXTRAS = {
    "segment": ("torch", "torchvision", "transformers", "open_clip",
                "safetensors", "scipy", "PIL", "skimage"),
    "cpu": ("faiss",),
    "s3": ("s3fs",),
    "http": ("aiohttp", "requests"),
    "hf": ("huggingface_hub",),
    "cli": ("pydantic", "yaml", "rich", "pycocotools"),
    "formats": ("supervision",),
    "pandas": ("pandas",),
    "tensorboard": ("tensorboard",),
    "build": ("ray", "diffusers", "spacy", "matplotlib", "psutil"),
}  # fmt: skip
"""Top-level modules that are imported on first use, by the extra of ovref that installs them."""


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose exports are imported on first access.

    It raises MissingPackageError where a package of one of ovref's extras is not installed.

    Args:
        package: `__name__` of the package.
        modules: modules of the package, and the names that each defines, with blanks between them.
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{package}.{module_of[name]}")
        except ModuleNotFoundError as error:
            raise missing_package(error, f"{package}.{name}") from error
        return getattr(module, name)

    return get


def missing_package(error: ModuleNotFoundError, user: str) -> ImportError:
    """The error to raise instead: one sentence with the pip command if an extra installs the
    package, otherwise the error itself.

    Args:
        user: what needs the package.
    """
    name = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if name in packages:
            return MissingPackageError(
                f"{user} needs {name}, which is not installed: pip install 'ovref[{extra}]'"
            )
    return error
