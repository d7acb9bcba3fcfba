"""Publishing at a folder and at a stand-in for the Hub, and opening what was published."""

import hashlib
import shutil

import numpy as np
import pytest

import ovref_inference
from array_fakes import EMBED, FakeTexts
from hub_server import Hub
from ovref.errors import InputError, MismatchError, StorageError
from ovref.exchange import publishing
from ovref.exchange.own_arrays import OwnArrays, collection_from_arrays
from ovref.exchange.picture_files import PublishedPictures, has_pictures, write_pictures
from ovref.records import NO, YES, ImageRecord, Noun, Region
from ovref.storage.file_store import Store
from ovref_inference.collection import hub, store
from ovref_inference.collection.prototypes import make_prototypes
from ovref_inference.errors import CollectionError


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    nouns = ["cat", "dog"] * 20
    visual = np.random.default_rng(0).standard_normal((40, 8))
    arrays = OwnArrays(
        visual=visual, nouns=nouns, more={"key": [f"image{i // 2:02d}#{i % 2}" for i in range(40)]}
    )
    folder = tmp_path_factory.mktemp("publishing") / "collection"
    collection_from_arrays(str(folder), arrays, EMBED, texts=FakeTexts(), licences=["own: CC0-1.0"])
    return str(folder)


def record(number, size_hw=(6, 9)):
    image_hwc = np.full((*size_hw, 3), number, np.uint8)
    file = publishing_png(image_hwc)
    regions = []
    for part, noun in enumerate(("cat", "dog", "bird")):
        mask_hw = np.full(size_hw, NO, np.uint8)
        mask_hw[:, 3 * part : 3 * part + 3] = YES
        regions.append(
            Region(noun=Noun(text=noun, start=0, end=3), mask_hw=mask_hw, score=0.5, source="drawn")
        )
    return ImageRecord(
        key=f"image{number:02d}", caption="cat dog", source="x", image=file, regions=tuple(regions)
    )


def publishing_png(image_hwc):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image_hwc).save(file, "png")
    return file.getvalue()


def test_a_folder_with_its_images_card_and_checksums(collection, tmp_path):
    with ovref_inference.open(collection) as opened:
        keys = frozenset(opened.to_table(["key"]).column("key").to_pylist())
        fingerprint = opened.manifest.fingerprint

    def images(folder):
        return write_pictures((record(i) for i in reversed(range(21))), keys, folder)

    evaluation = {
        "collection": {"fingerprint": fingerprint}, "caption": "Measured somewhere.", "data": "ten",
        "rows": [{"name": "FOSSIL", "miou": 0.5, "pixel_accuracy": None}],
    }  # fmt: skip
    target = tmp_path / "published"
    found = publishing.publish(
        collection, str(target), title="Cats", evaluation=evaluation, write_pictures=images
    )
    assert found["files"] == len(list(target.iterdir()))
    card = (target / "README.md").read_text()
    for text in (
        "# Cats", "40 references of 2 nouns", "| visual | `own:mine` | - | 8 |", "own: CC0-1.0",
        "| FOSSIL | 50.0 | - |", f'ovref_inference.open("{target}")', "dog (20)",
    ):  # fmt: skip
        assert text in card, text
    for line in (target / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest
    pictures = PublishedPictures(str(target))
    found = dict(pictures.pictures(["image07#1", "image20#0", "imageXX#0"]))
    assert list(found) == ["image07#1"]  # image 20 has no reference
    picture = found["image07#1"]
    assert picture.image_hwc.shape == (6, 9, 3) and picture.image_hwc[0, 0, 0] == 7
    assert picture.mask_hw[:, 3:6].all() and picture.mask_hw.sum() == 18
    assert {len(row["regions"]) for row in pictures.rows()} == {2}  # birds are no references
    with ovref_inference.open(target) as opened:
        assert len(opened) == 40
    file = target / "pictures-00000.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StorageError, match="is cut off"):
        list(PublishedPictures(str(target)).rows())
    (target / "pictures.json").write_text("[")
    with pytest.raises(StorageError, match=r"pictures\.json is damaged"):
        PublishedPictures(str(target))


def test_nothing_of_deleted_references_is_published(collection, tmp_path):
    copy, target = tmp_path / "copy", tmp_path / "there"
    shutil.copytree(collection, copy)
    publishing.publish(str(copy), str(target), title="x")
    gone = [3, 5, 38]
    with ovref_inference.open(copy) as opened:
        kept = [i for i in range(40) if i not in gone]
        whole = opened.rows(range(40))
        visual = np.array(opened.visual)
        embeddings = dict(zip(opened.nouns, opened.noun_embeddings, strict=True))
    store.tombstone(str(copy), gone, "an opt-out")
    publishing.publish(str(copy), str(target), title="x")  # the same collection, without them
    assert "37 references of 2 nouns" in (target / "README.md").read_text()
    for line in (target / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest
    with ovref_inference.open(target, verify="full") as opened:
        assert len(opened) == len(opened.visual) == 37 and not opened.manifest.counts["tombstones"]
        rows = opened.rows(range(37))
        assert [row["id"] for row in rows] == list(range(37))
        assert [row["key"] for row in rows] == [whole[i]["key"] for i in kept]
        np.testing.assert_array_equal(opened.visual, visual[kept])
        found = opened.search_regions(visual.astype(np.float32), k=1)
        assert (found.scores[kept, 0] > 0.999).all() and (found.scores[gone, 0] < 0.99).all()
        for noun, embedding in zip(opened.nouns, opened.noun_embeddings, strict=True):
            np.testing.assert_array_equal(embedding, embeddings[noun])
        cats = [i for i in kept if whole[i]["noun"] == "cat"]
        made = opened.prototypes(["cat"]).vectors_nkd[0]
        alone = make_prototypes(visual[cats], opened.prototype_config)
        np.testing.assert_allclose(made, alone, atol=2e-3)
    for file in target.iterdir():  # neither a vector nor a key
        assert visual[38].tobytes() not in file.read_bytes(), file
    again = publishing.publish(str(copy), str(tmp_path / "again"), title="x")
    assert again["files"] == len(list(target.iterdir()))
    for name in ("visual.faiss", "nouns.parquet", "references.parquet", "collection.json"):
        assert (tmp_path / "again" / name).read_bytes() == (target / name).read_bytes()
    store.tombstone(str(copy), kept, "the rest")
    with pytest.raises(InputError, match="all references of the collection are deleted"):
        publishing.publish(str(copy), str(tmp_path / "none"), title="x")


def test_images_are_sent_file_by_file(collection, tmp_path, monkeypatch):
    monkeypatch.setattr("ovref.exchange.picture_files.FILE_BYTES", 1)
    keys = frozenset(f"image{i:02d}#0" for i in range(5))
    most = []

    def images(folder):
        for name in write_pictures((record(i) for i in range(5)), keys, folder):
            most.append(len(list(folder.iterdir())))
            yield name

    publishing.publish(collection, str(tmp_path / "there"), title="x", write_pictures=images)
    assert most == [1] * 6  # five images and the index
    assert len(dict(PublishedPictures(str(tmp_path / "there")).pictures(keys))) == 5
    file = tmp_path / "there" / "pictures-00002.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(StorageError, match=r"pictures-00002\.parquet is damaged: its SHA-256"):
        list(PublishedPictures(str(tmp_path / "there")).rows())


def cut(self, local_path, path):
    raise OSError("the line is cut")


def test_another_collection_is_not_overwritten(collection, tmp_path, monkeypatch):
    target = tmp_path / "there"
    target.mkdir()
    (target / "collection.json").write_text('{"fingerprint": "other"}')
    with pytest.raises(MismatchError, match="holds another collection"):
        publishing.publish(collection, str(target), title="x")
    for name in ("pictures.json", "pictures-00007.parquet", "samples.png", "notes.txt"):
        (target / name).write_text("of the other one")
    publishing.publish(collection, str(target), title="x", replace=True)
    assert not has_pictures(str(target)) and not list(target.glob("pictures*"))
    assert not (target / "samples.png").exists() and (target / "notes.txt").exists()
    assert "Embeddings only" in (target / "README.md").read_text()
    publishing.publish(collection, str(target), title="x")  # the same one again
    manifest = target / "collection.json"
    whole = manifest.read_bytes()
    manifest.write_text('{"fingerprint": "other"}')
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the line is cut"):
        patch.setattr(Store, "upload", cut)
        publishing.publish(collection, str(target), title="x", replace=True)
    assert not manifest.exists()  # rather than a mixture of both
    manifest.write_bytes(whole)
    other = {"collection": {"fingerprint": "f" * 64}, "caption": "", "data": "", "rows": []}
    with pytest.raises(InputError, match="the evaluation is of the collection ffff"):
        publishing.publish(collection, str(target), title="x", evaluation=other)


def test_published_again_without_images_the_old_ones_go(collection, tmp_path):
    def images(folder):
        yield from write_pictures((record(i) for i in range(3)), frozenset(["image01#0"]), folder)
        (folder / publishing.SAMPLES).write_bytes(b"drawn")
        yield publishing.SAMPLES

    (tmp_path / "samples.png").write_bytes(b"of somebody else")
    publishing.publish(collection, str(tmp_path), title="x")
    assert not has_pictures(str(tmp_path)) and (tmp_path / "samples.png").exists()
    publishing.publish(collection, str(tmp_path), title="x", write_pictures=images)
    assert has_pictures(str(tmp_path))
    found = publishing.publish(collection, str(tmp_path), title="x")
    assert not has_pictures(str(tmp_path)) and found["files"] == len(list(tmp_path.iterdir()))


def test_what_is_no_evaluation_is_said(collection, tmp_path):
    with ovref_inference.open(collection) as opened:
        fingerprint = opened.manifest.fingerprint
    for tree in ([], "x", {"collection": {"fingerprint": fingerprint}}):
        with pytest.raises(InputError, match=r"not an evaluation\.json of `ovref evaluate`"):
            publishing.publish(collection, str(tmp_path / "x"), title="x", evaluation=tree)


@pytest.fixture
def the_hub(monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield server
    server.close()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own
def test_the_hub_and_its_cache(collection, the_hub, tmp_path, monkeypatch):
    keys = frozenset(["image03#0"])

    def images(folder):
        return write_pictures([record(3)], keys, folder)

    publishing.publish(collection, "hf://me/cats", title="Cats", write_pictures=images)
    first, tree = the_hub.repositories["me/cats"][-1]
    assert {"README.md", "SHA256SUMS", "collection.json", "visual.faiss"} <= tree.keys()
    assert list(the_hub.large.values()) == [tree["pictures-00000.parquet"]]  # before the commit
    cache = tmp_path / "cache"
    with ovref_inference.open("hf://me/cats", cache=cache, verify="full") as opened:
        assert len(opened) == 40 and "hf://me/cats" in repr(opened)
    assert (cache / "datasets--me--cats" / "snapshots" / first).is_dir()  # the library's layout
    assert "pictures-00000.parquet" not in the_hub.fetched
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert has_pictures("hf://me/cats") and not has_pictures("hf://me/none")
    ((key, picture),) = PublishedPictures("hf://me/cats").pictures(keys)
    assert key == "image03#0" and picture.mask_hw[:, :3].all()
    fetched = len(the_hub.fetched)
    with ovref_inference.open(f"hf://me/cats@{first}", cache=cache):
        assert len(the_hub.fetched) == fetched  # nothing is fetched twice
    the_hub.repositories["me/cats"].append(("1" * 40, {**tree, "collection.json": b"{}"}))
    with pytest.raises(CollectionError, match="is not the manifest"):
        ovref_inference.open("hf://me/cats", cache=cache)
    with pytest.raises(MismatchError, match="hf://me/cats holds another collection"):
        publishing.publish(collection, "hf://me/cats", title="Cats")
    publishing.publish(collection, "hf://me/cats", title="Cats", replace=True)
    assert store.read_tombstones("hf://me/cats")["id"] == []
    with pytest.raises(CollectionError, match="not changed where it lies"):
        store.tombstone("hf://me/cats", [1], "no good")
    with ovref_inference.open(f"hf://datasets/me/cats@{first}", cache=cache) as opened:
        assert len(opened) == 40


def test_what_the_hub_does_not_have(the_hub, tmp_path):
    the_hub.repositories["me/empty"] = [("0" * 40, {})]
    for url, message in (
        ("hf://me/none", "cannot fetch collection.json of hf://me/none"),
        ("hf://me/empty@v9", "cannot fetch collection.json"),
        ("hf://me/empty", "collection.json is missing at hf://me/empty"),
        ("hf://me", "a place on the Hub is hf://user/name"),
    ):
        with pytest.raises(CollectionError, match=message):
            ovref_inference.open(url, cache=tmp_path)
    with pytest.raises(InputError, match="not to a revision"):
        publishing.publish("x", "hf://me/cats@v1", title="x")


def test_places_on_the_hub():
    place = hub.hub_place("hf://me/cats@v1/folder/inside")
    assert (place.repository, place.revision) == ("me/cats", "v1")
    assert place.path("collection.json") == "folder/inside/collection.json"
    assert hub.hub_place("hf://datasets/me/cats/").path("x") == "x"
