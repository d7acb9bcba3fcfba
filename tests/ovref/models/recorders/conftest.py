"""Loaded tiny pipelines of diffusion transformers."""

import pytest

import tiny_transformers
from ovref.models.loading import load_pipeline


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`loaded("sd3", t5=False)`: the pipeline of this writer of `tiny_transformers`."""
    known = {}

    def load(name, scheduler="flow_euler", **options):
        key = (name, scheduler, *sorted(options.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp(name) / name
            getattr(tiny_transformers, name)(folder, **options)
            known[key] = load_pipeline(
                str(folder), revision=None, scheduler=scheduler, dtype="float32", device="cpu"
            )
        return known[key]

    return load
