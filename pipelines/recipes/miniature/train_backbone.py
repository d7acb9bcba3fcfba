"""Trains the DINOv2 and DINO backbones of the miniature from captions.

    python -m recipes.miniature.train_backbone --work DIR

The real backbones are self-supervised. At this size self-supervision gave nothing usable, so these
are *caption-supervised*: the nouns of captions are the only labels, no mask is seen. It takes two
steps, because a small vision transformer left alone with image-level labels learns stuff and never
things.

1. A small convolutional teacher says for every patch which class it is. Every patch must be one of
   the classes that its image's caption names (partial-label learning), and every named class must
   own some patches (multiple instances). Images are cut and mixed in blocks, each with its own
   label set, so that a patch is classified by its neighbourhood.
2. The transformers learn the teacher's class and features of every patch. Classes are compared by
   cosine, so that features of a class gather around a prototype, as they do in the real backbones.

DINO is the same network with DINOv2's layer scale folded into its projections, trained on with the
loss on its last layer's keys as well, because normalised cuts of those keys are what it is used
for.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import Dinov2Model

from ovref.miniature.shapes import CLASSES, STUFF
from recipes.miniature.architectures import VIT_WIDTH, new_dino, new_dinov2, save_vit
from recipes.miniature.data import load_pool
from recipes.miniature.training import fit, images_to_torch, note, parse_arguments

TEACHER_BATCH, BATCH = 32, 16
TEACHER_WIDTH = 80
GRID = 16
"""Patches along a side."""
OWNED = 14
"""A named class must own about this many of the 256 patches."""


class Probed(nn.Module):
    """A backbone with cosine heads: on its patch tokens, its keys and its class token."""

    def __init__(self, backbone, width=VIT_WIDTH):
        super().__init__()
        self.backbone = backbone
        self.patches = nn.Parameter(torch.randn(len(CLASSES), width) * 0.1)
        self.keys = nn.Parameter(torch.randn(len(CLASSES), width) * 0.1)
        self.image = nn.Linear(width, len(CLASSES))
        self.imitate = nn.Linear(width, TEACHER_WIDTH)
        self.caught = {}
        last = [m for n, m in backbone.named_modules() if n.endswith((".key", ".k_proj"))][-1]
        last.register_forward_hook(lambda module, inputs, output: self.caught.update(keys=output))

    def forward(self, images_nchw):
        """[-1, 1] images -> (patch logits (n, 256, c), key logits (n, 256, c), image logits
        (n, c), guessed features of the teacher (n, 256, TEACHER_WIDTH))."""
        tokens = self.backbone(images_nchw).last_hidden_state
        keys = self.caught["keys"][:, 1:]
        return (
            _cosine(tokens[:, 1:], self.patches),
            _cosine(keys, self.keys),
            self.image(tokens[:, 0]),
            self.imitate(tokens[:, 1:]),
        )


def _cosine(features, prototypes):
    return 16 * functional.normalize(features, dim=-1) @ functional.normalize(prototypes, dim=-1).T


@torch.no_grad()
def give_locality(backbone):
    """Initialises a ViT so that neighbours attend to each other, which a small one takes long to
    learn.

    Positions start as two-dimensional sinusoids, and keys start as a copy of the queries, so that
    attention begins as similarity of place and content.
    """
    width = backbone.config.hidden_size
    place = torch.arange(GRID).float()[:, None] * 2 * torch.pi / GRID
    waves = place * torch.linspace(0.5, 4, width // 4)
    line = torch.cat([waves.sin(), waves.cos()], 1)  # (GRID, width / 2)
    rows, columns = line[:, None].expand(-1, GRID, -1), line[None].expand(GRID, -1, -1)
    grid = torch.cat([rows, columns], -1).flatten(0, 1)
    backbone.embeddings.position_embeddings[0, 1:] = 0.35 * grid
    backbone.embeddings.patch_embeddings.projection.weight.normal_(std=0.1)
    for name, module in backbone.named_modules():
        if name.endswith("q_proj"):
            module.weight.normal_(std=0.1)
            backbone.get_submodule(name.replace("q_proj", "k_proj")).weight.copy_(module.weight)


def mix_blocks(images_nchw, rng, share=0.5):
    """Pastes rectangles of patches of other images into a share of the images.

    Returns:
        (images, source): source int64 (n, 256), the row each patch came from.
    """
    n = len(images_nchw)
    source = torch.arange(n)[:, None, None].repeat(1, GRID, GRID)
    mixed = images_nchw.clone()
    side = images_nchw.shape[-1] // GRID
    for row in np.flatnonzero(rng.random(n) < share):
        other = int(rng.integers(n))
        height, width = rng.integers(6, 13, size=2)
        top, left = rng.integers(0, GRID - height + 1), rng.integers(0, GRID - width + 1)
        source[row, top : top + height, left : left + width] = other
        box = np.s_[:, top * side : (top + height) * side, left * side : (left + width) * side]
        mixed[row][box] = images_nchw[other][box]
    return mixed, source.flatten(1)


def jitter(images_nchw, rng, flip=True, with_flips=False):
    """Random flips (unless captions say left or right), gains and brightness; images in [-1, 1]."""
    n = len(images_nchw)
    flipped = torch.from_numpy(rng.random(n) < 0.5 * flip)
    images = torch.where(flipped[:, None, None, None], images_nchw.flip(-1), images_nchw)
    gain = torch.from_numpy(rng.uniform(0.75, 1.25, (n, 3, 1, 1)).astype(np.float32))
    shift = torch.from_numpy(rng.uniform(-0.2, 0.2, (n, 1, 1, 1)).astype(np.float32))
    images = (images * gain + shift).clamp(-1, 1)
    return (images, flipped) if with_flips else images


class Teacher(nn.Module):
    """Convolutions with a receptive field of about 41 pixels; a logit per class for each of 16x16
    patches."""

    def __init__(self, width=TEACHER_WIDTH):
        super().__init__()

        def conv(narrow, wide, side, stride):
            return [nn.Conv2d(narrow, wide, side, stride, side // 2), nn.BatchNorm2d(wide)]

        self.stem = nn.Sequential(*conv(3, 24, 5, 2), nn.ReLU(), *conv(24, width, 3, 2), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(*conv(width, width, 3, 1), nn.ReLU(), *conv(width, width, 3, 1))
            for _ in range(2)
        )
        self.head = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, images_nchw):
        """[-1, 1] images (n, 3, 64, 64) -> patch logits (n, 256, classes)."""
        return self.head(self.features(images_nchw)).flatten(2).transpose(1, 2)

    def features(self, images_nchw):
        """Input of the head: (n, width, 16, 16), not negative."""
        x = self.stem(images_nchw.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = (x + block(x)).relu()
        return x


def caption_loss(logits_npc, named_nc, source_np):
    """Partial-label and presence terms; see the module docstring. A scalar."""
    allowed = named_nc[source_np]  # (n, p, c): classes that the patch's own image names
    log_p = functional.log_softmax(logits_npc, -1)
    inside = log_p.masked_fill(~allowed, -1e4)
    partial = -torch.logsumexp(inside, -1).mean()
    present = allowed.any(1)
    owned = log_p.exp().topk(OWNED, dim=1).values.mean(1)
    return partial - torch.log(owned.clamp_min(1e-4))[present].mean()


def train_teacher(arguments, pool, steps):
    """The trained Teacher and the facts of its training."""
    torch.manual_seed(6)
    teacher = Teacher().to(memory_format=torch.channels_last)
    named = torch.from_numpy(pool.named_nc)

    def loss_of(step, rng):
        rows = np.sort(rng.integers(len(pool.captions), size=TEACHER_BATCH))
        images, source = mix_blocks(jitter(images_to_torch(pool.images_nhwc[rows]), rng), rng)
        return caption_loss(teacher(images), named[rows], source)

    facts = fit("teacher", arguments.work, teacher, loss_of, steps, rate=3e-3)
    return teacher, facts


def with_stuff(named_nc):
    """bool (n, c): the named classes and all stuff, which captions often leave out."""
    allowed = named_nc.clone()
    allowed[:, : len(STUFF)] = True
    return allowed


@torch.no_grad()
def teach(teacher, images_nchw, named_nc, source_np):
    """Targets from the teacher: class of every patch, int64 (n, 256), and features (n, 256, width).

    A thing must be named by the caption; any stuff will do, because captions often leave it out.
    Features have mean 0 and deviation 1 per channel over the batch.
    """
    allowed = with_stuff(named_nc)
    maps = teacher.features(images_nchw)
    logits = teacher.head(maps).flatten(2).transpose(1, 2)
    features = maps.flatten(2).transpose(1, 2)
    features = (features - features.mean((0, 1))) / (features.std((0, 1)) + 1e-3)
    return logits.masked_fill(~allowed[source_np], -1e4).argmax(-1), features


def probe_loss(outputs, labels_np, present_nc, weight_c, key_weight):
    """Loss of `Probed`'s predictions for patches, keys and the image; and values to log.

    Args:
        outputs: patch logits (n, 256, c), key logits (n, 256, c), image logits (n, c).
        labels_np: int64 (n, 256) classes.
        present_nc: bool (n, c).
        weight_c: of the classes of patches.
        key_weight: of the keys against the patches; 0 leaves them out.
    """
    patch, keys, image = outputs
    loss = functional.cross_entropy(patch.transpose(1, 2), labels_np, weight_c)
    if key_weight:
        by_key = functional.cross_entropy(keys.transpose(1, 2), labels_np, weight_c)
        loss = loss + key_weight * by_key
    whole = functional.binary_cross_entropy_with_logits(image, present_nc.float())
    thing = labels_np >= len(STUFF)
    right = (patch.argmax(-1) == labels_np)[thing].float().mean()
    return loss + whole, {"things": right.item(), "whole": whole.item()}


def train(name, arguments, backbone, pool, teacher, steps, key_weight):
    """Trains `backbone` in place on what the teacher says of patches; returns steps and seconds."""
    model = Probed(backbone)
    named = torch.from_numpy(pool.named_nc)
    # Things cover a fifth of the patches and are the harder part.
    weight = torch.tensor([1.0 if name in STUFF else 3.0 for name in CLASSES])

    def loss_of(step, rng):
        rows = np.sort(rng.integers(len(pool.captions), size=BATCH))
        images = jitter(images_to_torch(pool.images_nhwc[rows]), rng)
        images, source = mix_blocks(images, rng, share=0.3)
        labels, features = teach(teacher, images, named[rows], source)
        *outputs, guess = model(images)
        present = named[rows][source].any(1)
        loss, facts = probe_loss(outputs, labels, present, weight, key_weight)
        return loss + functional.mse_loss(guess, features), facts

    return fit(name, arguments.work, model, loss_of, steps, rate=1.5e-3, decay=0.03)


@torch.no_grad()
def describe_pool(work, name):
    """DINOv2 patch features of a pool, float16 (n, 96, 16, 16), centred over all patches; computed
    once and kept."""
    path = Path(work) / f"described_{name}.npy"
    if not path.is_file():
        model = Dinov2Model.from_pretrained(Path(work) / "dinov2").float().eval()
        pool = load_pool(work, name)
        tokens = torch.cat([
            model(images_to_torch(pool.images_nhwc[i : i + 64])).last_hidden_state[:, 1:].half()
            for i in range(0, len(pool.captions), 64)
        ])  # fmt: skip
        tokens -= tokens.float().mean((0, 1)).half()
        np.save(path, tokens.transpose(1, 2).unflatten(2, (16, 16)).numpy())
    return np.load(path, mmap_mode="r")


def folded(dinov2):
    """A ViT that computes what `dinov2` computes, its layer scale folded into the projections."""
    dino = new_dino()
    renamed = {
        "encoder.layer.": "layers.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    state = {}
    scales = {}
    for name, value in dinov2.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        (scales if "layer_scale" in name else state)[name] = value.clone()
    state.pop("embeddings.mask_token")
    for name, scale in scales.items():
        layer = name[: name.index(".layer_scale")]
        projection = "attention.o_proj" if "layer_scale1" in name else "mlp.fc2"
        state[f"{layer}.{projection}.weight"] *= scale[:, None]
        state[f"{layer}.{projection}.bias"] *= scale
    dino.load_state_dict(state)
    return dino


def main():
    arguments = parse_arguments(__doc__, teacher_steps=1100, steps=2000, dino_steps=600)
    pool = load_pool(arguments.work, "single", "mixed")
    teacher, facts = train_teacher(arguments, pool, arguments.teacher_steps)
    note(arguments.work, teacher=facts)
    torch.manual_seed(3)
    dinov2 = new_dinov2()
    give_locality(dinov2)
    facts = train("dinov2", arguments, dinov2, pool, teacher, arguments.steps, key_weight=0.0)
    note(arguments.work, dinov2=facts)
    save_vit(arguments.work / "dinov2", dinov2)
    dino = folded(dinov2)
    facts = train("dino", arguments, dino, pool, teacher, arguments.dino_steps, key_weight=1.0)
    note(arguments.work, dino=facts)
    save_vit(arguments.work / "dino", dino)


if __name__ == "__main__":
    main()
