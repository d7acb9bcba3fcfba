"""The index over the inverted lists of all partitions: what it holds, who makes it, and when."""

import json
import secrets
import shutil

import faiss
import numpy as np
import pytest
from reduce_fakes import EMBED, FakeTexts, commit_step, direction, make_references, reduce_into
from test_partitioned import COUNTS, PROTOTYPES, content, in_any_order, manifest_of
from test_run import die_in

from ovref.exchange import publishing
from ovref.reduce import ReduceSpec, list_index, reduce_collection
from ovref.storage.file_store import Store
from ovref_inference import CollectionError, ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import opening, remote
from ovref_inference.collection import store as collections
from ovref_inference.collection.joined_index import JoinedIndex
from ovref_inference.collection.parts import TunedIndex
from ovref_inference.collection.remote_index import RemoteIndex

SPEC = ReduceSpec(prototypes=PROTOTYPES, partition_references=60)
ROLES = {"visual_lists": 12, "textual_lists": 8}
"""Widths."""


@pytest.fixture(autouse=True, scope="module")
def few_are_many():
    """Partitions of 45 references or more have inverted lists, and 60 lists an index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ovref_inference.collection.index.EXACT_BELOW", 45)
        patch.setattr("ovref.reduce.list_index.LEAST_LISTS", 60)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, few_are_many):
    """A step, and its collection."""
    folder = tmp_path_factory.mktemp("made")
    step = commit_step(folder / "run", make_references(COUNTS))
    reduce_into(folder / "collection", step, SPEC)
    return step, folder / "collection"


@pytest.fixture
def changed(made, tmp_path):
    """A copy of the collection that a test may change."""
    return shutil.copytree(made[1], tmp_path / "changed")


def centroids(folder):
    """role -> (lists, d) float32 of all partitions' indexes, as faiss opens them."""
    found = {}
    for role, dim in ROLES.items():
        every = []
        for part in manifest_of(folder).partitions:
            own = manifest_of(folder / part.path)
            name = own.files[role.replace("lists", "index")].path
            index = faiss.read_index(str(folder / part.path / name))
            if hasattr(index, "nlist"):
                every.append(index.quantizer.reconstruct_n(0, index.nlist))
        found[role] = np.concatenate(every)
        assert found[role].shape[1] == dim
    return found


def stored(folder, role):
    """Number of the list -> its vector in the file, and the size of each list of the file."""
    index = faiss.read_index(str(folder / manifest_of(folder).files[role].path))
    found, lists = {}, index.invlists
    sizes = [lists.list_size(number) for number in range(index.nlist)]
    for number, size in enumerate(sizes):
        ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size)
        vectors = index.sq.decode(codes.copy().reshape(size, -1))
        found |= {int(i): vector for i, vector in zip(ids, vectors, strict=True)}
    return found, sizes


def test_it_holds_the_centroids_of_all_partitions_in_their_order(made):
    _, folder = made
    manifest = manifest_of(folder)
    assert manifest.format_version == 6
    assert set(manifest.files) == {"partition_tree", *ROLES}
    sizes = [part.references for part in manifest.partitions]
    assert min(sizes) < 45 <= max(sizes)  # some partitions are exact, some have lists
    for role, expected in centroids(folder).items():
        found, lists = stored(folder, role)
        assert sorted(found) == list(range(len(expected)))
        for number, vector in enumerate(expected):
            np.testing.assert_allclose(found[number], vector, atol=4e-3)
        info = getattr(manifest, role)
        assert info.factory == f"IVF{len(lists)},SQ8" and len(lists) > 8
        assert all(at.recall >= list_index.LIST_RECALL for at in info.curve)
    assert not (folder / "_scatter").exists()


def test_a_search_finds_nearly_all_that_it_finds_by_comparing_all(made):
    with ReferenceCollection.open(made[1], verify="full") as opened:
        for kind, dim in (("visual", 12), ("textual", 8)):
            index = getattr(opened, f"_{kind}_index")
            assert index._lists is not None
            every = [fmt.SearchPoint(k=1, nprobe=999, recall=1.0, worst_tenth=1.0)]
            index._lists = TunedIndex(index._lists.index, every)
            comparing = JoinedIndex(index._parts, 1)
            queries = np.stack([direction(noun, dim) for noun in COUNTS]).astype(np.float32)
            queries /= np.linalg.norm(queries, axis=1, keepdims=True)
            for k in (1, 10, 350):
                found, expected = (
                    one.search(queries, k, np.zeros(0, np.int64)) for one in (index, comparing)
                )
                same = [np.isin(*pair) for pair in zip(found[1], expected[1], strict=True)]
                assert np.mean(same) > 0.98  # in 8 bits, another list may seem nearer
                np.testing.assert_allclose(found[0], expected[0], atol=4e-3)


def test_few_lists_have_none(made, tmp_path, monkeypatch):
    monkeypatch.setattr("ovref.reduce.list_index.LEAST_LISTS", 10_000)
    folder = tmp_path / "few"
    reduce_into(folder, made[0], SPEC)
    manifest = manifest_of(folder)
    assert manifest.format_version == 4 and set(manifest.files) == {"partition_tree"}
    assert not set(ROLES) & json.loads((folder / "collection.json").read_text()).keys()


KILLS = {
    "reading centroids": ("ovref.reduce.list_index.read_lists", 2),
    "the second index": ("ovref.reduce.list_index.index_centroids", 1),
    "manifest": ("ovref.reduce.partitioned.collections.publish_partitioned", 0),
}


@pytest.mark.parametrize("where", KILLS)
def test_killed_while_it_is_made_it_goes_on(made, tmp_path, monkeypatch, where):
    step, folder = made
    with monkeypatch.context() as patch:
        die_in(patch, *KILLS[where])
        with pytest.raises(KeyboardInterrupt):
            reduce_into(tmp_path / "again", step, SPEC)
    started = []

    def watched(tasks):
        started.extend(task.func.__name__ for task in tasks)
        return in_any_order(tasks)

    reduce_into(tmp_path / "again", step, SPEC, run_tasks=watched)
    assert content(tmp_path / "again") == content(folder)
    again = {"reading centroids": 2, "the second index": 1, "manifest": 0}[where]
    assert started.count("make_list_index") == again


def test_a_grown_collection_has_a_new_one(changed, place):
    folder, before = changed, manifest_of(changed)
    new = place(make_references({"fox": 150}, seed=1), run=1)
    reduce_into(folder, new, SPEC, base=Store.open(str(folder)))
    after = manifest_of(folder)
    for role, expected in centroids(folder).items():
        assert after.files[role] != before.files[role]
        assert not (folder / before.files[role].path).exists()
        found, _ = stored(folder, role)
        assert len(found) == len(expected)
        np.testing.assert_allclose(found[len(expected) - 1], expected[-1], atol=4e-3)


def test_a_damaged_or_missing_one_is_said(changed):
    folder = changed
    path = folder / manifest_of(folder).files["visual_lists"].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(CollectionError, match=r"visual_lists\.faiss.*checksum"):
        ReferenceCollection.open(folder, verify="full")
    path.unlink()
    with pytest.raises(CollectionError, match=r"visual_lists\.faiss is missing"):
        ReferenceCollection.open(folder)
    path.write_bytes(whole)
    manifest = folder / "collection.json"
    tree = json.loads(manifest.read_text())
    for change in ({"format_version": 4}, {"textual_lists": None}):
        changed = {name: value for name, value in (tree | change).items() if value is not None}
        manifest.write_text(json.dumps(changed))
        with pytest.raises(CollectionError, match="version 6 has visual_lists and textual_lists"):
            ReferenceCollection.open(folder)


def test_what_is_published_has_it_too(changed, tmp_path):
    """As it is, in 8 bits, and without deleted references, where it is made anew."""
    before = manifest_of(changed)
    for name, options in (("same", {}), ("int8", {"int8": True})):
        publishing.publish(str(changed), str(tmp_path / name), title="x", **options)
        for role in ROLES:
            assert manifest_of(tmp_path / name).files[role] == before.files[role]
            assert getattr(manifest_of(tmp_path / name), role) == getattr(before, role)
        ReferenceCollection.open(tmp_path / name, verify="full").close()
    largest = max(range(len(before.partitions)), key=lambda n: before.partitions[n].references)
    gone = [largest * fmt.PARTITION_IDS + i for i in range(0, 12)]
    collections.tombstone(str(changed), gone, "opt-out")
    publishing.publish(str(changed), str(tmp_path / "same"), title="x")
    after = manifest_of(tmp_path / "same")
    for role, expected in centroids(tmp_path / "same").items():
        assert after.files[role].sha256 != before.files[role].sha256
        found, _ = stored(tmp_path / "same", role)
        assert len(found) == len(expected)
        for number, vector in enumerate(expected):
            np.testing.assert_allclose(found[number], vector, atol=4e-3)
    with ReferenceCollection.open(tmp_path / "same", verify="full") as opened:
        assert len(opened.search_regions(direction("fox", 12)[None], k=10).ids[0]) == 10


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_on_s3_a_search_reads_lists_and_centroids_of_no_partition(
    made, tmp_path, s3_endpoint, monkeypatch
):
    step, folder = made
    options = {"endpoint_url": s3_endpoint, "key": "testing", "secret": "testing"}
    output = Store.open(f"s3://bucket/{secrets.token_hex(4)}", **options)
    reduce_collection(
        step, SPEC, embed=EMBED, texts=FakeTexts(), output=output, work=tmp_path / "s3_work",
        licences=("CC-BY-4.0",), run_tasks=in_any_order,
    )  # fmt: skip
    assert {path: output.read(path) for path in output.list()} == content(folder)
    monkeypatch.setattr(opening, "IN_PLACE_BYTES", 0)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 64)
    queries = np.stack([direction(noun, 12) for noun in COUNTS])
    with (
        ReferenceCollection.open(
            output.url, cache=tmp_path / "cache", storage_options=options
        ) as there,
        ReferenceCollection.open(folder) as local,
    ):
        for number in range(len(queries)):
            found, expected = (
                one.search_regions(queries[number : number + 1], k=3) for one in (there, local)
            )
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(found.scores, expected.scores)
            if number == 0:
                inside = [part.index for part in there._visual_index._parts]
                read = [one for one in inside if isinstance(one, RemoteIndex)]
                assert any("_header" not in vars(one) for one in read)
        assert not any("_quantizer" in vars(one) for one in read)
        assert "_quantizer" in vars(there._visual_index._lists.index)


def test_a_partition_is_read_without_its_other_entries(made):
    """What stands for a query is an entry of the list it is drawn from."""
    _, folder = made
    manifest = manifest_of(folder)
    parts = [(one.path, manifest_of(folder / one.path)) for one in manifest.partitions]
    indexes = list_index.partition_indexes("visual_lists", parts)
    assert 0 < len(indexes) < len(parts)
    one, store = indexes[0], Store.open(str(folder))
    own, some = list_index.read_lists(store, one, 20, np.random.default_rng(0))
    whole = faiss.read_index(str(folder / one.path))
    np.testing.assert_array_equal(own, whole.quantizer.reconstruct_n(0, whole.nlist))
    path = folder / one.path
    matrix = np.load(path.with_name("visual.f16.npy")).astype(np.float32)
    assert some.shape == (20, 12)
    assert (np.abs(matrix[None] - some[:, None]).max(axis=2).min(axis=1) == 0).all()
    assert len(np.unique(some, axis=0)) > 5


def test_steps_of_several_shards_change_nothing(made, tmp_path):
    step = commit_step(tmp_path / "other", make_references(COUNTS))
    reduce_into(tmp_path / "again", step, SPEC, run_tasks=in_any_order)
    assert content(tmp_path / "again") == content(made[1])
