"""Every shipped folder loads in its real library and gives finite outputs."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from ovref.miniature.scenes import render  # noqa: E402
from ovref.miniature.shapes import CLASSES  # noqa: E402
from ovref_miniature import WEIGHTS, weights_path  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def images():
    pixels = np.stack([render(i, "test").image_hwc for i in range(2)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_missing_weights_are_named():
    with pytest.raises(FileNotFoundError, match="no miniature weights called 'sam9'"):
        weights_path("sam9")


def test_folders_are_small():
    for name in WEIGHTS:
        size = sum(p.stat().st_size for p in weights_path(name).rglob("*") if p.is_file())
        most = 18 if name == "stable_diffusion_3" else 12
        assert size < most * 2**20, f"{name} takes {size} bytes"


def test_stable_diffusion_draws_the_same_image_from_the_same_seed():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        weights_path("stable_diffusion"), torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)

    def generate(seed):
        generator = torch.Generator().manual_seed(seed)
        return pipeline("a red boat on the water", num_inference_steps=3, height=64, width=64,
                        generator=generator, output_type="np").images[0]  # fmt: skip

    image = generate(1)
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()
    np.testing.assert_array_equal(image, generate(1))
    assert not np.array_equal(image, generate(2))


def test_stable_diffusion_3_draws_the_same_image_from_the_same_seed():
    """The miniature is loaded by the code that loads the real model, from the shipped parts."""
    from ovref.models.loading import load_pipeline

    pipeline = load_pipeline(
        "miniature:stable_diffusion_3", revision=None, scheduler="flow_euler", dtype="float32",
        device="cpu",
    )  # fmt: skip

    def generate(seed):
        generator = torch.Generator().manual_seed(seed)
        return pipeline("a red boat on the water", num_inference_steps=2, height=64, width=64,
                        generator=generator, output_type="np").images[0]  # fmt: skip

    image = generate(1)
    assert image.shape == (64, 64, 3) and np.isfinite(image).all() and image.std() > 0.02
    np.testing.assert_array_equal(image, generate(1))
    assert not np.array_equal(image, generate(2))
    assert pipeline.text_encoder_3 is None
    shared = "stable_diffusion/text_encoder/model.safetensors"
    for ours, theirs in ((pipeline.vae, "stable_diffusion/vae/diffusion_pytorch_model.safetensors"),
                         (pipeline.text_encoder.text_model, shared)):  # fmt: skip
        state = load_file(weights_path("clip").parent / theirs)
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, state[name].float(), msg=name)


def test_tokenizers_agree_and_encode_anything():
    from transformers import CLIPTokenizer

    one = CLIPTokenizer.from_pretrained(weights_path("stable_diffusion") / "tokenizer")
    other = CLIPTokenizer.from_pretrained(weights_path("clip"))
    for text in ("two traffic lights", "Xylophone über 東京", ""):
        ids = one(text).input_ids
        assert ids == other(text).input_ids
        assert ids[0] == one.bos_token_id == 4094 and ids[-1] == one.eos_token_id == 4095
    assert one.decode(one("a brick wall").input_ids[1:-1]).strip() == "a brick wall"
    assert one.model_max_length == 77


@torch.no_grad()
@pytest.mark.parametrize("folder", ["clip", "clip_convnext"])
def test_clip_embeds_images_and_texts(folder, images):
    import open_clip

    name = f"local-dir:{weights_path(folder)}"
    model, _ = open_clip.create_model_from_pretrained(name)
    ids = open_clip.get_tokenizer(name)(["a photo of a tree", "a tree on the grass"])
    assert ids.shape == (2, 77)
    seen, textual = model.encode_image(images), model.encode_text(ids)
    assert seen.shape == textual.shape and seen.dtype == textual.dtype == torch.float32
    assert torch.isfinite(seen).all() and torch.isfinite(textual).all()


def test_both_clips_have_one_text_tower():
    states = [
        load_file(weights_path(name) / "open_clip_model.safetensors")
        for name in ("clip", "clip_convnext")
    ]
    for name, value in states[0].items():
        if not name.startswith("visual."):
            assert torch.equal(states[1][name], value), name


def test_the_convolutional_clip_names_regions(tmp_path):
    from ovref_inference.encoders.clip_towers import load_clip
    from recipes.miniature.tokenizer import save_tokenizer
    from recipes.miniature.train_clip_convnext import noun_embeddings, region_accuracy

    clip = load_clip("miniature:clip_convnext", "")[0].eval()
    nouns_cd = noun_embeddings(clip, save_tokenizer(tmp_path, pad="!"))
    right = region_accuracy(clip.visual, nouns_cd, scenes=24)
    assert right["stuff"] > 0.95 and right["things"] > 0.9


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "dino"])
def test_backbones_give_a_token_per_patch(name, images):
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(weights_path(name), dtype=torch.float32).eval()
    tokens = model(images).last_hidden_state
    assert tokens.shape == (2, 257, model.config.hidden_size) and torch.isfinite(tokens).all()
    processor = AutoImageProcessor.from_pretrained(weights_path(name))
    pixels = processor(render(0, "test").image_hwc, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels[0], images[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_classifier_gives_a_logit_per_class(images):
    from recipes.miniature.measure import load_classifier

    logits = load_classifier()(images)
    assert logits.shape == (2, 27) and torch.isfinite(logits).all()


def test_clip_rc_segments_test_scenes():
    from ovref_inference import load_segmenter

    state = load_file(weights_path("clip_rc") / "clip_rc.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    segmenter = load_segmenter("miniature:clip_rc", "clip_rc", device="cpu")
    assert segmenter.head.setting == "inductive" and len(segmenter.head.unseen) == 6
    scenes = [render(i, "test") for i in range(24)]
    found = segmenter.segment([scene.image_hwc for scene in scenes], CLASSES)
    right = [one.labels_hw == s.label_hw for one, s in zip(found, scenes, strict=True)]
    assert np.mean(right) > 0.7  # tests/benchmarks/results/clip_rc.md has more than 0.8
