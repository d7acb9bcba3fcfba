"""Folders of Hugging Face datasets, as `save_to_disk` and as Parquet files."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ovref.errors import InputError
from ovref.evaluation.named_sets.huggingface import open_any_set, open_huggingface


def encoded(pixels, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def maps(rng):
    return [rng.integers(0, 151, (7, 5 + number)).astype(np.uint8) for number in range(7)]


@pytest.fixture
def table(maps):
    """Columns as of scene_parse_150."""
    images = [encoded(np.zeros((*values.shape, 3), np.uint8), "JPEG") for values in maps]
    return pa.table(
        {
            "image": [{"bytes": file, "path": f"{i}.jpg"} for i, file in enumerate(images)],
            "annotation": [{"bytes": encoded(values), "path": None} for values in maps],
            "scene_category": list(range(7)),
        }
    )


def save_to_disk(folder, table, **state):
    folder.mkdir(parents=True)
    names = []
    for number, part in enumerate((table.slice(0, 4), table.slice(4))):
        names.append(f"data-{number:05d}-of-00002.arrow")
        with pa.ipc.new_stream(str(folder / names[-1]), table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    content = {"_data_files": [{"filename": name} for name in names], **state}
    (folder / "state.json").write_text(json.dumps(content))


def check(data, maps):
    assert data.ids == tuple(str(number) for number in range(7)) and len(data.class_names) == 150
    for example, values_hw in zip(data, maps, strict=True):
        expected_hw = [[-1 if v == 0 else v - 1 for v in row] for row in values_hw.tolist()]
        np.testing.assert_array_equal(example.label_hw, expected_hw)
        assert example.image_hwc.shape == (*values_hw.shape, 3)
    np.testing.assert_array_equal(data.read("2").label_hw, [*data][2].label_hw)


@pytest.mark.parametrize("below", ["", "validation"])
def test_arrow_files(tmp_path, maps, table, below):
    save_to_disk(tmp_path / "saved" / below, table)
    check(open_huggingface(tmp_path / "saved", "validation", "ade150"), maps)


@pytest.mark.parametrize("below", ["", "data"])
def test_parquet_files(tmp_path, maps, table, below):
    (tmp_path / below).mkdir(exist_ok=True)
    for number, part in enumerate((table.slice(0, 5), table.slice(5))):
        path = tmp_path / below / f"validation-{number:05d}-of-00002.parquet"
        pq.write_table(part, path, row_group_size=2)
    check(open_huggingface(tmp_path, "validation", "ade150"), maps)


def test_files_beside_the_table(tmp_path, maps, table):
    (tmp_path / "1.png").write_bytes(encoded(maps[1]))
    cells = table["annotation"].to_pylist()
    cells[1] = {"bytes": None, "path": "1.png"}
    save_to_disk(tmp_path / "validation", table.set_column(1, "annotation", pa.array(cells)))
    check(open_huggingface(tmp_path, "validation", "ade150"), maps)


def test_what_does_not_fit_is_refused(tmp_path, table):
    save_to_disk(tmp_path / "validation", table)
    with pytest.raises(InputError, match=r"no split 'val'.*searched for val/state\.json"):
        open_huggingface(tmp_path, "val", "ade150")
    save_to_disk(tmp_path / "unlabelled", table.drop_columns(["annotation"]))
    with pytest.raises(InputError, match="no column 'annotation', only image, scene"):
        open_huggingface(tmp_path, "unlabelled", "ade150")
    with pytest.raises(InputError, match=r"name must be one of .*, found 'ade'"):
        open_huggingface(tmp_path, "validation", "ade")
    with pytest.raises(InputError, match=r"holds the values .*look like ADE20k's 150 ids"):
        list(open_huggingface(tmp_path, "validation", "voc21"))
    words = table.set_column(1, "annotation", table["scene_category"])
    save_to_disk(tmp_path / "words", words)
    with pytest.raises(InputError, match="holds no image file"):
        list(open_huggingface(tmp_path, "words", "ade150"))
    save_to_disk(tmp_path / "chosen", table, _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(InputError, match="flatten_indices"):
        open_huggingface(tmp_path, "chosen", "ade150")


def test_damaged_files_are_named(tmp_path, table):
    save_to_disk(tmp_path / "validation", table)
    (tmp_path / "validation/data-00001-of-00002.arrow").write_bytes(b"ARROW")
    with pytest.raises(InputError, match="cannot read the data set"):
        open_huggingface(tmp_path, "validation", "ade150")


@pytest.mark.parametrize("saved", ["validation", "val"])
def test_a_set_is_found_as_published_or_as_hugging_face_saves_it(tmp_path, maps, table, saved):
    save_to_disk(tmp_path / "saved" / saved, table)
    check(open_any_set("ade150", tmp_path / "saved"), maps)
    with pytest.raises(InputError, match="does not contain ade150, split train"):
        open_any_set("ade150", tmp_path / "saved", "train")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {number}" for number in range(150)))
    assert open_any_set("ade150", tmp_path / "saved", names=str(names)).class_names[3] == "class 3"
