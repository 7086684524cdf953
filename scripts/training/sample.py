#!/usr/bin/env python
"""Draw a grid of pictures from a training's checkpoint, or measure how much it depends on its self-attention.

python scripts/training/sample.py --output runs/demo --stage diffusion-32 --picture samples.png
python scripts/training/sample.py --output runs/demo --stage diffusion-32 --zero
"""

import argparse
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import scenes
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusion import DiffusionTask, signal_to_noise
from networks import make_unet, scheduler
from torch import Tensor, nn
from torchvision.utils import save_image
from transformers import CLIPTextModel, CLIPTokenizer

PROMPTS = (
    "a large panda on the right and a small rocket on the left on a striped blue background",
    "a large fox in the center on a checkered green background",
    "a large penguin on the left and a large owl on the right on a gradient purple background",
    "a small pizza on the top and a large robot on the bottom on a yellow background",
    "a large car on the left on a striped red background",
    "a large snowman in the center on a gradient blue background",
    "a small guitar on the left and a small croissant on the right on a black background",
    "a large sunflower on the bottom on a checkered white background",
)


def load(folder: Path, stage: str, average: bool = True) -> StableDiffusionPipeline:
    """The pipeline of a training in progress."""
    state = torch.load(folder / "checkpoints" / f"{stage}.pt", map_location="cpu", weights_only=True)
    task = DiffusionTask(make_unet(), CLIPTextModel.from_pretrained(folder / "text_encoder"))
    task.load_state_dict(state["average" if average else "task"])
    print(f"{stage}: {state['step']} updates")
    pipe = StableDiffusionPipeline(
        AutoencoderTiny.from_pretrained(folder / "model" / "vae"),
        task.text_encoder,
        CLIPTokenizer.from_pretrained(folder / "model" / "tokenizer"),
        task.unet,
        scheduler(),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: StableDiffusionPipeline, prompts: list[str], grid: int, steps: int = 25, guidance: float = 4.0, batch: int = 8
) -> Tensor:
    """One picture a prompt, seeded by its index, B×3×H×W in [0, 1]; closeups on the schedule of closeups."""
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        ratio = signal_to_noise(grid, part[0].startswith(scenes.CLOSEUP)).double()
        kept = ratio / (1 + ratio)
        betas = 1 - kept / torch.cat([torch.ones(1), kept[:-1]])
        pipe.scheduler = DDIMScheduler.from_config(scheduler().config, trained_betas=betas.tolist())
        with torch.autocast(pipe.device.type, torch.bfloat16):
            drawn = pipe(
                part,
                height=4 * grid,
                width=4 * grid,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(start + index) for index in range(len(part))],
                output_type="pt",
            ).images
        images.append(drawn.float().cpu())
    return torch.cat(images)


def self_attentions(unet: UNet2DConditionModel) -> dict[int, list[tuple[str, nn.Module]]]:
    """The self-attention modules by level: 0 is the latents' own grid, 1 half of it …"""
    levels: dict[int, list[tuple[str, nn.Module]]] = {}
    deepest = len(unet.down_blocks) - 1
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            kind, index = name.split(".")[:2]
            level = (
                {"down_blocks": int(index), "up_blocks": deepest - int(index)}[kind] if "_blocks" in kind else deepest
            )
            levels.setdefault(level, []).append((name, module))
    return dict(sorted(levels.items()))


@contextmanager
def zeroed(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, the modules' outputs are zero."""
    handles = [module.register_forward_hook(lambda *call: torch.zeros_like(call[2])) for module in modules]
    yield
    for handle in handles:
        handle.remove()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """In dB, one a picture."""
    return -10 * (a - b).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def main() -> None:
    """Parse the arguments; draw, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the training")
    parser.add_argument("--stage", required=True, help="whose checkpoint")
    parser.add_argument("--grid", type=int, help="side of the latents; default: the stage's")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    parser.add_argument("--random", type=int, default=16, help="number of closeups, and of random scenes")
    parser.add_argument("--zero", action="store_true", help="PSNR to stock with each grid's self-attention set to zero")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, not their moving average")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    grid = args.grid or int(args.stage.split("-")[1])
    pipe = load(args.output, args.stage, not args.raw).to(args.device)
    if args.zero:
        stock = draw(pipe, list(PROMPTS), grid, args.steps, args.guidance)
        for level, named in self_attentions(pipe.unet).items():
            with zeroed([module for _, module in named]):
                images = draw(pipe, list(PROMPTS), grid, args.steps, args.guidance)
            each = psnr(images, stock)
            print(f"{grid >> level}×{grid >> level} zero: {each.mean():.1f} dB ({each.min():.1f} to {each.max():.1f})")
    if args.picture:
        rng = random.Random("samples")
        chosen = [scenes.sample(rng) for _ in range(2 * args.random)]
        prompts = [scenes.caption(scene) for scene in chosen[: args.random]]
        rows = [draw(pipe, [*PROMPTS, *prompts], grid, args.steps, args.guidance)]
        if grid < 64:
            closeups = [
                scenes.caption(scenes.Scene(scene.things[:1], scene.colour, scene.texture), None, True)
                for scene in chosen[args.random :]
            ]
            prompts += closeups
            rows.append(draw(pipe, closeups, grid, args.steps, args.guidance))
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.cat(rows), args.picture, nrow=8)
        args.picture.with_suffix(".txt").write_text("\n".join([*PROMPTS, *prompts]) + "\n")


if __name__ == "__main__":
    main()
