"""What is kept from one call of the model to the next: one technique a file, each behind `Technique`."""

from typing import TypeVar

from torch import nn

from agentsd.cache.steps import StepCacheState
from agentsd.cache.technique import Call, Technique
from agentsd.config import AgentSDConfig

__all__ = ["Call", "Kind", "Technique", "techniques"]

Kind = TypeVar("Kind", bound=Technique)


def techniques(model: nn.Module, config: AgentSDConfig) -> list[Technique]:
    """The techniques of a configuration on a model; a ControlNet has no up side and computes every call in full.

    Raises:
        ValueError: the model does not suit one of them.
    """
    found: list[Technique] = []
    if config.caches and hasattr(model, "up_blocks"):
        found.append(StepCacheState(model, config.steps))
    return found
