"""Trains the transformer of the miniature Stable Diffusion 3, within a time that is given.

    python -m recipes.miniature.train_diffusion_transformer --work DIR --output DIR \\
        --seconds 160 --device cuda --processes 16

Needs the shipped VAE, text encoders and DINOv2, all frozen. Rectified flow with timesteps from a
logit-normal distribution (Esser et al., ICML 2024, arXiv 2403.03206, section 3.1); one thing per
image first, then mostly the full variety; a tenth of the captions is dropped for classifier-free
guidance, and most pooled vectors; representation alignment (REPA) as in `train_diffusion`.

The learning rate follows the share of `--seconds` that has passed, so runs differ in their last
bits and in their number of steps. A checkpoint in the work folder is continued; the averaged
weights, `transformer/`, and `training.json` are written to the output with every checkpoint.
`--export FOLDER` makes a pipeline folder of such an output, and notes its steps and seconds in the
`training.json` beside that folder:

    python -m recipes.miniature.train_diffusion_transformer --output DIR \\
        --export pipelines/ovref_miniature/weights/stable_diffusion_3
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.nn import functional
from transformers import Dinov2Model

from ovref_miniature import weights_path
from recipes.miniature.architectures_transformer import (
    BLOCKS,
    GRID,
    WIDTH,
    ZEROS,
    new_transformer,
    pipeline_of,
    save_stable_diffusion_3,
)
from recipes.miniature.data import load_pool
from recipes.miniature.training import images_to_torch, note, save_checkpoint

NAME = "diffusion_transformer"
CAPTION_DROP, POOLED_DROP = 0.1, 0.7
"""Shares of the captions that are replaced by the empty text, and of those that are left whose
pooled vector alone is: it knows the whole caption, and what it says need not be attended to."""
ALONE = 0.08
"""Share of the time in which every image shows one thing at most, when training starts anew."""
FULL = 0.7
"""Share of the full variety after that."""
WARM_UP, FALL = 200, 0.4
"""Steps in which the learning rate rises, and share of the time in which it falls to zero."""
ALIGNMENT, ALIGNED = 0.5, 2
"""Weight of the alignment term, one minus cosine, and the block whose image positions it is about:
REPA aligns at a third of the depth."""
AVERAGE = 0.998
LOG_EVERY, SAVE_SECONDS = 25, 20
EAGER_STEPS = 50
"""Steps before the blocks are compiled, whose speed is logged for comparison."""


@dataclass(frozen=True)
class Prepared:
    """Scenes as the transformer sees them, on the device; n scenes, those with one thing first."""

    latents_nchw: torch.Tensor
    """float32 (n, 4, 16, 16), scaled to unit variance."""
    text_ntc: torch.Tensor
    """(n, 77, channels): both text encoders' states, joined along channels."""
    pooled_nc: torch.Tensor
    """(n, channels) float32: both text encoders' projections."""
    described_npc: torch.Tensor
    """(n, 256, 96): DINOv2's patch features, centred over all patches."""
    alone: int
    """Number of scenes with one thing at most."""
    no_text_tc: torch.Tensor
    """(77, channels): states of the empty text."""
    no_pooled_c: torch.Tensor


@torch.no_grad()
def prepare(pools, device, batch=512):
    """Encodes `[single, mixed]` pools with the shipped models."""
    kept = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    pipeline = pipeline_of(new_transformer()).to(device)
    dinov2 = Dinov2Model.from_pretrained(weights_path("dinov2"), dtype=torch.float32)
    dinov2 = dinov2.to(device).eval()
    latents, described, text, pooled = [], [], [], []

    def encode_text(captions):
        states, _, projections, _ = pipeline.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False
        )
        return states[:, : pipeline.tokenizer_max_length].to(kept), projections

    for pool in pools:
        for start in range(0, len(pool.captions), batch):
            part = slice(start, start + batch)
            images = images_to_torch(pool.images_nhwc[part]).to(device)
            latents.append(pipeline.vae.encode(images).latent_dist.mean)
            described.append(dinov2(images).last_hidden_state[:, 1:].to(kept))
            states, projections = encode_text(list(pool.captions[part]))
            text.append(states)
            pooled.append(projections)
    described = torch.cat(described)
    described -= described.mean((0, 1), dtype=torch.float32).to(kept)
    (no_text,), (no_pooled,) = encode_text([""])
    return Prepared(
        latents_nchw=torch.cat(latents) * pipeline.vae.config.scaling_factor,
        text_ntc=torch.cat(text),
        pooled_nc=torch.cat(pooled),
        described_npc=described,
        alone=len(pools[0].captions),
        no_text_tc=no_text,
        no_pooled_c=no_pooled,
    )


class RepeatedLastToken:
    """Joint attention in which the last text token stands for `count` equal ones.

    The zeros after CLIP's tokens have no positions, so all have the same states in every block:
    one of them, as a key that counts `count` times, gives exactly what all would give.
    """

    def __init__(self, count):
        self.count = count

    def __call__(self, attn, hidden_states, encoder_hidden_states, **unused):
        def heads(x, norm=None):
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat([heads(attn.to_q(image), attn.norm_q),
                           heads(attn.add_q_proj(text), attn.norm_added_q)], 2)  # fmt: skip
        key = torch.cat([heads(attn.to_k(image), attn.norm_k),
                         heads(attn.add_k_proj(text), attn.norm_added_k)], 2)  # fmt: skip
        value = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(text))], 2)
        key, value = (
            torch.cat([x, x[:, :, -1:].expand(-1, -1, self.count - 1, -1)], 2) for x in (key, value)
        )
        out = self.attend(query.to(value.dtype), key.to(value.dtype), value)
        out = out.transpose(1, 2).flatten(2)
        image, text = out.split([image.shape[1], text.shape[1]], 1)
        text = text if attn.context_pre_only else attn.to_add_out(text)
        return attn.to_out[0](image), text

    def attend(self, query_bhqd, key_bhkd, value_bhkd):
        """Attention over the image, the text, and the last token once more for each further one."""
        return functional.scaled_dot_product_attention(query_bhqd, key_bhkd, value_bhkd)


class Denoiser(nn.Module):
    """The transformer, and the head that predicts DINOv2's features."""

    def __init__(self):
        super().__init__()
        self.transformer = new_transformer()
        for block in self.transformer.transformer_blocks:
            block.attn.set_processor(RepeatedLastToken(ZEROS))
        self.transformer.transformer_blocks[ALIGNED].register_forward_hook(
            lambda module, inputs, output: self.caught.update(features=output[1])
        )
        described = Dinov2Model.config_class.from_pretrained(weights_path("dinov2")).hidden_size
        self.describe = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, described)
        )
        self.caught = {}

    def forward(self, noisy_nchw, timesteps_n, text_ntc, pooled_nc):
        """Predicted velocity (noise minus latents) of latents (n, 4, 16, 16) at timesteps in
        [0, 1000] under texts without their zeros, and guessed DINOv2 features of the clean image
        (n, 256, 96)."""
        zero = text_ntc.new_zeros(len(text_ntc), 1, text_ntc.shape[2])
        velocity = self.transformer(
            hidden_states=noisy_nchw,
            encoder_hidden_states=torch.cat([text_ntc, zero], 1),
            pooled_projections=pooled_nc,
            timestep=timesteps_n,
        ).sample
        return velocity, self.describe(self.caught.pop("features"))

    @torch.no_grad()
    def standardise_text(self, text_ntc):
        """Makes the untrained first layer of the text see channels of mean 0 and variance 1.

        The text encoders' states have a few channels that are much larger than all others.
        """
        layer = self.transformer.context_embedder
        std_c, mean_c = torch.std_mean(text_ntc.float().flatten(0, 1), 0)
        layer.weight /= std_c
        layer.bias.copy_(-layer.weight @ mean_c)

    def compile_blocks(self):
        """Compiles the blocks, which share their graphs; hooks stay outside."""
        for block in self.transformer.transformer_blocks:
            block.forward = torch.compile(block.forward, dynamic=False)


def losses_of(model, data, batch, full):
    """Squared error of the velocity and mean cosine with DINOv2's features, of a random batch.

    Args:
        full: probability of a scene of the full variety.
    """
    device, count = data.latents_nchw.device, len(data.latents_nchw)
    uniform = torch.rand(5, batch, device=device)
    mixed = uniform[0] < full
    rows = torch.where(
        mixed,
        data.alone + uniform[1] * (count - data.alone),
        uniform[1] * data.alone,
    ).long().clamp_(max=count - 1)  # fmt: skip
    dropped = uniform[2] < CAPTION_DROP
    text = torch.where(dropped[:, None, None], data.no_text_tc, data.text_ntc[rows])
    without = dropped | (uniform[4] < POOLED_DROP)
    pooled = torch.where(without[:, None], data.no_pooled_c, data.pooled_nc[rows])
    # Evenly spread quantiles: less variance than independent ones.
    spread = (torch.arange(batch, device=device) + uniform[3]) / batch
    sigma = torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4)).sigmoid()[:, None, None, None]
    clean = data.latents_nchw[rows]
    noise = torch.randn_like(clean)
    noisy = (1 - sigma) * clean + sigma * noise
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity, guess = model(noisy, 1000 * sigma.flatten(), text, pooled)
    error = functional.mse_loss(velocity.float(), noise - clean)
    cosine = functional.cosine_similarity(guess.float(), data.described_npc[rows].float(), dim=-1)
    return error, cosine.mean()


def rate_factor(step, passed):
    """Multiplier of the learning rate; `passed` is the share of the time that has passed."""
    return min(1.0, (step + 1) / WARM_UP, max(0.0, (1 - passed) / FALL))


def train(model, data, work, output, *, seconds, batch, rate, compiled, facts, alone=ALONE):
    """Trains until `seconds` have passed, those of earlier starts included.

    Args:
        model: a Denoiser on the data's device.
        facts: what else `training.json` should say.
        alone: share of the time in which every image shows one thing at most.

    Returns:
        The rows of the log.
    """
    cuda = data.latents_nchw.is_cuda
    trained = list(model.parameters())
    optimiser = torch.optim.AdamW(
        trained, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=cuda
    )  # fmt: skip
    mean = [p.detach().clone() for p in trained]
    step, earlier, rows = 0, 0.0, []
    path = Path(work) / f"{NAME}.pt"
    if path.is_file():
        state = torch.load(path, weights_only=True, map_location=data.latents_nchw.device)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        mean, step, earlier = state["mean"], state["step"], state["seconds"]
    torch.manual_seed(3 + step)
    began = logged = saved = time.perf_counter()
    first, sums = step, torch.zeros(2, device=data.latents_nchw.device)

    def passed_seconds():
        return earlier + time.perf_counter() - began

    def save():
        save_checkpoint(path, model, mean, step, passed_seconds(), optimiser=optimiser.state_dict())
        save_average(output, model, mean)
        log = {**facts, "steps": step, "seconds": round(passed_seconds(), 1), "log": rows}
        (Path(output) / "training.json").write_text(json.dumps(log, indent=1) + "\n")

    model.train()
    while (passed := passed_seconds() / seconds) < 1:
        if compiled and step - first == EAGER_STEPS:
            model.compile_blocks()
        for group in optimiser.param_groups:
            group["lr"] = rate * rate_factor(step, passed)
        error, cosine = losses_of(model, data, batch, 0.0 if passed < alone else FULL)
        optimiser.zero_grad(set_to_none=True)
        (error + ALIGNMENT * (1 - cosine)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        with torch.no_grad():
            # A smaller decay at first, or the average would retain the initial weights.
            torch._foreach_lerp_(mean, trained, 1 - min(AVERAGE, (step + 1) / (step + 10)))
            sums += torch.stack([error, cosine]).detach()
        step += 1
        if step % LOG_EVERY == 0:
            loss, similarity = (sums / LOG_EVERY).tolist()  # waits for the device
            if not loss < float("inf"):
                raise FloatingPointError(f"the error is {loss} at step {step}")
            now = time.perf_counter()
            speed = LOG_EVERY / (now - logged)
            rows.append({"step": step, "seconds": round(passed_seconds(), 2),
                         "error": round(loss, 5), "cosine": round(similarity, 5),
                         "steps_per_second": round(speed, 3)})  # fmt: skip
            if step % (4 * LOG_EVERY) == 0 or step - first <= 4 * LOG_EVERY:
                print(json.dumps(rows[-1]), flush=True)
            sums.zero_()
            logged = now
            if now - saved > SAVE_SECONDS:
                save()
                saved = logged = time.perf_counter()
    save()
    return rows


def save_average(output, model, mean):
    """Writes the averaged transformer as fp16 into `output/transformer`."""
    averaged = dict(zip((name for name, _ in model.named_parameters()), mean, strict=True))
    fresh = new_transformer()
    state = fresh.state_dict()
    state |= {name: averaged[f"transformer.{name}"] for name, _ in fresh.named_parameters()}
    fresh.load_state_dict(state)
    fresh.half().save_pretrained(Path(output) / "transformer")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    parser.add_argument("--work", type=Path, help="folder for scenes and checkpoints")
    parser.add_argument("--export", type=Path, help="only make a pipeline folder of the output")
    parser.add_argument("--start", type=Path, help="folder of a transformer to begin with")
    parser.add_argument("--seconds", type=float, default=150, help="of training; preparation aside")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="that draw scenes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="compile the blocks: on an H100 it took 30 s and gave 18 instead of 16 steps/s",
    )
    parser.add_argument("--pools", nargs=2, default=["single_many", "mixed_many"])
    arguments = parser.parse_args()
    if arguments.export is not None:
        transformer = SD3Transformer2DModel.from_pretrained(
            arguments.output / "transformer", torch_dtype=torch.float32
        )
        save_stable_diffusion_3(arguments.export, transformer)
        log = json.loads((arguments.output / "training.json").read_text())
        kept = {name: log[name] for name in ("steps", "seconds", "batch", "device")}
        note(arguments.export.parent, diffusion_transformer=kept)
        return
    if arguments.work is None:
        parser.error("--work is needed for training")
    for folder in (arguments.work, arguments.output):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    pools = [load_pool(arguments.work, name, processes=arguments.processes)
             for name in arguments.pools]  # fmt: skip
    drawn = time.perf_counter()
    data = prepare(pools, arguments.device)
    torch.manual_seed(2)
    model = Denoiser().to(arguments.device)
    if arguments.start is None:
        model.standardise_text(data.text_ntc[:: max(1, len(data.text_ntc) // 4000), :16])
    else:
        start = SD3Transformer2DModel.from_pretrained(arguments.start, torch_dtype=torch.float32)
        model.transformer.load_state_dict(start.state_dict())
    if data.latents_nchw.is_cuda:
        torch.cuda.synchronize()
    facts = {
        "scenes": len(data.latents_nchw),
        "parameters": sum(p.numel() for p in model.transformer.parameters()),
        "blocks": BLOCKS,
        "width": WIDTH,
        "positions": GRID * GRID,
        "batch": arguments.batch,
        "rate": arguments.rate,
        "compiled": arguments.compiled,
        "continued": arguments.start is not None,
        "seconds_drawing": round(drawn - began, 1),
        "seconds_encoding": round(time.perf_counter() - drawn, 1),
        "latents_std": round(float(data.latents_nchw.std()), 4),
        "device": torch.cuda.get_device_name() if data.latents_nchw.is_cuda else "cpu",
    }
    print(json.dumps(facts), flush=True)
    rows = train(
        model, data, arguments.work, arguments.output, seconds=arguments.seconds,
        batch=arguments.batch, rate=arguments.rate, compiled=arguments.compiled, facts=facts,
        alone=ALONE if arguments.start is None else 0.0,
    )  # fmt: skip
    print(f"done after {rows[-1]['step'] if rows else 0} steps")


if __name__ == "__main__":
    main()
