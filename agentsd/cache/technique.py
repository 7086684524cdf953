"""What a technique that works across calls of the model is to its host."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from agentsd.schedule import Clock


@dataclass(frozen=True)
class Call:
    """A call of the model that is about to begin.

    Attributes:
        timestep: of the noise schedule, which has `num_train_timesteps`.
        clock: which has read the timestep.
        sample: the model's input.
        text: the prompt's embedding.
    """

    timestep: float
    num_train_timesteps: int
    clock: Clock
    sample: Tensor
    text: Tensor | None


class Technique(Protocol):
    """One technique on one model. Its constructor raises ValueError where the model does not suit it."""

    def attach(self) -> None:
        """Put it on the model."""

    def before_call(self, call: Call) -> None:
        """Decide what the call computes."""

    def after_call(self, *_: Any) -> None:
        """Forward hook of the model: keep what the call leaves."""

    def reset(self) -> None:
        """Keep nothing; the next call is stock."""

    def detach(self) -> None:
        """Take it off the model, which is as it was."""

    def describe(self) -> Iterator[str]:
        """Sentences on what it does."""
