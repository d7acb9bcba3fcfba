"""Collections on the Hugging Face Hub, through huggingface_hub and its own cache.

    hf://user/name              a data set repository; hf://datasets/user/name is the same
    hf://user/name@revision     a branch, tag or commit
    hf://user/name/folder       a folder in it
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovref_inference.errors import CollectionError
from ovref_inference.lazy import missing_package

PREFIX = "hf://"
_PLACE = re.compile(r"(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.+))?")


@dataclass(frozen=True, kw_only=True)
class HubPlace:
    """A folder of a data set repository."""

    repository: str
    revision: str | None = None
    """None for the newest."""
    folder: str = ""

    def path(self, name: str) -> str:
        """The path of a file in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


def hub_place(url: str) -> HubPlace:
    """Reads `hf://user/name@revision/folder`. Raises CollectionError for anything else."""
    found = _PLACE.fullmatch(url.removeprefix(PREFIX).rstrip("/"))
    if not url.startswith(PREFIX) or found is None:
        raise CollectionError(
            f"a place on the Hub is hf://user/name or hf://user/name@revision, found {url!r}"
        )
    repository, revision, folder = found.groups()
    return HubPlace(repository=repository, revision=revision, folder=folder or "")


def download(url: str, name: str, cache: str | Path | None = None) -> Path:
    """A file of the place in the library's cache, downloaded if it is not there yet.

    Args:
        cache: folder; None takes the library's own ($HF_HUB_CACHE).

    Raises:
        CollectionError: the repository, revision or file does not exist or cannot be reached.
        MissingPackageError: huggingface_hub is not installed.
    """
    try:
        import httpx
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    except ModuleNotFoundError as error:
        raise missing_package(error, url) from error
    place = hub_place(url)
    try:
        found = hf_hub_download(
            place.repository, place.path(name), repo_type="dataset", revision=place.revision,
            cache_dir=cache, endpoint=os.environ.get("HF_ENDPOINT"),
        )  # fmt: skip
    except EntryNotFoundError as error:
        raise CollectionError(
            f"{name} is missing at {url}, or cannot be had without the network: {_short(error)}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, httpx.HTTPError) as error:
        raise CollectionError(
            f"cannot fetch {name} of {url}: {_short(error)}; check the name, the revision, the "
            "network, and `hf auth login` for one that is private"
        ) from error
    return Path(str(found))


def file_by_ranges(url: str, name: str, manifest: Path) -> tuple[Any, str]:
    """fsspec's HTTP file system and the address of a file of the place, to be read by ranges.

    Args:
        manifest: the place's manifest, as `download` returned it. The address names its commit, so
            that files of a later commit are not mixed in.

    Raises:
        MissingPackageError: huggingface_hub or aiohttp is not installed.
    """
    try:
        from fsspec.implementations.http import HTTPFileSystem
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers
    except ModuleNotFoundError as error:
        raise missing_package(error, url) from error
    place = hub_place(url)
    # <cache>/datasets--user--name/snapshots/<commit>/...
    commit = manifest.parts[manifest.parts.index("snapshots") + 1]
    address = hf_hub_url(
        place.repository, place.path(name), repo_type="dataset", revision=commit,
        endpoint=os.environ.get("HF_ENDPOINT"),
    )  # fmt: skip
    return HTTPFileSystem(headers=build_hf_headers()), address


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
