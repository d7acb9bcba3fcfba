"""What the models of a configuration are, whether they run, and whether their features are right.

`ovref build --dry-run` loads the same models and feeds each stage one blank input; this says in
words what each of them is, and compares encoders with their own libraries.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovref.check_models import check_stage
from ovref.errors import ModelError
from ovref.known_models import table
from ovref_pipelines.build_config import BuildConfig


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The answer for one configuration."""

    text: str
    """For people: every model in a few lines, then the verdict."""
    problems: int
    """Models that cannot be used."""


def check(
    config: BuildConfig,
    *,
    shapes: bool = False,
    random: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Checked:
    """Checks every model that a configuration names. Nothing is read from the corpus or written.

    Args:
        shapes: read the models' configurations alone and load no weights.
        random: give encoders of the table of known models (`ovref.known_models.table`) random
            weights of the same architecture, so that nothing is downloaded; others are left out.
        say: called with a line for people when a step's models begin to load.
    """
    specs = {
        spec.name: spec for spec in (config.extract_nouns, config.make_images, config.embed)
    }
    blocks: list[str] = []
    problems = 0
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, str] = {}
        for step, spec in specs.items():
            say(f"check: {step}")
            found, failed = _step(step, spec, shapes, random, Path(folder), made)
            blocks += found
            problems += failed
    verdict = "every model that was checked can be used"
    if problems:
        verdict = f"{problems} of the models cannot be used as they are configured"
    return Checked(text="\n".join([*blocks, verdict]), problems=problems)


def _step(
    step: str, spec: Any, shapes: bool, random: bool, folder: Path, made: dict[str, str]
) -> tuple[list[str], int]:
    """Blocks of text about the models of a stage, and how many cannot be used."""
    from ovref.known_models import describe

    left_out: list[str] = []
    others = describe.others_of(spec)
    if random and not shapes:
        spec, left_out = _with_random_weights(spec, folder, made)
    found = describe.describe(step, spec, made, left_out, shapes)
    blocks = [describe.text(found)] if found else []
    problems = sum(bool(one.problem) for one in found)
    if shapes or random:
        reason = "its weights would be loaded" if shapes else "no random weights of it are known"
        blocks += [f"{step}: {model}\n    left out: {reason}" for model in [*left_out, *others]]
    elif others:
        try:
            check_stage(spec)
            blocks.append(f"{step}: {', '.join(others)}\n    ran on a blank input")
        except ModelError as error:
            blocks.append(f"{step}: {', '.join(others)}\n    CANNOT BE USED: {error}")
            problems += 1
    return blocks, problems


def _with_random_weights(spec: Any, folder: Path, made: dict[str, str]) -> tuple[Any, list[str]]:
    """The settings with folders of random weights in place of known models.

    Args:
        folder: where they are written.
        made: gets the known id of every folder; what is there already is not made again.

    Returns:
        The settings; and the models that are not known.
    """
    from ovref.known_models import random_weights
    from ovref.known_models.describe import is_described

    changed: dict[str, Any] = {}
    left_out: list[str] = []
    places = {model: place for place, model in made.items()}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if is_described(value):
            known = table.find(value.model)
            if known is None:
                left_out.append(value.model)
                continue
            if known.model not in places:
                place = folder / str(len(made))
                made[str(random_weights.write(known, place))] = known.model
                places[known.model] = str(place)
            changed[field.name] = dataclasses.replace(
                value, model=places[known.model], revision="", library=known.library
            )
        elif dataclasses.is_dataclass(value):
            inner, missing = _with_random_weights(value, folder, made)
            left_out += missing
            if inner is not value:
                changed[field.name] = inner
    return (dataclasses.replace(spec, **changed) if changed else spec), left_out
