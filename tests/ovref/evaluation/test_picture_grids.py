"""Pictures are PNG files within their limit, and their overlays are correct."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ovref.evaluation import picture_grids
from ovref.evaluation.picture_grids import (
    MAX_BYTES,
    class_palette,
    generation_grid,
    mask_overlay,
    prediction_grid,
    save_png,
)
from ovref.records import NO, UNSURE, YES, ImageRecord, Noun, Region


def record(nouns=2, heatmaps=True, caption="a cat and a $dog$"):
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (16, 24, 3)).astype(np.uint8)).save(buffer, "png")
    mask_hw = rng.choice([NO, UNSURE, YES], size=(16, 24)).astype(np.uint8)
    noun = Noun(text="cat", start=2, end=5)
    return ImageRecord(
        key="k",
        caption=caption,
        source="here",
        image=buffer.getvalue(),
        regions=(Region(noun=noun, mask_hw=mask_hw, score=0.5, source="daam"),) * nouns,
        heatmaps_nhw=rng.random((nouns, 4, 6)).astype(np.float16) if heatmaps else None,
    )


def test_generation_grid_is_a_png_with_a_row_for_each_record(tmp_path):
    generation_grid([record()], tmp_path / "one.png")
    generation_grid([record(), record(1, heatmaps=False)], tmp_path / "two.png", max_nouns=2)
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.format == "PNG" and one.width == two.width and two.height > one.height
    assert (tmp_path / "two.png").stat().st_size <= MAX_BYTES


def test_a_grid_without_heatmaps_has_one_cell_a_noun(tmp_path):
    generation_grid([record(3)], tmp_path / "with.png")
    generation_grid([record(3, heatmaps=False)], tmp_path / "without.png")
    with Image.open(tmp_path / "with.png") as one, Image.open(tmp_path / "without.png") as two:
        assert two.width / one.width == pytest.approx(4 / 7, abs=0.1)


def test_prediction_grid_shows_truth_and_predictions_in_the_same_colours(tmp_path):
    image = np.full((8, 8, 3), 128, np.uint8)
    label = np.array([[0] * 8] * 4 + [[1] * 8] * 4)
    path = tmp_path / "grid.png"
    prediction_grid([image], {"truth": [label], "FOSSIL": [label]}, ("grass", "sky"), path)
    with Image.open(path) as picture:
        colours = {rgb for _, rgb in picture.convert("RGB").getcolors(1 << 20)}
    for rgb in class_palette(2)[:2]:
        assert tuple(int(v) for v in rgb) in colours


def test_the_legend_names_pixels_without_a_class(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(picture_grids, "save_png", lambda figure, path: drawn.append(figure))
    image = np.full((4, 4, 3), 128, np.uint8)
    for label in (np.zeros((4, 4), int), np.array([[0, 0, 255, 255]] * 4)):
        prediction_grid([image], {"FOSSIL": [label]}, ("grass",), tmp_path / "x.png")
    named = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn]
    assert named == [["grass"], ["grass", "no class"]]


def test_pixels_without_a_true_class_are_not_judged(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(picture_grids, "save_png", lambda figure, path: drawn.append(figure))
    image = np.full((2, 4, 3), 128, np.uint8)
    columns = {
        "truth": [np.array([[0, 0, 255, 255]] * 2), np.full((2, 4), 255)],
        "FOSSIL": [np.array([[0, 1, 0, 1]] * 2), np.zeros((2, 4), int)],
    }
    prediction_grid([image] * 2, columns, ("grass", "sky"), tmp_path / "x.png")
    said = [text.get_text() for text in drawn[0].texts if "right" in text.get_text()]
    assert said == ["50% of pixels right"]


def test_grids_refuse_nothing_and_columns_of_another_length(tmp_path):
    with pytest.raises(ValueError, match="at least one record"):
        generation_grid([], tmp_path / "x.png")
    label = np.zeros((4, 4), int)
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"each of 1 images, found \{'FOSSIL': 2\}"):
        prediction_grid([image], {"FOSSIL": [label] * 2}, ("a",), tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_picture_over_the_limit_loses_colours_and_then_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_grids, "MAX_BYTES", 20_000)
    figure = Figure(figsize=(3, 3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.random.default_rng(0).random((200, 200, 3)))
    save_png(figure, tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size <= 20_000
    with Image.open(tmp_path / "noise.png") as picture:
        assert picture.width < 300


def test_mask_overlay_brightens_yes_over_unsure_over_no():
    image = np.full((1, 3, 3), 100, np.uint8)
    result = mask_overlay(image, np.array([[NO, UNSURE, YES]], np.uint8))
    assert result[0, 0].tolist() == [30, 30, 30]
    assert result[0, 1, 0] > result[0, 1, 2]  # amber
    assert result[0, 2, 1] > max(result[0, 2, 0], result[0, 2, 2])  # green


def test_palette_has_distinct_colours_and_white_at_the_end():
    palette = class_palette(27)
    assert len({tuple(rgb) for rgb in palette.tolist()}) == 28 and palette[-1].tolist() == [255] * 3
