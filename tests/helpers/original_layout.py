"""The weights of a Stable Diffusion 1 or XL pipeline under the names of original checkpoints."""

import torch

RESNET_OF_UNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS_OF_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
ENDS_OF_XL = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "encoder.layers": "transformer.resblocks", "self_attn": "attn", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
ATTENTION_OF_VAE = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"
}  # fmt: skip


def original_weights(pipeline):
    """Name -> tensor, as in the single files that people share."""
    found = {}
    for name, tensor in pipeline.unet.state_dict().items():
        layers = pipeline.unet.config.layers_per_block
        found["model.diffusion_model." + _of_unet(name, layers)] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        new = _of_vae(name, len(pipeline.vae.config.block_out_channels))
        convolution = ".attn_1." in new and ".norm." not in new and tensor.ndim == 2
        found["first_stage_model." + new] = tensor[:, :, None, None] if convolution else tensor
    second = getattr(pipeline, "text_encoder_2", None)
    first = "cond_stage_model" if second is None else "conditioner.embedders.0"
    for name, tensor in pipeline.text_encoder.state_dict().items():
        bare = name.removeprefix("text_model.")
        found[f"{first}.transformer.text_model.{bare}"] = tensor
    if second is not None:
        found |= _of_open_clip(second.state_dict(), "conditioner.embedders.1.model.")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _of_open_clip(state, prefix):
    """OpenCLIP's text tower: queries, keys and values are one tensor, the projection is turned."""
    found = {}
    for name, tensor in state.items():
        new = name.removeprefix("text_model.")
        for own, original in OPEN_CLIP.items():
            new = new.replace(own, original)
        if name == "text_projection.weight":
            found[prefix + "text_projection"] = tensor.T
        elif ".q_proj." in name:
            joined = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[prefix + new.replace("q_proj.", "in_proj_")] = torch.cat(joined)
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[prefix + new] = tensor
    return found


def _of_unet(name, layers):
    for own, original in (ENDS_OF_UNET | ENDS_OF_XL).items():
        if name.startswith(own + "."):
            return name.replace(own, original, 1)
    side, *rest = name.split(".")
    if side == "mid_block":
        part, number, *rest = rest
        place = {"resnets": 2 * int(number), "attentions": 1}[part]
        return ".".join([f"middle_block.{place}", *_resnet(part, rest)])
    block, part, number, *rest = rest
    block, number = int(block), int(number)
    if side == "down_blocks":
        if part == "downsamplers":
            return ".".join([f"input_blocks.{(block + 1) * (layers + 1)}.0.op", *rest[1:]])
        start = f"input_blocks.{1 + block * (layers + 1) + number}"
    else:
        last = block * (layers + 1) + layers
        if part == "upsamplers":  # behind resnet and attention
            return ".".join([f"output_blocks.{last}.2", *rest])
        start = f"output_blocks.{block * (layers + 1) + number}"
    return ".".join([start, "0" if part == "resnets" else "1", *_resnet(part, rest)])


def _resnet(part, rest):
    return [RESNET_OF_UNET[rest[0]], *rest[1:]] if part == "resnets" else rest


def _of_vae(name, blocks):
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    parts = name.split(".")
    ends = ("conv_in", "conv_out", "norm_out")
    if parts[0] in ("quant_conv", "post_quant_conv") or parts[1] in ends:
        return name
    half, side, number, *rest = parts
    if side == "mid_block":
        part, number, rest = number, rest[0], rest[1:]
        if part == "resnets":
            return ".".join([half, f"mid.block_{int(number) + 1}", *rest])
        tail = ".".join(rest)
        for own, original in ATTENTION_OF_VAE.items():
            tail = tail.replace(own + ".", original + ".")
        return f"{half}.mid.attn_1.{tail}"
    level = int(number) if side == "down_blocks" else blocks - 1 - int(number)
    way = {"down_blocks": "down", "up_blocks": "up"}[side]
    part, number, *rest = rest
    if part == "resnets":
        return ".".join([half, way, str(level), "block", number, *rest])
    return ".".join([half, way, str(level), f"{way}sample", *rest])
