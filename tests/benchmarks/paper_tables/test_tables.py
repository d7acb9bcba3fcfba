"""All tables from small collections: parameters from validation, parts kept, orderings explained.

Proposals of trained models are true masks here, with the classes of a proposer that is half sure.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovref.config import dump, load, parse
from ovref.errors import ConfigError
from ovref.miniature.shapes import CLASSES, UNSEEN
from ovref_inference.proposers.config import GroundingDinoConfig, MaskFormerConfig
from ovref_inference.proposers.proposals import Proposals
from paper_tables import tables
from paper_tables.datasets import miniature_scenes
from paper_tables.parts import Parts
from paper_tables.published import TABLES
from paper_tables.spec import Proposers, Segmenters, TablesSpec
from paper_tables.tables import choose, make_tables

RECIPE = Path(__file__).parents[3] / "configs" / "miniature_tables.yaml"
SEEN = tuple(name for name in CLASSES if name not in UNSEEN)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """True masks for models that take long, and few values to choose from."""
    load = Parts._load_proposer

    def proposer(self, name):
        if name in ("none", "opencut"):
            return load(self, name)
        masks = load(self, "truth")
        return masks if name != "trained" else lambda images: list(map(half_sure, masks(images)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "_load_proposer", proposer)
        patch.setattr(
            tables,
            "OPTIONS",
            {
                "fossil": {"n": (4,)},
                "freeda": {"n": (4,)},
                "corrclip": {"support": (0.0, 1.0)},
                "vocseg": {"alpha": (0.0, 0.5)},
                "retclip": {"gamma": (0.0, 0.5), "k": (3,), "tau": (0.02,), "alpha": (1.0,),
                            "beta": (0.7,)},
            },
        )  # fmt: skip
        yield


def half_sure(masks_nhw):
    trained = np.full((len(masks_nhw), len(SEEN) + 1), 0.5 / len(SEEN), np.float32)
    trained[:, -1] = 0.5
    return Proposals(
        mask_probs_nhw=masks_nhw.astype(np.float32), class_probs_nc=trained, trained_names=SEEN
    )


@pytest.fixture(scope="module")
def spec(table_collections, tmp_path_factory):
    return TablesSpec(
        output=str(tmp_path_factory.mktemp("tables") / "new"),
        collections=table_collections,
        # Never loaded here, see `quick`.
        proposers=Proposers(
            mask_former=MaskFormerConfig(model="none"), detector=GroundingDinoConfig(model="none")
        ),
        scenes=3,
        tuning_scenes=2,
        pictures=2,
    )


@pytest.fixture(scope="module")
def messages():
    return []


@pytest.fixture(scope="module")
def document(spec, messages):
    return make_tables(spec, messages.append, device="cpu")


def test_every_table_is_there_with_every_row(document):
    assert [item["key"] for item in document["tables"]] == list(TABLES)
    for item in document["tables"]:
        assert len(item["rows"]) > 2
        for row in item["rows"]:
            assert row["miou" if "miou" in row else "hiou"] is not None, (item["key"], row)
    keys = [one["key"] for item in document["tables"] for one in item["orderings"]]
    assert len(keys) == len(set(keys)) > 15


def test_files_agree_with_the_result(document, spec):
    with open(f"{spec.output}/tables.json") as file:
        assert json.load(file) == document
    with open(f"{spec.output}/tables.md") as file:
        page = file.read()
    assert "nothing about the real models" in page and "chosen on 2 validation scenes" in page
    for item in document["tables"]:
        assert f"## {item['title']}" in page
    with Image.open(f"{spec.output}/segmenters.png") as picture:
        assert picture.format == "PNG"


def test_the_same_setting_has_the_same_numbers_in_every_table(document):
    rows = {item["key"]: {r["name"]: r for r in item["rows"]} for item in document["tables"]}
    same = rows["vocseg_ensemble"]["ensemble"]["miou"]
    assert rows["vocseg_masking"]["binary"]["miou"] == same
    assert rows["segmenters"]["VOCSeg"]["miou"] == same == rows["unseen"]["VOCSeg"]["miou"]
    same = rows["retclip_parts"]["both"]["pq"]
    assert rows["retclip_proposals"]["GroundingDINO + SAM"]["pq"] == same
    assert rows["segmenters"]["RetCLIP, training-free"]["pq"] == same


def test_only_rows_with_trained_classes_have_a_harmonic_mean(document):
    rows = document["tables"][0]["rows"]
    assert [r["name"] for r in rows if r["hiou"] is not None] == [
        "VOCSeg",
        "RetCLIP, trained proposer",
    ]


def test_what_is_done_is_not_done_again(document, spec, messages):
    messages.clear()
    changed = replace(spec, reasons={"vocseg_k": "Only here."})
    again = make_tables(changed, messages.append, device="cpu")
    assert messages == [f"{name}: as before" for name in ("chosen", *TABLES, "pictures")]
    assert again["tables"] == document["tables"]
    page = Path(spec.output, "tables.md").read_text()
    one = next(t for t in again["tables"] if t["key"] == "vocseg_k")["orderings"][0]
    assert ("Only here." in page) == (one["verdict"] != "as in the paper")


def test_a_part_is_done_again_when_its_identity_has_changed(tmp_path):
    done = []

    def once(identity):
        made = tables._once(
            tmp_path / "part.json",
            identity,
            lambda: {"of": done.append(identity) or identity},
            lambda line: None,
        )
        return made["of"]

    assert [once(scenes) for scenes in (1, 1, 2, 2, 1)] == [1, 1, 2, 2, 1]
    assert done == [1, 2, 1]


def test_parts_depend_on_collections_and_parameters(spec, collection_url, clip_collections):
    def identity(spec):
        with Parts(spec, [], device="cpu") as parts:
            return tables._identity(spec, parts)

    own = identity(spec)
    assert own == identity(replace(spec, output="elsewhere", reasons={"a": "b"}, pictures=0))
    assert "miniature:clip" in own[2] and len(own[2]["miniature:sam"]) == 64
    others = replace(spec.collections, vocseg_none=clip_collections["crop_binary"])
    assert own != identity(replace(spec, collections=others))
    assert own != identity(replace(spec, tuning_scenes=3))


def test_parameters_come_from_the_values_offered_and_are_no_worse(spec):
    data = miniature_scenes("validation", 2)
    with Parts(spec, [data], device="cpu") as parts:
        start = spec.segmenters
        found = choose(parts, data)

        def miou(config):
            return tables.single_metric(data, parts.vocseg(data, config, "trained"), "miou")

        assert miou(found.vocseg) >= miou(start.vocseg)
    assert found.vocseg.alpha in (0.0, 0.5, start.vocseg.alpha)
    assert found.vocseg.beta == start.vocseg.beta  # not among the options
    assert parse(Segmenters, dump(found)) == found


def test_the_recipe_is_valid_and_mistakes_are_refused(spec):
    recipe = load(TablesSpec, RECIPE)
    assert recipe.scenes >= 60 and recipe.tuning_scenes > 0
    assert parse(TablesSpec, dump(spec)) == spec
    with pytest.raises(ConfigError, match="scenes must be at least 1"):
        parse(TablesSpec, dump(spec) | {"scenes": 0})
    windows = {"fossil": {"windows": {}}}
    with pytest.raises(ConfigError, match=r"fossil\.windows must be null"):
        parse(TablesSpec, dump(spec) | {"segmenters": windows})


def test_reasons_are_of_orderings_that_there_are(document):
    keys = {one["key"] for item in document["tables"] for one in item["orderings"]}
    assert set(load(TablesSpec, RECIPE).reasons) <= keys
