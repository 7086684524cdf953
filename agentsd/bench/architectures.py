"""UNets to measure: architectures with random weights, on which latency does not depend, or any pipeline's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Where UNet2DConditionModel's defaults are not those of the architecture.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: an architecture of `ARCHITECTURES` with random weights, or whatever `pipelines.load` takes.
        latent: height and width of the latents.
        batch: pictures in a UNet call; guidance makes two of each.
        fused: torch's fused attention wherever this package has one of its own.
    """

    model: str = "sd15"
    latent: tuple[int, int] = (64, 64)
    batch: int = 2
    dtype: str = "bfloat16"
    device: str = "cpu"
    compile: bool = False
    fused: bool = False


def build(setting: Setting) -> nn.Module:
    """The UNet of a setting, in evaluation mode."""
    from diffusers import UNet2DConditionModel

    dtype = getattr(torch, setting.dtype)
    if setting.model in ARCHITECTURES:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.random.fork_rng(), torch.device(setting.device):
                torch.manual_seed(0)
                unet: nn.Module = UNet2DConditionModel(**ARCHITECTURES[setting.model])
        finally:
            torch.set_default_dtype(before)
    else:
        from agentsd import pipelines

        unet = pipelines.load(setting.model, device=setting.device, dtype=dtype).unet
    return unet.eval().requires_grad_(False)


def caller(unet: Any, setting: Setting, batch: int) -> Callable[[Any, Tensor], Any]:
    """A function that calls a UNet at a timestep with the first `batch` elements of a setting's inputs."""
    generator = torch.Generator().manual_seed(1)
    dtype, config = getattr(torch, setting.dtype), unet.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(setting.batch, *shape, generator=generator)[:batch].to(setting.device, dtype)

    sample, text = noise(config.in_channels, *setting.latent), noise(77, config.cross_attention_dim)
    more = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        more["added_cond_kwargs"] = {"text_embeds": noise(pooled), "time_ids": noise(6)}
    # The peers' wrappers count on the positions that pipelines use.
    return lambda net, timestep: net(sample, timestep, encoder_hidden_states=text, return_dict=False, **more)
