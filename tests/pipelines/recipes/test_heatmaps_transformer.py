"""Run: pytest tests/pipelines/recipes/test_heatmaps_transformer.py"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ovref.miniature.scenes import render  # noqa: E402
from ovref.miniature.shapes import CLASSES  # noqa: E402
from ovref.models.joint_attribution import JointAttribution, Layout, recording  # noqa: E402
from ovref.models.tokens import token_positions  # noqa: E402
from recipes.miniature import architectures_transformer as architectures  # noqa: E402
from recipes.miniature import measure_transformer  # noqa: E402
from recipes.miniature.heatmaps_transformer import (  # noqa: E402
    READINGS,
    attention_of_scenes,
    enlarged,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pipeline():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BLOCKS": 3, "HEADS": 2, "WIDTH": 64}.items():
            patch.setattr(architectures, name, value)
        torch.manual_seed(0)
        transformer = architectures.new_transformer()
        for parameter in transformer.parameters():
            if parameter.ndim > 1:  # normalised queries and keys stay of unit variance
                torch.nn.init.normal_(parameter, std=0.1)
        return architectures.pipeline_of(transformer.eval())


@torch.no_grad()
def test_maps_are_those_of_the_product(pipeline):
    """Every block on its own, by `JointAttribution`, with all 256 zeros and fused attention."""
    scenes = [render(i, "test") for i in (0, 3)]
    network = pipeline.transformer
    processors = dict(network.attn_processors)
    maps, classes, rows = attention_of_scenes(pipeline, scenes, timesteps=(400,), seed=5)
    network.set_attn_processor(processors)
    assert maps.shape == (2, 1, 3, sum(len(s.nouns) for s in scenes), 16, 16)
    assert len(classes) == len(rows) == maps.shape[3] and rows.tolist() == sorted(rows)

    images = np.stack([s.image_hwc for s in scenes])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    clean = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    text, _, pooled, _ = pipeline.encode_prompt(
        [s.caption for s in scenes], None, None, do_classifier_free_guidance=False
    )
    assert text.shape[1] == 77 + architectures.ZEROS
    positions = [
        token_positions(pipeline.tokenizer, s.caption, [[(n.start, n.end)] for n in s.nouns])
        for s in scenes
    ]
    for r, reading in enumerate(READINGS):
        for b, block in enumerate(network.transformer_blocks):
            attribution = JointAttribution(positions, (16, 16), Layout(image="first"), reading)
            with recording(network, [block.attn], attribution, [True]):
                network(
                    hidden_states=0.6 * clean + 0.4 * noise, encoder_hidden_states=text,
                    pooled_projections=pooled, timestep=torch.full((2,), 400.0),
                )  # fmt: skip
            found = attribution.heatmaps_bnhw()
            expected = np.concatenate([
                m[: len(nouns)].numpy() for m, nouns in zip(found, positions, strict=True)
            ])  # fmt: skip
            ours = maps[r, 0, b]
            scale = np.abs(ours).max()  # the products' own, which exceeds that of differences
            if reading == "output":
                ours = ours - ours.min((1, 2), keepdims=True)
            assert expected.std() > 1e-3 * scale
            np.testing.assert_allclose(ours / scale, expected / scale, atol=2e-5)


def test_true_masks_are_scored_as_such():
    scenes = [render(i, "test") for i in range(3)]
    classes, rows, truth = [], [], []
    for i, scene in enumerate(scenes):
        for noun in scene.nouns:
            classes.append(CLASSES.index(noun.lemma))
            rows.append(i)
            truth.append(scene.label_hw == classes[-1])
    maps = np.stack(truth).astype(np.float32)
    scores = measure_transformer.score(maps, np.array(classes), np.array(rows), scenes)
    assert scores == {"otsu": [1.0, 1.0], "fixed": [1.0, 1.0]}
    worse = measure_transformer.score(1 - maps, np.array(classes), np.array(rows), scenes)
    assert max(worse["otsu"]) < 0.2
    assert enlarged(np.ones((2, 16, 16), np.float32)).shape == (2, 64, 64)
