"""Token-merged agent attention for Stable Diffusion in diffusers: `apply(pipe, ratio=0.4)`, `remove(pipe)`."""

from typing import TYPE_CHECKING, Any

from agentsd.api import applied, apply, disabled, is_applied, remove
from agentsd.config import KV, Agent, AgentSDConfig, AgentSDWarning, Merge, Phase, StepCache
from agentsd.describe import Report, describe

if TYPE_CHECKING:
    from agentsd.views import View, visualize

__version__ = "0.1.0"

__all__ = [
    "KV",
    "Agent",
    "AgentSDConfig",
    "AgentSDWarning",
    "Merge",
    "Phase",
    "Report",
    "StepCache",
    "View",
    "applied",
    "apply",
    "describe",
    "disabled",
    "is_applied",
    "remove",
    "visualize",
]


def __getattr__(name: str) -> Any:
    """Pictures are loaded when they are asked for."""
    if name not in ("View", "visualize"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from agentsd import views

    return getattr(views, name)
