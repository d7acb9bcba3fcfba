"""Trains the classifier that evaluates generated images.

    python -m recipes.miniature.train_classifier --work DIR

It learns on rendered train scenes which classes are present. It is used only for measuring, and
shares neither weights nor architecture with any model that it evaluates.
"""

import numpy as np
import torch
from torch.nn import functional

from recipes.miniature.architectures import Classifier, save_state
from recipes.miniature.data import load_pool
from recipes.miniature.train_backbone import jitter
from recipes.miniature.training import fit, images_to_torch, note, parse_arguments

BATCH = 48


def main():
    arguments = parse_arguments(__doc__, steps=700)
    pool = load_pool(arguments.work, "single", "mixed")
    torch.manual_seed(5)
    model = Classifier()

    def loss_of(step, rng):
        rows = np.sort(rng.integers(len(pool.captions), size=BATCH))
        images = jitter(images_to_torch(pool.images_nhwc[rows]), rng)
        # Noise and blur make it robust to the artefacts of a VAE.
        images = images + 0.08 * torch.randn_like(images) * torch.rand(BATCH, 1, 1, 1)
        blurred = functional.avg_pool2d(images, 3, 1, 1)
        soft = torch.from_numpy(rng.random(BATCH) < 0.4)[:, None, None, None]
        logits = model(
            torch.where(soft, blurred, images).contiguous(memory_format=torch.channels_last)
        )
        present = torch.from_numpy(pool.present_nc[rows]).float()
        return functional.binary_cross_entropy_with_logits(logits, present) * 10

    facts = fit("classifier", arguments.work, model, loss_of, arguments.steps, rate=2e-3)
    note(arguments.work, classifier=facts)
    (arguments.work / "classifier").mkdir(exist_ok=True)
    save_state(arguments.work / "classifier" / "model.safetensors", model)


if __name__ == "__main__":
    main()
