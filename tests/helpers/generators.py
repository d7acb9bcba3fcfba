"""A generator with the settings that a test names."""

from ovref.models.diffusion import Generator
from ovref.stages.synthesize import Synthesize


def generator_of(pipeline, *, fill_up_to=None, **settings):
    """`fill_up_to`: the size to which a compiled generator pads its batches; compiles nothing."""
    if fill_up_to is not None:
        settings |= {"compiled": True, "batch_size": fill_up_to}
    return Generator(pipeline, Synthesize(model="given", **settings))
