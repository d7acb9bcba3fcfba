"""The captions of the miniature world: a small grammar that describes a layout truthfully.

A layout says what stands where; `caption_of` puts it into words and returns the nouns with their
character spans. Colours, stuff and the second thing are sometimes left unsaid, as people do.
"""

from dataclasses import dataclass

import numpy as np

from ovref.miniature.shapes import PLURALS

NUMBERS = {1: "a", 2: "two", 3: "three"}


@dataclass(frozen=True)
class CaptionNoun:
    """A class named in a caption."""

    lemma: str
    """Singular, lower-case class name, for instance `traffic light`."""
    start: int
    """First character of its mention in the caption."""
    end: int
    """One past the last character of its mention."""


@dataclass(frozen=True)
class Group:
    """One thing, or two or three copies of it side by side."""

    thing: str
    colour: str
    count: int
    """1, 2 or 3."""
    ground: str
    """The stuff that its centre lies on."""


@dataclass(frozen=True)
class Layout:
    """What a scene shows, before pixels."""

    upper: str | None
    """Stuff of the upper part, or None when `lower` fills the scene."""
    upper_colour: str | None
    lower: str
    lower_colour: str
    groups: tuple[Group, ...]
    """None, one or two groups."""
    arrangement: str
    """`empty`, `single`, `beside` (first left of second) or `above` (first over second)."""


class _Writer:
    """Collects words and remembers where the nouns went."""

    def __init__(self):
        self.text = ""
        self.nouns = []

    def say(self, words):
        self.text += words if not self.text or words == "." else " " + words

    def say_noun(self, surface, lemma):
        self.say(surface)
        self.nouns.append(CaptionNoun(lemma, len(self.text) - len(surface), len(self.text)))


def plural(thing):
    """The plural of a class name."""
    return PLURALS.get(thing, thing + "s")


def _article(word):
    return "an" if word[0] in "aeiou" else "a"


def _say_group(writer, group, rng):
    colour = group.colour if rng.random() < 0.75 else None
    surface = group.thing if group.count == 1 else plural(group.thing)
    first = colour or surface
    if group.count > 1:
        writer.say(NUMBERS[group.count])
    else:
        writer.say("the" if rng.random() < 0.1 else _article(first))
    if colour:
        writer.say(colour)
    writer.say_noun(surface, group.thing)


def _say_stuff(writer, stuff, colour, rng):
    if rng.random() < 0.6:
        if stuff in ("sky", "brick wall", "road"):
            writer.say(_article(colour))
        writer.say(colour)
    else:
        writer.say("a" if stuff == "brick wall" and rng.random() < 0.7 else "the")
    writer.say_noun(stuff, stuff)


def _say_ground(writer, layout, ground, rng):
    """Where the last group is: `on the grass`, `in a blue sky`, `in front of a brick wall`."""
    colour = layout.upper_colour if ground == layout.upper else layout.lower_colour
    if ground == "brick wall":
        writer.say("in front of")
    elif ground == "sky":
        writer.say("in")
    else:
        writer.say("in" if ground in ("water", "snow") and rng.random() < 0.4 else "on")
    _say_stuff(writer, ground, colour, rng)


def _say_other_stuff(writer, layout, ground, rng):
    """The stuff that the things are not on: `under a pink sky`, `above the road`."""
    if layout.upper is None or rng.random() < 0.2:
        return
    if ground == layout.upper:
        writer.say("above")
        _say_stuff(writer, layout.lower, layout.lower_colour, rng)
    else:
        writer.say("under" if layout.upper == "sky" else "in front of")
        _say_stuff(writer, layout.upper, layout.upper_colour, rng)


def caption_of(layout, rng):
    """A caption that is true of `layout`, and its nouns in order of mention.

    Args:
        layout: a Layout.
        rng: numpy Generator; draws wording and omissions.

    Returns:
        (text, tuple of CaptionNoun).
    """
    writer = _Writer()
    draw = rng.random()
    if draw < 0.3:
        writer.say("a photo of" if draw < 0.2 else "a picture of")
    if layout.arrangement == "empty":
        if layout.upper is None:
            _say_stuff(writer, layout.lower, layout.lower_colour, rng)
        else:
            _say_stuff(writer, layout.upper, layout.upper_colour, rng)
            writer.say("above" if layout.upper == "sky" else "behind")
            _say_stuff(writer, layout.lower, layout.lower_colour, rng)
    elif layout.arrangement == "single":
        (group,) = layout.groups
        _say_group(writer, group, rng)
        if rng.random() < 0.9:
            _say_ground(writer, layout, group.ground, rng)
            _say_other_stuff(writer, layout, group.ground, rng)
    elif layout.arrangement == "beside":
        left, right = layout.groups
        relation = rng.choice(["to the left of", "to the right of", "next to", "and"])
        swap = relation == "to the right of" or (
            relation in ("next to", "and") and rng.random() < 0.5
        )
        first, second = (right, left) if swap else (left, right)
        _say_group(writer, first, rng)
        if rng.random() < 0.92:
            writer.say(str(relation))
            _say_group(writer, second, rng)
        if rng.random() < 0.85:
            _say_ground(writer, layout, left.ground, rng)
            _say_other_stuff(writer, layout, left.ground, rng)
    else:
        top, bottom = layout.groups
        below = rng.random() < 0.35
        first, second = (bottom, top) if below else (top, bottom)
        _say_group(writer, first, rng)
        if rng.random() < 0.4:
            _say_ground(writer, layout, first.ground, rng)
        writer.say("below" if below else "above")
        _say_group(writer, second, rng)
        if rng.random() < 0.7:
            _say_ground(writer, layout, second.ground, rng)
    if rng.random() < 0.15:
        writer.say(".")
    return writer.text, tuple(writer.nouns)


def draw_rng(seed, split_index):
    """The generator behind one scene: depends on seed and split only."""
    return np.random.default_rng([split_index, seed])
