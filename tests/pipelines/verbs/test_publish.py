"""What `ovref publish` refuses before it writes."""

import numpy as np
import pytest

from array_fakes import EMBED, FakeTexts
from ovref.errors import InputError
from ovref.exchange.own_arrays import OwnArrays, collection_from_arrays
from ovref_inference.errors import CollectionError
from ovref_pipelines import api


def test_a_collection_without_its_build(tmp_path):
    visual = np.random.default_rng(0).standard_normal((2, 8))
    place, target = str(tmp_path / "own"), tmp_path / "published"
    arrays = OwnArrays(visual=visual, nouns=["cat", "dog"])
    collection_from_arrays(place, arrays, EMBED, texts=FakeTexts())
    with pytest.raises(InputError, match=r"images are not here.*--build, or .* by --no-images"):
        api.publish(place, str(target))
    with pytest.raises(CollectionError, match="no reference collection at"):
        api.publish(str(tmp_path / "nothing"), str(target))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/evaluation.json").write_text("{")
    with pytest.raises(InputError, match=r"evaluation\.json is damaged"):
        api.publish(place, str(target), images=False)
    assert not target.exists()
