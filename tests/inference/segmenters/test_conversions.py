"""Segmentations as tensors and as supervision's detections; modules; custom backbones."""

import numpy as np
import pytest
import torch

import ovref_inference
from ovref_inference.collection.prototypes import Prototypes
from ovref_inference.encoders import VisualEncoderConfig, load_visual_encoder
from ovref_inference.encoders.registry import as_encoder
from ovref_inference.errors import ModelError
from ovref_inference.images import box_of
from ovref_inference.segmenters import PrototypeHead, Segmentation, SegmenterModule
from ovref_inference.segmenters.fossil import prototype_scores


@pytest.fixture
def segmentation():
    labels_hw = np.array([[0, 0, 2], [-1, 2, 2]], dtype=np.int32)
    scores_chw = np.stack([np.full((2, 3), value, np.float32) for value in (0.6, 0.1, 0.8)])
    scores_hw = np.array([[0.6, 0.4, 0.8], [-np.inf, 0.6, 0.7]], dtype=np.float32)
    return Segmentation(
        labels_hw=labels_hw, max_score_hw=scores_hw, scores_of=scores_chw.__getitem__
    )


def test_masks_and_tensors(segmentation):
    masks_nhw, classes = segmentation.masks()
    assert classes.tolist() == [0, 2] and masks_nhw.sum((1, 2)).tolist() == [2, 3]
    found = segmentation.to_torch()
    assert found["labels"].dtype == torch.int64 and found["labels"].tolist()[1] == [-1, 2, 2]
    assert found["masks"].numpy().tolist() == masks_nhw.tolist()
    assert found["classes"].tolist() == [0, 2]


@pytest.mark.filterwarnings("ignore:OpenCV")  # supervision without it counts in numpy
def test_detections_are_those_of_supervision(segmentation):
    found = segmentation.to_supervision(["cat", "dog", "sky"])
    assert found.class_id.tolist() == [0, 2]
    assert found.data["class_name"].tolist() == ["cat", "sky"]
    assert found.xyxy.tolist() == [[0, 0, 2, 1], [1, 0, 3, 2]]
    assert found.confidence.tolist() == pytest.approx([0.5, 0.7])
    assert found.area.tolist() == [2, 3]  # which supervision counts in the masks


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_an_image_without_a_class_has_no_detections():
    labels_hw, scores_hw = np.full((2, 2), -1, np.int32), np.zeros((2, 2), np.float32)
    empty = Segmentation(labels_hw=labels_hw, max_score_hw=scores_hw, scores_of=list)
    assert len(empty.to_supervision(["cat"])) == 0


def test_the_box_of_a_mask():
    mask_hw = np.zeros((5, 6), dtype=bool)
    assert box_of(mask_hw) == (0, 0, 0, 0)
    mask_hw[1:3, 4] = True
    assert box_of(mask_hw) == (4, 1, 5, 3)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_head_is_equation_five(gamma):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3, 4, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    prototypes = Prototypes(vectors_nkd=vectors, counts=np.array([4, 2, 1]), nouns=((),) * 3)
    features_bdhw = torch.tensor(rng.standard_normal((2, 5, 3, 2)), requires_grad=True)
    scores_bchw = PrototypeHead(prototypes, gamma)(features_bdhw)
    flat = features_bdhw.detach().permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    wanted = prototype_scores(flat, prototypes, gamma)
    found = scores_bchw.permute(0, 2, 3, 1).reshape(-1, 3)
    assert np.allclose(found.detach().numpy(), wanted, atol=1e-6)
    scores_bchw.sum().backward()
    assert features_bdhw.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"features \(b, 5, h, w\)"):
        PrototypeHead(prototypes)(features_bdhw[:, :4])


class Halves:
    """A segmenter that gives the left half of an image to the first class, the right to the
    second."""

    def segment(self, images, class_names):
        found = []
        for image_hwc in images:
            scores_chw = np.zeros((2, *image_hwc.shape[:2]), np.float32)
            middle = image_hwc.shape[1] // 2
            scores_chw[0, :, :middle] = scores_chw[1, :, middle:] = image_hwc.mean() / 255
            found.append(
                Segmentation(
                    labels_hw=scores_chw.argmax(0).astype(np.int32),
                    max_score_hw=scores_chw.max(0),
                    scores_of=scores_chw.__getitem__,
                )
            )
        return found


def test_a_module_takes_bytes_and_floats_alike():
    module = SegmenterModule(Halves(), ["cat", "dog"])
    images = torch.full((2, 3, 4, 6), 51, dtype=torch.uint8)
    found = module(images)
    assert found.shape == (2, 2, 4, 6) and not found.requires_grad
    assert found.argmax(1)[0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(found, module(images / 255))
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        module(images.float())
    with pytest.raises(ValueError, match=r"images \(b, 3, H, W\)"):
        module(images[0])


class Colours:
    """A backbone: mean colours in a grid of 2 x 2."""

    def encode(self, images):
        return np.stack(
            [
                [[part.mean((0, 1)) for part in np.array_split(row, 2, 1)]
                 for row in np.array_split(image_hwc, 2)]
                for image_hwc in images
            ]
        ).astype(np.float32)  # fmt: skip


def test_a_backbone_of_ones_own_is_found_by_its_name():
    config = VisualEncoderConfig(model="own:colours", size_hw=(8, 8))
    with pytest.raises(ModelError, match=r"register_backbone\('colours', load"):
        load_visual_encoder(config)
    ovref_inference.register_backbone("colours", lambda config, device: Colours())
    encoder = load_visual_encoder(config)
    assert (encoder.dim, encoder.grid_hw) == (3, (2, 2))
    image_hwc = np.zeros((8, 8, 3), np.uint8)
    image_hwc[:4] = 200
    top = np.zeros((1, 8, 8), dtype=bool)
    top[0, :4] = True
    ((features_nd, valid),) = encoder.encode_regions([image_hwc], [top])
    assert valid.all() and features_nd.tolist() == [[200, 200, 200]]
    assert as_encoder(encoder) is encoder


def test_a_backbone_that_gives_no_grid_is_refused():
    class Flat:
        def encode(self, images):
            return np.zeros((len(images), 3))

    with pytest.raises(ModelError, match=r"features \(n, h, w, d\), found \(1, 3\)"):
        as_encoder(Flat())
