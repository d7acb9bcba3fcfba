"""Picture grids: generated images with their heatmaps and masks, and predicted label maps.

Every function draws one PNG of at most `MAX_BYTES`.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ovref.ops.overlays import heated
from ovref.ops.palette import class_palette
from ovref.records import UNSURE, YES, ImageRecord

MAX_BYTES = 400_000
"""Maximum size of a PNG; if it is larger, colours are reduced to a palette of at most 256."""

YES_RGB, UNSURE_RGB = np.array([66, 214, 110]), np.array([250, 190, 60])
INK, MUTED = "#1c1c1c", "#6b6b6b"
CELL = 1.45
"""Side of one picture in a grid, in inches."""


def generation_grid(records: Sequence[ImageRecord], path: str | Path, max_nouns: int = 3) -> None:
    """Draws images with the heatmaps and masks of their nouns, one row per record.

    Each noun takes two cells: its heatmap over the image, and its tri-state mask (green: yes,
    amber: unsure, dimmed: no) with its score. If no record has heatmaps, it takes one, its mask.

    Args:
        records: records with at least one region each.
        path: path of the PNG.
        max_nouns: maximum number of regions drawn per record.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("generation_grid needs at least one record, found none")
    nouns = min(max_nouns, max(len(record.regions) for record in records))
    heading, row_height = 0.3, CELL + 0.5
    heatmaps = any(record.heatmaps_nhw is not None for record in records)
    cells = 1 + heatmaps  # of a noun
    # Wide enough for the heading.
    width = max(CELL * 1.08 * (1 + cells * nouns), 3.2 * CELL)
    figure = Figure(figsize=(width, heading + row_height * len(records)))
    top = figure.get_figheight() - heading
    figure.text(
        0.01, 1 - 0.5 * heading / figure.get_figheight(),
        f"image, then for each noun {'its heatmap and ' if heatmaps else ''}its mask "
        "with its score (green: yes, amber: unsure)",
        fontsize=8.5, color=MUTED, va="center",
    )  # fmt: skip
    for row, record in enumerate(records):
        image_hwc = record.image_hwc()
        base = top - row * row_height
        figure.text(
            0.01, (base - 0.13) / figure.get_figheight(), record.caption, fontsize=8.5, color=INK,
            va="center", style="italic", parse_math=False,
        )  # fmt: skip
        _cell(figure, 0, base - 0.24, image_hwc, "")
        for index, region in enumerate(record.regions[:nouns]):
            if record.heatmaps_nhw is not None:
                overlay = heated(image_hwc, record.heatmaps_nhw[index])
                _cell(figure, 1 + cells * index, base - 0.24, overlay, region.noun.text)
            title = f"{region.noun.text} {region.score:.2f}"
            overlay = mask_overlay(image_hwc, region.mask_hw)
            _cell(figure, cells * (1 + index), base - 0.24, overlay, title)
    save_png(figure, path)


def prediction_grid(
    images: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[np.ndarray]],
    classes: Sequence[str],
    path: str | Path,
    colours: Mapping[str, tuple[int, int, int]] | None = None,
) -> None:
    """Draws images beside their label maps in class colours, with a legend.

    Below each predicted map is the share of correct pixels among those with a true class.

    Args:
        images: (H, W, 3) uint8.
        columns: name -> one (H, W) integer label map per image. Labels outside [0, classes) are
            drawn white. `truth` has the true maps.
        classes: class names by label.
        path: path of the PNG.
        colours: sRGB in [0, 255] of some classes; the others get those of `class_palette`.

    Raises:
        ValueError: there are no images, or a column has another length.
    """
    wrong = {name: len(maps) for name, maps in columns.items() if len(maps) != len(images)}
    if not images or wrong:
        raise ValueError(f"expected one map for each of {len(images)} images, found {wrong}")
    palette = class_palette(len(classes))
    for name, colour in (colours or {}).items():
        palette[classes.index(name)] = colour
    shown = sorted({int(v) for maps in columns.values() for m in maps for v in np.unique(m)})
    nameless = any(not 0 <= label < len(classes) for label in shown)
    shown = [label for label in shown if 0 <= label < len(classes)]
    width = CELL * 1.08 * (1 + len(columns))
    per_row = max(1, int(width / 1.25))
    legend = 0.22 * -(-(len(shown) + nameless) // per_row) + 0.15
    heading, row_height = 0.42, CELL + 0.24
    figure = Figure(figsize=(width, heading + row_height * len(images) + legend))
    height = figure.get_figheight()
    for column, name in enumerate(("image", *columns)):
        figure.text(
            (column * CELL * 1.08 + 0.08) / width, 1 - (heading - 0.06) / height,
            textwrap.fill(name, 18), fontsize=8, color=INK, va="bottom", weight="bold",
        )  # fmt: skip
    for row, image_hwc in enumerate(images):
        base = height - heading - row * row_height
        _cell(figure, 0, base, image_hwc, "")
        for column, (name, maps) in enumerate(columns.items(), start=1):
            label_hw = np.where(maps[row] < 0, len(classes), maps[row])
            coloured = palette[np.minimum(label_hw, len(classes))]
            text = ""
            if "truth" in columns and name != "truth":
                truth_hw = columns["truth"][row]
                right = (maps[row] == truth_hw)[(truth_hw >= 0) & (truth_hw < len(classes))]
                text = f"{right.mean():.0%} of pixels right" if len(right) else ""
            _cell(figure, column, base, coloured, text)
    patches = [Patch(facecolor=palette[label] / 255, label=classes[label]) for label in shown]
    if nameless:
        patches.append(Patch(facecolor="white", edgecolor=MUTED, label="no class"))
    figure.legend(
        handles=patches, loc="lower left", ncols=per_row, fontsize=7.5, frameon=False,
        handlelength=1, handleheight=1, columnspacing=1, bbox_to_anchor=(0, 0),
    )  # fmt: skip
    save_png(figure, path)


def mask_overlay(image_hwc: np.ndarray, mask_hw: np.ndarray) -> np.ndarray:
    """A tri-state mask over its image: YES green, UNSURE amber, NO dimmed; (H, W, 3) uint8."""
    result = image_hwc * 0.3
    for value, colour, weight in ((YES, YES_RGB, 0.35), (UNSURE, UNSURE_RGB, 0.5)):
        where = mask_hw == value
        result[where] = image_hwc[where] * (1 - weight) + colour * weight
    return result.round().astype(np.uint8)


def save_png(figure: Figure, path: str | Path) -> None:
    """Writes a figure as a PNG of at most MAX_BYTES, reducing colours if necessary."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())
    encoded = _png(image)
    if len(encoded) > MAX_BYTES:
        encoded = _png(image.quantize(256, dither=Image.Dither.NONE))
    while len(encoded) > MAX_BYTES:
        image = image.resize(
            (image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.LANCZOS
        )
        encoded = _png(image.quantize(256, dither=Image.Dither.NONE))
    Path(path).write_bytes(encoded)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _cell(figure: Figure, column: int, top: float, image_hwc: np.ndarray, below: str) -> None:
    """Draws a square picture with a line of text below; `top` in inches from the figure's
    bottom."""
    width, height = figure.get_size_inches()
    left = column * CELL * 1.08 + 0.08
    axes = figure.add_axes((left / width, (top - CELL) / height, CELL / width, CELL / height))
    axes.imshow(image_hwc, interpolation="nearest")
    axes.set_axis_off()
    if below:
        figure.text(
            left / width, (top - CELL - 0.1) / height, below, fontsize=7.5, color=INK,
            va="center", parse_math=False,
        )  # fmt: skip
