"""Invalid images and class names are refused; views of images are accepted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.encoders.load import load_visual_encoder
from ovref_inference.proposers.config import GroundingDinoConfig, MaskFormerConfig
from ovref_inference.proposers.detectors import load_detector
from ovref_inference.proposers.load import opencut_proposer
from ovref_inference.proposers.mask_former import load_mask_former
from ovref_inference.segmenters.corrclip import CorrClipSegmenter
from ovref_inference.segmenters.fossil import FossilSegmenter, TextOnlySegmenter
from ovref_inference.segmenters.freeda import FreedaSegmenter
from ovref_inference.segmenters.retclip import RetClipSegmenter
from ovref_inference.segmenters.vocseg import VocSegSegmenter

# Whatever is checked is checked before any of these is asked.
NONE = SimpleNamespace()
VISUAL = SimpleNamespace(model="none", settings={})
COLLECTION = SimpleNamespace(
    url="none", textual=NONE, manifest=SimpleNamespace(templates=("a {}.",), visual=VISUAL)
)
SEGMENTERS = (
    FossilSegmenter(COLLECTION, NONE, NONE, NONE),
    TextOnlySegmenter(NONE, NONE, NONE),
    FreedaSegmenter(COLLECTION, NONE, NONE),
    VocSegSegmenter(COLLECTION, NONE, NONE, NONE),
    RetClipSegmenter(COLLECTION, NONE, NONE, NONE),
    CorrClipSegmenter(COLLECTION, NONE, NONE, NONE, NONE),
)
IMAGE = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)


@pytest.fixture(params=SEGMENTERS, ids=lambda segmenter: type(segmenter).__name__)
def segmenter(request):
    return request.param


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGE, r"images must be a list of images, found one array \(8, 9, 3\)"),
        (torch.from_numpy(IMAGE), "images must be a list of images, found one array"),
        ([torch.from_numpy(IMAGE)], "must be a numpy array .* found Tensor"),
        ([Image.fromarray(IMAGE)], "must be a numpy array .* found Image"),
        (["photo.png"], "must be a numpy array .* found str"),
        ([IMAGE, IMAGE / 255], r"uint8, found \(8, 9, 3\) float64"),
        ([IMAGE.transpose(2, 0, 1)], r"\(H, W, 3\).*, found \(3, 8, 9\) uint8"),
        ([IMAGE[..., 0]], r"\(H, W, 3\).*, found \(8, 9\) uint8"),
        ([np.dstack([IMAGE, IMAGE[..., :1]])], r"\(H, W, 3\).*, found \(8, 9, 4\) uint8"),
        ([IMAGE[:0]], "must have a pixel"),
    ],
)
def test_what_is_no_image_is_refused_in_the_same_words(segmenter, images, message):
    with pytest.raises(ValueError, match=message):
        segmenter.segment(images, ["red"])


@pytest.mark.parametrize("names", ["red", [], ["red", " "], ["red", 3], (None,)])
def test_what_is_no_list_of_names_is_refused_in_the_same_words(segmenter, names):
    with pytest.raises(ValueError, match="names must be a list of one or more non-empty texts"):
        segmenter.segment([IMAGE], names)


def views():
    """Pairs: a view whose strides torch refuses, and the same image as an array of its own."""
    for view in (IMAGE[..., ::-1], IMAGE[:, ::-1], IMAGE.transpose(1, 0, 2)[::-1]):
        yield view, np.ascontiguousarray(view)


def test_an_image_may_be_a_view_of_another():
    """As OpenCV's images are, turned to RGB by image[..., ::-1]."""
    config = VisualEncoderConfig(model="miniature:dino", size_hw=(32, 32), features="keys")
    encoder = load_visual_encoder(config, device="cpu")
    propose = opencut_proposer(encoder, device="cpu")
    for view, copy in views():
        np.testing.assert_array_equal(encoder.encode([view]), encoder.encode([copy]))
        np.testing.assert_array_equal(propose([view])[0], propose([copy])[0])


def test_detectors_take_views_and_images_of_any_height():
    """Three rows are not three channels, nor is one."""
    former = load_mask_former(
        MaskFormerConfig(model="miniature:maskformer", min_score=0.0), device="cpu"
    )
    detector = load_detector(
        GroundingDinoConfig(model="miniature:grounding_dino", box_threshold=0.0, text_threshold=0),
        device="cpu",
    )
    for view, copy in views():
        (one,), (other,) = former.propose([view]), former.propose([copy])
        np.testing.assert_array_equal(one.mask_probs_nhw, other.mask_probs_nhw)
        (one,), (other,) = (detector.detect([image], [["boat"]]) for image in (view, copy))
        np.testing.assert_array_equal(one.boxes_xyxy, other.boxes_xyxy)
    for height in (1, 3):
        low = np.repeat(IMAGE[:1], height, axis=0)
        (found,) = former.propose([low])
        assert found.mask_probs_nhw.shape[1:] == (height, 9) and len(found.class_probs_nc)
        (boxes,) = detector.detect([low], [["boat"]])
        assert (boxes.boxes_xyxy[:, 3] <= height).all()
        # Rows that are all equal are the same image, whatever their number.
        (twice,) = former.propose([np.repeat(low, 2, axis=0)])
        np.testing.assert_allclose(
            found.class_probs_nc[:, -1], twice.class_probs_nc[:, -1], atol=1e-4
        )
