"""The README's Python runs as it is written there, in the order in which it stands."""

import re
from pathlib import Path

import pytest
from PIL import Image

from paper_tables.datasets import miniature_scenes

README = Path(__file__).resolve().parents[3] / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def demo(collection_url, tmp_path, monkeypatch):
    """A folder as `make demo` leaves it, and a photograph."""
    runs = tmp_path / "runs" / "demo"
    runs.mkdir(parents=True)
    (runs / "collection").symlink_to(collection_url)
    Image.fromarray(miniature_scenes("validation", 1).images[0]).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)


def test_a_collection_is_asked(demo, capsys):
    found = {}
    exec(compile(SNIPPETS[0], "README.md", "exec"), found)
    assert found["prototypes"].counts.all() and (found["support"].ids[:, 0] == [0, 1, 2]).all()
    assert capsys.readouterr().out.strip()


def test_an_image_is_segmented(demo):
    assert len(SNIPPETS) == 2
    found = {}
    exec(compile(SNIPPETS[1], "README.md", "exec"), found)
    assert found["labels_hw"].shape == found["image_hwc"].shape[:2]
    assert set(found["labels_hw"].ravel()) <= {0, 1, 2}
    found["segmenter"].collection.close()
