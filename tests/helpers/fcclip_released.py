"""FC-CLIP as it was released: the names of its tensors, and its head written out slowly from them.

Names and order of operations are those of bytedance/fc-clip; nothing of ovref or transformers is
used here.
"""

import torch
from torch.nn.functional import (
    conv2d,
    grid_sample,
    group_norm,
    interpolate,
    layer_norm,
    linear,
    multi_head_attention_forward,
    relu,
)

HEADS, LEVELS, POINTS = 4, 3, 4
SIZES = {"widths": (8, 16, 24, 32), "dim": 12, "queries": 5, "hidden": 32, "feedforward": 20,
         "encoder_feedforward": 24, "encoder_layers": 2, "decoder_layers": 4}  # fmt: skip


def pair(tensors, name, *shape):
    tensors[f"{name}.weight"] = torch.randn(*shape) * shape[-1] ** -0.5 if len(shape) > 1 else 1.0
    if len(shape) == 1:
        tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(shape)
    tensors[f"{name}.bias"] = 0.1 * torch.randn(shape[0])


def released_head(seed=0, **sizes):
    """Random tensors under the names of a released checkpoint's head."""
    torch.manual_seed(seed)
    s = SIZES | sizes
    hidden, found = s["hidden"], {}
    pixel, predictor = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    for i, width in enumerate(s["widths"][:0:-1]):
        pair(found, f"{pixel}.input_proj.{i}.0", hidden, width, 1, 1)
        pair(found, f"{pixel}.input_proj.{i}.1", hidden)
    found[f"{pixel}.transformer.level_embed"] = torch.randn(LEVELS, hidden)
    for i in range(s["encoder_layers"]):
        layer = f"{pixel}.transformer.encoder.layers.{i}"
        samples = HEADS * LEVELS * POINTS
        pair(found, f"{layer}.self_attn.sampling_offsets", 2 * samples, hidden)
        pair(found, f"{layer}.self_attn.attention_weights", samples, hidden)
        pair(found, f"{layer}.self_attn.value_proj", hidden, hidden)
        pair(found, f"{layer}.self_attn.output_proj", hidden, hidden)
        pair(found, f"{layer}.norm1", hidden)
        pair(found, f"{layer}.linear1", s["encoder_feedforward"], hidden)
        pair(found, f"{layer}.linear2", hidden, s["encoder_feedforward"])
        pair(found, f"{layer}.norm2", hidden)
    pair(found, f"{pixel}.mask_features", hidden, hidden, 1, 1)
    found[f"{pixel}.adapter_1.weight"] = torch.randn(hidden, s["widths"][0], 1, 1) * 0.3
    pair(found, f"{pixel}.adapter_1.norm", hidden)
    found[f"{pixel}.layer_1.weight"] = torch.randn(hidden, hidden, 3, 3) * 0.06
    pair(found, f"{pixel}.layer_1.norm", hidden)
    for i in range(s["decoder_layers"]):
        for kind, attention in (("self", "self_attn"), ("cross", "multihead_attn")):
            name = f"{predictor}.transformer_{kind}_attention_layers.{i}"
            found[f"{name}.{attention}.in_proj_weight"] = torch.randn(3 * hidden, hidden) * 0.2
            found[f"{name}.{attention}.in_proj_bias"] = 0.1 * torch.randn(3 * hidden)
            pair(found, f"{name}.{attention}.out_proj", hidden, hidden)
            pair(found, f"{name}.norm", hidden)
        name = f"{predictor}.transformer_ffn_layers.{i}"
        pair(found, f"{name}.linear1", s["feedforward"], hidden)
        pair(found, f"{name}.linear2", hidden, s["feedforward"])
        pair(found, f"{name}.norm", hidden)
    pair(found, f"{predictor}.decoder_norm", hidden)
    for name in ("query_feat", "query_embed"):
        found[f"{predictor}.{name}.weight"] = torch.randn(s["queries"], hidden)
    found[f"{predictor}.level_embed.weight"] = torch.randn(LEVELS, hidden)
    for i in range(3):
        pair(found, f"{predictor}.mask_embed.layers.{i}", hidden, hidden)
        width = s["dim"] if i == 2 else hidden
        pair(found, f"{predictor}.class_embed.layers.{i}", width, hidden)
    pair(found, f"{predictor}._mask_pooling_proj.0", hidden)
    pair(found, f"{predictor}._mask_pooling_proj.1", hidden, hidden)
    found[f"{predictor}.logit_scale"] = torch.tensor(3.1)
    found["void_embedding.weight"] = torch.randn(1, s["dim"])
    return found


class SlowHead:
    """FC-CLIP's head on tensors under their released names, one image at a time."""

    def __init__(self, tensors):
        self.tensors = tensors

    def of(self, name):
        return self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")

    def norm(self, name, values):
        weight, bias = self.of(name)
        return layer_norm(values, weight.shape, weight, bias)

    def full(self, name, values):
        return linear(values, *self.of(name))

    def layers(self, name):
        return 1 + max(int(k.removeprefix(f"{name}.").split(".")[0]) for k in self.tensors
                       if k.startswith(f"{name}."))  # fmt: skip

    def __call__(self, maps):
        """[(c, h, w)] of four strides -> mask logits (q, h, w) and embeddings (q, d) by layer."""
        levels, features = self.pixels(maps)
        return self.predict(levels, features)

    def pixels(self, maps):
        pixel = "sem_seg_head.pixel_decoder"
        sources, positions, sizes = [], [], []
        for i, one in enumerate(maps[:0:-1]):
            projected = conv2d(one[None], *self.of(f"{pixel}.input_proj.{i}.0"))
            projected = group_norm(projected, 32, *self.of(f"{pixel}.input_proj.{i}.1"))[0]
            sizes.append(projected.shape[1:])
            sources.append(projected.flatten(1).T)
            level = self.tensors[f"{pixel}.transformer.level_embed"][i]
            positions.append(sine(sizes[-1], projected.shape[0]) + level)
        tokens, places = torch.cat(sources), torch.cat(positions)
        centres = torch.cat(
            [torch.stack(torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w,
                                        indexing="ij"), -1).reshape(-1, 2) for h, w in sizes]
        ).flip(1)  # fmt: skip
        for i in range(self.layers(f"{pixel}.transformer.encoder.layers")):
            layer = f"{pixel}.transformer.encoder.layers.{i}"
            attended = self.deformable(
                f"{layer}.self_attn", tokens + places, tokens, centres, sizes
            )
            tokens = self.norm(f"{layer}.norm1", tokens + attended)
            wide = relu(self.full(f"{layer}.linear1", tokens))
            tokens = self.norm(f"{layer}.norm2", tokens + self.full(f"{layer}.linear2", wide))
        levels, start = [], 0
        for h, w in sizes:
            levels.append(tokens[start : start + h * w].T.reshape(-1, h, w))
            start += h * w
        lateral = conv2d(maps[0][None], self.of(f"{pixel}.adapter_1")[0])
        lateral = group_norm(lateral, 32, *self.of(f"{pixel}.adapter_1.norm"))
        up = interpolate(levels[-1][None], lateral.shape[2:], mode="bilinear")
        out = conv2d(lateral + up, self.of(f"{pixel}.layer_1")[0], padding=1)
        out = relu(group_norm(out, 32, *self.of(f"{pixel}.layer_1.norm")))
        return levels, conv2d(out, *self.of(f"{pixel}.mask_features"))[0]

    def deformable(self, name, queries, values, centres, sizes):
        """Each query takes a few samples beside its own place on every level, head by head."""
        count, hidden = queries.shape
        values = self.full(f"{name}.value_proj", values).reshape(-1, HEADS, hidden // HEADS)
        offsets = self.full(f"{name}.sampling_offsets", queries)
        offsets = offsets.reshape(count, HEADS, LEVELS, POINTS, 2)
        shares = self.full(f"{name}.attention_weights", queries).reshape(count, HEADS, -1)
        shares = shares.softmax(2).reshape(count, HEADS, LEVELS, POINTS)
        found, start = torch.zeros(count, HEADS, hidden // HEADS), 0
        for level, (h, w) in enumerate(sizes):
            part = values[start : start + h * w]
            start += h * w
            for head in range(HEADS):
                image = part[:, head].T.reshape(1, -1, h, w)
                places = centres[:, None] + offsets[:, head, level] / torch.tensor([w, h])
                samples = grid_sample(image, 2 * places[None] - 1, align_corners=False)[0]
                found[:, head] += (samples * shares[:, head, level]).sum(2).T
        return self.full(f"{name}.output_proj", found.flatten(1))

    def predict(self, levels, features):
        predictor = "sem_seg_head.predictor"
        asked = self.tensors[f"{predictor}.query_embed.weight"]
        states = self.tensors[f"{predictor}.query_feat.weight"]
        found = [self.heads(states, features)]
        for i in range(self.layers(f"{predictor}.transformer_ffn_layers")):
            one = levels[i % LEVELS]
            source = one.flatten(1).T + self.tensors[f"{predictor}.level_embed.weight"][i % LEVELS]
            small = interpolate(found[-1][0][None], one.shape[1:], mode="bilinear")[0]
            hidden_from = small.flatten(1).sigmoid() < 0.5
            hidden_from[hidden_from.all(1)] = False
            name = f"{predictor}.transformer_cross_attention_layers.{i}"
            states = self.norm(f"{name}.norm", states + self.attention(
                f"{name}.multihead_attn", states + asked,
                source + sine(one.shape[1:], one.shape[0]), source, hidden_from
            ))  # fmt: skip
            name = f"{predictor}.transformer_self_attention_layers.{i}"
            states = self.norm(f"{name}.norm", states + self.attention(
                f"{name}.self_attn", states + asked, states + asked, states, None
            ))  # fmt: skip
            name = f"{predictor}.transformer_ffn_layers.{i}"
            wide = relu(self.full(f"{name}.linear1", states))
            states = self.norm(f"{name}.norm", states + self.full(f"{name}.linear2", wide))
            found.append(self.heads(states, features))
        return found

    def attention(self, name, query, key, value, mask):
        found, _ = multi_head_attention_forward(
            query[:, None], key[:, None], value[:, None], query.shape[1], HEADS,
            self.tensors[f"{name}.in_proj_weight"], self.tensors[f"{name}.in_proj_bias"],
            None, None, False, 0.0, *self.of(f"{name}.out_proj"), training=False,
            need_weights=False, attn_mask=mask,
        )  # fmt: skip
        return found[:, 0]

    def heads(self, states, features):
        predictor = "sem_seg_head.predictor"
        states = self.norm(f"{predictor}.decoder_norm", states)
        masks = torch.einsum("qc,chw->qhw", self.steps("mask_embed", states), features)
        pooled = torch.zeros(len(states), features.shape[0])
        for i, mask in enumerate(masks):
            if (mask > 0).any():
                pooled[i] = features[:, mask > 0].mean(1)
        pooled = self.norm(f"{predictor}._mask_pooling_proj.0", pooled)
        pooled = self.full(f"{predictor}._mask_pooling_proj.1", pooled)
        return masks, self.steps("class_embed", pooled + states)

    def steps(self, name, values):
        for i in range(3):
            values = self.full(f"sem_seg_head.predictor.{name}.layers.{i}", values)
            values = relu(values) if i < 2 else values
        return values


def sine(size_hw, width):
    """(h w, width) positions as in DETR, normalised: half for the row, half for the column."""
    h, w = size_hw
    rows = (torch.arange(1, h + 1) / (h + 1e-6) * 2 * torch.pi)[:, None].expand(h, w)
    columns = (torch.arange(1, w + 1) / (w + 1e-6) * 2 * torch.pi)[None].expand(h, w)
    half = torch.arange(width // 2)
    periods = 10000 ** (2 * (half // 2) / (width // 2))
    halves = []
    for places in (rows, columns):
        angles = places[:, :, None] / periods
        halves.append(torch.stack([angles[:, :, 0::2].sin(), angles[:, :, 1::2].cos()], 3))
    return torch.cat([one.flatten(2) for one in halves], 2).reshape(h * w, width)
