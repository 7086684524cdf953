#!/usr/bin/env python
"""Train the embedded model from nothing: autoencoder, text encoder, diffusion, attribute checker.

One process, CUDA if there is one; or two processes on a CPU:
python scripts/training/demo.py --output runs/demo
OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1 \\
    torchrun --nproc_per_node 2 scripts/training/demo.py --output runs/demo --device cpu

The reasons for the recipe are in agentsd/demo/README.md. The same command resumes an interrupted run bit-identically.
"""

import argparse
import itertools
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from agentsd.demo import scenes
from agentsd.demo.checker import AttributeChecker
from agentsd.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Scene, article
from agentsd.drawing import draw

LENGTH = 32
# Averages of four cells have less variance than the latents of the coarse grid: by a factor of 1 to 2, with the noise.
GROWN_SCALE = 1.5
WIDTH = 128
STAGES = ("text", "vae", "diffusion", "checker")
SAMPLES = (
    "a large red circle on the left, a small blue star on the right, on a striped green background",
    "a large white star in the center on a checkered purple background",
    "a small yellow ring on the top and a large black triangle on the bottom on an orange background",
    "a large blue square on the left and a large yellow circle on the right on a gradient black background",
)


@dataclass(frozen=True)
class Stage:
    """`steps` updates of `batch` pictures on one grid, the learning rate falling from `start` to `end`."""

    grid: int
    steps: int
    batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    vae_steps: int = 2400
    text_steps: int = 1000
    checker_steps: int = 2400
    stages: tuple[Stage, ...] = (
        Stage(16, 300, 64, 1e-3, 1e-3),
        Stage(32, 4400, 16, 1e-3, 2e-4),
        Stage(64, 1200, 8, 6e-4, 2e-5),
    )
    ema: float = 0.997
    empty_captions: float = 0.1
    text_rate: float = 0.2
    thing_weight: float = 3.0


def scheduler() -> DDIMScheduler:
    """DDPM's linear betas, ending in almost pure noise: Stable Diffusion's would leave the layout visible in it."""
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.025,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the vocabulary is one token and any other word is spelt in letters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,-'")
    # Unless they are there first, the trainer numbers the endings of words in no fixed order and breaks ties by number.
    endings = [letter + "</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        special_tokens=endings,
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(scenes.VOCABULARY)] * 4 + [" ".join(letters)], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = list(dict.fromkeys([*letters, *endings, *(m.replace(" ", "") for m in merges)]))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae() -> AutoencoderTiny:
    """Factor 4, four latent channels, 0.2 M parameters."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
    )


def make_unet(grid: int) -> UNet2DConditionModel:
    """Self- and cross-attention on every grid down to 8×8 from `grid`, which is 64×64 at last and coarser at first."""
    levels = 4 if grid < 64 else 5
    return UNet2DConditionModel(
        sample_size=grid,
        block_out_channels=(64, 64, 96, 128, 128)[-levels:],
        layers_per_block=1,
        down_block_types=(*("CrossAttnDownBlock2D",) * (levels - 1), "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn" if levels == 4 else "UNetMidBlock2D",
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (levels - 1)),
        attention_head_dim=(1, 1, 3, 4, 4)[-levels:],
        cross_attention_dim=WIDTH,
    )


@torch.no_grad()
def grow(unet: UNet2DConditionModel, coarse: UNet2DConditionModel) -> None:
    """Make `unet` begin as `coarse` on averages of 2×2 cells, with its new outermost level passing its input through.

    Progressive growing, with the new level's branches at zero: what is left to learn is the detail. The middle block
    keeps its first convolutions only, so that the weights stay within 16 MiB.
    """
    renamed = {}
    for name, value in coarse.state_dict().items():
        kind, _, rest = name.partition(".")
        if kind == "down_blocks":
            index, _, rest = rest.partition(".")
            name = f"down_blocks.{int(index) + 1}.{rest}"
        renamed[name] = value
    first = {name: renamed.pop(f"conv_in.{name}") for name in ("weight", "bias")}
    state = unet.state_dict()
    unet.load_state_dict(state | {name: value for name, value in renamed.items() if name in state})

    down, up = unet.down_blocks[0], unet.up_blocks[-1]
    for resnet in (*down.resnets, *up.resnets):
        nn.init.zeros_(resnet.conv2.weight)
        nn.init.zeros_(resnet.conv2.bias)
    for transformer in (*down.attentions, *up.attentions):
        nn.init.zeros_(transformer.proj_out.weight)
        nn.init.zeros_(transformer.proj_out.bias)
    for resnet in up.resnets:
        nn.init.dirac_(resnet.conv_shortcut.weight)
        nn.init.zeros_(resnet.conv_shortcut.bias)
    upsampler = unet.up_blocks[-2].upsamplers[0].conv
    nn.init.dirac_(upsampler.weight)
    nn.init.zeros_(upsampler.bias)

    # conv_in makes, of each latent channel, means of two rows and two columns (0, 1) and the next row or column alone
    # (1, 2); the strided convolution then finds in them what the coarse conv_in saw around each average of four cells.
    box = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    halve = down.downsamplers[0].conv
    nn.init.zeros_(halve.weight)
    halve.bias.copy_(first["bias"])
    where = {0: (0, 0), 1: (0, 2), 2: (1, 2)}  # tap of the coarse kernel: which mean, at which tap of the stride
    unet.conv_in.bias[:16] = 0
    unet.conv_in.weight[:16] = 0
    for row, column, channel in itertools.product(range(2), range(2), range(4)):
        unet.conv_in.weight[8 * row + 4 * column + channel, channel] = torch.outer(box[row], box[column])
    for a, b, channel in itertools.product(range(3), range(3), range(4)):
        (row, u), (column, v) = where[a], where[b]
        halve.weight[:, 8 * row + 4 * column + channel, u, v] += GROWN_SCALE * first["weight"][:, channel, a, b]


def described(scene: Scene, rng: random.Random) -> str:
    """A scene in words as `scenes.caption`, but some parts left out and joined in different ways."""

    def keep(probability: float) -> bool:
        return rng.random() < probability

    parts = []
    for thing in scene.things:
        words = [thing.size] if thing.size and keep(0.88) else []
        if thing.colour and keep(0.95):
            words.append(thing.colour)
        words.append(str(thing.shape))
        text = article(" ".join(words))
        if thing.place and keep(0.88):
            text += f" in the {thing.place}" if thing.place == "center" else f" on the {thing.place}"
        parts.append(text)
    joiner = ", " if rng.random() < 0.5 else " and "
    text = joiner.join(parts)
    if scene.colour and scene.texture and keep(0.9):
        plain = scene.texture == "plain" and rng.random() < 0.8
        ground = scene.colour if plain else f"{scene.texture} {scene.colour}"
        text += (", on " if rng.random() < 0.4 else " on ") + article(ground) + " background"
    return text


def labels(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `AttributeChecker.forward` should say of fully specified scenes; -1 where it does not matter."""
    shape = torch.full((len(scenes), len(PLACES)), len(SHAPES))
    colour, size = torch.full_like(shape, -1), torch.full_like(shape, -1)
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            place = list(PLACES).index(str(thing.place))
            shape[index, place] = SHAPES.index(str(thing.shape))
            colour[index, place] = list(COLOURS).index(str(thing.colour))
            size[index, place] = list(SIZES).index(str(thing.size))
    ground = torch.tensor([list(COLOURS).index(str(scene.colour)) for scene in scenes])
    texture = torch.tensor([TEXTURES.index(str(scene.texture)) for scene in scenes])
    return shape, colour, size, ground, texture


def attribute_loss(logits: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> Tensor:
    """The sum of the attributes' cross-entropies."""
    pairs = zip(logits, targets, strict=True)
    return torch.stack([F.cross_entropy(g.flatten(0, -2), t.flatten(), ignore_index=-1) for g, t in pairs]).sum()


class VAETask(nn.Module):
    """L1 on pixels and edges, with more weight on the things; latents are pulled to zero mean and unit variance."""

    def __init__(self, thing_weight: float) -> None:
        super().__init__()
        self.vae = make_vae()
        self.thing_weight = thing_weight

    def forward(self, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        latents = self.vae.encoder(images)
        # A little noise, so that the decoder forgives what diffusion leaves over.
        decoded = self.vae.decoder(latents + 0.05 * torch.randn_like(latents)).float()
        weight = 1 + self.thing_weight * masks
        error = decoded - images
        edges = sum((error.diff(dim=d).abs() * weight.narrow(d, 1, error.shape[d] - 1)).mean() for d in (-1, -2))
        latents = latents.float()
        moments = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        psnr = -10 * (error.detach().clamp(-1, 1).square().mean() / 4).log10()
        return {
            "loss": (weight * error.abs()).mean() + edges + 0.1 * moments,
            "psnr": psnr,
            "std": latents.std().detach(),
        }


class TextTask(nn.Module):
    """Teaches the text encoder, before any picture is drawn, to tell what the words put at each place."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.queries = nn.Parameter(torch.randn(len(scenes.PLACES) + 1, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.sizes = (
            [1 + len(scenes.SHAPES), len(scenes.COLOURS), len(scenes.SIZES)],
            [len(scenes.COLOURS), len(scenes.TEXTURES)],
        )
        self.things, self.ground = (nn.Linear(WIDTH, sum(sizes)) for sizes in self.sizes)

    def forward(self, tokens: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        states = self.text_encoder(tokens)[0]
        read, _ = self.attention(self.queries.expand(len(states), -1, -1), states, states, need_weights=False)
        things = self.things(read[:, :-1]).float().split(self.sizes[0], dim=-1)
        ground = self.ground(read[:, -1]).float().split(self.sizes[1], dim=-1)
        return {"loss": attribute_loss((*things, *ground), targets)}


class DiffusionTask(nn.Module):
    """Velocity prediction; the loss weighs the things more than the background."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(
        self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, target: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        velocity = self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample.float()
        return {"loss": (weight * (velocity - target).square()).mean() / weight.mean()}


class CheckerTask(nn.Module):
    """The attribute checker on rendered pictures, distorted in ways in which generated ones differ from them."""

    def __init__(self) -> None:
        super().__init__()
        self.checker = AttributeChecker()

    def forward(self, images: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        return {"loss": attribute_loss(tuple(logits.float() for logits in self.checker(images)), targets)}


class Progress:
    """How many updates a checkpoint has seen."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Trainer:
    """Runs the stages of a recipe in a folder; each resumes at its checkpoint and is skipped when its result exists."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        accelerator: Accelerator,
        checkpoint_every: int = 200,
        sample_every: int = 400,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.accelerator = accelerator
        self.checkpoint_every = checkpoint_every
        self.sample_every = sample_every
        self.device = accelerator.device
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2))
            if not (folder / "model" / "tokenizer").exists():
                make_tokenizer(folder / "model" / "tokenizer")
        accelerator.wait_for_everyone()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "model" / "tokenizer")

    def draw(
        self, name: str, step: int, count: int, size: int
    ) -> tuple[list[scenes.Scene], Tensor, Tensor, random.Random]:
        """This process's share of `count` scenes, with pictures in [-1, 1] and masks."""
        rng = random.Random(f"{self.recipe.seed}/{name}/{step}/{self.accelerator.process_index}")
        chosen = [scenes.sample(rng) for _ in range(count // self.accelerator.num_processes)]
        images, masks = scenes.render(chosen, size, rng.getrandbits(40))
        torch.manual_seed(rng.getrandbits(40))
        return chosen, images * 2 - 1, masks, rng

    def tokens(self, prompts: list[str]) -> Tensor:
        """Token ids, B×LENGTH."""
        return self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).input_ids

    def fit(
        self,
        name: str,
        task: nn.Module,
        steps: int,
        batch: Callable[[int], tuple[Tensor, ...]],
        rate: Callable[[float], float],
        groups: list[dict[str, Any]] | None = None,
        ema: EMAModel | None = None,
        sample: Callable[[int], None] | None = None,
    ) -> None:
        """Minimise `task(*batch(step))["loss"]` by AdamW at `rate(share of the steps done)`."""
        accelerator = self.accelerator
        optimizer = torch.optim.AdamW(
            groups or [{"params": list(task.parameters())}], lr=1.0, betas=(0.9, 0.99), weight_decay=0.01
        )
        scales = [group["lr"] for group in optimizer.param_groups]
        net, optimizer = accelerator.prepare(task, optimizer)
        progress = Progress()
        accelerator.register_for_checkpointing(progress, *([ema] if ema else []))
        checkpoint = self.folder / "checkpoints" / name
        if checkpoint.exists():
            accelerator.load_state(str(checkpoint))
        main = accelerator.is_main_process
        bar = tqdm(total=steps, initial=progress.step, desc=name, disable=not main, mininterval=20)
        started = time.time()
        while progress.step < steps:
            step = progress.step
            for group, scale in zip(optimizer.param_groups, scales, strict=True):
                group["lr"] = scale * rate(step / steps) * min(1, (step + 1) / 100)
            figures = net(*(tensor.to(self.device) for tensor in batch(step)))
            accelerator.backward(figures["loss"])
            accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.step(task.parameters())
            progress.step += 1
            bar.update()
            if main and step % 10 == 0:
                row = {"stage": name, "step": step, "seconds": round(time.time() - started, 1)}
                row |= {key: round(value.item(), 5) for key, value in figures.items()}
                bar.set_postfix(loss=row["loss"], refresh=False)
                with (self.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
            if progress.step % self.checkpoint_every == 0 or progress.step == steps:
                self.checkpoint(checkpoint)
            if main and sample and self.sample_every and progress.step % self.sample_every == 0:
                sample(progress.step)
        bar.close()
        accelerator.free_memory()
        accelerator._custom_objects.clear()

    def checkpoint(self, folder: Path) -> None:
        """Write a checkpoint beside the last one, then put it in its place."""
        fresh = folder.with_name(folder.name + ".new")
        self.accelerator.save_state(str(fresh))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
        self.accelerator.wait_for_everyone()

    def vae(self) -> AutoencoderTiny:
        """Stage `vae`: crops of pictures of every size, a quarter of them in other colours."""
        result = self.folder / "model" / "vae"
        if not result.exists():
            torch.manual_seed(self.recipe.seed)
            task = VAETask(self.recipe.thing_weight)

            def batch(step: int) -> tuple[Tensor, ...]:
                size = (256, 128, 256, 64)[step % 4]
                _, images, masks, rng = self.draw("vae", step, 16, size)
                top, left = rng.randint(0, size - 64), rng.randint(0, size - 64)
                images, masks = (t[..., top : top + 64, left : left + 64] for t in (images, masks))
                some = len(images) // 4
                images[:some] = images[:some, rng.sample(range(3), 3)] * rng.uniform(0.4, 1)
                return images, masks

            self.fit("vae", task, self.recipe.vae_steps, batch, lambda done: 2e-3 * (1 - done) ** 0.8)
            vae = task.vae.cpu().eval()
            with torch.no_grad():
                latents = vae.encode(self.draw("scale", 0, 32, 256)[1]).latents
            vae.register_to_config(scaling_factor=1 / latents.std().item())
            if self.accelerator.is_main_process:
                vae.save_pretrained(result)
            self.accelerator.wait_for_everyone()
        return AutoencoderTiny.from_pretrained(result).to(self.device).eval()

    def text(self) -> CLIPTextModel:
        """Stage `text`."""
        result = self.folder / "text_encoder"
        if not result.exists():
            torch.manual_seed(self.recipe.seed)
            task = TextTask(make_text_encoder(self.tokenizer))

            def batch(step: int) -> tuple[Tensor, ...]:
                rng = random.Random(f"{self.recipe.seed}/text/{step}/{self.accelerator.process_index}")
                chosen = [scenes.sample(rng) for _ in range(128 // self.accelerator.num_processes)]
                return self.tokens([described(scene, rng) for scene in chosen]), *labels(chosen)

            self.fit("text", task, self.recipe.text_steps, batch, lambda done: 1e-3 * (1 - done))
            if self.accelerator.is_main_process:
                task.text_encoder.save_pretrained(result)
            self.accelerator.wait_for_everyone()
        return CLIPTextModel.from_pretrained(result)

    def diffusion(self) -> None:
        """Stages `diffusion-16`, `-32` and `-64`: the same scenes on finer and finer grids."""
        vae, previous = self.vae(), None
        for stage in self.recipe.stages:
            torch.manual_seed(self.recipe.seed)
            unet, text_encoder = make_unet(stage.grid), self.text()
            if previous is not None:
                text_encoder = previous.text_encoder
                if previous.unet.config.block_out_channels == unet.config.block_out_channels:
                    unet.load_state_dict(previous.unet.state_dict())
                else:
                    grow(unet, previous.unet)
            task = previous = DiffusionTask(unet, text_encoder)
            result = self.folder / f"diffusion-{stage.grid}.safetensors"
            if result.exists():
                task.load_state_dict(load_file(result))
                continue
            ema = EMAModel(task.parameters(), decay=self.recipe.ema, use_ema_warmup=True, inv_gamma=10)
            self._diffuse(stage, task, vae, ema)
            ema.copy_to(task.parameters())
            if self.accelerator.is_main_process:
                save_file({key: value.cpu() for key, value in task.state_dict().items()}, result)
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            # Saved anew, the tokenizer would lose the files that older transformers read.
            tokenizer = {file: file.read_bytes() for file in (self.folder / "model" / "tokenizer").iterdir()}
            self.assemble(task, vae).to("cpu", torch.float16).save_pretrained(self.folder / "model")
            for file, content in tokenizer.items():
                file.write_bytes(content)
            # transformers 5 leaves out the prefix of CLIP's weights, without which version 4 does not find them.
            text_encoder = self.folder / "model" / "text_encoder" / "model.safetensors"
            weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(text_encoder).items()}
            save_file(weights, text_encoder, metadata={"format": "pt"})
            # AutoencoderTiny writes a field that it does not read back, and warns of it; and where it was loaded from.
            _edit(self.folder / "model" / "vae" / "config.json", block_out_channels=None, _name_or_path=None)
            # transformers loads in the dtype of the file unless it is told another, diffusers in float32.
            _edit(self.folder / "model" / "text_encoder" / "config.json", dtype="float32")

    def _diffuse(self, stage: Stage, task: DiffusionTask, vae: AutoencoderTiny, ema: EMAModel) -> None:
        name = f"diffusion-{stage.grid}"
        snr = (lambda a: a / (1 - a))(scheduler().alphas_cumprod)
        # A coarser grid has fewer cells to average noise over: the same timestep is to hide as much of the layout on
        # every grid.
        snr = snr * (64 / stage.grid) ** 2
        signal, noise_level = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()

        def batch(step: int) -> tuple[Tensor, ...]:
            chosen, images, masks, rng = self.draw(name, step, stage.batch, stage.grid * 4)
            prompts = ["" if rng.random() < self.recipe.empty_captions else described(scene, rng) for scene in chosen]
            with torch.no_grad():
                latents = vae.encode(images.to(self.device)).latents.float().cpu() * vae.config.scaling_factor
            # Stratified: the batch covers the schedule evenly.
            places = (torch.arange(len(chosen)) + torch.rand(len(chosen))) / len(chosen)
            timesteps = (places * len(snr)).long()
            a, s = signal[timesteps, None, None, None], noise_level[timesteps, None, None, None]
            noise = torch.randn_like(latents)
            weight = 1 + self.recipe.thing_weight * F.max_pool2d(F.max_pool2d(masks, 4), 3, 1, 1)
            return a * latents + s * noise, timesteps, self.tokens(prompts), a * noise - s * latents, weight

        def sample(step: int) -> None:
            ema.store(task.parameters())
            ema.copy_to(task.parameters())
            pipe = self.assemble(task, vae)
            if stage.grid != 64:
                pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, trained_betas=_betas(signal.square()))
            size = stage.grid * 4
            call: dict[str, Any] = {"height": size, "width": size, "guidance_scale": 4.0, "num_inference_steps": 20}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.accelerator.mixed_precision == "bf16"):
                images = draw(pipe, SAMPLES, range(len(SAMPLES)), **call).images
            ema.restore(task.parameters())
            grid = Image.new("RGB", (size * len(images), size))
            for index, image in enumerate(images):
                grid.paste(image, (size * index, 0))
            (self.folder / "samples").mkdir(exist_ok=True)
            grid.save(self.folder / "samples" / f"{name}-{step:05d}.png")

        groups = [
            {"params": list(task.unet.parameters()), "lr": 1.0},
            {"params": list(task.text_encoder.parameters()), "lr": self.recipe.text_rate},
        ]
        ema.to(self.device)
        self.fit(
            name,
            task,
            stage.steps,
            batch,
            lambda done: stage.start * (stage.end / stage.start) ** done,
            groups,
            ema,
            sample,
        )

    def assemble(self, task: DiffusionTask, vae: AutoencoderTiny) -> StableDiffusionPipeline:
        """The pipeline as diffusers knows it."""
        return StableDiffusionPipeline(
            vae, task.text_encoder, self.tokenizer, task.unet, scheduler(), None, None, requires_safety_checker=False
        )

    def checker(self) -> None:
        """Stage `checker`."""
        result = self.folder / "checker.safetensors"
        if result.exists():
            return
        vae = self.vae()
        torch.manual_seed(self.recipe.seed)
        task = CheckerTask()

        def batch(step: int) -> tuple[Tensor, ...]:
            rng = random.Random(f"{self.recipe.seed}/checker/{step}/{self.accelerator.process_index}")
            # Held-out combinations are shown here: the checker has to be right about all of them.
            chosen = [scenes.sample(rng, rng.random() < 0.2) for _ in range(32 // self.accelerator.num_processes)]
            images, _ = scenes.render(chosen, 128, rng.getrandbits(40))
            torch.manual_seed(rng.getrandbits(40))
            if step % 4 == 0:
                with torch.no_grad():
                    latents = vae.encode(images.to(self.device) * 2 - 1).latents
                    latents = latents + torch.rand(()) * 0.3 * torch.randn_like(latents)
                    images = (vae.decode(latents).sample / 2 + 0.5).float().cpu()
            gain = 1 + 0.1 * torch.randn(len(images), 3, 1, 1)
            blurred = F.interpolate(
                F.interpolate(images, scale_factor=0.5, mode="area"), scale_factor=2.0, mode="bilinear"
            )
            images = torch.lerp(images, blurred, torch.rand(len(images), 1, 1, 1)) * gain
            return (images + torch.rand(()) * 0.05 * torch.randn_like(images)).clamp(0, 1), *labels(chosen)

        self.fit("checker", task, self.recipe.checker_steps, batch, lambda done: 2e-3 * (1 - done))
        if self.accelerator.is_main_process:
            save_file({key: value.half() for key, value in task.checker.state_dict().items()}, result)
        self.accelerator.wait_for_everyone()


def _betas(alphas_cumprod: Tensor) -> list[float]:
    previous = torch.cat([torch.ones(1), alphas_cumprod[:-1]])
    return (1 - alphas_cumprod / previous).tolist()


def _edit(path: Path, **changes: Any) -> None:
    config = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Parse the arguments and run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for model, checkpoints, samples and log.jsonl"
    )
    parser.add_argument(
        "--stage", choices=STAGES, action="append", help="only this stage (repeatable); default: all, in order"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of steps of every stage")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="autocast precision")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA if there is one")
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--sample-every", type=int, default=400, metavar="STEPS", help="0: no sample pictures")
    args = parser.parse_args()

    def scaled(steps: int) -> int:
        return max(1, round(steps * args.scale))

    recipe = Recipe()
    recipe = replace(
        recipe,
        **{name: scaled(getattr(recipe, name)) for name in ("vae_steps", "text_steps", "checker_steps")},
        stages=tuple(replace(stage, steps=scaled(stage.steps)) for stage in recipe.stages),
    )
    accelerator = Accelerator(mixed_precision=args.precision, cpu=args.device == "cpu")
    trainer = Trainer(recipe, args.output, accelerator, args.checkpoint_every, args.sample_every)
    for stage in STAGES:
        if not args.stage or stage in args.stage:
            getattr(trainer, stage)()


if __name__ == "__main__":
    main()
