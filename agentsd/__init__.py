"""Token-merged agent attention for Stable Diffusion in diffusers: `apply(pipe, ratio=0.4)`, `remove(pipe)`."""

from agentsd.config import AgentSDConfig, Phase
from agentsd.patch import applied, apply, disabled, is_applied, remove
from agentsd.report import Report, describe

__version__ = "0.1.0"

__all__ = [
    "AgentSDConfig",
    "Phase",
    "Report",
    "applied",
    "apply",
    "describe",
    "disabled",
    "is_applied",
    "remove",
]
