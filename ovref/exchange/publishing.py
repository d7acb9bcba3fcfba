"""Publishes a collection for others: its files, a data set card, checksums and images.

    README.md           the card, made from the manifest (with the Hub's front matter)
    SHA256SUMS          checksums of all other files, for `sha256sum -c`
    samples.png         crops of some references with their masks
    pictures.json, pictures-*.parquet       the images, unless left out
    collection.json     the manifest, written last as the commit, and the files it names

Files that opening a collection does not need are not named by its manifest. Nothing of deleted
references is published: where there are any, the collection is made again without them.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ovref.errors import InputError, MismatchError
from ovref.exchange.picture_files import INDEX
from ovref.identity import fingerprint
from ovref.reduce.compact import compact, compacted_fingerprint
from ovref.reduce.int8 import in_int8
from ovref.storage.file_store import Store
from ovref_inference.collection import format as fmt
from ovref_inference.collection import hub, store
from ovref_inference.collection.nouns import read_nouns
from ovref_inference.places import sha256_of

CARD, SUMS, SAMPLES = "README.md", "SHA256SUMS", "samples.png"
OF_IMAGES = ("pictures-*.parquet", INDEX, SAMPLES)
"""Files of an earlier publication that a later one without images must remove."""
NOUNS = 20
"""Number of nouns named on the card."""

WritePictures = Callable[[Path], Iterable[str]]
"""Writes the images of a collection, or its samples, into a folder; gives the name of each file
once it is whole, after which it is taken away."""


def publish(
    collection_url: str,
    target: str,
    *,
    title: str,
    evaluation: dict[str, Any] | None = None,
    write_pictures: WritePictures | None = None,
    replace: bool = False,
    int8: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, int]:
    """Publishes a collection at a folder, an object store or the Hub.

    Args:
        collection_url: the collection.
        target: folder, fsspec URL, or hf://user/name, which is created if it does not exist.
        title: title of the card.
        evaluation: content of the collection's evaluation.json, for the card.
        write_pictures: writes `samples.png` and the images into the folder that it gets.
        replace: whether another collection at `target` may be replaced.
        int8: converts embeddings to int8 (`reduce.int8`), which makes another collection; nothing
            if they are int8 already.
        storage_options: fsspec's options for `collection_url`.

    Returns:
        `files` and `bytes`.

    Raises:
        CollectionError: there is no collection, or one of its files is damaged.
        InputError: the evaluation is invalid or belongs to another collection; `target` has a
            revision; or the Hub cannot be reached, or refuses.
        MismatchError: `target` holds another collection, and `replace` is not set.
        StorageError: the target cannot be written.
    """
    on_hub = target.startswith(hub.PREFIX)
    if on_hub and hub.hub_place(target).revision:
        raise InputError(f"publish to a repository, not to a revision of it: {target}")
    manifest, paths = store.fetch(collection_url, verify="full", storage_options=storage_options)
    if evaluation is not None and not _is_evaluation(evaluation):
        raise InputError(
            "the evaluation is not an evaluation.json of `ovref evaluate`: expected caption, data, "
            "rows and collection"
        )
    if evaluation is not None and measured_of(evaluation) != manifest.fingerprint:
        raise InputError(
            f"the evaluation is of the collection {measured_of(evaluation)[:12]}, this one is "
            f"{manifest.fingerprint[:12]}: evaluate it again"
        )
    has_deleted = manifest.counts["tombstones"] > 0
    wanted = compacted_fingerprint(manifest, paths) if has_deleted else manifest.fingerprint
    converts = int8 and manifest.embeddings != "int8"
    if converts:
        wanted = fingerprint([wanted, "int8"])
    there = _fingerprint_at(target)
    is_other = there not in (None, wanted)
    if is_other and there != manifest.fingerprint and not replace:
        raise MismatchError(
            f"{target} holds another collection (fingerprint {str(there)[:12]}, this one has "
            f"{wanted[:12]}); choose another place, or give --replace"
        )
    with tempfile.TemporaryDirectory() as scratch:
        if has_deleted:
            manifest, paths = compact(manifest, paths, Path(scratch, "compact"))
        if converts:
            manifest, paths = in_int8(manifest, paths, Path(scratch, "converted"), wanted)
        place = _OnHub(target) if on_hub else _InStore(target, there is not None, is_other)
        sums: dict[str, str] = {}
        size = 0

        def send(name: str, digest: str = "") -> None:
            nonlocal size
            sums[name] = digest or sha256_of(folder / name)
            size += (folder / name).stat().st_size
            place.send(folder / name)

        folder = Path(scratch, "files")
        folder.mkdir()
        # One at a time, so that there is never more than one file of images on this disk.
        for name in write_pictures(folder) if write_pictures is not None else ():
            send(name)
        for role, path in paths.items():
            info = manifest.files[role]
            _link(path, folder / info.path)
            send(info.path, info.sha256)  # just checked, or just written
        text = card(manifest, title, target, evaluation, list(sums), _most_frequent(paths))
        (folder / CARD).write_text(text, encoding="utf-8")
        send(CARD)
        content = fmt.manifest_bytes(manifest)
        sums[fmt.MANIFEST] = hashlib.sha256(content).hexdigest()
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        (folder / SUMS).write_text(lines, encoding="utf-8")
        send(SUMS)
        (folder / fmt.MANIFEST).write_bytes(content)
        place.finish(folder / fmt.MANIFEST, set(sums), manifest.fingerprint)
    return {"files": len(sums), "bytes": size + len(content)}


class _InStore:
    """A folder or an object store that is published to."""

    def __init__(self, target: str, published: bool, is_other: bool) -> None:
        """
        Args:
            published: whether there is a collection; is_other: and another one.
        """
        self._store, self._published = Store.open(target), published
        if is_other:  # first, so that nobody opens a mixture of both if this is cut off
            self._store.delete(fmt.MANIFEST)

    def send(self, path: Path) -> None:
        """Sends a file and takes it away."""
        self._store.upload(path, path.name)
        path.unlink()

    def finish(self, manifest: Path, names: set[str], fingerprint: str) -> None:
        """Sends the manifest, which is the commit; images of an earlier publication go."""
        # Of an earlier publication only: other folders have files of these names too.
        for name in self._store.list() if self._published else ():
            if any(fnmatch(name, pattern) for pattern in OF_IMAGES) and name not in names:
                self._store.delete(name)
        self.send(manifest)


class _OnHub:
    """A repository of the Hub that is published to, in one commit: whoever opens the newest
    revision sees the old collection or this one."""

    def __init__(self, target: str) -> None:
        from huggingface_hub import HfApi

        self._target, self._place = target, hub.hub_place(target)
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        self._operations: list[Any] = []
        with self._errors():
            self._api.create_repo(self._place.repository, repo_type="dataset", exist_ok=True)

    def send(self, path: Path) -> None:
        """Sends a large file and takes it away; a small one goes with the commit."""
        from huggingface_hub import CommitOperationAdd

        added = CommitOperationAdd(self._place.path(path.name), str(path))
        with self._errors():
            self._api.preupload_lfs_files(
                self._place.repository, additions=[added], repo_type="dataset"
            )
        self._operations.append(added)
        if added._is_uploaded:
            path.unlink()

    def finish(self, manifest: Path, names: set[str], fingerprint: str) -> None:
        """Commits; images of an earlier publication go."""
        from huggingface_hub import CommitOperationDelete

        self.send(manifest)
        wanted = {self._place.path(name) for name in names}
        patterns = [self._place.path(pattern) for pattern in OF_IMAGES]
        with self._errors():
            known = self._api.list_repo_files(self._place.repository, repo_type="dataset")
            self._operations += [
                CommitOperationDelete(name)
                for name in known
                if any(fnmatch(name, pattern) for pattern in patterns) and name not in wanted
            ]
            self._api.create_commit(
                self._place.repository,
                self._operations,
                commit_message=f"Reference collection {fingerprint[:12]}",
                repo_type="dataset",
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import httpx
        from huggingface_hub.errors import HfHubHTTPError

        try:
            yield
        except (HfHubHTTPError, httpx.HTTPError) as error:
            raise InputError(
                f"cannot publish to {self._target}: {str(error)[:300]}; `hf auth login` stores a "
                "token"
            ) from error


def _is_evaluation(tree: Any) -> bool:
    return (
        isinstance(tree, dict)
        and {"caption", "data", "rows", "collection"} <= tree.keys()
        and isinstance(tree["rows"], list)
        and all(isinstance(row, dict) and "name" in row for row in tree["rows"])
    )


def measured_of(evaluation: Any) -> str:
    """The fingerprint of the collection that an evaluation.json measured; empty for other files."""
    collection = evaluation.get("collection") if isinstance(evaluation, dict) else None
    return collection.get("fingerprint", "") if isinstance(collection, dict) else ""


def card(
    manifest: fmt.Manifest,
    title: str,
    target: str,
    evaluation: dict[str, Any] | None,
    files: list[str],
    nouns: list[tuple[str, int]],
) -> str:
    """The data set card: contents, models, licences, evaluation, and how to load it."""
    counts = manifest.counts
    front = [
        "---", f"pretty_name: {json.dumps(title, ensure_ascii=False)}", "license: other",
        "task_categories: [image-segmentation]", "tags: [ovref, reference-collection]",
    ]  # fmt: skip
    pictures = [name for name in files if name.startswith("pictures-")]
    if pictures:
        front += [
            "configs:", "- config_name: pictures", "  data_files: pictures-*.parquet",
        ]  # fmt: skip
    lines = [
        *front, "---", f"# {title}", "",
        "A reference collection for training-free open-vocabulary segmentation, built with ovref: "
        f"{counts['references']:,} references of {counts['nouns']:,} nouns, "
        f"{counts['prototypes']:,} prototypes.",
        "", "```python", "import ovref_inference",
        f'collection = ovref_inference.open("{target}")',
        'segmenter = collection.segmenter("fossil")', "```", "",
    ]  # fmt: skip
    if SAMPLES in files:
        lines += [f"![Some references with their masks]({SAMPLES})", ""]
    lines += ["## What is in it", ""]
    shown = ", ".join(f"{noun} ({count:,})" for noun, count in nouns)
    lines += [f"Most frequent nouns: {shown}.", ""]
    lines += [
        "| embedding | model | revision | width |", "|---|---|---|---:|",
        *(
            f"| {kind} | `{encoder.model}` | {encoder.revision or '-'} | {encoder.dim} |"
            for kind, encoder in (("visual", manifest.visual), ("textual", manifest.textual))
        ), "",
    ]  # fmt: skip
    lines.append(
        "The images are in `pictures-*.parquet`, with the mask of every reference."
        if pictures
        else "Embeddings only: the images are not part of it."
    )
    lines += ["", "## How it was made", ""]
    made = [one for one in manifest.build.get("provenance", []) if "models" in one]
    models = {model["model"]: model for one in made for model in one["models"]}
    if models:
        lines += ["| step | model | licence |", "|---|---|---|"]
        for model in models.values():
            lines.append(f"| {model['step']} | `{model['model']}` | {model['licence']} |")
        lines.append("")
    for one in made:
        lines.append(f"Captions: {one['corpus']['corpus_id']}, licence {one['corpus']['licence']}.")
    lines += ["", "## Licences of what it was made from", ""]
    lines += [f"- {line}" for line in manifest.licences] or ["Nothing is stated."]
    lines += ["", "## How it was measured", "", *_measured(evaluation), ""]
    lines += [
        f"Fingerprint `{manifest.fingerprint}`, format version {manifest.format_version}. "
        f"`sha256sum -c {SUMS}` checks the files.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _measured(evaluation: dict[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["It was not measured, or nothing was said of it."]
    lines = [f"{evaluation['caption']} Data: {evaluation['data']}.", ""]
    lines += ["| segmenter | mIoU % | pixel accuracy % |", "|---|---:|---:|"]
    for row in evaluation["rows"]:
        shares = [row.get(name) for name in ("miou", "pixel_accuracy")]
        cells = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def _most_frequent(paths: dict[str, Path]) -> list[tuple[str, int]]:
    nouns = read_nouns(paths["nouns"])
    pairs = zip(nouns["noun"], nouns["count"].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:NOUNS]


def _link(path: Path, target: Path) -> None:
    """Hard-links a file if possible, otherwise copies it."""
    path = path.resolve()  # the Hub's cache holds links
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _fingerprint_at(target: str) -> str | None:
    """The fingerprint of the collection at a target; None if there is none."""
    if target.startswith(hub.PREFIX):
        content = _manifest_on_hub(target)
    else:
        place = Store.open(target)
        content = place.read(fmt.MANIFEST) if place.exists(fmt.MANIFEST) else None
    if content is None:
        return None
    try:
        return str(json.loads(content)["fingerprint"])
    except (ValueError, TypeError, KeyError):
        return "unknown"


def _manifest_on_hub(target: str) -> bytes | None:
    """The manifest in a repository; None if there is no repository or no manifest."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    place, api = hub.hub_place(target), HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        if not api.file_exists(place.repository, place.path(fmt.MANIFEST), repo_type="dataset"):
            return None
    except (HfHubHTTPError, httpx.HTTPError) as error:
        raise InputError(f"cannot look up {target}: {str(error)[:300]}") from error
    return hub.download(target, fmt.MANIFEST).read_bytes()
