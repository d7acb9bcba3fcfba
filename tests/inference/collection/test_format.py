"""The files of a collection: what writers refuse, and that equal content gives equal bytes."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from ovref_inference import CollectionError
from ovref_inference.collection import format as fmt
from ovref_inference.collection.nouns import read_nouns


def test_vectors_in_parts_are_a_plain_npy_file(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float16)
    with fmt.VectorWriter(tmp_path / "parts.npy", 10, 3) as writer:
        for start, stop in ((0, 4), (4, 4), (4, 9), (9, 10)):
            writer.append(vectors[start:stop])
    np.testing.assert_array_equal(np.load(tmp_path / "parts.npy", allow_pickle=False), vectors)
    fmt.write_vectors(tmp_path / "whole.npy", vectors.astype(np.float64))
    assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "parts.npy").read_bytes()
    opened = fmt.open_vectors(tmp_path / "parts.npy")
    assert isinstance(opened, np.memmap) and not opened.flags.writeable


def test_no_vectors(tmp_path):
    fmt.write_vectors(tmp_path / "none.npy", np.zeros((0, 5)))
    assert fmt.open_vectors(tmp_path / "none.npy").shape == (0, 5)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((2, 4)), r"expected \(n, 3\)"),
        (np.ones(3), r"expected \(n, 3\)"),
        (np.array([[0.0, 1, 2], [np.nan, 1, 2]]), "row 1 has a value that is not finite"),
        (np.array([[0.0, np.inf, 2]]), "row 0"),
        (np.ones((1, 3)), "2 rows announced, 1 written"),
        (np.ones((3, 3)), "2 rows announced, 3 written"),
    ],
)
def test_vectors_that_do_not_belong_are_refused(tmp_path, vectors, message):
    with (
        pytest.raises(ValueError, match=message),
        fmt.VectorWriter(tmp_path / "x.npy", 2, 3) as writer,
    ):
        writer.append(vectors)


def test_a_value_beyond_float16_is_not_finite(tmp_path):
    with (
        pytest.raises(ValueError, match="not finite"),
        pytest.warns(RuntimeWarning, match="overflow"),
    ):
        fmt.write_vectors(tmp_path / "x.npy", np.array([[1e6]]))


@pytest.mark.parametrize(
    "array", [np.ones(3, np.float16), np.ones((2, 2)), np.array([[{}]], dtype=object)]
)
def test_other_arrays_are_no_vectors(tmp_path, array):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(CollectionError, match=r"x\.npy"):
        fmt.open_vectors(tmp_path / "x.npy")


def test_table_bytes_do_not_depend_on_the_parts(tmp_path, built, monkeypatch):
    monkeypatch.setattr(fmt, "ROW_GROUP", 16)
    columns = built.references()
    for name, step in (("one", 1000), ("two", 7)):
        with fmt.TableWriter(tmp_path / name, fmt.REFERENCE_SCHEMA) as writer:
            for start in range(0, len(columns["id"]), step):
                writer.append({k: v[start : start + step] for k, v in columns.items()})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with fmt.open_table(tmp_path / "two", fmt.REFERENCE_SCHEMA) as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert set(groups[:-1]) == {16} and sum(groups) == len(columns["id"])
        assert file.read().to_pydict()["caption"] == columns["caption"]


def test_empty_values_are_refused_but_for_the_seed(tmp_path, built):
    columns = {name: values[:1] for name, values in built.references().items()}
    with fmt.TableWriter(tmp_path / "ok", fmt.REFERENCE_SCHEMA) as writer:
        writer.append({**columns, "seed": [None]})
    with (
        pytest.raises(ValueError, match="noun has empty values"),
        fmt.TableWriter(tmp_path / "bad", fmt.REFERENCE_SCHEMA) as writer,
    ):
        writer.append({**columns, "noun": [None]})


def test_a_table_of_another_schema_is_refused(tmp_path):
    fmt.write_table(tmp_path / "x", fmt.TOMBSTONE_SCHEMA, fmt.tombstone_columns([3, 1, 3], "why"))
    assert fmt.read_tombstones(tmp_path / "x").tolist() == [1, 3]
    with pytest.raises(CollectionError, match="expected"):
        fmt.open_table(tmp_path / "x", fmt.NOUN_SCHEMA)
    (tmp_path / "x").write_bytes(b"PAR1 no")
    with pytest.raises(CollectionError, match="cannot read the table"):
        fmt.open_table(tmp_path / "x", fmt.NOUN_SCHEMA)


def test_the_manifest_survives_a_round_trip(built):
    manifest = dataclasses.replace(
        built.manifest(),
        files={r: fmt.FileInfo(path=n, bytes=1, sha256="0" * 64) for r, n in fmt.FILES.items()},
        build={"größe": [1, 2.5, None]},
    )
    content = fmt.manifest_bytes(manifest)
    assert fmt.parse_manifest(content, "here") == manifest
    assert fmt.manifest_bytes(fmt.parse_manifest(content, "here")) == content


def partitioned(built, **changes):
    partitions = tuple(
        fmt.PartitionInfo(path=f"partitions/{i:05d}", fingerprint=f"{i}", references=3, nouns=1)
        for i in range(2)
    )
    heading = {f.name: getattr(built.manifest(), f.name) for f in dataclasses.fields(fmt.Heading)}
    counts = {"references": 6, "nouns": 2, "prototypes": 4, "tombstones": 0}
    fields = heading | {"partitions": partitions, "counts": counts}
    return fmt.PartitionedManifest(**(fields | changes))


def test_a_partitioned_manifest_survives_a_round_trip(built):
    tree = fmt.FileInfo(path="partition_tree.npz", bytes=1, sha256="0" * 64)
    manifest = partitioned(built, files={"partition_tree": tree})
    content = fmt.manifest_bytes(manifest)
    assert fmt.parse_manifest(content, "here") == manifest
    assert fmt.manifest_bytes(fmt.parse_manifest(content, "here")) == content
    with pytest.raises(CollectionError, match="give one of its partitions, such as x/partitions/0"):
        fmt.undivided(manifest, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partitions": ()}, "names no partition"),
        ({"counts": {"references": 7, "nouns": 2}}, "counts 7 references, its partitions hold 6"),
        ({"path": "partitions/../../x"}, "a partition outside its folder"),
        ({"path": "partitions/00001"}, "one of them twice"),
    ],
)
def test_a_partitioned_manifest_that_contradicts_itself_is_refused(built, changes, message):
    manifest = partitioned(built)
    if "path" in changes:
        first, second = manifest.partitions
        changes = {"partitions": (dataclasses.replace(first, **changes), second)}
    content = fmt.manifest_bytes(dataclasses.replace(manifest, **changes))
    with pytest.raises(CollectionError, match=message):
        fmt.parse_manifest(content, "here")


def test_a_manifest_that_is_not_plain_json_is_refused(built):
    with pytest.raises(ValueError, match="JSON compliant"):
        fmt.manifest_bytes(dataclasses.replace(built.manifest(), build={"loss": float("nan")}))


def test_widths_of_noun_embeddings(tmp_path):
    empty = {name: [] for name in fmt.NOUN_SCHEMA.names}
    fmt.write_table(tmp_path / "x", fmt.NOUN_SCHEMA, empty)
    assert read_nouns(tmp_path / "x").names == []
    assert pa.types.is_float32(fmt.NOUN_SCHEMA.field("embedding").type.value_type)
