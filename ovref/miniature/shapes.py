"""What the miniature world is made of: classes, colours and the outlines of things. Data only.

A thing is a list of parts painted in order in a unit square (x right, y down, both in [0, 1]). A part
is (kind, role, coordinates): kind `poly` takes corner points, `oval` and `box` take (x0, y0, x1, y1).
A role is `main` (the thing's colour), `dark` or `light` (shades of it), `cut` (erase), or a fixed
colour of ACCENTS. Classes differ by outline and parts only: each comes in every colour.
"""

# ruff: noqa: E501

import math

STUFF = ("sky", "brick wall", "grass", "sand", "water", "snow", "road")
"""Stuff classes; label ids 0 to 6."""

UPPER = ("sky", "brick wall")
"""Stuff that may fill the upper part of a scene."""

LOWER = ("grass", "sand", "water", "snow", "road")
"""Stuff that may fill the lower part of a scene."""

COLOURS = {
    "red": (214, 48, 44),
    "yellow": (240, 205, 50),
    "green": (60, 165, 70),
    "blue": (50, 95, 215),
    "purple": (145, 65, 185),
    "white": (240, 240, 240),
}
"""Colours of things, sRGB in [0, 255]."""

STUFF_COLOURS = {
    "sky": {
        "blue": (130, 185, 240),
        "pink": (240, 170, 195),
        "orange": (245, 185, 110),
        "grey": (170, 175, 182),
    },
    "brick wall": {
        "red": (176, 84, 68),
        "brown": (140, 100, 70),
        "grey": (135, 135, 140),
        "yellow": (205, 175, 105),
    },
    "grass": {"green": (95, 170, 75), "yellow": (195, 190, 80), "brown": (150, 125, 75)},
    "sand": {"yellow": (230, 205, 140), "white": (232, 226, 212), "orange": (222, 160, 105)},
    "water": {"blue": (65, 130, 205), "green": (70, 165, 150), "grey": (130, 150, 165)},
    "snow": {"white": (236, 242, 248), "blue": (200, 220, 245), "pink": (245, 215, 225)},
    "road": {"grey": (115, 115, 120), "black": (62, 62, 68), "brown": (130, 105, 90)},
}
"""Base colour of every stuff class in its colours, sRGB in [0, 255]."""

ACCENTS = {
    "black": (30, 30, 34),
    "ivory": (245, 235, 215),
    "brown": (120, 78, 45),
    "leaf": (70, 140, 60),
    "orange": (240, 140, 40),
    "gold": (250, 215, 70),
    "glass": (190, 225, 245),
    "lamp_red": (235, 60, 50),
    "lamp_green": (80, 205, 95),
}
"""Colours of parts that do not follow the colour of their thing, sRGB in [0, 255]."""


def _ray(angle, inner, outer, half_width):
    """Triangle pointing outwards from the centre of the unit square; lengths in unit widths."""
    c, s = math.cos(angle), math.sin(angle)
    return [
        (0.5 + inner * c - half_width * s, 0.5 + inner * s + half_width * c),
        (0.5 + inner * c + half_width * s, 0.5 + inner * s - half_width * c),
        (0.5 + outer * c, 0.5 + outer * s),
    ]


def _disc(x, y, r):
    return (x - r, y - r, x + r, y + r)


PARTS = {
    "sun": [("poly", "dark", _ray(k * math.pi / 4, 0.2, 0.5, 0.13)) for k in range(8)]
    + [("oval", "main", _disc(0.5, 0.5, 0.3)), ("oval", "light", _disc(0.5, 0.5, 0.17))],
    "moon": [("oval", "main", (0.05, 0.0, 1.0, 1.0)), ("oval", "cut", (-0.2, 0.05, 0.62, 0.83)),
             ("oval", "dark", _disc(0.78, 0.4, 0.08)), ("oval", "dark", _disc(0.62, 0.8, 0.07))],
    "cloud": [("oval", "main", (0.0, 0.42, 0.42, 0.8)), ("oval", "main", (0.58, 0.42, 1.0, 0.8)),
              ("oval", "main", (0.16, 0.22, 0.56, 0.68)), ("oval", "main", (0.42, 0.16, 0.84, 0.68)),
              ("box", "main", (0.2, 0.55, 0.8, 0.8)), ("oval", "light", (0.27, 0.3, 0.5, 0.52)),
              ("oval", "light", (0.52, 0.24, 0.75, 0.48))],
    "tree": [("box", "brown", (0.4, 0.76, 0.6, 1.0)), ("poly", "dark", [(0.08, 0.8), (0.92, 0.8), (0.5, 0.36)]),
             ("poly", "main", [(0.15, 0.58), (0.85, 0.58), (0.5, 0.18)]),
             ("poly", "light", [(0.23, 0.34), (0.77, 0.34), (0.5, 0.0)])],
    "house": [("box", "main", (0.12, 0.42, 0.88, 1.0)), ("poly", "dark", [(0.0, 0.46), (1.0, 0.46), (0.5, 0.02)]),
              ("box", "brown", (0.4, 0.66, 0.6, 1.0)), ("box", "glass", (0.19, 0.54, 0.35, 0.7)),
              ("box", "glass", (0.65, 0.54, 0.81, 0.7))],
    "boat": [("box", "brown", (0.45, 0.04, 0.53, 0.72)), ("poly", "light", [(0.56, 0.05), (0.56, 0.62), (0.95, 0.62)]),
             ("poly", "ivory", [(0.42, 0.16), (0.42, 0.62), (0.12, 0.62)]),
             ("poly", "main", [(0.0, 0.68), (1.0, 0.68), (0.82, 0.96), (0.18, 0.96)]),
             ("poly", "dark", [(0.1, 0.83), (0.9, 0.83), (0.82, 0.96), (0.18, 0.96)])],
    "car": [("poly", "dark", [(0.2, 0.5), (0.32, 0.24), (0.7, 0.24), (0.84, 0.5)]),
            ("poly", "glass", [(0.28, 0.48), (0.36, 0.3), (0.48, 0.3), (0.48, 0.48)]),
            ("poly", "glass", [(0.54, 0.48), (0.54, 0.3), (0.67, 0.3), (0.75, 0.48)]),
            ("poly", "main", [(0.0, 0.5), (0.95, 0.48), (1.0, 0.58), (1.0, 0.74), (0.0, 0.74)]),
            ("oval", "black", _disc(0.24, 0.74, 0.14)), ("oval", "black", _disc(0.76, 0.74, 0.14)),
            ("oval", "ivory", _disc(0.24, 0.74, 0.06)), ("oval", "ivory", _disc(0.76, 0.74, 0.06))],
    "fish": [("poly", "dark", [(0.66, 0.5), (1.0, 0.2), (0.92, 0.5), (1.0, 0.8)]),
             ("poly", "dark", [(0.3, 0.3), (0.5, 0.1), (0.62, 0.34)]), ("oval", "main", (0.0, 0.22, 0.78, 0.78)),
             ("poly", "light", [(0.38, 0.5), (0.6, 0.4), (0.6, 0.66)]), ("oval", "ivory", _disc(0.17, 0.43, 0.09)),
             ("oval", "black", _disc(0.16, 0.43, 0.05))],
    "bird": [("poly", "dark", [(0.6, 0.5), (1.0, 0.5), (0.96, 0.72), (0.6, 0.7)]), ("oval", "main", (0.2, 0.38, 0.78, 0.82)),
             ("oval", "main", _disc(0.26, 0.36, 0.19)), ("poly", "orange", [(0.12, 0.3), (0.12, 0.46), (-0.04, 0.4)]),
             ("poly", "dark", [(0.36, 0.56), (0.66, 0.58), (0.74, 0.06)]), ("oval", "black", _disc(0.23, 0.32, 0.05)),
             ("box", "orange", (0.4, 0.8, 0.46, 0.98)), ("box", "orange", (0.54, 0.8, 0.6, 0.98))],
    "mushroom": [("poly", "ivory", [(0.38, 0.5), (0.62, 0.5), (0.7, 1.0), (0.3, 1.0)]),
                 ("oval", "main", (0.0, 0.04, 1.0, 1.0)), ("box", "cut", (0.0, 0.58, 0.33, 1.0)),
                 ("box", "cut", (0.67, 0.58, 1.0, 1.0)),
                 ("poly", "ivory", [(0.33, 0.58), (0.67, 0.58), (0.7, 1.0), (0.3, 1.0)]),
                 ("oval", "ivory", _disc(0.28, 0.36, 0.1)), ("oval", "ivory", _disc(0.54, 0.22, 0.1)),
                 ("oval", "ivory", _disc(0.76, 0.42, 0.09))],
    "cactus": [("oval", "main", (0.36, 0.0, 0.64, 0.4)), ("box", "main", (0.36, 0.18, 0.64, 1.0)),
               ("box", "main", (0.06, 0.56, 0.4, 0.72)), ("box", "main", (0.06, 0.28, 0.22, 0.72)),
               ("box", "main", (0.6, 0.42, 0.94, 0.58)), ("box", "main", (0.78, 0.14, 0.94, 0.58)),
               ("box", "light", (0.44, 0.12, 0.48, 0.98)), ("box", "dark", (0.54, 0.12, 0.58, 0.98))],
    "flower": [("box", "leaf", (0.46, 0.5, 0.54, 1.0)), ("poly", "leaf", [(0.5, 0.94), (0.8, 0.66), (0.84, 0.84)]),
               ("poly", "leaf", [(0.5, 0.94), (0.2, 0.66), (0.16, 0.84)])]
    + [("oval", "main", _disc(0.5 + 0.23 * math.cos(a), 0.34 + 0.23 * math.sin(a), 0.14))
       for a in (k * math.pi / 3 for k in range(6))] + [("oval", "gold", _disc(0.5, 0.34, 0.13))],
    "umbrella": [("oval", "main", (0.0, 0.05, 1.0, 0.95)), ("box", "cut", (0.0, 0.5, 1.0, 1.0)),
                 ("oval", "dark", (0.33, 0.05, 0.67, 0.95)), ("box", "cut", (0.0, 0.5, 1.0, 1.0)),
                 ("box", "black", (0.46, 0.48, 0.54, 0.95)), ("box", "black", (0.54, 0.87, 0.72, 0.95)),
                 ("box", "black", (0.66, 0.78, 0.72, 0.9))],
    "balloon": [("box", "brown", (0.47, 0.74, 0.53, 1.0)), ("poly", "dark", [(0.5, 0.66), (0.38, 0.8), (0.62, 0.8)]),
                ("oval", "main", (0.16, 0.0, 0.84, 0.74)), ("oval", "light", (0.28, 0.1, 0.46, 0.34))],
    "kite": [("poly", "main", [(0.5, 0.0), (0.86, 0.32), (0.5, 0.32)]), ("poly", "ivory", [(0.5, 0.0), (0.14, 0.32), (0.5, 0.32)]),
             ("poly", "dark", [(0.14, 0.32), (0.5, 0.32), (0.5, 0.74)]), ("poly", "main", [(0.86, 0.32), (0.5, 0.32), (0.5, 0.74)]),
             ("box", "brown", (0.47, 0.72, 0.53, 1.0)), ("poly", "dark", [(0.3, 0.78), (0.3, 0.96), (0.7, 0.78), (0.7, 0.96)])],
    "rocket": [("poly", "orange", [(0.36, 0.8), (0.64, 0.8), (0.5, 1.0)]), ("poly", "dark", [(0.34, 0.48), (0.12, 0.88), (0.38, 0.8)]),
               ("poly", "dark", [(0.66, 0.48), (0.88, 0.88), (0.62, 0.8)]),
               ("poly", "main", [(0.5, 0.0), (0.7, 0.26), (0.7, 0.7), (0.62, 0.82), (0.38, 0.82), (0.3, 0.7), (0.3, 0.26)]),
               ("poly", "dark", [(0.5, 0.0), (0.66, 0.2), (0.34, 0.2)]), ("oval", "glass", _disc(0.5, 0.4, 0.12))],
    "cup": [("oval", "dark", (0.58, 0.26, 1.0, 0.74)), ("oval", "cut", (0.68, 0.37, 0.9, 0.63)),
            ("poly", "main", [(0.0, 0.12), (0.78, 0.12), (0.68, 0.92), (0.1, 0.92)]),
            ("poly", "ivory", [(0.045, 0.46), (0.735, 0.46), (0.71, 0.62), (0.068, 0.62)]), ("oval", "dark", (0.0, 0.04, 0.78, 0.22))],
    "traffic light": [("box", "brown", (0.43, 0.7, 0.57, 1.0)), ("box", "main", (0.24, 0.0, 0.76, 0.8)),
                      ("oval", "lamp_red", _disc(0.5, 0.14, 0.11)), ("oval", "gold", _disc(0.5, 0.4, 0.11)),
                      ("oval", "lamp_green", _disc(0.5, 0.66, 0.11))],
    "butterfly": [("oval", "main", (0.0, 0.06, 0.48, 0.56)), ("oval", "main", (0.52, 0.06, 1.0, 0.56)),
                  ("oval", "dark", (0.1, 0.48, 0.48, 0.94)), ("oval", "dark", (0.52, 0.48, 0.9, 0.94)),
                  ("oval", "ivory", _disc(0.22, 0.3, 0.1)), ("oval", "ivory", _disc(0.78, 0.3, 0.1)),
                  ("oval", "black", (0.44, 0.1, 0.56, 0.92))],
    "snowman": [("oval", "main", _disc(0.5, 0.74, 0.27)), ("oval", "light", _disc(0.5, 0.4, 0.2)),
                ("box", "black", (0.36, 0.0, 0.64, 0.2)), ("box", "black", (0.26, 0.18, 0.74, 0.25)),
                ("poly", "orange", [(0.5, 0.36), (0.5, 0.46), (0.76, 0.42)]), ("oval", "black", _disc(0.42, 0.34, 0.04)),
                ("oval", "black", _disc(0.5, 0.66, 0.05)), ("oval", "black", _disc(0.5, 0.84, 0.05))],
}  # fmt: skip
"""Parts of every thing, painted in order."""

THINGS = tuple(PARTS)
"""Thing classes; label ids 7 and up, in this order."""

CLASSES = STUFF + THINGS
"""All classes; the label id is the position."""

UNSEEN = ("snow", "car", "mushroom", "balloon", "cup", "butterfly")
"""Classes that the miniature's MaskFormer never saw: no scene that shows one is in its training."""

PLURALS = {"cactus": "cacti", "butterfly": "butterflies", "snowman": "snowmen", "fish": "fish"}
"""Plurals that do not just add an s."""
