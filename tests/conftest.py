"""Tiny Stable Diffusion parts with random weights, of the real diffusers and transformers classes."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentsd import planning
from compatibility import compatibility, pytest_addoption, pytest_sessionfinish  # noqa: F401

TinyUNet = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def tiny_grids_are_accelerated() -> Iterator[int]:
    """Accelerate the tests' models, whose grids are below the default of min_tokens; return that default."""
    shipped = planning.MIN_TOKENS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "MIN_TOKENS", 1)
        yield shipped


@pytest.fixture
def shipped_min_tokens(tiny_grids_are_accelerated: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the default of min_tokens that users have, which is in force during the test."""
    monkeypatch.setattr(planning, "MIN_TOKENS", tiny_grids_are_accelerated)
    return tiny_grids_are_accelerated


def build_unet(seed: int = 0, **overrides: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**options | overrides).eval()


@pytest.fixture(scope="session")
def tiny_unet() -> TinyUNet:
    """Return a factory of UNets with seeded random weights; keywords replace fields of the configuration."""
    return build_unet


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a StableDiffusionPipeline of random weights: 64x64 pixels, VAE factor 4, 16x16 tokens."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=64,
        )
        tokenizer = build_tokenizer(tmp_path_factory.mktemp("tokenizer"))
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        text_encoder = CLIPTextModel(text).eval()
    StableDiffusionPipeline(
        unet=build_unet(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def build_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.:"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


@pytest.fixture
def tiny_pipeline(tiny_pipeline_folder: Path) -> Any:
    """Return a fresh pipeline of :func:`tiny_pipeline_folder`, free to change."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, use_safetensors=True)


@pytest.fixture(scope="session")
def tiny_single_file(tiny_pipeline_folder: Path) -> Path:
    """Return the weights of :func:`tiny_pipeline_folder` in one file, named as in the original Stable Diffusion."""
    state = {}
    folder = tiny_pipeline_folder
    for name, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        state[f"model.diffusion_model.{original_unet_name(name)}"] = value
    for name, value in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        name = original_vae_name(name)
        attention = "mid.attn_1" in name and name.endswith("weight") and "norm" not in name
        state[f"first_stage_model.{name}"] = value[:, :, None, None].contiguous() if attention else value
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    file = folder.with_name("single.safetensors")
    save_file(state, file)
    return file


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_unet_name(name: str) -> str:
    for pattern, replacement in (
        (r"time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
        (r"conv_in", "input_blocks.0.0"),
        (r"conv_norm_out", "out.0"),
        (r"conv_out", "out.2"),
        (r"down_blocks\.(\d)\.resnets\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.0"),
        (r"down_blocks\.(\d)\.attentions\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.1"),
        (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"mid_block\.attentions\.0", "middle_block.1"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0"),
        (r"up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{2 * int(m[1]) + 1}.2"),
    ):
        name = re.sub(f"^{pattern}", replacement, name)
    return re.sub(r"^(\w+_blocks?\.[\d.]+\.)(\w+)(?=\.\w+$)", lambda m: m[1] + RESNET.get(m[2], m[2]), name)


def original_vae_name(name: str) -> str:
    for pattern, replacement in (
        (r"coder\.down_blocks\.(\d)\.resnets\.(\d)", r"coder.down.\1.block.\2"),
        (r"coder\.down_blocks\.(\d)\.downsamplers\.0", r"coder.down.\1.downsample"),
        (r"coder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"coder.up.{2 - int(m[1])}.block.{m[2]}"),
        (r"coder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"coder.up.{2 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"attn_1\.to_out\.0", "attn_1.proj_out"),
        (r"attn_1\.to_(\w)", r"attn_1.\1"),
        (r"attn_1\.group_norm", "attn_1.norm"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ):
        name = re.sub(pattern, replacement, name)
    return name
