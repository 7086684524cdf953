"""`apply` and `remove`, and the contexts around them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from agentsd.config import AgentSDConfig
from agentsd.hosts.diffusers_unet import Patch, networks, patch_of

Model = TypeVar("Model")


def apply(model: Model, config: AgentSDConfig | str | None = None, /, **overrides: Any) -> Model:
    """Accelerate the self-attention of a model. Applying again replaces the configuration.

    Args:
        model: a diffusers pipeline with a UNet (its ControlNets are accelerated too), a UNet or a ControlNet.
        config: the configuration, or the name of a preset; None is `AgentSDConfig()`, AgentSD as published.
        **overrides: fields of the configuration, or of every phase that has them, to replace, for example `ratio=0.5`.

    Returns:
        The same model.

    Raises:
        ValueError: a value is out of range or has no effect, or the model has no layer that the configuration covers.

    Example:
        ```python
        pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        agentsd.apply(pipe, ratio=0.4)
        image = pipe("a photo of an astronaut riding a horse on mars").images[0]
        agentsd.remove(pipe)
        ```
    """
    if isinstance(config, str):
        config = AgentSDConfig.from_preset(config)
    if not isinstance(config, AgentSDConfig | None):
        raise ValueError(
            f"config is {config!r}; it must be an AgentSDConfig or a preset's name, fields go by name: ratio=0.4"
        )
    config = (config or AgentSDConfig()).replace(**overrides)
    nets = networks(model)
    previous = _patches(model)
    remove(model)
    done: list[nn.Module] = []
    try:
        for net in nets:
            Patch(net, config, model)
            done.append(net)
    except ValueError:
        for net in done:
            remove(net)
        for patch in previous:
            Patch(patch.model, patch.config, patch.pipe())
        raise
    return model


def remove(model: Model) -> Model:
    """Take the acceleration off: the model is stock again, bit for bit. Does nothing where it is not applied."""
    for patch in _patches(model):
        patch.remove()
    return model


def is_applied(model: Any) -> bool:
    """Whether any network of the model is accelerated."""
    return bool(_patches(model))


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Context in which an accelerated model computes as stock."""
    patches = _patches(model)
    before = [patch.enabled for patch in patches]
    try:
        for patch in patches:
            patch.enabled = False
        yield model
    finally:
        for patch, enabled in zip(patches, before, strict=True):
            patch.enabled = enabled


@contextmanager
def applied(model: Model, config: AgentSDConfig | str | None = None, /, **overrides: Any) -> Iterator[Model]:
    """Context in which a model is accelerated; afterwards it is what it was before."""
    previous = _patches(model)
    apply(model, config, **overrides)
    try:
        yield model
    finally:
        remove(model)
        for patch in previous:
            Patch(patch.model, patch.config, patch.pipe())


def _patches(model: Any) -> list[Patch]:
    return [patch for net in networks(model) if (patch := patch_of(net))]
