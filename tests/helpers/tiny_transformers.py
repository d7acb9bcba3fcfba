"""Tiny diffusion transformers with random weights, in the real on-disk layouts of their pipelines.

Every part is of the real class: tokenizers, text encoders, autoencoders, networks, schedulers.
"""

import json
import string
from pathlib import Path

import torch

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]{% else %}"
    "[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def clip_tokenizer(folder: Path, max_length: int = 77):
    """As in Stable Diffusion; `folder` is scratch."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in byte_characters()]
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "a n", "an d</w>"]
    vocab = letters + [letter + "</w>" for letter in letters]
    vocab += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = max_length
    return tokenizer


def byte_characters() -> list[int]:
    """The printable stand-in of each byte in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [byte if byte in printable else next(spare) for byte in range(256)]


def clip_text_encoder(tokenizer, projection: bool = False, width: int = 32):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer(max_length: int):
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(letter, -10.0) for letter in string.ascii_letters + string.digits + ",.-'"]
    pieces += [("\u2581" + word, -3.0) for word in ("a", "cat", "dog", "and", "the")]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    tokenizer.model_max_length = max_length
    return tokenizer


def t5_encoder(tokenizer, width: int, d_kv: int = 8, d_ff: int = 37):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=d_kv, d_ff=d_ff, num_layers=2,
                      num_heads=4)  # fmt: skip
    return T5EncoderModel(config).eval()


def _byte_level_vocabulary(special):
    letters = [chr(c) for c in byte_characters()]
    merges = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g"), ("\u0120", "cat"),
              ("\u0120", "dog"), ("t", "h"), ("th", "e")]  # fmt: skip
    tokens = [*letters, *("".join(merge) for merge in merges), *special]
    return {token: i for i, token in enumerate(tokens)}, merges


def qwen_tokenizer():
    from transformers import AddedToken, Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab, merges = _byte_level_vocabulary(special)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.model_max_length = 131072
    return tokenizer


def gemma_tokenizer():
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["\u2581", *string.printable[:95].replace(" ", "")]
    merges = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g"), ("\u2581", "cat")]
    tokens += ["".join(merge) for merge in merges]
    tokenizer = GemmaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, padding_side="right"
    )
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def mistral_processor():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PixtralImageProcessor, PixtralProcessor, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]",
               "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]  # fmt: skip
    vocab, merges = _byte_level_vocabulary(special)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", padding_side="left", additional_special_tokens=special[4:],
        model_max_length=131072,
    )  # fmt: skip
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(), tokenizer=tokenizer,
        chat_template=MISTRAL_TEMPLATE,
    )  # fmt: skip


def _small(vocab: int, layers: int) -> dict:
    """Sizes of a tiny language model."""
    return {
        "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 8192,
    }  # fmt: skip


def vae(channels: int, **options):
    """Latents are a quarter of the image."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4,
        latent_channels=channels, **options,
    ).eval()  # fmt: skip


def sharpened(network):
    """Random attention is nearly uniform; sharper queries give maps that differ by place."""
    for name, parameter in network.named_parameters():
        if any(part in name for part in ("to_q.", "add_q_proj.", "to_qkv_mlp_proj.")):
            parameter.data *= 3
    return network.eval()


def sd3(folder: Path, *, t5: bool = True, **options) -> Path:
    """Latents have 16 channels; block 0 has a second, image-only attention as in 3.5-medium."""
    import diffusers

    torch.manual_seed(1)
    tokenizers = [clip_tokenizer(folder.with_name(f"{folder.name}_clip{n}")) for n in (1, 2)]
    tokenizers[1].pad_token = "!"
    third = t5_tokenizer(512)
    network = diffusers.SD3Transformer2DModel(
        **{
            "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 4,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 64,
            "caption_projection_dim": 32, "pooled_projection_dim": 64, "pos_embed_max_size": 32,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm", **options,
        }
    )  # fmt: skip
    diffusers.StableDiffusion3Pipeline(
        transformer=sharpened(network),
        vae=vae(4, shift_factor=0.06, scaling_factor=1.5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_text_encoder(tokenizers[0], projection=True),
        text_encoder_2=clip_text_encoder(tokenizers[1], projection=True),
        text_encoder_3=t5_encoder(third, 64) if t5 else None,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=third if t5 else None,
    ).save_pretrained(folder)
    return folder


def pixart(folder: Path) -> Path:
    import diffusers

    torch.manual_seed(2)
    tokenizer = t5_tokenizer(512)
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=32, sample_size=16, caption_channels=64,
        use_additional_conditions=False,
    )  # fmt: skip
    diffusers.PixArtSigmaPipeline(
        transformer=sharpened(network), vae=vae(4), tokenizer=tokenizer,
        # Sizes that bitsandbytes' own layout for AVX-512 needs: multiples of 64 in, of 32 out.
        text_encoder=t5_encoder(tokenizer, 64, d_kv=16, d_ff=64),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def sana(folder: Path, *, sprint: bool = False) -> Path:
    import diffusers
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(3)
    tokenizer = gemma_tokenizer()
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3, encoder_block_out_channels=(4, 8, 8),
        decoder_block_out_channels=(4, 8, 8), encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()), scaling_factor=0.41,
    ).eval()  # fmt: skip
    network = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=3,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=16, sample_size=32, patch_size=1, guidance_embeds=sprint,
        qk_norm="rms_norm_across_heads" if sprint else None,
    )  # fmt: skip
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    kind = diffusers.SanaSprintPipeline if sprint else diffusers.SanaPipeline
    kind(
        transformer=sharpened(network), vae=autoencoder, tokenizer=tokenizer,
        text_encoder=Gemma2Model(Gemma2Config(**_small(len(tokenizer), 1))).eval(),
        scheduler=diffusers.SCMScheduler() if sprint
        else diffusers.DPMSolverMultistepScheduler(**flow),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def flux(folder: Path, *, guidance_embeds: bool = True) -> Path:
    import diffusers

    torch.manual_seed(4)
    tokenizer, second = clip_tokenizer(folder.with_name(f"{folder.name}_clip")), t5_tokenizer(512)
    network = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=32,
        guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    diffusers.FluxPipeline(
        transformer=sharpened(network), vae=vae(4, shift_factor=0.1, scaling_factor=0.4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=guidance_embeds
        ),
        tokenizer=tokenizer, text_encoder=clip_text_encoder(tokenizer), tokenizer_2=second,
        text_encoder_2=t5_encoder(second, 24),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _flux2_parts(width: int, guidance_embeds: bool) -> dict:
    import diffusers

    network = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=3 * width, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4,
        latent_channels=4,
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": sharpened(network), "vae": autoencoder, "scheduler": scheduler}


def flux2_klein(folder: Path, *, distilled: bool = True) -> Path:
    import diffusers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    tokenizer = qwen_tokenizer()
    diffusers.Flux2KleinPipeline(
        **_flux2_parts(16, guidance_embeds=False), tokenizer=tokenizer, is_distilled=distilled,
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**_small(len(tokenizer), 28))).eval(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def flux2(folder: Path) -> Path:
    import diffusers
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
    )

    torch.manual_seed(6)
    processor = mistral_processor()
    config = Mistral3Config(
        text_config=MistralConfig(**_small(len(processor.tokenizer), 30)),
        vision_config=PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            head_dim=8, image_size=32, patch_size=16,
        ),
    )  # fmt: skip
    diffusers.Flux2Pipeline(
        **_flux2_parts(16, guidance_embeds=True), tokenizer=processor,
        text_encoder=Mistral3ForConditionalGeneration(config).eval(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen_image(folder: Path) -> Path:
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(7)
    tokenizer = qwen_tokenizer()
    text = _small(len(tokenizer), 2) | {
        "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2], "rope_type": "default"}
    }
    text.pop("head_dim")
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 16,
        },
    )  # fmt: skip
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.0, 0.1, 0.2, 0.3],
        latents_std=[1.0, 1.1, 1.2, 1.3],
    ).eval()  # fmt: skip
    diffusers.QwenImagePipeline(
        transformer=sharpened(network), vae=autoencoder, tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def z_image(folder: Path) -> Path:
    import diffusers
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(8)
    tokenizer = qwen_tokenizer()
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    torch.nn.init.normal_(network.x_pad_token, std=0.1)
    torch.nn.init.normal_(network.cap_pad_token, std=0.1)
    diffusers.ZImagePipeline(
        transformer=sharpened(network), vae=vae(4, shift_factor=0.1, scaling_factor=0.4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer,
        text_encoder=Qwen3Model(Qwen3Config(**_small(len(tokenizer), 2))).eval(),
    ).save_pretrained(folder)  # fmt: skip
    return folder
