"""AgentSD in AUTOMATIC1111's WebUI and in Forge: an always visible script with enable, preset and ratio."""

import logging
from typing import Any

import gradio as gr
from modules import scripts, shared
from torch import Tensor

from agentsd.hosts import ldm

PRESET, RATIO = "AgentSD preset", "AgentSD ratio"


def forge_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, extra: dict[str, Any]) -> Tensor:
    """The attention that Forge was started with."""
    from backend import attention

    out: Tensor = attention.attention_function(q, k, v, heads)
    return out


def in_forge(p: Any) -> bool:
    """Whether the model is Forge's, which has hooks for attention, or AUTOMATIC1111's, which has none."""
    return hasattr(p.sd_model, "forge_objects")


def release(p: Any) -> None:
    """Take off what an image that failed may have left on. Forge takes a fresh clone for each sampling."""
    if not in_forge(p):
        ldm.remove(p.sd_model.model.diffusion_model)


class AgentSDScript(scripts.Script):
    def title(self) -> str:
        return "AgentSD"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """The controls, and the names under which they are written into images and read back."""
        with gr.Accordion("AgentSD", open=False):
            enabled = gr.Checkbox(False, label="Enable", info="Cheaper self-attention in SD 1.x, 2.x and XL.")
            preset = gr.Dropdown(
                list(ldm.presets()),
                value="paper",
                label="Preset",
                info="paper: as published, changes the image most. faithful: stays closest to the stock image. "
                "fast: fewest agents. hires: for 1024×1024 and more.",
            )
            ratio = gr.Slider(
                0.0,
                0.75,
                value=0.4,
                step=0.05,
                label="Ratio",
                info="paper: share of the tokens merged away. More is faster and loses detail. "
                "No effect in faithful, fast and hires.",
            )
        self.infotext_fields = [(enabled, lambda parameters: PRESET in parameters), (preset, PRESET), (ratio, RATIO)]
        self.paste_field_names = [PRESET, RATIO]
        return [enabled, preset, ratio]

    def process(self, p: Any, enabled: bool, preset: str, ratio: float) -> None:
        """Called once before the images."""
        release(p)

    def process_batch(self, p: Any, enabled: bool, preset: str, ratio: float, **_: Any) -> None:
        """Called before each batch: here AUTOMATIC1111's UNet gets its hooks."""
        if enabled and not in_forge(p):
            self.accelerate(p, preset, ratio)

    def process_before_every_sampling(self, p: Any, enabled: bool, preset: str, ratio: float, **_: Any) -> None:
        """Called before each sampling, the first and that of hires fix: here Forge's clone gets its hooks."""
        if enabled and in_forge(p):
            self.accelerate(p, preset, ratio)

    def postprocess_batch(self, p: Any, *_: Any, **__: Any) -> None:
        release(p)

    def accelerate(self, p: Any, preset: str, ratio: float) -> None:
        """Put the acceleration on, or say why not; note it in the parameters of the images."""
        model = p.sd_model
        try:
            config = ldm.from_preset(preset, ratio)
            if in_forge(p):
                objects = model.forge_objects
                objects.unet = ldm.attach(objects.unet, config, lambda host: host.predictor, forge_attention)
            else:
                unet = model.model.diffusion_model
                ldm.apply(unet, config, model.num_timesteps, lambda: bool(shared.loaded_hypernetworks))
        except ValueError as error:
            logging.warning("AgentSD is not applied: %s", error)
            return
        p.extra_generation_params.update({PRESET: preset, RATIO: ratio})
