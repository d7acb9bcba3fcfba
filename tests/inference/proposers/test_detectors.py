"""MM-Grounding-DINO, LLMDet and OWLv2 against transformers' own post-processing."""

import numpy as np
import pytest
import torch
from detector_fakes import WORDS, image_processor, tiny_grounding_dino, tokenizer
from torchvision.ops import clip_boxes_to_image
from transformers import (
    BertConfig,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SwinConfig,
    ViTConfig,
    ViTModel,
)

from ovref.known_models.random_weights import varied, write_tokenizer
from ovref_inference import ModelError
from ovref_inference.proposers.config import GroundingDinoConfig
from ovref_inference.proposers.detectors import load_detector
from ovref_inference.proposers.owl import Owl

RNG = np.random.default_rng(1)
IMAGES = [RNG.integers(0, 256, (*size_hw, 3), dtype=np.uint8) for size_hw in ((64, 96), (90, 50))]


@pytest.fixture(scope="module")
def mm_folder(tmp_path_factory):
    return _mm_grounding_dino(tmp_path_factory.mktemp("mm"), stages=(2, 3))


@pytest.fixture(scope="module")
def llmdet_folder(tmp_path_factory):
    """As `llmdet_large`: all four stages of the backbone, and a fifth level of features."""
    return _mm_grounding_dino(tmp_path_factory.mktemp("llmdet"), stages=(1, 2, 3, 4))


def _mm_grounding_dino(folder, stages):
    """With a level of features more than stages; each class head has a bias of its own, of the size
    of LLMDet's."""
    torch.manual_seed(0)
    deepest = stages[-1]
    backbone = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=(1,) * deepest,
        num_heads=(1, *(2,) * (deepest - 1)), window_size=4,
        out_features=[f"stage{stage}" for stage in stages], drop_path_rate=0.0,
    )  # fmt: skip
    text = BertConfig(
        vocab_size=1030 + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=256,
    )  # fmt: skip
    model = MMGroundingDinoForObjectDetection(
        MMGroundingDinoConfig(
            backbone_config=backbone, text_config=text, num_queries=20, d_model=32,
            encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
            num_feature_levels=len(stages) + 1,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "class_embed" in name:
            parameter.data -= 4.4 + 0.1 * torch.rand(())
    model.eval().save_pretrained(folder)
    GroundingDinoProcessor(image_processor(), tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def owl_folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32}  # fmt: skip
    config = Owlv2Config(
        vision_config={**sizes, "image_size": 64, "patch_size": 16},
        text_config={**sizes, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
        projection_dim=32,
    )
    folder = tmp_path_factory.mktemp("owl")
    varied(Owlv2ForObjectDetection(config)).save_pretrained(folder)
    Owlv2ImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    write_tokenizer(folder, config.text_config)
    return str(folder)


@pytest.mark.parametrize("named", ["mm_folder", "llmdet_folder"])
def test_mm_grounding_dino_and_llmdet_find_what_the_library_does(request, named):
    folder = request.getfixturevalue(named)
    config = GroundingDinoConfig(model=folder, box_threshold=0.0, text_threshold=0.0, nms_iou=1.0)
    detector = load_detector(config, device="cpu")
    processor = GroundingDinoProcessor.from_pretrained(folder)
    model = MMGroundingDinoForObjectDetection.from_pretrained(folder).eval()
    for image_hwc in IMAGES:
        inputs = processor(images=image_hwc, text="cat.", return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        theirs = processor.post_process_grounded_object_detection(
            outputs, inputs.input_ids, 0.0, 0.0, [image_hwc.shape[:2]]
        )[0]
        expected = clip_boxes_to_image(theirs["boxes"], image_hwc.shape[:2])
        ours = detector.detect([image_hwc], [["cat"]])[0]
        assert len(ours.scores) == 20 and (np.diff(ours.scores) <= 0).all()
        of_cat = outputs.logits[0, :, 1].sigmoid()  # the token behind [CLS]
        np.testing.assert_allclose(np.sort(ours.scores), of_cat.sort().values, rtol=1e-4)
        np.testing.assert_allclose(
            np.sort(ours.boxes_xyxy, axis=0), np.sort(expected.numpy(), axis=0), atol=0.05
        )


def test_llmdets_first_export_is_refused(tmp_path):
    """Its file calls itself a GroundingDINO, whose class in transformers has no such bias."""
    model = tiny_grounding_dino()
    biases = {f"class_embed.{n}.bias": torch.tensor([-4.41]) for n in range(2)}
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | biases)
    GroundingDinoProcessor(image_processor(), tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its scores would be wrong: it is LLMDet's first export"):
        load_detector(GroundingDinoConfig(model=str(tmp_path)), device="cpu")


def own_answer(folder, image_hwc, texts, threshold):
    processor = Owlv2Processor.from_pretrained(folder)
    model = Owlv2ForObjectDetection.from_pretrained(folder).eval()
    inputs = processor(
        images=image_hwc, text=[texts], return_tensors="pt", padding="max_length", max_length=16
    )
    with torch.inference_mode():
        outputs = model(**inputs)
    return processor.image_processor.post_process_object_detection(
        outputs, threshold, [image_hwc.shape[:2]]
    )[0]


def test_owlv2_finds_what_the_library_does(owl_folder):
    nouns = [["boat", "green tree", "boat"], ["grass"]]
    config = GroundingDinoConfig(model=owl_folder, box_threshold=0.0, nms_iou=1.0)
    detector = load_detector(config, device="cpu")
    assert isinstance(detector, Owl)
    found = detector.detect(IMAGES, nouns)
    for image_hwc, texts, ours in zip(IMAGES, nouns, found, strict=True):
        asked = list(dict.fromkeys(texts))
        theirs = own_answer(owl_folder, image_hwc, [f"a photo of a {text}" for text in asked], 0.0)
        boxes = clip_boxes_to_image(theirs["boxes"], image_hwc.shape[:2])
        solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        order = theirs["scores"][solid].argsort(descending=True, stable=True)
        np.testing.assert_allclose(ours.scores, theirs["scores"][solid][order], atol=1e-5)
        np.testing.assert_allclose(ours.boxes_xyxy, boxes[solid][order], atol=1e-2)
        np.testing.assert_array_equal(ours.nouns, theirs["labels"][solid][order])
        assert len(ours.scores) > 2
    # A threshold leaves the surest.
    middle = float(np.median(found[0].scores))
    sure = load_detector(
        GroundingDinoConfig(model=owl_folder, box_threshold=middle, nms_iou=1.0), device="cpu"
    ).detect(IMAGES[:1], nouns[:1])[0]
    expected = found[0].scores[found[0].scores > middle]
    np.testing.assert_allclose(sure.scores[: len(expected) - 1], expected[:-1], atol=1e-5)
    assert abs(len(sure.scores) - len(expected)) <= 1  # the median itself may round either way
    assert len(detector.detect(IMAGES[:1], [[]])[0].scores) == 0


def test_batches_do_not_change_owlv2(owl_folder):
    config = GroundingDinoConfig(model=owl_folder, box_threshold=0.0, template="{}")
    detector = load_detector(config, device="cpu")
    together = detector.detect(IMAGES, [["boat", "house", "sky"], ["grass"]])
    for image_hwc, nouns, one in zip(
        IMAGES, [["boat", "house", "sky"], ["grass"]], together, strict=True
    ):
        alone = detector.detect([image_hwc], [nouns])[0]
        np.testing.assert_allclose(alone.scores, one.scores, atol=1e-5)
        np.testing.assert_allclose(alone.boxes_xyxy, one.boxes_xyxy, atol=1e-2)


def test_what_is_no_detector_is_refused(tmp_path):
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                       intermediate_size=8)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ModelError, match=r"type 'vit'.*expected a GroundingDINO.*OWLv2"):
        load_detector(GroundingDinoConfig(model=str(tmp_path)))
    with pytest.raises(ValueError, match="template must have one"):
        GroundingDinoConfig(model="x", template="a photo")
