import importlib.util
from pathlib import Path

import pytest
import spacy

from ovref.errors import ModelError
from ovref.models.tagger import MINIATURE, load_tagger

BUNDLED = Path(importlib.util.find_spec("ovref_miniature").origin).parent / "tagger"


def test_the_bundled_tagger_sets_tags_and_has_its_notice():
    nlp = load_tagger()
    assert [token.tag_ for token in nlp("two dogs on a brick wall")] == [
        "CD",
        "NNS",
        "IN",
        "DT",
        "NN",
        "NN",
    ]
    assert nlp.pipe_names == ["tagger"]
    notice = (BUNDLED / "NOTICE.md").read_text()
    assert "CC BY-SA 4.0" in notice
    assert "Permission is hereby granted" in notice  # the MIT licence asks for its text
    assert nlp.meta["license"] == "CC BY-SA 4.0"


def test_the_bundled_tagger_is_small_and_holds_no_pickle():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15e6
    assert not [path for path in files if path.read_bytes().startswith(b"\x80\x04")]


def test_components_that_are_not_needed_are_left_out(tmp_path):
    nlp = load_tagger()
    nlp.add_pipe("entity_ruler", name="ner")
    nlp.to_disk(tmp_path / "model")
    assert load_tagger(str(tmp_path / "model")).pipe_names == ["tagger"]


@pytest.mark.parametrize("name", ["no_such_package", "/no/such/folder"])
def test_a_missing_tagger_says_what_to_install(name):
    with pytest.raises(ModelError, match=rf"{name}.*python -m spacy download en_core_web_sm"):
        load_tagger(name)


def test_without_the_miniature_its_tagger_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install ./pipelines/ovref_miniature"):
        load_tagger()


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    (tmp_path / "meta.json").write_text("{broken")
    (tmp_path / "config.cfg").write_text("[nlp]")
    with pytest.raises(ModelError, match="cannot load the noun tagger"):
        load_tagger(str(tmp_path))


def test_a_pipeline_without_tags_is_refused(tmp_path):
    spacy.blank("en").to_disk(tmp_path)
    with pytest.raises(ModelError, match=r"cannot find nouns.*found the components none"):
        load_tagger(str(tmp_path))


def test_another_version_is_refused():
    version = load_tagger().meta["version"]
    assert load_tagger(MINIATURE, version)
    with pytest.raises(ModelError, match=f"has version {version}, expected 9.9.9"):
        load_tagger(MINIATURE, "9.9.9")


# -- training -----------------------------------------------------------------------------------
