"""Pure functions on arrays and text.

Axis suffixes in names, used everywhere: n regions or items, h rows, w columns, c channels, d
embedding dimensions, k prototypes; `boxes_xyxy` in pixels, right and bottom exclusive; `size_hw` is
(height, width).
"""
