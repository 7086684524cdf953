"""The parts of the embedded model: tokenizer, text encoder, autoencoder, UNet, noise schedule."""

import json
from pathlib import Path

import scenes
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 32
WIDTH = 128
CHANNELS = (64, 96, 160)
HEADS = (1, 2, 5)
LAYERS = (1, 1, 2)


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
        vocab_size=2000,
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


def make_vae(width: int = 64) -> AutoencoderTiny:
    """Factor 4, four latent channels; the encoder has no block at full resolution."""
    return AutoencoderTiny(
        encoder_block_out_channels=(width, width, width),
        decoder_block_out_channels=(width, width, width),
        num_encoder_blocks=(0, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
        scaling_factor=1.0,
    )


def make_unet(
    channels: tuple[int, ...] = CHANNELS, heads: tuple[int, ...] = HEADS, layers: tuple[int, ...] = LAYERS
) -> UNet2DConditionModel:
    """Self- and cross-attention on every grid, from the latents' own down to a quarter of it; one resnet a block.

    There is no coarser grid on which convolutions alone would reach over the whole picture, and below the finest grid
    every second convolution sees one cell only: what lies further away comes by attention.
    """
    levels = len(channels)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        attention_head_dim=heads,
        cross_attention_dim=WIDTH,
        transformer_layers_per_block=layers,
    )
    for block in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]):
        for resnet in block.resnets:
            narrow(resnet.conv2.weight)
    return unet


@torch.no_grad()
def narrow(kernel: nn.Parameter) -> None:
    """Set all taps of a 3×3 convolution but the central one to zero, and keep them there: their gradient is zero."""
    mask = torch.zeros(3, 3)
    mask[1, 1] = 1
    kernel.mul_(mask)
    kernel.register_hook(lambda gradient: gradient * mask.to(gradient.device))
