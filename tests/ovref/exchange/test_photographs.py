"""Where photographs are found: files, folders, patterns, object stores."""

import io

import numpy as np
import pytest
from PIL import Image

from ovref.errors import InputError
from ovref.exchange.photographs import find_photographs


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "deep/b.jpg", "deep/c.PNG", "deep/notes.txt", ".hidden/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2), (9, 8, 7)).save(path, "png")
    return tmp_path


def test_files_folders_and_patterns(folder):
    found = find_photographs([str(folder)])
    assert [one.file_name for one in found] == ["a.png", "deep/b.jpg", "deep/c.PNG"]
    assert [one.name for one in found] == ["a", "deep/b", "deep/c"]
    assert found[0].image_hwc().tolist() == [[[9, 8, 7]] * 3] * 2
    assert [one.name for one in find_photographs([f"{folder}/*/*.jpg"])] == ["deep/b"]
    both = find_photographs([f"{folder}/a.png", f"{folder}/a.png"])
    assert [one.file_name for one in both] == ["a.png"]


def test_a_bucket(s3_environment):
    import s3fs

    file = io.BytesIO()
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(file, "png")
    s3fs.S3FileSystem().pipe("bucket/photographs/x/one.png", file.getvalue())
    (found,) = find_photographs(["s3://bucket/photographs"])
    assert found.name == "x/one" and found.image_hwc().shape == (2, 2, 3)


def test_what_is_not_there_or_has_one_name(folder):
    with pytest.raises(InputError, match=r"there is no image at .*none: expected a file"):
        find_photographs([f"{folder}/none"])
    (folder / "deep" / "a.png").write_bytes((folder / "a.png").read_bytes())
    with pytest.raises(InputError, match="would both be written as a"):
        find_photographs([f"{folder}/a.png", f"{folder}/deep/a.png"])
    (folder / "a.jpg").write_bytes((folder / "a.png").read_bytes())
    with pytest.raises(InputError, match="written as a: rename one, or segment"):
        find_photographs([str(folder)])
