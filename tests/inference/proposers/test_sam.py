"""SAM: loading, and masks equal to those of segment-anything's own predictor and generator."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from transformers import SamConfig as SamSizes
from transformers import SamModel

from ovref_inference import ModelError
from ovref_inference.proposers import sam_model
from ovref_inference.proposers.config import SamConfig, SamGridConfig
from ovref_inference.proposers.sam import SamMasks
from ovref_inference.proposers.sam_model import from_segment_anything, load_sam
from recipes.miniature.architectures_grounding import new_sam

SMALL = SamSizes(
    vision_config={
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "global_attn_indexes": [1],
        "window_size": 4,
        "output_channels": 16,
        "num_pos_feats": 8,
    },
    prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8},
    mask_decoder_config={
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
)
RNG = np.random.default_rng(0)
IMAGES = [
    RNG.integers(0, 256, size=(*size_hw, 3), dtype=np.uint8)
    for size_hw in ((64, 64), (48, 80), (7, 3), (130, 40))
]
BOXES = [
    np.array([[3, 4, 30.5, 40], [0, 0, 64, 64], [10, 10, 11, 11]]),
    np.zeros((0, 4)),
    np.array([[0, 0, 3, 7]]),
    np.array([[1, 100, 39, 130], [5, 5, 20, 90.25]]),
]


@pytest.fixture(scope="module")
def original():
    """A Sam of segment-anything with random weights."""
    torch.manual_seed(2)
    model = new_sam(SMALL)
    with torch.no_grad():
        # As initialised, masks are all one or all nothing; larger weights split the images.
        for weight in model.parameters():
            if weight.ndim == 2:
                weight *= 1.5
        for head in model.mask_decoder.output_hypernetworks_mlps:
            head.layers[-1].bias.zero_()
            head.layers[-1].weight *= 20  # logits beyond the offset of stability
        model.mask_decoder.iou_prediction_head.layers[-1].bias += 0.5
        for weight in model.image_encoder.parameters():
            if not weight.any():  # positions, which start as zeros and would not be compared
                weight.normal_(std=0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sam(original):
    return from_segment_anything(original.state_dict(), SMALL).eval().requires_grad_(False)


def predicted(sam, image, boxes, multimask):
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    for box in boxes:
        masks, ious, _ = predictor.predict(box=box, multimask_output=multimask)
        yield masks[ious.argmax()], ious.max()


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("at_once", [1, 64])
def test_masks_of_boxes_are_those_of_the_packages_predictor(sam, original, multimask, at_once):
    answers = list(
        SamMasks(sam, batch_size=3, prompts_at_once=at_once).of_boxes(
            IMAGES, BOXES, multimask=multimask
        )
    )
    for image, boxes, (masks, ious) in zip(IMAGES, BOXES, answers, strict=True):
        assert masks.shape == (len(boxes), *image.shape[:2]) and masks.dtype == bool
        assert ious.shape == (len(boxes),) and ious.dtype == np.float32
        for number, (mask, iou) in enumerate(predicted(original, image, boxes, multimask)):
            # Batched kernels round differently: a pixel on the very edge may flip.
            assert np.mean(masks[number] != mask) < 0.005
            assert ious[number] == pytest.approx(iou, abs=1e-5)
    masks = answers[0][0]
    assert 0 < masks[0].mean() < 1, "the comparison needs masks that are not trivial"
    assert (masks[0] != masks[1]).any(), "and that depend on the box"


def test_the_image_encoder_runs_once_an_image_however_many_boxes(sam):
    seen = []
    hook = sam.vision_encoder.register_forward_hook(
        lambda _m, inputs, _o: seen.append(len(inputs[0]))
    )
    many = [np.tile(boxes, (40, 1)) for boxes in BOXES]
    answers = list(SamMasks(sam, batch_size=2, prompts_at_once=16).of_boxes(IMAGES, many))
    hook.remove()
    assert seen == [2, 1], "the image without boxes is not encoded"
    assert [len(masks) for masks, _ in answers] == [120, 0, 40, 80]


def test_large_masks_are_made_a_few_at_a_time(sam, monkeypatch):
    whole = list(SamMasks(sam).of_boxes(IMAGES[:1], BOXES[:1]))
    monkeypatch.setattr("ovref_inference.proposers.sam.UPSCALED_PIXELS", 1)
    parts = list(SamMasks(sam).of_boxes(IMAGES[:1], BOXES[:1]))
    np.testing.assert_array_equal(whole[0][0], parts[0][0])


@pytest.mark.parametrize("thresholds", [(0.0, 0.0, 1.0), (0.25, 0.2, 0.99), (0.99, 1.0, 0.7)])
def test_masks_of_the_grid_are_those_of_the_packages_generator(sam, original, thresholds):
    predicted_iou, stability, nms_iou = thresholds
    config = SamGridConfig(
        sam=SamConfig(model="unused"),
        points_per_side=5,
        min_predicted_iou=predicted_iou,
        min_stability=stability,
        nms_iou=nms_iou,
    )
    reference = SamAutomaticMaskGenerator(
        original,
        points_per_side=5,
        pred_iou_thresh=predicted_iou,
        stability_score_thresh=stability,
        box_nms_thresh=nms_iou,
    )
    answers = SamMasks(sam, prompts_at_once=64).of_grid(IMAGES[:2], config)
    for image, (masks, ious) in zip(IMAGES, answers, strict=False):
        expected = [mask for mask in reference.generate(image) if mask["segmentation"].any()]
        assert len(masks) == len(expected)
        assert masks.shape[1:] == image.shape[:2]
        assert len(masks) or predicted_iou == 0.99
        assert (np.diff(ious) <= 0).all()
        for mask, iou, other in zip(masks, ious, expected, strict=True):
            assert np.mean(mask != other["segmentation"]) < 0.005  # as above
            assert iou == pytest.approx(other["predicted_iou"], abs=1e-5)


def test_the_image_encoder_is_that_of_the_package(sam, original):
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = sam.vision_encoder(pixels).last_hidden_state, original.image_encoder(pixels)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert theirs.abs().max() > 0.5


@pytest.fixture
def small_is_published(monkeypatch):
    monkeypatch.setattr(sam_model, "_published", lambda state: SMALL)


def saved(original, folder, name):
    state = {key: value.contiguous() for key, value in original.state_dict().items()}
    if name.endswith(".pth"):
        torch.save(state, folder / name)
    else:
        save_file(state, folder / name)
    return folder / name


def test_all_layouts_load_to_the_same_model(sam, original, small_is_published, tmp_path):
    sam.save_pretrained(tmp_path / "folder")
    files = [saved(original, tmp_path, name) for name in ("any.pth", "any.safetensors")]
    for path in (*files, tmp_path / "folder"):
        loaded = load_sam(str(path))
        assert not loaded.training and loaded.config.vision_config.image_size == 64
        assert loaded.state_dict().keys() == sam.state_dict().keys()
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, sam.state_dict()[key]) and not value.requires_grad


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_published_sizes_are_those_of_the_package(name):
    with torch.device("meta"):
        theirs = sam_model_registry[name]()
        config = sam_model._published(theirs.state_dict())
        ours = SamModel(config)
    renamed = sam_model._renamed(theirs.state_dict())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in renamed.items()
    }
    for mine, other in zip(ours.vision_encoder.layers, theirs.image_encoder.blocks, strict=True):
        assert mine.window_size == other.window_size
        assert mine.attn.num_attention_heads == other.attn.num_heads
        assert mine.layer_norm1.eps == other.norm1.eps
    for mine, other in zip(
        ours.mask_decoder.transformer.layers, theirs.mask_decoder.transformer.layers, strict=True
    ):
        assert mine.self_attn.num_attention_heads == other.self_attn.num_heads
    assert config.vision_config.image_size == theirs.image_encoder.img_size


class Malicious:
    def __reduce__(self):
        return print, ("unpickled",)


def test_broken_checkpoints_are_refused_and_nothing_is_unpickled(original, tmp_path, capsys):
    path = saved(original, tmp_path, "any.safetensors")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    torch.save({"image_encoder.pos_embed": Malicious()}, tmp_path / "worse.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    for name in ("empty.pth", "bad.pth", "worse.pth", "tensor.pth", "none.pth"):
        with pytest.raises(ModelError, match="cannot load SAM"):
            load_sam(str(tmp_path / name))
    assert "unpickled" not in capsys.readouterr().out
    with pytest.raises(ModelError, match="no published SAM has an image encoder of width 16"):
        load_sam(str(path))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot load SAM"):
        load_sam(str(path))


def test_weights_of_another_architecture_are_refused(sam, original, small_is_published, tmp_path):
    state = {key: value for key, value in original.state_dict().items() if "blocks.1" not in key}
    torch.save(state, tmp_path / "few.pth")
    with pytest.raises(ModelError, match=r"Missing key.*layers\.1"):
        load_sam(str(tmp_path / "few.pth"))
    sam.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"layers\.2"):
        load_sam(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(ModelError, match="it is a vit, not a sam"):
        load_sam(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="cannot load SAM"):
        load_sam(str(tmp_path))


def test_an_image_of_another_type_is_refused(sam):
    with pytest.raises(ValueError, match=r"uint8, found \(4, 4, 3\) float32"):
        list(SamMasks(sam).of_boxes([np.zeros((4, 4, 3), np.float32)], [np.ones((1, 4))]))


@pytest.mark.parametrize(
    "change", [{"points_per_side": 0}, {"min_stability": 1.5}, {"nms_iou": -0.1}]
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SamGridConfig(sam=SamConfig(model="m"), **change)
