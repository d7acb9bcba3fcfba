"""Captioned scenes with exact masks: the whole data set of the miniature world.

A scene is an upper stuff over a lower one (or one stuff alone) with one or two groups of things.
It is a pure function of (split, seed, options). A combination (thing, colour, stuff it stands on)
belongs to one split for ever, so validation and test show only combinations that training never
saw.

    scene = render(seed=3, split="train")
    scene.image_hwc, scene.label_hw, scene.caption, scene.nouns
"""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ovref.miniature.captions import CaptionNoun, Group, Layout, caption_of, draw_rng
from ovref.miniature.shapes import (
    ACCENTS,
    CLASSES,
    COLOURS,
    LOWER,
    PARTS,
    STUFF,
    STUFF_COLOURS,
    THINGS,
    UPPER,
)

SPLITS = ("train", "validation", "test")
SUPERSAMPLING = 4


@dataclass(frozen=True, eq=False)
class Scene:
    """One drawn scene. Arrays are read by pixel row, then column."""

    image_hwc: np.ndarray
    """uint8 RGB, (size, size, 3), in [0, 255]."""
    label_hw: np.ndarray
    """uint8 class ids (positions in `shapes.CLASSES`), (size, size); every pixel has a class."""
    instance_hw: np.ndarray
    """uint8, (size, size): 0 for stuff, 1.. for single things in drawing order."""
    caption: str
    nouns: tuple[CaptionNoun, ...]
    """Classes named in the caption, in order; each is visible in the scene."""
    layout: Layout


@functools.cache
def combinations(split):
    """Allowed (colour, ground) pairs of every thing in a split: {thing: tuple of pairs}.

    Every thing's pairs are ordered by a hash; of ten, the first eight belong to train, the next to
    validation, the last to test. So each split shows every thing, and no pair is in two splits.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    pairs = [(colour, ground) for colour in COLOURS for ground in STUFF]
    start, stop = {"train": (0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1)}[split]
    chosen = slice(round(start * len(pairs)), round(stop * len(pairs)))
    return {
        thing: tuple(
            sorted(pairs, key=lambda p: hashlib.sha256("|".join((thing, *p)).encode()).digest())
        )[chosen]
        for thing in THINGS
    }


def _pick(rng, sequence):
    return sequence[int(rng.integers(len(sequence)))]


def draw_layout(rng, split, pair_share=0.35, plural_share=0.12, empty_share=0.03):
    """What a scene of `split` shows. Shares are probabilities in [0, 1] of that kind of scene."""
    allowed = combinations(split)
    kind = rng.random()
    if kind < empty_share:
        upper = _pick(rng, UPPER) if rng.random() < 0.6 else None
        lower = _pick(rng, LOWER) if upper else _pick(rng, STUFF)
        groups, arrangement = (), "empty"
    else:
        thing = _pick(rng, THINGS)
        colour, ground = _pick(rng, allowed[thing])
        layered = rng.random() < 0.75
        if ground in UPPER:
            upper, lower = (ground, _pick(rng, LOWER)) if layered else (None, ground)
        else:
            upper, lower = (_pick(rng, UPPER) if layered else None), ground
        plural = kind < empty_share + plural_share
        count = int(rng.integers(2, 4)) if plural else 1
        groups, arrangement = (Group(thing, colour, count, ground),), "single"
        if kind > 1 - pair_share:
            groups, arrangement = _add_second(rng, allowed, groups[0], upper, lower)
    return Layout(
        upper=upper,
        upper_colour=_pick(rng, tuple(STUFF_COLOURS[upper])) if upper else None,
        lower=lower,
        lower_colour=_pick(rng, tuple(STUFF_COLOURS[lower])),
        groups=groups,
        arrangement=arrangement,
    )


def _add_second(rng, allowed, group, upper, lower):
    """A second group that the split allows, beside the first or on the other stuff."""
    other = {upper: lower, lower: upper}.get(group.ground) if upper else None
    ground = other if other and rng.random() < 0.4 else group.ground
    for _ in range(50):
        thing = _pick(rng, THINGS)
        colours = [c for c, g in allowed[thing] if g == ground]
        if thing != group.thing and colours:
            break
    else:
        return (group,), "single"
    second = Group(thing, _pick(rng, colours), 1, ground)
    if ground == group.ground:
        return ((group, second) if rng.random() < 0.5 else (second, group)), "beside"
    return ((group, second) if group.ground == upper else (second, group)), "above"


@functools.lru_cache(maxsize=20_000)
def _sprite(thing, colour, size, mirrored):
    """A thing drawn alone, trimmed to its pixels.

    Returns:
        (rgb float32 (h, w, 3) in [0, 255], alpha float32 (h, w) in [0, 1]); a dark rim included.
    """
    side = size * SUPERSAMPLING
    main = np.array(COLOURS[colour], float)
    paint = {"main": main, "dark": main * 0.62, "light": main + (255 - main) * 0.5}
    paint |= {role: np.array(rgb, float) for role, rgb in ACCENTS.items()}
    rgb, alpha = Image.new("RGB", (side, side)), Image.new("L", (side, side))
    pen_rgb, pen_alpha = ImageDraw.Draw(rgb), ImageDraw.Draw(alpha)
    # A margin keeps the rim inside the square.
    scale, margin = side * 0.92, side * 0.04
    for kind, role, coordinates in PARTS[thing]:
        points = np.array(coordinates, float).reshape(-1, 2) * scale + margin
        flat = [tuple(p) for p in points]
        opacity = 0 if role == "cut" else 255
        fill = tuple(int(v) for v in paint.get(role, (0, 0, 0)))
        if kind == "poly":
            pen_rgb.polygon(flat, fill=fill)
            pen_alpha.polygon(flat, fill=opacity)
        elif kind == "oval":
            pen_rgb.ellipse(flat, fill=fill)
            pen_alpha.ellipse(flat, fill=opacity)
        else:
            pen_rgb.rectangle(flat, fill=fill)
            pen_alpha.rectangle(flat, fill=opacity)
    # The rim keeps a thing visible on stuff of its own colour; it belongs to the thing.
    rim = max(3, round(side * 0.028) * 2 + 1)
    grown = alpha.filter(ImageFilter.MaxFilter(rim))
    rgb = Image.composite(rgb, Image.new("RGB", (side, side), (40, 36, 44)), alpha)
    rgb = np.asarray(rgb.resize((size, size), Image.Resampling.BOX), np.float32)
    cover = np.asarray(grown.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    if mirrored:
        rgb, cover = rgb[:, ::-1], cover[:, ::-1]
    rows, columns = np.flatnonzero(cover.max(1) > 0), np.flatnonzero(cover.max(0) > 0)
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.ascontiguousarray(rgb[box]), np.ascontiguousarray(cover[box])


def _texture(stuff, colour, size, rng):
    """A square of stuff: float32 (size, size, 3) in [0, 255]; no finer than 3/64 of its side."""
    base = np.array(STUFF_COLOURS[stuff][colour], np.float32)
    # Pattern coordinates in 64ths of the side, shifted at random.
    y = (np.arange(size, dtype=np.float32) * (64 / size))[:, None] + rng.uniform(0, 64)
    x = (np.arange(size, dtype=np.float32) * (64 / size))[None, :] + rng.uniform(0, 64)
    if stuff == "sky":
        down = np.linspace(-1, 1, size, dtype=np.float32)[:, None]
        shade = 0.13 * down + 0.03 * np.sin(x / 9 + y / 6)
    elif stuff == "brick wall":
        row = np.floor(y / 7)
        mortar = (np.mod(y, 7) < 1.8) | (np.mod(x + 6 * np.mod(row, 2), 12) < 1.8)
        tint = 0.07 * np.sin(row * 12.9 + np.floor((x + 6 * np.mod(row, 2)) / 12) * 78.2)
        shade = np.where(mortar, 0.38, tint - 0.05)
    elif stuff == "grass":
        # Rows of pointed blades.
        blade = np.abs(np.mod(x + 3 * np.mod(np.floor(y / 9), 2), 6) - 3) / 3
        shade = np.where(np.mod(y, 9) / 9 > blade, 0.16, -0.2)
    elif stuff == "sand":
        dx = np.mod(x + 4 * np.mod(np.floor(y / 8), 2), 8) - 4
        dy = np.mod(y, 8) - 4
        shade = np.where(dx * dx + dy * dy < 4.2, -0.24, 0.03)
    elif stuff == "water":
        shade = 0.2 * np.sin(2 * np.pi * (y + 2 * np.sin(x / 3.6)) / 8)
    elif stuff == "snow":
        dx = np.abs(np.mod(x + 6 * np.mod(np.floor(y / 12), 2), 12) - 6)
        dy = np.abs(np.mod(y, 12) - 6)
        cross = ((dx < 1.3) & (dy < 4)) | ((dy < 1.3) & (dx < 4))
        shade = np.where(cross, -0.2, 0.02)
    elif stuff == "road":
        dash = (np.mod(y, 13) < 3) & (np.mod(x + 7 * np.mod(np.floor(y / 13), 2), 18) < 10)
        shade = np.where(dash, 0.75, 0.0)
    else:
        raise ValueError(f"unknown stuff {stuff!r}; expected one of {STUFF}")
    gain = rng.uniform(0.92, 1.08)
    shade = np.broadcast_to(shade, (size, size)).astype(np.float32)[..., None]
    # Lighter parts move towards white, so that dark colours show them too.
    light = base * gain + (255 - base * gain) * np.maximum(shade, 0)
    return light * (1 + np.minimum(shade, 0))


def _slots(layout, size, rng):
    """Boxes of single things, [(group, centre x, centre y, side)], and the horizon, in pixels.

    The centre of a thing lies on its ground; things of one scene hardly overlap.
    """
    pair = len(layout.groups) == 2
    if layout.upper is None:
        horizon = 0.0
    elif layout.arrangement == "empty" or layout.arrangement == "above":
        horizon = rng.uniform(0.46, 0.54)
    elif layout.groups[0].ground == layout.upper:
        horizon = rng.uniform(0.58, 0.78)
    else:
        horizon = rng.uniform(0.22, 0.42)
    slots = []
    for position, group in enumerate(layout.groups):
        top, bottom = (0.0, 1.0)
        if layout.upper is not None:
            top, bottom = (0.0, horizon) if group.ground == layout.upper else (horizon, 1.0)
        if group.count > 1:
            side = rng.uniform(0.27, 0.32) if group.count == 3 else rng.uniform(0.32, 0.42)
            step = 0.98 / group.count
            xs = (np.arange(group.count) + 0.5) * step + 0.01
        elif pair:
            side = rng.uniform(0.38, 0.46)
            near = 0.26 if position == 0 else 0.74
            near = rng.uniform(0.25, 0.75) if layout.arrangement == "above" else near
            xs = [near + rng.uniform(-0.03, 0.03)]
        else:
            side = rng.uniform(0.42, 0.6)
            xs = [rng.uniform(side / 2, 1 - side / 2)]
        reach = 0.3 * side  # a thing may cross the edge of its ground by a fifth of its side
        middle = rng.uniform(top + reach, max(bottom - reach, top + reach + 0.01))
        lowest = max(min(bottom, 1 - side / 2), side / 2 + 0.001)
        middle = np.clip(middle, max(top, side / 2), lowest)
        for x in xs:
            y = np.clip(middle + rng.uniform(-0.04, 0.04), side / 2, 1 - side / 2)
            slots.append((group, x * size, y * size, side * size))
    return slots, round(horizon * size)


def draw_image(layout, rng, size=64):
    """Pixels and exact maps of a layout: (image_hwc, label_hw, instance_hw), all uint8."""
    image = _texture(layout.lower, layout.lower_colour, size, rng)
    label = np.full((size, size), CLASSES.index(layout.lower), np.uint8)
    instance = np.zeros((size, size), np.uint8)
    slots, horizon = _slots(layout, size, rng)
    if layout.upper is not None:
        image[:horizon] = _texture(layout.upper, layout.upper_colour, size, rng)[:horizon]
        label[:horizon] = CLASSES.index(layout.upper)
    for number, (group, x, y, side) in enumerate(slots, start=1):
        mirrored = bool(rng.random() < 0.5)
        rgb, alpha = _sprite(group.thing, group.colour, max(8, round(side)), mirrored)
        height, width = alpha.shape
        top = int(np.clip(round(y - height / 2), 0, size - height))
        left = int(np.clip(round(x - width / 2), 0, size - width))
        box = np.s_[top : top + height, left : left + width]
        gain = rng.uniform(0.88, 1.1)
        image[box] += alpha[..., None] * (np.minimum(rgb * gain, 255) - image[box])
        covered = alpha >= 0.5
        label[box][covered] = CLASSES.index(group.thing)
        instance[box][covered] = number
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), label, instance


def render(seed, split="train", size=64, **shares):
    """Draws one scene.

    Args:
        seed: non-negative integer; the same (seed, split, size, shares) gives the same scene.
        split: `train`, `validation` or `test`.
        size: side of the square image in pixels, at least 32.
        shares: `pair_share`, `plural_share`, `empty_share` of `draw_layout`.

    Returns:
        A Scene.
    """
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, not {size}")
    combinations(split)  # rejects an unknown split
    rng = draw_rng(seed, SPLITS.index(split))
    layout = draw_layout(rng, split, **shares)
    caption, nouns = caption_of(layout, rng)
    image, label, instance = draw_image(layout, rng, size)
    return Scene(image, label, instance, caption, nouns, layout)
