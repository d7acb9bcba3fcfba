"""Run: pytest tests/without_a_gpu/test_pretend_cuda.py

The builder's stages as on a card, on one that is not there (`pretend_cuda.py`).
"""

import numpy as np
import pytest
import torch
from pretend_cuda import OnCard, pretend_cuda

from ovref.contract import Dropped
from ovref.evaluation.apply_protocol import segment_with_protocol
from ovref.evaluation.protocols import Protocol
from ovref.identity import record_key
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES
from ovref.models.diffusion import Generator
from ovref.models.noun_grounding import DetectorRoute, ProposalRoute
from ovref.records import ImageRecord, Noun, Prompt, Reference
from ovref.stages.embed import Embed
from ovref.stages.ground import Ground
from ovref.stages.synthesize import Synthesize
from ovref.stored_images import jpeg_of
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.load import load_text_encoder, load_visual_encoder
from ovref_inference.proposers.config import (
    GroundingDinoConfig,
    MaskFormerConfig,
    OpenCutProposerConfig,
    ProposerConfig,
    SamConfig,
    SamGridConfig,
)
from ovref_inference.proposers.load import no_proposals
from ovref_inference.segmenters import windows
from ovref_inference.segmenters.fossil import TextOnlySegmenter


@pytest.fixture
def card(monkeypatch):
    with pretend_cuda(monkeypatch) as found:
        yield found


def prompts(count):
    found = []
    for seed in range(count):
        scene = render(seed, "validation")
        nouns = tuple(Noun(text=n.lemma, start=n.start, end=n.end) for n in scene.nouns)
        found.append(
            Prompt(
                key=record_key("test", scene.caption, seed),
                caption=scene.caption,
                nouns=nouns,
                source=f"test:{seed}",
                image=jpeg_of(scene.image_hwc, 95),
            )
        )
    return found


def test_what_a_card_refuses_is_refused(card):
    on_card = torch.ones(3, device="cuda")
    assert isinstance(on_card, OnCard) and on_card.device == torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="cuda:0 and on the cpu"):
        on_card + torch.ones(3)
    with pytest.raises(RuntimeError, match="cuda:0 and on the cpu"):
        torch.nn.Embedding(4, 2).to("cuda")(torch.tensor([1]))
    with pytest.raises(RuntimeError, match="numpy"):
        on_card.numpy()
    assert (on_card + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2]


def test_waits_for_the_card_are_noted(card):
    numbers = torch.arange(4, device="cuda")
    assert card.waits == []
    assert float(numbers.sum()) == 6 and len(numbers[numbers > 1]) == 2
    numbers.cpu()
    torch.zeros(2).to("cuda")
    assert [wait.partition(" at ")[0] for wait in card.waits] == [
        "aten::_local_scalar_dense", "aten::index", "aten::_to_copy", "aten::_to_copy",
    ]  # fmt: skip


def synthesis(**changes):
    return Synthesize(
        **{
            "model": "miniature:stable_diffusion", "steps": 2, "guidance": 4.0, "size_hw": (64, 64),
            "factors": (1,), "batch_size": 2, "min_area": 0.0, "max_area": 1.0, **changes,
        }
    )  # fmt: skip


def on_both(spec, records, card):
    """What a stage makes on the CPU, and on the card."""
    with card.away():
        expected = list(spec.build()(iter(records)))
    return expected, list(spec.build()(iter(records)))


def assert_same_images(expected, found):
    assert [item.key for item in found] == [item.key for item in expected]
    for one, other in zip(expected, found, strict=True):
        assert type(one) is type(other)
        if isinstance(one, ImageRecord):
            assert np.abs(one.image_hwc().astype(int) - other.image_hwc()).max() <= 3
            for left, right in zip(one.regions, other.regions, strict=True):
                assert (left.mask_hw == right.mask_hw).mean() > 0.98
                assert right.score == pytest.approx(left.score, abs=0.05)


@pytest.mark.parametrize("scheduler", ["unipc", "lcm"])
def test_generation(card, scheduler):
    assert_same_images(*on_both(synthesis(scheduler=scheduler), prompts(3), card))


def test_generation_in_half_precision(card):
    spec = synthesis(dtype="float16", channels_last=True, fused_projections=True, guided_share=0.5)
    found = list(spec.build()(iter(prompts(2))))
    assert [type(item) for item in found] == [ImageRecord] * 2


@pytest.mark.parametrize("scheduler", ["ddim", "dpm_solver++", "euler"])
def test_no_step_waits_for_the_card(card, scheduler):
    """Nor does attribution: what is waited for does not grow with the steps."""
    counts = []
    for steps in (2, 4):
        stage = synthesis(scheduler=scheduler, steps=steps).build()
        before = len(card.waits)
        list(stage(iter(prompts(2))))
        counts.append(len(card.waits) - before)
    assert counts[0] == counts[1] < 20


CLIP = TextEncoderConfig(model="miniature:clip")
SIZE = {"size_hw": (64, 64)}
VISUALS = {
    "dinov2": VisualEncoderConfig(model="miniature:dinov2", precision="float16", **SIZE),
    "dino_keys": VisualEncoderConfig(model="miniature:dino", features="keys", **SIZE),
    "clip_values": VisualEncoderConfig(
        model="miniature:clip", library="open_clip", features="values", **SIZE
    ),
    "clip_crops": VisualEncoderConfig(
        model="miniature:clip", library="open_clip", features="crop_binary", **SIZE
    ),
}


@pytest.fixture(scope="module")
def generated():
    """Images that the CPU drew."""
    return list(synthesis().build()(iter(prompts(2))))


@pytest.mark.parametrize("visual", VISUALS)
def test_embedding(generated, card, visual):
    expected, found = on_both(Embed(visual=VISUALS[visual], text=CLIP), generated, card)
    assert len(found) > 2 and [item.key for item in found] == [item.key for item in expected]
    for one, other in zip(expected, found, strict=True):
        assert isinstance(other, Reference)
        np.testing.assert_allclose(other.visual, one.visual, atol=5e-3)
        np.testing.assert_allclose(other.textual, one.textual, atol=5e-3)


SAM = SamConfig(model="miniature:sam")
GRID = SamGridConfig(sam=SAM, points_per_side=4, min_predicted_iou=0.6, min_stability=0.6)
ROUTES = {
    "detector": Ground(
        detector=DetectorRoute(
            detector=GroundingDinoConfig(
                model="miniature:grounding_dino", box_threshold=0.2, text_threshold=0.2
            ),
            sam=SAM,
        )
    ),
    "mask_former": ProposerConfig(mask_former=MaskFormerConfig(model="miniature:maskformer")),
    "sam_grid": ProposerConfig(sam_grid=GRID),
    "opencut": ProposerConfig(opencut=OpenCutProposerConfig(keys=VISUALS["dino_keys"])),
}


@pytest.mark.parametrize("route", ROUTES)
def test_grounding(card, route):
    spec = ROUTES[route]
    if isinstance(spec, ProposerConfig):
        match = ProposalRoute(proposer=spec, visual=VISUALS["clip_crops"], text=CLIP)
        spec = Ground(proposals=match)
    expected, found = on_both(spec, prompts(3), card)
    assert any(isinstance(item, ImageRecord) for item in expected)
    assert [item for item in found if isinstance(item, Dropped)] == [
        item for item in expected if isinstance(item, Dropped)
    ]
    assert_same_images(expected, found)


def test_windows_of_a_protocol_stay_on_the_card(card, monkeypatch):
    """What is waited for does not grow with the parts that the classes are computed in."""
    image_hwc = render(0, "validation").image_hwc
    protocol = Protocol(
        name="test", source="test", resize="short_side", side=96, window=64, stride=32
    )

    def segmented():
        segmenter = TextOnlySegmenter(
            load_visual_encoder(VISUALS["clip_values"]), load_text_encoder(CLIP), no_proposals,
            windows=None,
        )  # fmt: skip
        return segment_with_protocol(segmenter, image_hwc, CLASSES, protocol)

    with card.away():
        expected = segmented()
    counts = []
    for at_once in (len(CLASSES), 4):
        monkeypatch.setattr(windows, "_VALUES_AT_ONCE", at_once * 64 * 64)
        before = len(card.waits)
        found = segmented()
        counts.append(len(card.waits) - before)
    assert (found.labels_hw == expected.labels_hw).mean() > 0.99
    np.testing.assert_allclose(found.scores_chw, expected.scores_chw, atol=1e-4)
    assert counts[0] == counts[1]


class Memory:
    """The memory of a card on which generation takes `fixed` bytes and more for each image."""

    def __init__(self, monkeypatch, *, free, fixed, an_image):
        self.generated, self.in_use = [], 10**9
        whole = Generator.generate_at_once

        def generate_at_once(generator, captions, positions, seeds):
            self.generated.append(len(captions))
            if fixed + an_image * len(captions) > free:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(generator, captions, positions, seeds)

        monkeypatch.setattr(Generator, "generate_at_once", generate_at_once)
        for name, function in {
            "mem_get_info": lambda: (free, 2 * free),
            "memory_reserved": lambda: self.in_use,
            "reset_peak_memory_stats": lambda: None,
            "max_memory_reserved": lambda: self.in_use + fixed + an_image * self.generated[-1],
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)


@pytest.mark.parametrize("scheduler", ["unipc", "sde_dpm_solver++"])
def test_the_automatic_batch_size_leaves_no_trace(card, monkeypatch, scheduler, caplog):
    memory = Memory(monkeypatch, free=10**10, fixed=10**9, an_image=9 * 10**8)
    orders = prompts(6)
    caplog.set_level("INFO", "ovref.models.batch_size")
    before = torch.random.get_rng_state()
    stage = synthesis(scheduler=scheduler, batch_size="auto").build()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert stage.batch_size == 4 and memory.generated == [2, 4]
    (line,) = caplog.messages
    assert "batches of 4" in line and "2 took 2.80 GB, 4 took 4.60 GB" in line
    found = list(stage(iter(orders)))
    assert memory.generated == [2, 4, 4, 2]
    expected = list(synthesis(scheduler=scheduler, batch_size=4).build()(iter(orders)))
    assert [item.image for item in found] == [item.image for item in expected]
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one.heatmaps_nhw, other.heatmaps_nhw)
        assert other.provenance == one.provenance | {"batch_size": 4}


@pytest.mark.parametrize(
    ("free", "expected", "tried"), [(6.9, 2, [2, 4]), (2.7, 1, [2]), (20, 8, [2, 4])], ids=str
)
def test_probes_that_do_not_fit_bound_the_batch(card, monkeypatch, free, expected, tried):
    memory = Memory(monkeypatch, free=int(free * 10**9), fixed=10**9, an_image=int(9e8))
    compiled = []

    def note(module, **options):
        compiled.append((type(module).__name__, list(memory.generated)))

    monkeypatch.setattr(torch.nn.Module, "compile", note)
    stage = synthesis(batch_size="auto", compiled=True, steps=1, guidance=1.0).build()
    assert stage.batch_size == expected
    # Nothing is compiled before the batch size is known, which is then the only one.
    assert compiled == [("UNet2DConditionModel", tried), ("Decoder", tried)]
    rows = []
    unet = stage._generator._pipeline.unet
    unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    (record,) = stage(iter(prompts(1)))
    assert rows == [expected] and record.provenance["batch_size"] == expected
