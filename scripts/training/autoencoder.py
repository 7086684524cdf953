"""Stage `autoencoder`: the autoencoder on crops of pictures of every size."""

import random

import scenes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from loop import Run, fit
from networks import make_vae
from torch import Tensor, nn

CROP = 64
NOISE = 0.04


class AutoencoderTask(nn.Module):
    """L1, squares and edges on pixels, with more weight on the things; latents are pulled to zero mean, unit variance.

    Every third update decodes latents of twice the size after averaging 2×2 cells, and asks for the reduced picture:
    latents that scale as pictures do are easier to generate (Kouzelis et al. 2025, EQ-VAE).
    """

    def __init__(self, thing_weight: float = 3.0) -> None:
        super().__init__()
        self.vae = make_vae()
        self.thing_weight = thing_weight

    def forward(self, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Loss and PSNR of pictures in [-1, 1]."""
        latents = self.vae.encoder(images)
        decoded, target = latents, images
        if images.shape[-1] > CROP:
            decoded, target, masks = F.avg_pool2d(latents, 2), F.avg_pool2d(images, 2), F.avg_pool2d(masks, 2)
        # A little noise, so that the decoder forgives what diffusion leaves over.
        error = self.vae.decoder(decoded + NOISE * torch.randn_like(decoded)).float() - target
        weight = 1 + self.thing_weight * masks
        edges = sum((error.diff(dim=d).abs() * weight.narrow(d, 1, error.shape[d] - 1)).mean() for d in (-1, -2))
        latents = latents.float()
        moments = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        pixels = (weight * (error.abs() + 2 * error.square())).mean()
        psnr = -10 * (error.detach().square().mean() / 4).log10()
        return {"loss": pixels + edges + 0.1 * moments, "psnr": psnr, "std": latents.std().detach()}


def batch(step: int, count: int, seed: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two crops each of `count` pictures, half of them around a thing, and their masks."""
    rng = random.Random(f"{seed}/autoencoder/{step}")
    pooled = step % 3 == 2
    size = 256 if pooled else (256, 128, 256, 64)[step // 3 % 4]
    crop = 2 * CROP if pooled else CROP
    chosen = [scenes.sample(rng) for _ in range(count // 2 if pooled else count)]
    images, masks = scenes.render(chosen, size, rng.getrandbits(40), device=device)
    crops = []
    for index, scene in enumerate(chosen):
        for near in (True, False):
            centre = scenes.PLACES[str(rng.choice(scene.things).place)] if near else (rng.random(), rng.random())
            left, top = (
                min(max(round((part + rng.uniform(-0.1, 0.1)) * size - crop / 2), 0), size - crop) for part in centre
            )
            both = torch.cat([images, masks], 1)[index, :, top : top + crop, left : left + crop]
            if rng.random() < 0.25:
                both = torch.cat([both[rng.sample(range(3), 3)] * rng.uniform(0.4, 1), both[3:]])
            crops.append(both)
    torch.manual_seed(rng.getrandbits(40))
    both = torch.stack(crops)
    return both[:, :3] * 2 - 1, both[:, 3:]


def train(run: Run, steps: int, seed: int = 0, count: int = 8, matrices: bool = True, rate: float = 2.5e-3) -> None:
    """Train the autoencoder and write it to `model/vae`, with the scaling factor that gives unit variance."""
    torch.manual_seed(seed)
    task = AutoencoderTask()
    share = f"{seed}/{run.rank}"
    average = fit(
        run,
        "autoencoder",
        task,
        steps,
        lambda step: batch(step, count // run.world, share, run.device),
        lambda done: rate * (1 - done) ** 0.8 + 1e-5,
        matrices,
    )
    if run.main and not run.stopping:
        task.load_state_dict(average.weights)
        vae = task.vae.cpu().eval()
        vae.register_to_config(scaling_factor=1 / deviation(vae))
        vae.save_pretrained(run.folder / "model" / "vae")
        print(f"autoencoder: {psnr(vae):.2f} dB", flush=True)


def held_out_pictures(count: int = 32, size: int = 256) -> Tensor:
    """Pictures in [-1, 1] of scenes that training never shows."""
    rng = random.Random("autoencoder/held out")
    return scenes.render([scenes.sample(rng, held_out=True) for _ in range(count)], size, 1)[0] * 2 - 1


@torch.no_grad()
def deviation(vae: AutoencoderTiny) -> float:
    """Standard deviation of the latents of whole pictures."""
    return vae.encode(held_out_pictures()).latents.std().item()


@torch.no_grad()
def psnr(vae: AutoencoderTiny, count: int = 32) -> float:
    """Mean PSNR in dB of decoded latents to held-out pictures."""
    images = held_out_pictures(count)
    decoded = torch.cat([vae.decode(vae.encode(part).latents).sample.clamp(-1, 1) for part in images.split(4)])
    return (-10 * ((decoded - images).square().mean((1, 2, 3)) / 4).log10()).mean().item()
