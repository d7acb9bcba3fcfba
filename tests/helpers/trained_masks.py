"""Small trainings of heads by matched masks, shared by several tests."""

from ovref.training.labelled_batches import TrainingData
from ovref.training.mask_settings import MaskFormerNetwork, MaskFormerTraining
from ovref.training.settings import TrainingConfig
from ovref_inference.proposers.open_mask_former import OpenMaskFormerConfig

UNSEEN = ("car", "mushroom", "balloon")
SHARED = {
    "output": "", "device": "cpu", "templates": ("a {}.",),
    "data": TrainingData(
        scenes=12, unseen=UNSEEN, short_side=64, scale=(1.0, 1.2), most_of_one=1.0, threads=1
    ),
    "training": TrainingConfig(steps=4, batch=2, rate=1e-3, save_every=2, log_every=2),
}  # fmt: skip
SIZES = OpenMaskFormerConfig(
    embed_dim=8, depths=(1, 1, 1, 1), swin_heads=(1, 1, 2, 2), window=4, patch=2, drop_path=0.0,
    features=32, mask_features=16, queries=6, hidden=16, decoder_layers=2, heads=2, feedforward=16,
    dropout=0.0,
)  # fmt: skip
MASK_FORMER = MaskFormerTraining(
    network=MaskFormerNetwork(
        model="miniature:clip", size_hw=(64, 64), sizes=SIZES, short_side=64, long_side=96
    ),
    **SHARED,
)
