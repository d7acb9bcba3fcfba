"""An open collection apart from searching: `repr`, tables, pickling, encoder settings,
segmenters."""

import hashlib
import importlib
from typing import Any

import numpy as np
import pyarrow as pa

from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.errors import CollectionError
from ovref_inference.lazy import missing_package


class CollectionHandle:
    """Base of `ReferenceCollection`."""

    url: str
    manifest: Any
    _deleted: np.ndarray
    _nouns: Any
    _table: Any
    _opened: dict[str, Any]
    """The arguments it was opened with, so that another process can open it too."""

    def __repr__(self) -> str:
        manifest = self.manifest
        living = manifest.counts["references"] - len(self._deleted)
        return (
            f"ReferenceCollection({self.url!r}: {living} references "
            f"of {int((self._nouns.counts > 0).sum())} nouns, {manifest.visual.model} "
            f"{manifest.visual.dim} wide, {manifest.textual.model} {manifest.textual.dim} wide)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A DataLoader's worker maps the same files; the content is not pickled.
        return _open_again, (type(self), self.url, self._opened)

    @property
    def deletions(self) -> str:
        """Hash that is another one after a deletion or its undoing, 64 hexadecimal digits."""
        file = self.manifest.files.get("tombstones")  # a partitioned collection has none of its own
        return file.sha256 if file else hashlib.sha256(self._deleted.tobytes()).hexdigest()

    @property
    def visual_config(self) -> VisualEncoderConfig:
        """The visual encoder that made the collection, for `encoders.load_visual_encoder`.

        Raises:
            CollectionError: the manifest's settings do not fit this version's encoders.
        """
        settings = dict(self.manifest.visual.settings)
        if "size_hw" in settings:
            settings["size_hw"] = tuple(settings["size_hw"])
        return self._encoder_config(VisualEncoderConfig, settings)

    @property
    def text_config(self) -> TextEncoderConfig:
        """The text encoder that made the collection, for `encoders.load_text_encoder`.

        Raises:
            CollectionError: the manifest's settings do not fit this version's encoders.
        """
        return self._encoder_config(TextEncoderConfig, self.manifest.textual.settings)

    def to_table(self, columns: list[str] | None = None) -> pa.Table:
        """The references that are not deleted as an Arrow table, columns as in `REFERENCE_SCHEMA`.

        Raises:
            ValueError: there is no such column.
        """
        known = self._table.columns
        unknown = sorted(set(columns or ()) - set(known))
        if unknown:
            raise ValueError(f"{self.url} has the columns {', '.join(known)}, not {unknown}")
        return self._table.read(columns, self._deleted)

    def to_pandas(self, columns: list[str] | None = None) -> Any:
        """`to_table` as a pandas DataFrame. Raises MissingPackageError without pandas."""
        try:
            importlib.import_module("pandas")
        except ModuleNotFoundError as error:
            raise missing_package(error, "ReferenceCollection.to_pandas") from error
        return self.to_table(columns).to_pandas()

    def segmenter(self, method: str = "fossil", **options: Any) -> Any:
        """`segmenters.load_segmenter` of this collection, with its options and errors."""
        # Imported by name, because segmenters import collections.
        load = importlib.import_module("ovref_inference.segmenters.load").load_segmenter
        return load(self, method, **options)

    def _encoder_config(self, kind: type, settings: dict[str, Any]) -> Any:
        try:
            return kind(**settings)
        except (TypeError, ValueError, KeyError) as error:
            raise CollectionError(
                f"{self.url}: the manifest's encoder settings {settings} are no {kind.__name__} "
                f"({error}); load the encoder yourself and pass embeddings"
            ) from error


def _open_again(kind: Any, url: str, options: dict[str, Any]) -> Any:
    return kind.open(url, **options)
