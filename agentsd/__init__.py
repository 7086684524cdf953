"""Token-merged agent attention for Stable Diffusion in diffusers: `apply(pipe, ratio=0.4)`, `remove(pipe)`."""

from typing import TYPE_CHECKING, Any

from agentsd.config import AgentSDConfig, AgentSDWarning, Phase
from agentsd.patch import applied, apply, disabled, is_applied, remove
from agentsd.report import Report, describe

if TYPE_CHECKING:
    from agentsd.view import View, visualize

__version__ = "0.1.0"

__all__ = [
    "AgentSDConfig",
    "AgentSDWarning",
    "Phase",
    "Report",
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
    from agentsd import view

    return getattr(view, name)
