"""A tiny GroundingDINO with random weights, its tokenizer, and a detector with a script."""

from types import SimpleNamespace

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    SwinConfig,
)

WORDS = [
    "cat", "dog", "sky", "light", "traffic", "lamp", "tree", "red", "pa", "##nda", "st", "bernard",
    *"abcdefghijklmn",
]  # fmt: skip


def tokenizer():
    """BERT's ids for what the model knows by id; WORDS from 1030 on."""
    tokens = [f"[unused{number}]" for number in range(1030)]
    for number, token in ((0, "[PAD]"), (100, "[UNK]"), (101, "[CLS]"), (102, "[SEP]"),
                          (103, "[MASK]"), (1012, "."), (1029, "?")):  # fmt: skip
        tokens[number] = token
    vocabulary = {token: number for number, token in enumerate([*tokens, *WORDS])}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=256)


def image_processor():
    return GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})


def tiny_grounding_dino(**changes):
    """Three levels of features, so that the last of them is more than one cell."""
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        **{
            "backbone_config": SwinConfig(
                image_size=64,
                patch_size=4,
                embed_dim=8,
                depths=(1, 1, 1),
                num_heads=(1, 2, 2),
                window_size=4,
                out_features=["stage2", "stage3"],
                drop_path_rate=0.0,
            ),
            "text_config": BertConfig(
                vocab_size=1030 + len(WORDS),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=256,
            ),
            "num_queries": 20,
            "d_model": 32,  # a multiple of 32, for group norm
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "num_feature_levels": 3,
            **changes,
        }
    )
    return GroundingDinoForObjectDetection(config).eval()


class ScriptedDetector:
    """Answers as a GroundingDINO would; what it sees is a script.

    The script is a list of (box as centre and size in [0, 1], probability of each token by its
    number in the prompt or by its text).
    """

    device = torch.device("cpu")
    model = SimpleNamespace(special_tokens=torch.tensor([101, 102, 1012, 1029]))

    def __init__(self, script, longest=256):
        self.script, self.prompts, self.batches, self.inside = script, [], [], []
        self.config = SimpleNamespace(
            max_text_len=longest, text_config=SimpleNamespace(max_position_embeddings=512)
        )
        self._names = {number: token for token, number in tokenizer().get_vocab().items()}

    def __call__(self, pixel_values, pixel_mask, input_ids, attention_mask):
        self.batches.append(len(input_ids))
        self.inside.append(pixel_mask)
        logits, boxes = [], []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            tokens = [self._names[int(number)] for number in ids[: mask.sum()]]
            self.prompts.append(tokens)
            rows = torch.full((len(self.script), 256), -torch.inf)
            for row, (_, chances) in zip(rows, self.script, strict=True):
                for place, token in enumerate(tokens):
                    chance = chances.get(place, chances.get(token, 0.01))
                    row[place] = torch.logit(torch.tensor(chance))
            logits.append(rows)
            boxes.append(torch.tensor([box for box, _ in self.script]))
        return SimpleNamespace(logits=torch.stack(logits), pred_boxes=torch.stack(boxes))
