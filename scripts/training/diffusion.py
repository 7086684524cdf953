"""Stages `diffusion-16`, `-32` and `-64`: one UNet on finer and finer latents."""

import random
from dataclasses import dataclass

import scenes
import text
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, UNet2DConditionModel
from loop import Run, fit
from networks import make_unet, scheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

FINEST = 64


@dataclass(frozen=True)
class Stage:
    """`steps` updates of `count` pictures on latents of one grid; `closeups` is the share of windows among them."""

    grid: int
    steps: int
    count: int
    rate: float
    closeups: float = 0.5
    empty_captions: float = 0.1
    thing_weight: float = 3.0
    text_rate: float = 0.2
    matrices: bool = True

    @property
    def name(self) -> str:
        """Of its checkpoint."""
        return f"diffusion-{self.grid}"


def signal_to_noise(grid: int, closeup: bool) -> Tensor:
    """The schedule's ratio of variances at each timestep.

    A coarser grid has fewer cells to average noise over: the same timestep is to hide as much of the layout on every
    grid. A closeup shows its thing at twice the scale, so that on 32×32 it is a window of a picture on 64×64.
    """
    alphas = scheduler().alphas_cumprod
    return alphas / (1 - alphas) * (FINEST / (2 * grid if closeup else grid)) ** 2


class DiffusionTask(nn.Module):
    """Velocity prediction; weights count the things more than the background, and nearly clean latents less."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(
        self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, target: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        """Loss, and the unweighted error of the noisier and the cleaner half of the timesteps."""
        velocity = self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample.float()
        error = (velocity - target).square()
        each, noisier = error.detach().mean((1, 2, 3)), timesteps >= 500
        return {
            "loss": (weight * error).mean(),
            "noisier": each[noisier].mean(),
            "cleaner": each[~noisier].mean(),
        }


class Data:
    """Noisy latents of captioned scenes."""

    def __init__(self, run: Run, stage: Stage, vae: AutoencoderTiny, tokenizer: CLIPTokenizer, seed: int) -> None:
        self.run, self.stage, self.vae, self.tokenizer, self.seed = run, stage, vae, tokenizer, seed
        self.ratios = torch.stack([signal_to_noise(stage.grid, closeup) for closeup in (False, True)])

    @torch.no_grad()
    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """This process's share of an update: noisy latents, timesteps, tokens, target, weight."""
        run, stage = self.run, self.stage
        rng = random.Random(f"{self.seed}/{stage.name}/{step}/{run.rank}")
        count = stage.count // run.world
        chosen, closeups = text.sample(rng, count, stage.closeups)
        images, masks = scenes.render(chosen, 4 * stage.grid, rng.getrandbits(40), closeups, run.device)
        prompts = [
            "" if rng.random() < stage.empty_captions else scenes.caption(scene, rng, closeup)
            for scene, closeup in zip(chosen, closeups, strict=True)
        ]
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.autocast):
            latents = self.vae.encode(images * 2 - 1).latents.float() * self.vae.config.scaling_factor
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        # Stratified: the batch covers the schedule evenly.
        places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        timesteps = (places * self.ratios.shape[1]).long()
        ratio = self.ratios[torch.tensor(closeups).long(), timesteps]
        signal, sigma = ((r / (1 + r)).sqrt().view(-1, 1, 1, 1).to(run.device) for r in (ratio, 1 / ratio))
        noise = torch.randn(latents.shape, generator=generator).to(run.device)
        things = 1 + stage.thing_weight * F.max_pool2d(masks, 4)
        weight = things / things.mean() * (6 / (1 + ratio)).clamp(max=1).view(-1, 1, 1, 1).to(run.device)
        return (
            signal * latents + sigma * noise,
            timesteps,
            text.encode(self.tokenizer, prompts),
            signal * noise - sigma * latents,
            weight,
        )


def load_vae(run: Run) -> AutoencoderTiny:
    """The run's autoencoder, frozen."""
    return AutoencoderTiny.from_pretrained(run.folder / "model" / "vae").to(run.device).eval().requires_grad_(False)


def train(
    run: Run,
    stage: Stage,
    previous: Stage | None,
    seed: int = 0,
    limit_seconds: float = float("inf"),
    compiled: bool = False,
) -> None:
    """Train on one grid, beginning with the moving average of the stage before."""
    torch.manual_seed(seed)
    task = DiffusionTask(make_unet(), CLIPTextModel.from_pretrained(run.folder / "text_encoder"))
    if previous is not None:
        task.load_state_dict(average(run, previous))
    if compiled:
        task.unet.compile(dynamic=False)
    data = Data(run, stage, load_vae(run), text.tokenizer(run), seed)
    fit(
        run,
        stage.name,
        task,
        stage.steps,
        data,
        lambda done: stage.rate * min(1, 5 * (1 - done) + 0.02),
        stage.matrices,
        {"text_encoder": stage.text_rate},
        limit_seconds=limit_seconds,
    )


def average(run: Run, stage: Stage) -> dict[str, Tensor]:
    """The moving average of the weights in a stage's checkpoint."""
    path = run.folder / "checkpoints" / f"{stage.name}.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["average"]
