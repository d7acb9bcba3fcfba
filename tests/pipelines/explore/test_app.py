"""The explorer's HTTP interface, tested by real requests."""

import dataclasses
import io
import json
import shutil

import httpx
import numpy as np
import pytest
from explorer_server import TOKEN, served
from PIL import Image
from recipe_fakes import FakeTexts, fake_build

from hub_server import Hub
from ovref.errors import ConfigError, InputError
from ovref.exchange.publishing import publish
from ovref.reduce.spec import FilterSpec, ReduceSpec
from ovref_inference import ModelError, ReferenceCollection
from ovref_pipelines import api, recipe
from ovref_pipelines.explore import app
from ovref_pipelines.explore.library import Library
from ovref_pipelines.explore.serve import serve
from ovref_pipelines.output import open_build


def get(explorer, path, **query):
    answer = explorer.client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer, code, says):
    assert answer.status_code == code and says in answer.json()["error"]


def test_nothing_without_the_token_and_nothing_for_other_sites(explorer):
    base = str(explorer.client.base_url)
    for path in ("/", "/app.js", "/api/about", "/api/picture/0/image"):
        assert httpx.get(f"{base}{path}").status_code == 401
        assert httpx.get(f"{base}{path}?token=wrong").status_code == 401
    other = {"origin": "http://evil.example"}
    assert explorer.client.get("/api/about", headers=other).status_code == 403
    assert explorer.client.get("/api/about", headers={"host": "evil.example"}).status_code == 403
    page = httpx.get(f"{base}/?token={TOKEN}")
    assert "HttpOnly; SameSite=Strict" in page.headers["set-cookie"]
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_port_that_does_not_exist(build_output):
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1 port 70000"):
        serve(str(build_output), port=70_000)


def test_the_page_asks_no_other_host(explorer):
    for path in ("/", "/app.js", "/views.js", "/style.css", "/icon.svg"):
        text = explorer.client.get(path).text.replace("http://www.w3.org/2000/svg", "")
        assert text and "http://" not in text and "https://" not in text and "//cdn" not in text


def test_what_lies_there(explorer, build_output):
    about = get(explorer, "/api/about")
    assert about["collection"] == f"{build_output}/collection" and about["has_images"]
    assert about["counts"]["references"] == 60 and about["counts"]["nouns"] == 7
    progress = get(explorer, "/api/progress")
    assert progress["published"] and [step["outputs"] for step in progress["steps"]] == [60] * 4
    assert progress["now"]["state"] == "done"
    assert progress["now"]["steps"]["images"]["records_done"] == 60


def test_the_vocabulary_is_searched_and_paged(explorer):
    every = get(explorer, "/api/nouns", order="count", count=100)["nouns"]
    counts = {one["noun"]: one["count"] for one in every}
    assert sum(counts.values()) == 60 and list(counts.values()) == sorted(
        counts.values(), reverse=True
    )
    assert get(explorer, "/api/nouns", order="name", start=2, count=2)["nouns"] == [
        {"noun": "cup", "count": counts["cup"]}, {"noun": "fish", "count": counts["fish"]},
    ]  # fmt: skip
    found = get(explorer, "/api/nouns", text="S", order="name")
    assert [one["noun"] for one in found["nouns"]] == ["star", "fish", "house"]
    refused(explorer.client.get("/api/nouns?count=100000"), 422, "from 0 to 200")


def test_a_noun_s_references_come_by_their_agreement_with_each_other(explorer):
    found = get(explorer, "/api/noun", noun="cup", count=100)
    collection = explorer.library.open().collection
    ids = collection.references_of("cup")
    assert [one["noun"] for one in found["references"]] == ["cup"] * len(ids) == ["cup"] * 9
    vectors = np.asarray(collection.visual[ids], np.float64)
    wanted = {}
    for row, reference in enumerate(ids.tolist()):
        mean = np.delete(vectors, row, axis=0).mean(0)
        cosine = mean @ vectors[row] / np.linalg.norm(mean) / np.linalg.norm(vectors[row])
        wanted[reference] = cosine
    told = {one["id"]: one["agreement"] for one in found["references"]}
    assert told == pytest.approx(wanted, abs=2e-3)
    assert list(told) == sorted(told, key=wanted.get)
    typical = get(explorer, "/api/noun", noun="cup", order="typical", count=3)["references"]
    assert [one["id"] for one in typical] == list(told)[::-1][:3]
    assert len(found["neighbours"]) == 6
    refused(explorer.client.get("/api/noun?noun=zebra"), 422, "no noun 'zebra'")


def test_a_reference_with_its_neighbours_and_the_nouns_of_its_image(explorer):
    found = get(explorer, "/api/reference/5")
    collection = explorer.library.open().collection
    assert found["row"] == json.loads(json.dumps(collection.rows([5])[0]))
    cosines = np.asarray(collection.visual, np.float32) @ np.asarray(
        collection.visual[5], np.float32
    )
    nearest = np.argsort(-cosines)[1:9]
    assert [one["id"] for one in found["neighbours"]] == nearest.tolist()
    assert [one["noun"] for one in found["image"]] == [found["row"]["noun"]]
    refused(explorer.client.get("/api/reference/60"), 422, "no reference 60")


def test_prototypes_come_with_their_nearest_references(explorer):
    found = get(explorer, "/api/prototypes", noun="cup")
    assert found and all(1 <= len(one["references"]) <= 4 for one in found)
    assert all("cup" in one["made_of"] for one in found)
    for noun in ("", "zebra"):
        refused(explorer.client.get(f"/api/prototypes?noun={noun}"), 422, "has no noun")


@pytest.mark.parametrize("layer", ["image", "mask", "heatmap", "crop"])
def test_pictures_are_those_of_the_build(explorer, build_output, layer):
    answer = explorer.client.get(f"/api/picture/5/{layer}?side=64")
    assert answer.headers["content-type"] == "image/webp" and "max-age" in str(answer.headers)
    row = explorer.library.open().collection.rows([5])[0]
    step = open_build(str(build_output)).step("images")
    shard = row["shard"].partition("/")[2]
    (record,) = [r for r in step.read(shard) if r.key == row["key"].partition("#")[0]]
    shown = np.asarray(Image.open(io.BytesIO(answer.content)), np.int16)
    assert shown.shape == (64, 64, 3)
    if layer in ("image", "crop"):
        assert np.abs(shown[32, 32] - record.image_hwc()[4, 4]).max() <= 8


def test_a_collection_alone_has_no_pictures(explorer, build_output, tmp_path):
    shutil.copytree(build_output / "collection", tmp_path / "alone")
    with served(Library(str(tmp_path / "alone"))) as alone:
        assert get(alone, "/api/about")["has_images"] is False
        assert get(alone, "/api/noun", noun="cup")["count"] == 9
        refused(alone.client.get("/api/picture/5/image"), 422, "give it with --build")
        refused(alone.client.get("/api/progress"), 422, "without its build")
    with served(Library(str(tmp_path / "alone"), str(build_output))) as together:
        assert together.client.get("/api/picture/5/image").status_code == 200


def test_a_build_without_its_collection_shows_how_far_it_is(build_output, tmp_path):
    shutil.copytree(build_output, tmp_path / "out", ignore=shutil.ignore_patterns("collection"))
    with served(Library(str(tmp_path / "out"))) as found:
        assert get(found, "/api/about")["collection"] is None
        assert not get(found, "/api/progress")["published"]
        refused(found.client.get("/api/nouns"), 422, "there is no collection yet")
        shutil.copytree(build_output / "collection", tmp_path / "out" / "collection")
        assert get(found, "/api/nouns")["total"] == 7
    with pytest.raises(InputError, match="no output of `ovref build`"):
        Library(str(tmp_path))


def test_coverage_of_a_list_of_classes(explorer, monkeypatch):
    answer = explorer.client.post("/api/coverage", content="Cup, boat")
    assert [(one["name"], one["verdict"], one["count"]) for one in answer.json()["classes"]] == [
        ("Cup", "few", 9), ("boat", "few", 9),
    ]  # fmt: skip
    refused(explorer.client.post("/api/coverage", content=" \n "), 422, "1 to 2000 classes")
    # A class that is no noun needs the collection's own text encoder.
    def missing(self, names):
        raise ModelError("the model fake is not here")

    monkeypatch.setattr(ReferenceCollection, "embed_text", missing)
    refused(explorer.client.post("/api/coverage", content="goblet"), 503, "fake")


def test_a_published_collection_has_its_images(build_output, tmp_path):
    source, there, again = build_output / "collection", tmp_path / "there", tmp_path / "again"
    api.publish(str(source), str(there))
    with served(Library(str(there))) as explorer:
        assert get(explorer, "/api/about")["has_images"]
        wanted = Library(str(build_output)).image(7)
        found = explorer.library.image(7)
        assert np.array_equal(found.image_hwc, wanted.image_hwc) and found.mask_hw.all()
        answer = explorer.client.get("/api/picture/7/mask?side=64")
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/webp"
    api.publish(str(there), str(again))  # without the build: what lies beside it goes with it
    for name in ("pictures-00000.parquet", "pictures.json", "samples.png"):
        assert (again / name).read_bytes() == (there / name).read_bytes()


def test_a_pasted_list_has_synonyms_and_is_measured_when_asked(explorer):
    lists = "Cup; house\nboat\nCup; house"
    quick, full = (
        explorer.client.post(f"/api/coverage{query}", content=lists).json()["classes"]
        for query in ("", "?measured")
    )
    for rows in (quick, full):
        assert {one["name"]: (one["synonyms"], one["count"]) for one in rows} == {
            "Cup": (["house"], 18), "boat": ([], 9),
        }  # fmt: skip
    assert {one["nearest"] for one in quick} == {None}
    assert {one["name"]: one["nearest"] for one in full} == {"Cup": "boat", "boat": "Cup"}
    assert all(0 < one["tightness"] <= 1 and 0 <= one["taken_share"] <= 1 for one in full)


def test_clip_is_asked_about_the_images(explorer, monkeypatch):
    texts = FakeTexts()
    boat_1d = texts.encode(["boat"])
    monkeypatch.setattr(ReferenceCollection, "embed_text", lambda self, names: texts.encode(names))
    monkeypatch.setattr(
        ReferenceCollection, "embed_images", lambda self, images: boat_1d.repeat(len(images), 0)
    )
    answer = explorer.client.post("/api/coverage?measured&clip", content="cup, boat")
    found = {one["name"]: one["clip"] for one in answer.json()["classes"]}
    assert found["boat"] == {"references": 9, "cosine": pytest.approx(1), "first": 1}
    cosine = float(texts.encode(["cup"])[0] @ boat_1d[0])
    assert found["cup"] == {"references": 9, "cosine": pytest.approx(cosine), "first": 0}


def test_references_are_deleted_with_a_reason_and_come_back(build_output, tmp_path):
    shutil.copytree(build_output, tmp_path / "out")
    with served(Library(str(tmp_path / "out"))) as explorer:
        ids = [one["id"] for one in get(explorer, "/api/noun", noun="cup")["references"]][:2]
        fingerprint = get(explorer, "/api/about")["fingerprint"]

        def post(path, json=None, **content):
            known = None if json is None else json | {"fingerprint": fingerprint}
            return explorer.client.post(path, json=known, **content)

        refused(post("/api/tombstones", json={"ids": ids}), 422, "give a reason")
        refused(post("/api/tombstones", json={"ids": [99], "reason": "x"}), 422, "not [99]")
        refused(post("/api/tombstones", content="{"), 422, "expected ids")
        for number in ("1e999", "1.7", "true", '"1"'):
            content = f'{{"ids": [{number}], "reason": "x", "fingerprint": "x"}}'
            refused(post("/api/tombstones", content=content), 422, "expected ids")
        deleted = post("/api/tombstones", json={"ids": ids, "reason": "blurred"})
        assert deleted.json() == {"total": 2}
        assert get(explorer, "/api/noun", noun="cup")["count"] == 7
        listed = get(explorer, "/api/tombstones")
        assert sorted((one["id"], one["reason"]) for one in listed["references"]) == sorted(
            (number, "blurred") for number in ids
        )
        with ReferenceCollection.open(tmp_path / "out" / "collection") as collection:
            assert len(collection) == 58
        assert post("/api/tombstones", json={"ids": ids, "undo": True}).json() == {"total": 0}
        assert get(explorer, "/api/noun", noun="cup")["count"] == 9
        # A reduction with other filters gives the numbers to other references.
        path = tmp_path / "out" / "collection" / "collection.json"
        path.write_text(path.read_text().replace(fingerprint, "f" * 64))
        refused(post("/api/tombstones", json={"ids": ids, "reason": "x"}), 422, "has been rebuilt")
        fingerprint = get(explorer, "/api/about")["fingerprint"]
        assert fingerprint == "f" * 64
        assert post("/api/tombstones", json={"ids": ids, "reason": "x"}).json() == {"total": 2}


def test_the_address_of_the_machine_is_a_name_of_a_server_that_listens_everywhere(explorer):
    port = explorer.client.base_url.port
    with served(explorer.library, hosts=("elsewhere",)) as other:
        answer = other.client.get("/api/about")  # by the address that the request came to
        assert answer.status_code == 200 and port != other.client.base_url.port
        for host in ("localhost", "evil.example", "127.0.0.1"):
            wrong = {"host": f"{host}:{port}"}
            assert other.client.get("/api/about", headers=wrong).status_code == 403


def test_a_collection_on_the_hub_is_shown_and_not_changed(build_output, tmp_path, monkeypatch):
    hub = Hub()
    for name, value in {"ENDPOINT": hub.url, "TOKEN": "hf_test"}.items():
        monkeypatch.setenv(f"HF_{name}", value)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    try:
        publish(str(build_output / "collection"), "hf://me/seen", title="Seen")
        with served(Library("hf://me/seen")) as explorer:
            about = get(explorer, "/api/about")
            assert about["build"] is None and about["counts"]["references"] == 60
            assert get(explorer, "/api/noun", noun="cup")["count"] == 9
            assert get(explorer, "/api/tombstones")["total"] == 0
            deletion = {"ids": [1], "reason": "x", "fingerprint": about["fingerprint"]}
            answer = explorer.client.post("/api/tombstones", json=deletion)
            refused(answer, 422, "not changed where it lies")
    finally:
        hub.close()


def test_what_is_too_large_is_not_read(explorer, monkeypatch):
    monkeypatch.setattr(app, "UPLOAD_BYTES", 1 << 20)
    post, large = explorer.client.post, b" " * (3 << 20)
    files = {"photograph": ("a.jpg", large)}
    refused(post("/api/segment", data={"classes": "cup"}, files=files), 422, "at most 1 MB")
    refused(post("/api/segment", content=iter([b"--x--"])), 422, "at most 1 MB")  # of no length
    refused(post("/api/tombstones", content=large), 422, "is larger than")
    refused(post("/api/coverage", content=large), 422, "is larger than")


@pytest.mark.parametrize(
    ("data", "classes", "methods", "says"),
    [
        (b"no image", "cup", ["fossil"], "image"),
        (b"", "cup", ["fossil"], "no bytes"),
        (None, "cup", ["fossil"], "give a photograph"),
        (b"x", "", ["fossil"], "1 to 2000 classes"),
        (b"x", "cup", [], "at least one method"),
    ],
)
def test_what_cannot_be_segmented_is_explained(explorer, data, classes, methods, says):
    files = None if data is None else {"photograph": ("a.jpg", data)}
    fields = {"classes": classes, "method": methods}
    if files is None:
        files = {"other": ("a.jpg", b"x")}
    refused(explorer.client.post("/api/segment", data=fields, files=files), 422, says)


def test_what_the_filters_left_out_is_counted_and_shown(build_output, tmp_path):
    config = fake_build(tmp_path, captions=60, shard_size=16)
    strict = ReduceSpec(filter=FilterSpec(min_score=0.5, duplicate_cosine=0.2))
    config = dataclasses.replace(config, reduce=strict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "_LazyTexts", FakeTexts)
        recipe.build(config)
    with served(Library(config.output)) as explorer:
        found = get(explorer, "/api/filtered")
        steps = {step["filter"]: step for step in found["steps"]}
        lost = steps["near_duplicate"]["before"] - steps["near_duplicate"]["after"]
        assert steps["score"]["before"] == steps["score"]["after"] == 60 and lost > 0
        shown = found["dropped"]["near_duplicate"]
        assert found["dropped"].keys() == {"near_duplicate"} and len(shown) == min(24, lost)
        assert found["warnings"] == []
        kept = explorer.library.open().collection
        keys = {row["key"] for row in kept.rows(np.arange(len(kept)))}
        assert len(keys) == 60 - lost and not keys & {one["key"] for one in shown}
        answer = explorer.client.get(f"/api/filtered/{shown[0]['row']}/image?side=8")
        assert answer.headers["content-type"] == "image/webp"
        refused(explorer.client.get("/api/filtered/999/image"), 422, "with the number 999")
    with served(Library(f"{config.output}/collection", str(build_output))) as elsewhere:
        assert get(elsewhere, "/api/filtered")["dropped"] is None
