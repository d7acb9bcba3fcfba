"""Finds the files of a data set below a folder, in the first of its layouts that exists."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ovref.errors import InputError
from ovref.evaluation.named_sets.context_json import ContextMasks, read_context
from ovref.evaluation.named_sets.layouts import FolderLayout, NamedSet
from ovref.evaluation.named_sets.panoptic import IndexedSegments, read_index


@dataclass(frozen=True, kw_only=True)
class FoundLayout:
    """A layout and its location."""

    layout: FolderLayout
    base: Path
    """Folder to which the layout's paths are relative."""
    split: str
    """The layout's name for the split."""
    images: str
    """The layout's image path that exists."""
    ids: tuple[str, ...]
    """Image ids, sorted, or in the order of the split file."""
    segments: Mapping[str, IndexedSegments] | None = None
    """Segments of each image, from a panoptic JSON file."""
    masks: Mapping[str, ContextMasks] | None = None
    """Masks of each image, from Pascal Context's JSON file."""

    @property
    def folder(self) -> Path:
        """Folder of the label files."""
        return self.base / _folder(self.layout.labels, self.split)

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders, or single files, that images are read from."""
        paths = (self.images, self.layout.labels, self.layout.instances)
        return tuple(dict.fromkeys(self.base / _folder(p, self.split) for p in paths if p))

    def image(self, image_id: str) -> Path:
        """The file of an image."""
        return self.base / self.images.format(split=self.split, id=image_id)

    def label(self, image_id: str) -> Path:
        """The label file of an image."""
        return self.base / self.layout.labels.format(split=self.split, id=image_id)

    def instances(self, image_id: str) -> Path:
        """The instance file of an image."""
        return self.base / self.layout.instances.format(split=self.split, id=image_id)


def find_files(named: NamedSet, root: Path, split: str) -> FoundLayout:
    """Finds the files of a split.

    Raises:
        InputError: no layout exists, or one of its image or label files is missing.
    """
    looked_for = []
    for layout in named.layouts:
        if split not in layout.splits:
            continue
        split_name = layout.splits[split]
        for base in dict.fromkeys(root / each for each in layout.bases):
            for images in layout.images:
                if _is_there(layout, base, split_name, images):
                    return _listed(layout, base, split_name, images)
        images = " or ".join(each.format(split=split_name, id="*") for each in layout.images)
        text = f"{images} with {layout.labels.format(split=split_name, id='*')}"
        if layout.listed_by not in ("images", "labels", layout.labels):
            text += f" and {layout.listed_by.format(split=split_name)}"
        if layout.instances:
            text += f" and {layout.instances.format(split=split_name, id='*')}"
        looked_for.append(f"- {layout.what}: {text}")
    bases = ", ".join(dict.fromkeys(b or "." for each in named.layouts for b in each.bases))
    lines = "\n".join(looked_for)
    raise InputError(
        f"{root} does not contain {named.name}, split {split}; searched it and its folders {bases} "
        f"for\n{lines}"
    )


def _is_there(layout: FolderLayout, base: Path, split: str, images: str) -> bool:
    folders = [images, layout.instances] if layout.instances else [images]
    if not all((base / _folder(each, split)).is_dir() for each in folders):
        return False
    if layout.reader == "context_json":
        return (base / layout.labels).is_file()
    if layout.listed_by not in ("images", "labels"):
        return (base / _folder(layout.labels, split)).is_dir() and (
            base / layout.listed_by.format(split=split)
        ).is_file()
    return any(True for _ in _ids(base, layout.labels, split, layout.not_labels))


def _listed(layout: FolderLayout, base: Path, split: str, images: str) -> FoundLayout:
    """The layout with its image ids, all of which have image and label file."""
    segments = masks = None
    if layout.listed_by in ("images", "labels"):
        image_ids = set(_ids(base, images, split, ()))
        label_ids = set(_ids(base, layout.labels, split, layout.not_labels))
        kept = image_ids if layout.listed_by == "images" else label_ids
        bad = label_ids - image_ids if layout.listed_by == "labels" else label_ids ^ image_ids
        ids = tuple(sorted(kept))
    else:
        path = base / layout.listed_by.format(split=split)
        if layout.reader == "panoptic":
            segments = read_index(path, layout.rule.classes)
            ids = tuple(segments)
        elif layout.reader == "context_json":
            masks = read_context(path, split)
            ids = tuple(masks)
        else:
            ids = _ids_of_file(path)
        # The folders also contain other images.
        folder_images = set(_ids(base, images, split, ()))
        folder_labels = set(masks or _ids(base, layout.labels, split, ()))
        bad = {each for each in ids if each not in folder_images or each not in folder_labels}
    found = FoundLayout(
        layout=layout,
        base=base,
        split=split,
        images=images,
        ids=ids,
        segments=segments,
        masks=masks,
    )
    if bad:
        example = min(bad)
        lacks = found.image(example) if found.label(example).exists() else found.label(example)
        raise InputError(
            f"{len(bad)} images of {layout.what} in {base} lack their image or label file, for "
            f"one {lacks}"
        )
    return found


def _ids(base: Path, template: str, split: str, excluded: tuple[str, ...]) -> Iterator[str]:
    """Ids of the files that match a path, without hidden files, such as those of macOS."""
    folder = base / _folder(template, split)
    end = template.rsplit("{id}", 1)[1]
    for path in folder.rglob(f"*{end}"):
        relative = path.relative_to(folder).as_posix()
        if not re.search(r"(^|/)\.", relative) and not relative.endswith(excluded or ("\0",)):
            yield relative[: -len(end)]


def _ids_of_file(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the split file {path}: {error}") from error
    if not lines:
        raise InputError(f"the split file {path} is empty")
    if len(set(lines)) < len(lines):
        raise InputError(f"the split file {path} lists an image twice")
    return tuple(lines)


def _folder(template: str, split: str) -> str:
    """The part of a path before placeholders."""
    return template.split("{id}")[0].format(split=split)
