"""The verbs that use a collection, and the examples, over one tiny real build."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import ovref
import ovref_inference
from ovref.errors import ConfigError
from ovref.exchange.class_lists import read_classes
from ovref.exchange.segment_files import NO_LABEL_8
from ovref.miniature.scenes import render
from ovref_inference.segmenters import load
from ovref_inference.segmenters.fossil import FossilConfig
from ovref_pipelines import cli
from ovref_pipelines.verbs import segment

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
CLASSES = "sky;heaven,grass,brick wall,zebra crossing"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three drawn scenes, one in a folder below, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, name in enumerate(("a.png", "b.png", "deep/c.png")):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(render(number, "test").image_hwc).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def run(capsys, *arguments):
    """The exit code, stdout and stderr of a command."""
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_segment(tiny_build, photographs, tmp_path, capsys):
    output = tmp_path / "segments"
    code, out, _ = run(
        capsys, "segment", tiny_build / "collection", photographs, "--classes", CLASSES,
        "--output", output, "--formats", "overlay,labels,coco,panoptic", "--things", "grass",
    )  # fmt: skip
    assert code == 0 and "3 images" in out
    assert "broken.jpg: corrupt_image" in out
    report = json.loads((output / "segment.json").read_text())
    assert list(report["left_out"]) == [str(photographs / "broken.jpg")]
    assert report["classes"] == ["sky", "grass", "brick wall", "zebra crossing"]
    coco = COCO(str(output / "coco.json"))
    panoptic = json.loads((output / "panoptic.json").read_text())
    assert [image["file_name"] for image in panoptic["images"]] == ["a.png", "b.png", "deep/c.png"]
    total = dict.fromkeys(report["classes"], 0)
    for image in panoptic["images"]:
        name = image["file_name"].removesuffix(".png")
        labels_hw = np.asarray(Image.open(output / f"labels/{name}.png"))
        assert Image.open(output / f"overlays/{name}.png").size == labels_hw.shape[::-1] == (64, 64)
        seen_hw = np.full((64, 64), NO_LABEL_8)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
            seen_hw[coco.annToMask(annotation).astype(bool)] = annotation["category_id"] - 1
        assert np.array_equal(seen_hw, labels_hw)
        for label, class_name in enumerate(report["classes"]):
            total[class_name] += int((labels_hw == label).sum())
        assert (output / f"panoptic/{name}.png").is_file()
    assert total == report["pixels"]


def test_settings_of_the_method_are_those_that_fit_with_what_is_asked(tiny_build):
    with ovref_inference.open(tiny_build / "collection") as collection:
        job = segment.Job(
            collection="", output="", classes=read_classes("sky"), settings=("k=3", "gamma=0.25")
        )
        found = segment.method_settings(job, collection)
        fitting = load.fitting(FossilConfig(), collection)
        assert found == dataclasses.replace(fitting, k=3, gamma=0.25) and found.n < FossilConfig().n


@pytest.mark.slow
def test_workers_write_the_same(tiny_build, photographs, tmp_path, capsys):
    for workers in (1, 2):
        code, *_ = run(
            capsys, "segment", tiny_build / "collection", photographs, "--classes", CLASSES,
            "--output", tmp_path / str(workers), "--workers", workers,
        )  # fmt: skip
        assert code == 0
    for path in [*sorted((tmp_path / "1").rglob("*.png")), tmp_path / "1/coco.json"]:
        other = tmp_path / "2" / path.relative_to(tmp_path / "1")
        assert path.read_bytes() == other.read_bytes(), path


def test_segment_refuses_before_it_loads_a_model(tiny_build, photographs, tmp_path, capsys):
    place = tiny_build / "collection"
    for arguments, message in (
        ((place, photographs, "--classes", "none.txt"), "there is no class list none.txt"),
        ((place, photographs, "--classes", "ade151"), "did you mean ade150?"),
        ((place, tmp_path / "x.png", "--classes", "sky"), "there is no image at"),
        ((place, photographs, "--classes", "sky", "--proposer", "sam"), "--proposer must be"),
        ((tmp_path, photographs, "--classes", "sky"), "no reference collection at"),
        ((place, photographs, "--classes", "sky", "--method", "vocseg"), "compares the two"),
        ((place, photographs, "--classes", "sky", "--set", "m=5"), "unknown key m (known here"),
        ((place, photographs, "--classes", "sky", "--set", "k=0"), "k=0"),
        ((place, photographs, "--classes", "sky", "--proposer", "fcclip:x"), "fossil does not ask"),
    ):
        code, _, err = run(capsys, "segment", *arguments, "--output", tmp_path / "out")
        assert code == 2 and message in err, err


def test_search(tiny_build, photographs, tmp_path, capsys):
    place, sheet = tiny_build / "collection", tmp_path / "sheet.png"
    with ovref_inference.open(place) as collection:
        noun = collection.nouns[int(collection.noun_counts.argmax())]
        wanted = collection.search_text(collection.embed_text(["the " + noun]), k=3)
        ids = wanted.ids[0].tolist()
    code, out, err = run(capsys, "search", place, noun, "-k", 3, "--sheet", sheet)
    assert code == 0 and out.count(noun) >= 2 and "3 of 3 references have an image" in err
    assert Image.open(sheet).width > 400
    code, out, _ = run(capsys, "search", place, "the", noun, "-k", 3, "--json")
    found = json.loads(out)["references"]
    assert [row["id"] for row in found] == ids
    assert found[0]["similarity"] == pytest.approx(float(wanted.scores[0, 0]), abs=1e-3)
    picture = photographs / "a.png"
    code, out, _ = run(
        capsys, "search", place, "--image", picture, "--box", "0,0,64,20", "-k", 2, "--json"
    )
    by_box = json.loads(out)["references"]
    mask_hw = np.zeros((64, 64), np.uint8)
    mask_hw[:20] = 255
    Image.fromarray(mask_hw).save(tmp_path / "mask.png")
    code, out, _ = run(
        capsys, "search", place, "--image", picture, "--mask", tmp_path / "mask.png", "-k", 2,
        "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["references"] == by_box
    for arguments, message in (
        (("sky", "--image", picture), "words to search for, or --image, not both"),
        ((" ",), "there is nothing to search for"),
        ((), "there is nothing to search for"),
        (("sky", "--box", "0,0,1,1"), "give --image too"),
        (("--image", picture, "--box", "0,0,65,1"), "must lie in the image of 64 x 64"),
        (("--image", photographs / "broken.jpg"), "is not an image"),
        (("sky", "--sheet", tmp_path / "sheet.jpg"), "sheet.jpg must end in .png"),
    ):
        code, _, err = run(capsys, "search", place, *arguments)
        assert code == 2 and message in err, err


def test_coverage(tiny_build, tmp_path, capsys):
    place, classes = tiny_build / "collection", tmp_path / "classes.txt"
    with ovref_inference.open(place) as collection:
        counts = dict(zip(collection.nouns, collection.noun_counts.tolist(), strict=True))
    first, second, *_ = counts
    classes.write_text(f"{first.upper()}\nthing of no name; {second}\nxqvz korpatsch\n")
    code, out, _ = run(capsys, "coverage", place, "--classes", classes, "--json")
    found = {row["name"]: row for row in json.loads(out)["classes"]}
    assert code == 0 and next(iter(found)) == "xqvz korpatsch"
    assert found[first.upper()]["by_name"] == counts[first]
    assert found["thing of no name"]["by_synonym"] == counts[second]
    assert found[first.upper()]["nearest"] == "thing of no name"
    code, out, _ = run(capsys, "coverage", place, "--classes", classes)
    assert code == 0 and "3 classes: " in out and first.upper() in out
    code, out, _ = run(capsys, "coverage", place, "--classes", classes, "--clip", "--json")
    clip = {row["name"]: row["clip"] for row in json.loads(out)["classes"]}
    assert code == 0 and clip["xqvz korpatsch"] is None
    assert clip[first.upper()]["references"] == min(counts[first], 24)
    assert -1 <= clip[first.upper()]["cosine"] <= 1 and 0 <= clip[first.upper()]["first"] <= 1
    code, _, err = run(capsys, "coverage", place, "--classes", "nothing.txt")
    assert code == 2 and "there is no class list nothing.txt" in err


def test_a_search_by_words_imports_no_torch(tiny_build):
    code = (
        "import sys; from ovref_pipelines.cli import main\n"
        f"assert main(['search', {str(tiny_build / 'collection')!r}, 'some', 'thing']) == 0\n"
        "print([n for n in ('torch', 'scipy', 'matplotlib', 'pydantic') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_publish_export_and_import(tiny_build, tmp_path, capsys):
    published = tmp_path / "published"
    code, out, _ = run(capsys, "publish", tiny_build / "collection", published)
    assert code == 0 and "published at" in out
    with ovref_inference.open(published, verify="full") as collection:
        references, noun = len(collection), collection.nouns[0]
    # The build is not needed any more: pictures come from what was published.
    code, _, err = run(capsys, "search", published, noun, "-k", 2, "--sheet", tmp_path / "s.png")
    assert code == 0 and "2 of 2 references have an image" in err
    for layout in ("prototypes", "segrag", "exemplars", "coco", "corrclip"):
        code, out, err = run(capsys, "export", published, layout, tmp_path / layout)
        assert code == 0 and "written to" in out, err
    code, _, err = run(capsys, "export", published, "coco", tmp_path / "coco")
    assert code == 2 and "is not empty" in err
    models = ("--visual", "miniature:dinov2", "--size", 64, "--text", "miniature:clip")
    code, out, err = run(
        capsys, "import", "corrclip", tmp_path / "corrclip", "--name", "ovref", *models,
        "--classes", "sky,grass,sun", "--output", tmp_path / "imported",
    )  # fmt: skip
    assert code == 0 and f"{references} references of" in out, err
    code, _, err = run(
        capsys, "import", "freeda", tmp_path, tmp_path, *models, "--output", tmp_path / "x"
    )
    assert code == 2 and "give their names with --classes" in err


def test_settings_in_python_are_as_strict_as_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key corpus\.limits"):
        ovref.build("miniature", {"output": tmp_path, "corpus": {"limits": 3}})
    with pytest.raises(ConfigError, match="there is no such file"):
        ovref.build("minature", {"output": tmp_path})
    with pytest.raises(ConfigError, match="scenes"):
        ovref.evaluate({"collection": "x", "output": str(tmp_path), "scenes": "many"})
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("ovref.evaluation.evaluate.evaluate", lambda spec, *rest: seen.append(spec))
        ovref.evaluate({"collection": "x", "output": "o", "dataset": "voc21", "root": "r"})
        ovref.evaluate({"method": "knn", "output": "o"})
    assert (seen[0].root, seen[0].collection) == (str(tmp_path / "r"), str(tmp_path / "x"))
    assert seen[1].collection == ""
    with pytest.raises(AttributeError, match="no attribute 'built'"):
        ovref.built  # noqa: B018


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.mark.filterwarnings("ignore:.* has no references for")  # a dozen captions name few classes
@pytest.mark.filterwarnings("ignore:OpenCV")
def test_examples_of_use(tiny_build, photographs, tmp_path, capsys):
    place = str(tiny_build / "collection")
    found = example("segment_photographs")(place, [str(photographs / "a.png")])
    assert len(found[0]) and "a.png" in capsys.readouterr().out
    labels_hw = example("own_vectors")(str(tmp_path / "colours"))
    assert set(labels_hw[:28].ravel()) == {0} and set(labels_hw[36:].ravel()) == {1}
    scores, frozen = example("own_model")(place)
    assert scores.shape == (2, 3, 8, 8) and frozen.shape == (1, 3, 64, 64)


def test_the_example_that_builds(tiny_build, monkeypatch):
    """The build is there already; what is tried is the example's settings and the evaluation."""
    seen = {}

    def build(config, settings):
        seen.update(settings, config=config)

        class Summary:
            collection_url = str(tiny_build / "collection")

        return Summary

    monkeypatch.setattr(ovref, "build", build, raising=False)
    found = example("build_and_evaluate")(str(tiny_build), limit=12, scenes=2)
    assert seen["config"] == "miniature" and seen["corpus.limit"] == 12
    assert found["rows"][0]["name"] == "FOSSIL"
