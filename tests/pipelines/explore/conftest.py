"""A small build to explore, and its explorer."""

from pathlib import Path

import pytest
from explorer_server import served
from recipe_fakes import FakeTexts, fake_build

from ovref_pipelines import recipe
from ovref_pipelines.explore.library import Library


@pytest.fixture(scope="session")
def build_output(tmp_path_factory):
    """The output of a build of 60 captions of seven nouns."""
    folder = tmp_path_factory.mktemp("explored")
    config = fake_build(folder, captions=60, shard_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "_LazyTexts", FakeTexts)
        recipe.build(config)
    return Path(config.output)


@pytest.fixture
def explorer(build_output):
    """The explorer of that build."""
    with served(Library(str(build_output))) as found:
        yield found
