"""Exports and imports of other programs' layouts, over a small collection of drawn images."""

import io
import json
import tarfile
from functools import partial

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from safetensors.numpy import load_file

from ovref.errors import InputError
from ovref.exchange import exports, imports
from ovref.exchange.exemplars import best_references, click_points
from ovref.exchange.own_arrays import OwnArrays, collection_from_arrays
from ovref.exchange.picture_files import Picture
from ovref.stages.embed import Embed
from ovref_inference import ReferenceCollection
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig

EMBED = Embed(
    visual=VisualEncoderConfig(model="own:mine", size_hw=(8, 8)),
    text=TextEncoderConfig(model="fake"),
    templates=("a {}.",),
)
NOUNS = ("cat", "dog", "tree")


class FakeTexts:
    """Texts that name the same noun are near each other."""

    def encode(self, texts):
        rows = np.zeros((len(texts), 6), np.float32)
        for row, text in zip(rows, texts, strict=True):
            row[:] = np.random.default_rng(list(text.encode())).normal(size=6) * 0.05
            row[[i for i, noun in enumerate(NOUNS) if noun in text.lower()]] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Two images of each of 15 scenes' three nouns: `<image>#0` to `#2`."""
    rng = np.random.default_rng(0)
    nouns = list(NOUNS) * 15
    centres = rng.standard_normal((3, 8))
    visual = centres[np.arange(45) % 3] + 0.3 * rng.standard_normal((45, 8))
    keys = [f"image{i // 3:02d}#{i % 3}" for i in range(45)]
    arrays = OwnArrays(
        visual=visual, nouns=nouns, captions=[f"a {n}" for n in nouns], more={"key": keys}
    )
    folder = tmp_path_factory.mktemp("exchange") / "collection"
    collection_from_arrays(str(folder), arrays, EMBED, texts=FakeTexts(), name="mine")
    with ReferenceCollection.open(folder) as opened:
        yield opened


def pictures(rows):
    """Each image is 12 x 10; a reference's mask is one of three vertical bars."""
    found = []
    for row in rows:
        mask_hw = np.zeros((10, 12), dtype=bool)
        bar = int(row["key"][-1])
        mask_hw[1:9, 4 * bar : 4 * bar + 4] = True
        found.append(Picture(image_hwc=np.full((10, 12, 3), 40 * bar, np.uint8), mask_hw=mask_hw))
    return found


def test_prototypes(collection, tmp_path):
    found = exports.export_prototypes(collection, tmp_path / "x")
    tensors = load_file(tmp_path / "x/prototypes.safetensors")
    names = (tmp_path / "x/nouns.txt").read_text().split("\n")[:-1]
    assert names == list(NOUNS) and found.counts == {"nouns": 3, "prototypes": 30}
    assert np.array_equal(np.load(tmp_path / "x/prototypes.npy"), tensors["vectors"])
    own = collection.prototypes(["dog"], text_embeddings=FakeTexts().encode(["dog"]))
    assert np.allclose(tensors["vectors"][tensors["noun"] == 1], own.vectors_nkd[0], atol=1e-6)


def test_segrags_bank(collection, tmp_path):
    assert exports.export_segrag(collection, tmp_path / "x").counts["nouns"] == 3
    bank = torch.load(tmp_path / "x/tree/prototypes.pt", weights_only=True)
    assert bank.dtype == torch.float32 and bank.shape == (10, 8)
    assert torch.allclose(bank.norm(dim=1), torch.ones(10), atol=1e-3)


def test_corrclips_bank_out_and_in_again(collection, tmp_path):
    exports.export_corrclip(collection, pictures, tmp_path, name="bank")
    keys = (tmp_path / "manifests/bank.manifest.txt").read_text().splitlines()
    lines = (tmp_path / "manifests/bank.images.tsv").read_text().splitlines()
    heads = [line.split("\t") for line in lines]
    assert len(heads) == 15 and heads[1] == ["image01", "3", "3"] and keys[3] == "image01#0"
    with np.load(tmp_path / "masks/bank/ovref/image01.npz") as masks:
        assert masks["instance_mask"].dtype == bool and masks["instance_mask"].shape == (3, 10, 12)
    vectors = torch.load(tmp_path / "vfm_embeddings/bank_dinov2.pt", weights_only=True)
    assert vectors.dtype == torch.float16 and len(vectors) == 45
    index = faiss.read_index(str(tmp_path / "vfm_embeddings/bank_dinov2.faiss"))
    assert sorted(faiss.vector_to_array(index.id_map).tolist()) == list(range(45))
    arrays = imports.read_corrclip(
        tmp_path, "bank", "metaclip_l", "dinov2", ["dog", "cat", "tree"], FakeTexts()
    )
    assert arrays.nouns == list(NOUNS) * 15 and min(arrays.more["score"]) > 0.5
    assert np.allclose(arrays.visual, collection.visual, atol=2e-3)
    with pytest.raises(InputError, match="cannot be the name of a file"):
        exports.export_corrclip(collection, pictures, tmp_path, name="../bank")
    (tmp_path / "manifests/bank.manifest.txt").write_text("image00#0\n")
    with pytest.raises(InputError, match="has 1 regions, 45 vision and 45 CLIP embeddings"):
        imports.read_corrclip(tmp_path, "bank", "metaclip_l", "dinov2", NOUNS, FakeTexts())


def test_a_pickle_that_does_things_is_refused(tmp_path):
    import pickle

    class Shell:
        def __reduce__(self):
            return print, ("this must not be run",)

    for name in ("vfm_embeddings/b_dinov2.pt", "clip_embeddings/b_metaclip_l.pt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(pickle.dumps(Shell(), protocol=2))
    with pytest.raises(InputError, match="cannot read the tensor"):
        imports.read_corrclip(tmp_path, "b", "metaclip_l", "dinov2", NOUNS, FakeTexts())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["HNSW8", "Flat", "IVF2,Flat"])
def test_freedas_release(collection, tmp_path, packed, kind):
    """Row i of the index is the i-th of the sorted names, whatever the order in the archive."""
    folder = tmp_path / "prototype_embeddings"
    folder.mkdir()
    names = [f"{(i * 17) % 45:02d}_x.npy" for i in range(45)]
    visual = np.asarray(collection.visual, np.float32)
    visual[9] = np.nan
    for name, vector in zip(names, visual, strict=True):
        np.save(folder / name, vector)
    order = np.argsort(names)
    index = faiss.index_factory(6, kind, faiss.METRIC_INNER_PRODUCT)
    textual = np.asarray(collection.textual[order], np.float32)
    if not index.is_trained:
        index.train(textual)
    index.add(textual)
    faiss.write_index(index, str(tmp_path / "knn.index"))
    place = folder
    if packed:
        place = tmp_path / "prototype_embeddings.tar"
        with tarfile.open(place, "w:gz") as tar:
            for name in names:
                tar.add(folder / name, f"./{name}")
    arrays = imports.read_freeda(place, tmp_path / "knn.index", NOUNS, FakeTexts(), tmp_path)
    kept = [i for i in order if i != 9]
    assert arrays.nouns == [NOUNS[i % 3] for i in kept]
    assert np.array_equal(arrays.visual, visual[kept])
    assert np.allclose(arrays.textual, collection.textual[kept], atol=1e-6)
    with pytest.raises(InputError, match="text encoder 6: give the CLIP"):
        imports.nearest_names(np.ones((2, 4), np.float32), NOUNS, FakeTexts())


def test_a_release_of_two_halves_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(4, np.float32))
    index = faiss.IndexFlatIP(6)
    index.add(np.ones((2, 6), np.float32))
    faiss.write_index(index, str(tmp_path / "knn.index"))
    with pytest.raises(InputError, match=r"has 1 embeddings, .* 2 vectors"):
        imports.read_freeda(tmp_path, tmp_path / "knn.index", NOUNS, FakeTexts(), tmp_path)
    with pytest.raises(InputError, match="cannot read the index"):
        imports.read_freeda(tmp_path, tmp_path / "a.npy", NOUNS, FakeTexts(), tmp_path)


def test_exemplars(collection, tmp_path):
    found = exports.export_exemplars(collection, pictures, tmp_path, k=2, nouns=["dog", "tree"])
    assert found.counts["exemplars"] == 4
    tree = json.loads((tmp_path / "exemplars.json").read_text())
    assert list(tree) == ["dog", "tree"]
    for one in tree["dog"]:
        assert one["box_xyxy"] == [4, 1, 8, 9] and one["area"] == 32
        mask_hw = coco_mask.decode(one["mask"]).astype(bool)
        assert mask_hw.sum() == 32 and all(mask_hw[y, x] for x, y in one["points_xy"])
        with Image.open(io.BytesIO((tmp_path / one["image"]).read_bytes())) as image:
            assert image.size == (12, 10)
    with pytest.raises(InputError, match="has no nouns horse"):
        exports.export_exemplars(collection, pictures, tmp_path, nouns=["horse"])


def test_no_file_is_written_outside_of_the_folder(collection, tmp_path, monkeypatch):
    """Keys come with a collection of somebody else's."""
    rows = [row | {"key": "../b#0"} for row in collection.rows([0, 1])]
    monkeypatch.setattr(collection, "rows", lambda ids: rows[: len(ids)])
    table = pa.table({"id": [0, 1], "key": ["../b#0", "../b#1"]})
    monkeypatch.setattr(collection, "to_table", lambda columns: table)
    for export in (
        partial(exports.export_exemplars, k=2, nouns=["dog"]),
        exports.export_corrclip,
    ):
        with pytest.raises(InputError, match=r"'\.\./b', the key of an image, cannot be"):
            export(collection, pictures, tmp_path / "inside")
    assert not list(tmp_path.rglob("b*.*"))


def test_coco_with_the_list_of_references(collection, tmp_path):
    exports.export_exemplars(collection, pictures, tmp_path, k=2, coco=True)
    coco = COCO(str(tmp_path / "coco.json"))
    references = json.loads((tmp_path / "references.json").read_text())
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(NOUNS)
    for category, entries in references.items():
        assert len(entries) == 2
        for entry in entries:
            (annotation,) = coco.loadAnns(entry["ann_ids"])
            assert annotation["category_id"] == int(category)
            assert annotation["image_id"] == entry["img_id"]
            (image,) = coco.loadImgs(entry["img_id"])
            assert (tmp_path / "images" / image["file_name"]).is_file()


def test_a_category_of_fewer_references_is_not_in_the_list(collection, tmp_path):
    """no-time-to-train refuses a list whose categories have different numbers of references."""

    def few(rows):
        return [
            None if row["noun"] == "dog" and number % 3 else one
            for number, (row, one) in enumerate(zip(rows, pictures(rows), strict=True))
        ]

    found = exports.export_exemplars(collection, few, tmp_path, k=3, coco=True)
    names = {c["id"]: c["name"] for c in COCO(str(tmp_path / "coco.json")).cats.values()}
    references = json.loads((tmp_path / "references.json").read_text())
    assert sorted(names.values()) == sorted(NOUNS)
    assert {names[int(category)] for category in references} == {"cat", "tree"}
    assert {len(entries) for entries in references.values()} == {3}
    assert "dog: 1 of 3 exemplars, so it is not in references.json" in found.left_out


def test_the_best_references_show_different_looks():
    """From two tight groups come one reference each, the nearest to the group's middle."""

    class Collection:
        nouns = ("cat",)
        noun_embeddings = np.ones((1, 2), np.float32)
        angles = np.array([0.0, 0.2, 0.1, 1.57, 1.4])
        visual = np.stack([np.cos(angles), np.sin(angles)], axis=1)

        def references_of(self, noun):
            return np.arange(5)

        def prototypes(self, names, k, **options):
            class Found:
                vectors_nkd = np.array([[[0, 1], [np.cos(0.1), np.sin(0.1)]]])
                counts = np.array([2])

            return Found

    assert dict(best_references(Collection(), ["cat"], 2)) == {"cat": [2, 3]}
    assert dict(best_references(Collection(), ["cat"], 9)) == {"cat": [0, 1, 2, 3, 4]}


def test_points_are_far_from_edges_and_from_each_other():
    mask_hw = np.zeros((9, 21), dtype=bool)
    mask_hw[1:8, 1:8] = mask_hw[3:6, 10:20] = True
    points = click_points(mask_hw)
    assert points[0] == (4, 4) and all(mask_hw[y, x] for x, y in points) and len(points) == 3
    assert len(set(points)) == 3
    assert click_points(np.zeros((3, 3), dtype=bool)) == []
    lone = np.zeros((3, 3), dtype=bool)
    lone[2, 2] = True
    assert click_points(lone) == [(2, 2)]
