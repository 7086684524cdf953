"""Every family of pipelines that diffusers builds around a Stable Diffusion UNet, tiny and with random weights.

The parts of a family are built once and copied for each pipeline, so a test may do to its pipeline what it likes.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from conftest import build_tokenizer, build_unet

# In pixels; the VAE halves twice. SDXL has its finest self-attention at half the latent grid, which is 16×16 then.
SIZE, SIZE_XL = 64, 128
PROMPT, NEGATIVE = "a red circle", "blue"

Make = Callable[[], Any]


@dataclass(frozen=True)
class Family:
    """A pipeline as people use it.

    Attributes:
        name: as people call it.
        build: a fresh pipeline, float32 on the CPU.
        draw: `draw(pipe, seed=0)`, a seeded image of a few steps, mostly as latents.
        covered: how many self-attention layers preset `paper` accelerates in such a draw.
        note: what is unmodified.
    """

    name: str
    build: Callable[[], Any]
    draw: Callable[..., Tensor]
    covered: int
    note: str = ""


def seeded(seed: int, make: Make) -> Any:
    """What `make` returns, with random weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def sharpened(net: nn.Module) -> Any:
    """The network with self-attention strong enough that its acceleration shows, and no layer that is born zero."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        for name, module in net.named_modules():
            if name.endswith("attn1"):
                module.to_q.weight.mul_(4)
                module.to_out[0].weight.mul_(4)
    return net.eval().requires_grad_(False)


@cache
def unet(**overrides: Any) -> Any:
    return sharpened(build_unet(**overrides))


@cache
def unet_xl(**overrides: Any) -> Any:
    """Three levels as in SDXL: no attention at the first, the deeper the more transformer blocks."""
    return unet(
        **{
            "sample_size": SIZE_XL // 4,
            "block_out_channels": (16, 16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "use_linear_projection": True,
            "cross_attention_dim": 64,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        }
        | overrides
    )


@cache
def controlnet(seed: int = 0, xl: bool = False) -> Any:
    def make() -> Any:
        net = diffusers.ControlNetModel.from_unet(
            unet_xl() if xl else unet(), conditioning_embedding_out_channels=(8, 8, 16)
        )
        for parameter in net.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        return net.eval().requires_grad_(False)

    return seeded(seed, make)


@cache
def vae(scaling_factor: float = 0.18215) -> Any:
    def make() -> Any:
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=SIZE,
            scaling_factor=scaling_factor,
            force_upcast=False,
        )

    return seeded(1, make).eval().requires_grad_(False)


@cache
def tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return build_tokenizer(Path(folder))


@cache
def text_encoder(projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer().model_max_length,
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return seeded(2, lambda: kind(config)).eval().requires_grad_(False)


@cache
def image_encoder() -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return seeded(3, lambda: transformers.CLIPVisionModelWithProjection(config)).eval().requires_grad_(False)


@cache
def adapter(kind: str = "full_adapter", channels: tuple[int, ...] = (16, 32), factor: int = 4) -> Any:
    def make() -> Any:
        return diffusers.T2IAdapter(3, list(channels), num_res_blocks=1, downscale_factor=factor, adapter_type=kind)

    return seeded(4, make).eval().requires_grad_(False)


@cache
def motion_adapter() -> Any:
    def make() -> Any:
        return diffusers.MotionAdapter(
            block_out_channels=(16, 32),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
        )

    return sharpened(seeded(5, make))


@cache
def bert() -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = LDMBertConfig(
        vocab_size=len(tokenizer()),
        encoder_layers=1,
        encoder_ffn_dim=48,
        encoder_attention_heads=2,
        head_dim=16,
        d_model=32,
    )
    return seeded(6, lambda: LDMBertModel(config)).eval().requires_grad_(False)


@cache
def ip_adapter() -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter as its files hold it: a projection to four tokens, and keys and values per cross-attention."""
    generator = torch.Generator().manual_seed(7)
    width, tokens = 32, 4
    attention = {}
    layers = [name for name in unet().attn_processors if "attn2" in name]
    for index, name in enumerate(layers):
        channels = unet().get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("k", "v"):
            weight = torch.randn(channels, width, generator=generator)
            attention[f"{2 * index + 1}.to_{part}_ip.weight"] = weight
    projection = {
        "proj.weight": torch.randn(tokens * width, 32, generator=generator),
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": attention}


def load_ip_adapter(pipe: Any) -> Any:
    """Load the IP-Adapter of this module, as `load_ip_adapter` does it from a file."""
    pipe.load_ip_adapter(copy.deepcopy(ip_adapter()), subfolder="", weight_name="")
    return pipe


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(**overrides: Any) -> Any:
    return diffusers.DDIMScheduler(
        **{**SCHEDULE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **overrides}
    )


def euler(**overrides: Any) -> Any:
    return diffusers.EulerDiscreteScheduler(**{**SCHEDULE, "steps_offset": 1, **overrides})


def ready(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(**given: Any) -> dict[str, Any]:
    """Copies of the components of a Stable Diffusion 1.x pipeline, and of those that replace them."""
    stock: dict[str, Make] = {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": ddim,
    }
    missing = {key: make() for key, make in stock.items() if key not in given}
    return copy.deepcopy(missing | given)


UNCHECKED: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def sd(kind: str, given: Callable[[], dict[str, Any]] = dict, checked: bool = True) -> Callable[[], Any]:
    """A factory of Stable Diffusion pipelines of a class."""

    def build() -> Any:
        return ready(getattr(diffusers, kind)(**parts(**given()), **(UNCHECKED if checked else {})))

    return build


def sdxl(kind: str, given: Callable[[], dict[str, Any]] = dict) -> Callable[[], Any]:
    """A factory of Stable Diffusion XL pipelines of a class."""

    def build() -> Any:
        stock = {
            "unet": unet_xl(),
            "scheduler": euler(),
            "text_encoder_2": text_encoder(projection=True),
            "tokenizer_2": tokenizer(),
        }
        return ready(getattr(diffusers, kind)(**parts(**(stock | given()))))

    return build


def picture(seed: int, size: int = SIZE, channels: int = 3) -> Tensor:
    """A smooth random image, 1×C×H×W in [0, 1]."""
    coarse = torch.rand(1, channels, 8, 8, generator=torch.Generator().manual_seed(100 + seed))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def mask(size: int = SIZE) -> Tensor:
    """The left half is to be painted."""
    painted = torch.zeros(1, 1, size, size)
    painted[..., : size // 2] = 1
    return painted


def drawing(inputs: Callable[[int], dict[str, Any]] = lambda seed: {}, **options: Any) -> Callable[..., Tensor]:
    """A function that calls a pipeline; `inputs` makes the arguments that depend on the seed."""

    def draw(pipe: Any, seed: int = 0) -> Tensor:
        arguments = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", **options}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            result = pipe(**arguments, **inputs(seed), generator=torch.Generator().manual_seed(seed))
        image = torch.as_tensor(result[0])
        assert image.isfinite().all()
        return image.detach().float()

    return draw


text = partial(drawing, prompt=PROMPT, negative_prompt=NEGATIVE)


def families() -> Sequence[Family]:
    control = {"controlnet_conditioning_scale": 0.8}
    temporal = "temporal self-attention is unmodified"
    deeper = "self-attention of the coarser levels is unmodified"

    def xl_image(seed: int) -> dict[str, Any]:
        return {"image": picture(seed, SIZE_XL)}

    return (
        Family("SD 1.x text-to-image", sd("StableDiffusionPipeline"), text(), 3, deeper),
        Family(
            "SD 1.x img2img",
            sd("StableDiffusionImg2ImgPipeline"),
            text(lambda seed: {"image": picture(seed)}, strength=0.8, num_inference_steps=4),
            3,
            deeper,
        ),
        Family(
            "SD 1.x inpaint, 4 channels",
            sd("StableDiffusionInpaintPipeline"),
            text(lambda seed: {"image": picture(seed), "mask_image": mask()}),
            3,
            deeper,
        ),
        Family(
            "SD 1.x inpaint, 9 channels",
            sd("StableDiffusionInpaintPipeline", lambda: {"unet": unet(in_channels=9)}),
            text(lambda seed: {"image": picture(seed), "mask_image": mask()}),
            3,
            deeper,
        ),
        Family(
            "depth2img",
            sd(
                "StableDiffusionDepth2ImgPipeline",
                lambda: {"unet": unet(in_channels=5), "depth_estimator": None, "feature_extractor": None},
                checked=False,
            ),
            text(
                lambda seed: {"image": picture(seed), "depth_map": picture(seed + 1, channels=1)[0]},
                strength=0.8,
                num_inference_steps=4,
            ),
            3,
            deeper,
        ),
        Family(
            "InstructPix2Pix",
            sd("StableDiffusionInstructPix2PixPipeline", lambda: {"unet": unet(in_channels=8)}),
            text(lambda seed: {"image": picture(seed)}, image_guidance_scale=1.5),
            3,
            deeper,
        ),
        Family(
            "upscale",
            sd(
                "StableDiffusionUpscalePipeline",
                # Its finest level has cross-attention alone, so the one below it is the finest with self-attention.
                lambda: {
                    "vae": vae(scaling_factor=0.08333),
                    "unet": unet(in_channels=7, num_class_embeds=100, only_cross_attention=(True, False)),
                    "low_res_scheduler": diffusers.DDPMScheduler(),
                    "scheduler": ddim(prediction_type="v_prediction"),
                    "max_noise_level": 90,
                },
                checked=False,
            ),
            text(lambda seed: {"image": picture(seed, SIZE // 4)}),
            4,
            "the finest level has no self-attention",
        ),
        Family(
            "image variation",
            lambda: ready(
                diffusers.StableDiffusionImageVariationPipeline(
                    **copy.deepcopy({"vae": vae(), "unet": unet(), "image_encoder": image_encoder()}),
                    scheduler=ddim(),
                    **UNCHECKED,
                )
            ),
            drawing(lambda seed: {"image": picture(seed, 32)}, height=SIZE, width=SIZE),
            3,
            deeper,
        ),
        Family(
            "ControlNet",
            sd("StableDiffusionControlNetPipeline", lambda: {"controlnet": controlnet()}),
            text(lambda seed: {"image": picture(seed)}, **control),
            4,
            deeper,
        ),
        Family(
            "several ControlNets",
            sd("StableDiffusionControlNetPipeline", lambda: {"controlnet": [controlnet(), controlnet(1)]}),
            text(lambda seed: {"image": [picture(seed), picture(seed + 1)]}, controlnet_conditioning_scale=[0.8, 0.5]),
            5,
            deeper,
        ),
        Family(
            "ControlNet img2img",
            sd("StableDiffusionControlNetImg2ImgPipeline", lambda: {"controlnet": controlnet()}),
            text(
                lambda seed: {"image": picture(seed), "control_image": picture(seed + 1)},
                strength=0.8,
                num_inference_steps=4,
                **control,
            ),
            4,
            deeper,
        ),
        Family(
            "ControlNet inpaint",
            sd("StableDiffusionControlNetInpaintPipeline", lambda: {"controlnet": controlnet()}),
            text(
                lambda seed: {"image": picture(seed), "mask_image": mask(), "control_image": picture(seed + 1)},
                **control,
            ),
            4,
            deeper,
        ),
        Family(
            "T2I-Adapter",
            sd("StableDiffusionAdapterPipeline", lambda: {"adapter": adapter()}),
            text(lambda seed: {"image": picture(seed)}),
            3,
            deeper,
        ),
        Family(
            "IP-Adapter",
            lambda: load_ip_adapter(ip_adapter_ready()),
            text(lambda seed: {"ip_adapter_image": picture(seed, 32)}),
            3,
            deeper,
        ),
        Family(
            "GLIGEN",
            sd("StableDiffusionGLIGENPipeline", lambda: {"unet": unet(attention_type="gated")}),
            text(
                lambda seed: {"gligen_phrases": ["a red circle"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]]},
                gligen_scheduled_sampling_beta=1.0,
            ),
            3,
            "gated attention to the boxes is unmodified",
        ),
        Family(
            "PAG",
            sd("StableDiffusionPAGPipeline", lambda: {"pag_applied_layers": ["mid", "up_blocks.1.attentions.1"]}),
            text(pag_scale=2.0),
            2,
            "layers of perturbed attention are skipped",
        ),
        Family(
            "LCM",
            sd(
                "LatentConsistencyModelPipeline",
                lambda: {"unet": unet(time_cond_proj_dim=32), "scheduler": diffusers.LCMScheduler(**SCHEDULE)},
            ),
            drawing(prompt=PROMPT, num_inference_steps=2),
            3,
            deeper,
        ),
        Family(
            "AnimateDiff",
            sd("AnimateDiffPipeline", lambda: {"motion_adapter": motion_adapter()}, checked=False),
            text(num_frames=2),
            3,
            temporal,
        ),
        Family(
            "LDM text-to-image",
            lambda: ready(
                diffusers.LDMTextToImagePipeline(
                    **copy.deepcopy({"vqvae": vae(), "bert": bert(), "tokenizer": tokenizer(), "unet": unet()}),
                    scheduler=ddim(),
                )
            ),
            # Its latent grid is an eighth of the size asked for, whatever the VAE.
            drawing(prompt=PROMPT, height=128, width=128, output_type="np"),
            3,
            deeper,
        ),
        Family(
            "SD 2.x",
            sd(
                "StableDiffusionPipeline",
                lambda: {
                    "unet": unet(use_linear_projection=True, attention_head_dim=(2, 4)),
                    "scheduler": ddim(prediction_type="v_prediction"),
                },
            ),
            text(guidance_rescale=0.7),
            3,
            deeper,
        ),
        Family(
            "SD 2.x, attention in float32",
            sd(
                "StableDiffusionPipeline",
                lambda: {
                    "unet": unet(use_linear_projection=True, upcast_attention=True),
                    "scheduler": ddim(prediction_type="v_prediction"),
                },
            ),
            text(),
            3,
            deeper,
        ),
        Family("SDXL text-to-image", sdxl("StableDiffusionXLPipeline"), text(), 3, deeper),
        Family(
            "SDXL img2img",
            sdxl("StableDiffusionXLImg2ImgPipeline"),
            text(xl_image, strength=0.8, num_inference_steps=4),
            3,
            deeper,
        ),
        Family(
            "SDXL inpaint",
            sdxl("StableDiffusionXLInpaintPipeline", lambda: {"unet": unet_xl(in_channels=9)}),
            text(lambda seed: {"image": picture(seed, SIZE_XL), "mask_image": mask(SIZE_XL)}, strength=1.0),
            3,
            deeper,
        ),
        Family(
            "SDXL refiner",
            sdxl(
                "StableDiffusionXLImg2ImgPipeline",
                lambda: {
                    "unet": unet_xl(
                        cross_attention_dim=32,
                        projection_class_embeddings_input_dim=5 * 8 + 32,
                        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                    ),
                    "text_encoder": None,
                    "tokenizer": None,
                    "requires_aesthetics_score": True,
                },
            ),
            text(xl_image, strength=0.3, num_inference_steps=7),
            3,
            deeper,
        ),
        Family(
            "SDXL ControlNet",
            sdxl("StableDiffusionXLControlNetPipeline", lambda: {"controlnet": controlnet(xl=True)}),
            text(xl_image, **control),
            4,
            deeper,
        ),
        Family(
            "SDXL PAG",
            sdxl("StableDiffusionXLPAGPipeline", lambda: {"pag_applied_layers": ["mid"]}),
            text(pag_scale=2.0),
            3,
            deeper,
        ),
        Family(
            "SDXL T2I-Adapter",
            sdxl("StableDiffusionXLAdapterPipeline", lambda: {"adapter": adapter("full_adapter_xl", (16, 16, 32), 8)}),
            text(xl_image),
            3,
            deeper,
        ),
        Family(
            "SDXL few-step",
            sdxl(
                "StableDiffusionXLPipeline",
                lambda: {
                    "scheduler": diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
                },
            ),
            drawing(prompt=PROMPT, num_inference_steps=1, guidance_scale=0.0),
            3,
            deeper,
        ),
    )


def ip_adapter_ready() -> Any:
    """A text-to-image pipeline that an IP-Adapter can be loaded into."""
    components = parts(image_encoder=image_encoder())
    unchecked = {**UNCHECKED, "feature_extractor": transformers.CLIPImageProcessor(crop_size=32, size=32)}
    return ready(diffusers.StableDiffusionPipeline(**components, **unchecked))


FAMILIES: dict[str, Family] = {family.name: family for family in families()}
# Those that the fast tests look at.
KINDS = (next(iter(FAMILIES)), "ControlNet", "LDM text-to-image", "SDXL text-to-image")
