"""The embedded model, a small latent-diffusion pipeline that draws coloured shapes, and its attribute checker."""

from pathlib import Path

from agentsd.demo.scenes import VOCABULARY, unknown_words

MODEL = Path(__file__).parent / "model"
CHECKER = Path(__file__).parent / "checker.safetensors"

__all__ = ["CHECKER", "MODEL", "VOCABULARY", "unknown_words"]
