"""CLIP-RC's network against the paper's equations, written out token by token."""

import math
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch

from ovref_inference.encoders.config import TextEncoderConfig
from ovref_inference.encoders.load import load_text_encoder
from ovref_inference.errors import ModelError
from ovref_inference.segmenters.clip_rc_config import ClipRcNetworkConfig
from ovref_inference.segmenters.clip_rc_network import (
    ClipRcNetwork,
    aligned_patches,
    bridge_mask,
    descriptors,
    load_network,
)

GRID_HW = (4, 6)
SMALL = ClipRcNetworkConfig(
    model="a tiny one", size_hw=(8, 12), regions=4, prompts=3, layers=2, heads=2, ffn=12,
    dropout=0.0, recovery_layers=1,
)  # fmt: skip


def tiny_network(config=SMALL, seed=0):
    torch.manual_seed(seed)
    visual = open_clip.transformer.VisionTransformer(
        image_size=(8, 12), patch_size=2, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
    )
    network = ClipRcNetwork(visual, config)
    for parameter in network.parameters():  # norms and biases too, and what begins with zeros
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return network.eval()


def array(tensor):
    return tensor.detach().double().numpy()


def norm(vectors, module):
    centred = vectors - vectors.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + module.eps)
    return scaled * array(module.weight) + array(module.bias)


def linear(vectors, module):
    return vectors @ array(module.weight).T + array(module.bias)


def attend(own, others, module, visible=lambda i, j: True):
    """Multi-head attention, one token and head at a time."""
    dim, heads = own.shape[1], module.num_heads
    weights, biases = array(module.in_proj_weight), array(module.in_proj_bias)
    q, k, v = (
        x @ weights[i * dim : (i + 1) * dim].T + biases[i * dim : (i + 1) * dim]
        for i, x in enumerate((own, others, others))
    )
    found = np.zeros_like(own)
    for token in range(len(own)):
        seen = [j for j in range(len(others)) if visible(token, j)]
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            scores = np.array([q[token, part] @ k[j, part] for j in seen]) / math.sqrt(dim / heads)
            shares = np.exp(scores - scores.max())
            found[token, part] = (shares / shares.sum()) @ v[seen, part]
    return linear(found, module.out_proj)


def gelu(values):
    return np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)(values)


def slow_encoder(network, image_chw):
    """Fig. 5 and eq. 1 to 3 of one image: G, R and I, L2-normalised."""
    encoder, visual, config = network.encoder, network.encoder.visual, network.config
    rows, columns = GRID_HW
    root, kernel = config.root, array(visual.conv1.weight)
    first = array(visual.class_embedding) + array(visual.positional_embedding)[0]
    kinds, tokens = [("class",)], [first]
    for row in range(rows):
        for column in range(columns):
            patch = image_chw[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            position = array(visual.positional_embedding)[1 + row * columns + column]
            kinds.append(("patch", row * root // rows, column * root // columns))
            tokens.append((kernel * patch).sum((1, 2, 3)) + position)
    for region in range(config.regions):
        kinds.append(("region", region // root, region % root))
        own = array(encoder.regions_mw)[region] if config.update_regions else first
        tokens.append(own)
    tokens = norm(np.array(tokens), visual.ln_pre)

    def visible(i, j):
        one, other = order[i], order[j]
        if "region" not in (one[0], other[0]):
            return True
        return {one[0], other[0]} <= {"patch", "region"} and one[1:] == other[1:]

    order = [kinds[0], *[("prompt",)] * config.prompts, *kinds[1:]]
    for layer, block in enumerate(visual.transformer.resblocks):
        prompts = np.zeros((0, tokens.shape[1]))
        if config.prompts:
            prompts = linear(array(encoder.prompts_lkw)[layer], encoder.project)
        tokens = np.concatenate([tokens[:1], prompts, tokens[1:]])
        normed = norm(tokens, block.ln_1)
        tokens = tokens + attend(normed, normed, block.attn, visible)
        hidden = gelu(linear(norm(tokens, block.ln_2), block.mlp.c_fc))
        tokens = tokens + linear(hidden, block.mlp.c_proj)
        tokens = np.concatenate([tokens[:1], tokens[1 + config.prompts :]])
    if config.prompts:
        seen = 1 + rows * columns
        tokens[:seen] = norm(tokens[:seen], encoder.prompt_norm)
    joint = norm(tokens, visual.ln_post) @ array(visual.proj)
    joint /= np.linalg.norm(joint, axis=1, keepdims=True)
    return joint[0], joint[1 + rows * columns :], joint[1 : 1 + rows * columns]


def slow_layer(own, others, layer):
    own = norm(own + attend(own, others, layer.attention), layer.norm_attended)
    hidden = np.maximum(linear(own, layer.linear1), 0)
    return norm(own + linear(hidden, layer.linear2), layer.norm_fed)


def slow_decoder(queries, patches, decoder):
    """Eq. 7: both branches see what the other one was."""
    queries, patches = linear(queries, decoder.queries), linear(patches, decoder.patches)
    for layer in decoder.layers:
        before = queries
        queries = slow_layer(queries, patches, layer.queries)
        patches = slow_layer(patches, before, layer.patches)
    return queries, patches


def enlarged(regions, root, row, column):
    """A region's embedding at a patch: bilinear between the centres of the regions."""
    y, x = (
        min(max((place + 0.5) * root / side - 0.5, 0), root - 1)
        for place, side in zip((row, column), GRID_HW, strict=True)
    )
    top, left = min(int(y), root - 1), min(int(x), root - 1)
    below, right = min(top + 1, root - 1), min(left + 1, root - 1)
    dy, dx = y - top, x - left
    at = lambda i, j: regions[i * root + j]  # noqa: E731
    upper = (1 - dx) * at(top, left) + dx * at(top, right)
    return (1 - dy) * upper + dy * ((1 - dx) * at(below, left) + dx * at(below, right))


def slow_network(network, image_chw, classes):
    """Logits of one image, and all that the recovery loss compares."""
    config = network.config
    whole, regions, patches = slow_encoder(network, image_chw)
    aligned = []
    for place, patch in enumerate(patches):
        parts = [whole] if "global" in config.align else []
        if "regions" in config.align:
            parts.append(enlarged(regions, config.root, *divmod(place, GRID_HW[1])))
        aligned.append(np.concatenate([*parts, patch]))
    about = [whole + region for region in regions] if config.regions else [whole]
    related = [np.concatenate([one * text, text]) for one in about for text in classes]
    queries, decoded = slow_decoder(np.array(related), np.array(aligned), network.decoder)
    logits = np.zeros((len(classes), len(patches)))
    for c in range(len(classes)):
        for p in range(len(patches)):
            products = [queries[m * len(classes) + c] @ decoded[p] for m in range(len(about))]
            logits[c, p] = sum(products) / len(products)
    return logits.reshape(len(classes), *GRID_HW), (queries, decoded, np.array(related), patches)


CASES = {
    "paper": {},
    "one region": {"regions": 1},
    "trained regions": {"update_regions": True},
    "no prompts": {"prompts": 0},
    "only the image beside": {"align": ("global",)},
    "only regions beside": {"align": ("regions",)},
    "without all three": {"regions": 0, "align": (), "recovery_layers": 0},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_scores_are_those_of_the_equations(changes):
    network = tiny_network(replace(SMALL, **changes))
    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((2, 3, 8, 12))
    classes = rng.standard_normal((5, 8))
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    found = network(torch.from_numpy(pixels).float(), torch.from_numpy(classes).float())
    assert found.recovery is None
    for number in range(2):
        logits, _ = slow_network(network, pixels[number], classes)
        assert np.abs(logits).max() > 0.1
        np.testing.assert_allclose(array(found.logits_nchw[number]), logits, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 2])
def test_recovery_is_that_of_the_equations_and_of_training_alone(layers):
    network = tiny_network(replace(SMALL, recovery_layers=layers)).train()
    rng = np.random.default_rng(2)
    pixels, classes = rng.standard_normal((1, 3, 8, 12)), rng.standard_normal((3, 8))
    found = network(torch.from_numpy(pixels).float(), torch.from_numpy(classes).float()).recovery
    _, (queries, decoded, related, patches) = slow_network(network, pixels[0], classes)
    recovered = slow_decoder(queries, decoded, network.recovery.decoder)
    wanted = [related, patches]
    own = [linear(recovered[0], network.recovery.descriptors),
           linear(recovered[1], network.recovery.patches)]  # fmt: skip
    np.testing.assert_allclose(array(found.descriptors_nqe[0]), own[0], atol=1e-4)
    np.testing.assert_allclose(array(found.patches_npd[0]), own[1], atol=1e-4)
    np.testing.assert_allclose(array(found.wanted_descriptors_nqe[0]), wanted[0], atol=1e-5)
    np.testing.assert_allclose(array(found.wanted_patches_npd[0]), wanted[1], atol=1e-5)
    assert not found.wanted_patches_npd.requires_grad
    assert not found.wanted_descriptors_nqe.requires_grad


def test_clip_is_frozen_and_always_evaluates():
    network = tiny_network().train()
    visual = network.encoder.visual
    assert not visual.training and network.decoder.training
    assert not any(parameter.requires_grad for parameter in visual.parameters())
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    logits = network(torch.randn(2, 3, 8, 12), torch.randn(4, 8)).logits_nchw
    logits.square().mean().backward()
    used = [n for n, p in network.named_parameters() if p.grad is not None and p.grad.any()]
    assert "encoder.prompts_lkw" in used and not any("visual" in name for name in used)
    assert all(torch.equal(value, before[name]) for name, value in visual.state_dict().items())
    state = network.trained_state(with_recovery=False)
    assert not any("visual" in name or name.startswith("recovery") for name in state)


def test_a_bridge_of_one_region_without_prompts_sees_no_class_token():
    hidden = bridge_mask((1, 2), 1, 0) == -math.inf
    assert hidden.tolist() == [  # class, two patches, region
        [False, False, False, True],
        [False, False, False, False],
        [False, False, False, False],
        [True, False, False, False],
    ]


def test_regions_must_divide_the_grid():
    with pytest.raises(ValueError, match=r"9 regions \(3 x 3\) do not divide a grid of 4 x 6"):
        bridge_mask((4, 6), 3, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": 8}, "regions must be a square number or 0, found 8"),
        ({"regions": 0}, "align must leave out 'regions'"),
        ({"regions": 0, "align": (), "update_regions": True}, "update_regions must be false"),
        ({"align": ("global", "global")}, "align must name each part once"),
        ({"model": ""}, "model must name"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_settings_that_make_no_network_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


MINIATURE = replace(SMALL, model="miniature:clip", size_hw=(64, 96), heads=4)


CPU = torch.device("cpu")


def test_without_prompts_and_bridge_the_image_is_embedded_as_clip_does():
    config = replace(MINIATURE, prompts=0, regions=0, align=("global",), size_hw=(64, 64))
    network, pixels = load_network(config, CPU)
    text = load_text_encoder(TextEncoderConfig(model="miniature:clip"), device="cpu")
    image_hwc = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    encoded = network.encoder(pixels([image_hwc], (64, 64)))
    np.testing.assert_allclose(
        encoded.whole_nd.detach().numpy(), text.encode_images([image_hwc]), atol=1e-5
    )
    assert aligned_patches(encoded, (8, 8), ("global",)).shape == (1, 64, 2 * 64)
    assert descriptors(encoded, torch.zeros(5, 64)).shape == (1, 5, 2 * 64)


def test_images_that_are_not_square_and_bfloat16():
    network, pixels = load_network(MINIATURE, CPU)
    assert network.encoder.grid_hw == (8, 12)
    some = pixels([np.full((20, 30, 3), 90, np.uint8)], (64, 96))
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = network(some, torch.eye(64)[:3])
    exact = network(some, torch.eye(64)[:3])
    assert found.logits_nchw.shape == (1, 3, 8, 12) and found.recovery is not None
    near = (found.logits_nchw.float() - exact.logits_nchw).abs().max()
    assert near < 0.1 * exact.logits_nchw.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_hw": (64, 100)}, "multiples of miniature:clip's patch of 8 pixels"),
        ({"regions": 9}, "9 regions .* do not divide a grid of 8 x 12"),
        ({"heads": 7}, "heads must divide 64"),
        ({"model": "miniature:nothing"}, "no miniature model 'nothing'"),
    ],
)
def test_networks_that_do_not_fit_their_clip_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        load_network(replace(MINIATURE, **changes), CPU)
