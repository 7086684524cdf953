"""Where in the noise schedule a call of the model is, and which phase is in force there."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class Ends(Protocol):
    """Something in force while progress < until."""

    @property
    def until(self) -> float: ...


Part = TypeVar("Part", bound=Ends)


def progress(timestep: float, num_train_timesteps: int) -> float:
    """How far denoising has come: 0 at pure noise, 1 at the image."""
    return 1 - timestep / num_train_timesteps


def in_force(parts: Iterable[Part], at: float) -> Part | None:
    """The first part that ends after a progress; at the image itself, those that end there."""
    return next((part for part in parts if at < part.until or part.until == 1), None)


class Clock:
    """Reads timesteps from the device once per image.

    A pipeline hands the UNet one element after another of the scheduler's tensor of timesteps. The whole tensor is
    read when its first element is seen; the later ones are found by their place in the same storage, without waiting
    for the device.

    Attributes:
        schedule: all timesteps; empty where a timestep is not part of a longer tensor.
        position: grows from step to step: the place in the schedule, or minus the timestep.
        run: another object for each schedule.
    """

    def __init__(self) -> None:
        self._last: tuple[torch.UntypedStorage, int, torch.dtype] | None = None
        self._values: list[float] = []
        self.schedule: list[float] = []
        self.position: float = 0
        self.run: object = None

    def read(self, timestep: Tensor | float) -> float:
        """The timestep as a number; of a batch of timesteps, the first."""
        if not isinstance(timestep, Tensor):
            self._last, self.schedule, self.run, self.position = None, [], None, -float(timestep)
            return float(timestep)
        storage = timestep.untyped_storage()
        # A write into the tensor changes its version, unless it is an inference tensor, which has none.
        version = -1 if timestep.is_inference() else timestep._version
        if (
            self._last is None
            or self._last[0].data_ptr() != storage.data_ptr()
            or self._last[1:] != (version, timestep.dtype)
        ):
            whole = torch.empty(0, dtype=timestep.dtype, device=timestep.device)
            self._values = whole.set_(storage).tolist()
            self._last = storage, version, timestep.dtype
            self.schedule = self._values if len(self._values) > timestep.numel() else []
            self.run = object() if self.schedule else None
        place = int(timestep.storage_offset())
        value = float(self._values[place])
        self.position = place if self.schedule else -value
        return value
