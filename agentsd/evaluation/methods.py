"""Putting a method on a pipeline: stock, a preset with fields replaced, or a peer."""

import copy
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agentsd.benchmark import PEERS, configuration, parse
from agentsd.config import AgentSDConfig
from agentsd.patch import apply
from agentsd.pipelines import sha256

# The peers' options and what they are unless told otherwise.
OPTIONS: dict[str, dict[str, Any]] = {
    "tomesd": {
        "ratio": 0.5,
        "max_downsample": 1,
        "sx": 2,
        "sy": 2,
        "use_rand": True,
        "merge_attn": True,
        "merge_crossattn": False,
        "merge_mlp": False,
    },
    "deepcache": {"cache_interval": 3, "cache_branch_id": 0, "skip_mode": "uniform"},
    "tgate": {"gate_step": 10, "sp_interval": 5, "fi_interval": 1, "warm_up": 2},
}


@dataclass(frozen=True)
class Method:
    """A way to make images.

    Attributes:
        text: `name:key=value,key=value`; a key `0/key` is of the first phase alone.
        settings: the whole configuration, so that the name is not needed to repeat it, with the version of a peer and
            the SHA-256 of a refinement.
    """

    text: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """`stock`, a preset or a peer."""
        return self.text.partition(":")[0]

    @property
    def options(self) -> dict[str, Any]:
        """The configuration alone."""
        return {key: value for key, value in self.settings.items() if key not in ("version", "refine_sha256")}

    @property
    def folder(self) -> str:
        """A name for files."""
        return re.sub(r"[^\w.=+]+", "-", self.text).strip("-")

    @property
    def sha256(self) -> str:
        """Of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


def method(text: str) -> Method:
    """Look a method up.

    Raises:
        ValueError: it does not exist, or an option is not one of its fields.
        OSError: the file of a refinement cannot be read.
    """
    name, options = parse(text)
    known = ("stock", *AgentSDConfig.presets(), *PEERS)
    if name not in known:
        raise ValueError(f"method is {name!r}; it must be one of {', '.join(known)}")
    if name == "stock":
        if options:
            raise ValueError(f"method is {text!r}; stock has no options")
        return Method(text, {})
    if name in PEERS:
        for key in options:
            if key not in OPTIONS[name]:
                raise ValueError(f"method {text!r}: {name} has no option {key!r}; it has {', '.join(OPTIONS[name])}")
        return Method(text, {"version": version(PEERS[name]), **OPTIONS[name], **options})
    try:
        config = configuration(name, options)
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}") from None
    refined = {"refine_sha256": sha256(Path(config.refine))} if config.refine else {}
    return Method(text, config.to_dict() | refined)


def missing(wanted: Sequence[Method]) -> dict[str, str]:
    """The package that each method needs and that is not installed."""
    return {m.text: PEERS[m.name] for m in wanted if m.name in PEERS and version(PEERS[m.name]) is None}


def copied(pipe: Any) -> Any:
    """A pipeline with a UNet and a scheduler of its own, which shares the weights."""
    shared = (*pipe.unet.parameters(), *pipe.unet.buffers())
    own = copy.copy(pipe)
    own.register_modules(
        unet=copy.deepcopy(pipe.unet, {id(tensor): tensor for tensor in shared}),
        scheduler=copy.deepcopy(pipe.scheduler),
    )
    return own


def prepared(pipe: Any, wanted: Method) -> Callable[..., Any]:
    """A function that is called as the pipeline and draws with a method.

    It works on a UNet of its own, which shares its weights with the pipeline's, so that no method meets what another
    one has left behind. What it draws depends on its arguments alone.
    """
    own = copied(pipe)
    options = wanted.options
    if wanted.name == "stock":
        return own
    if wanted.name == "tomesd":
        return partial(_tomesd, own, options)
    if wanted.name == "deepcache":
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(own)
        helper.set_params(**options)
        helper.enable()
        return own
    if wanted.name == "tgate":
        import tgate

        load = tgate.TgateSDXLLoader if "XL" in type(own).__name__ else tgate.TgateSDLoader
        return partial(load(own).tgate, **options)
    return apply(own, AgentSDConfig.from_dict(options))


def _tomesd(pipe: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Draw with tomesd, whose random places would otherwise follow from all that ran before in the process."""
    with torch.random.fork_rng():
        put_tomesd(pipe, options)
        return pipe(*args, **kwargs)


def put_tomesd(pipe: Any, options: dict[str, Any]) -> None:
    """Patch a pipeline with tomesd, and seed the generator that it will fork."""
    import tomesd

    torch.manual_seed(0)
    tomesd.apply_patch(pipe, **options)


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
