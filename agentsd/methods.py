"""Ways to make an image, by name: stock, the floor, a preset or configuration, a peer. One grammar for every tool."""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from agentsd import checks
from agentsd.api import apply
from agentsd.config import AgentSDConfig
from agentsd.hosts.diffusers_unet import find_layers
from agentsd.planning import Planner
from agentsd.results import version


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """`name:key=value,key=value` → the name and the options, their values read as YAML; lists are written [1+2]."""
    name, _, rest = text.partition(":")
    options = {}
    for assignment in filter(None, rest.split(",")):
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"method is {text!r}; options are written name:key=value,key=value")
        options[key] = yaml.safe_load(value.replace("+", ", ") if value.startswith("[") else value)
    return name, options


PEERS = {"tomesd": "tomesd", "deepcache": "DeepCache", "tgate": "tgate"}
# Their options and what they are unless told otherwise.
_DEFAULTS = (
    "tomesd:ratio=0.5,max_downsample=1,sx=2,sy=2,use_rand=true,merge_attn=true,merge_crossattn=false,merge_mlp=false",
    "deepcache:cache_interval=3,cache_branch_id=0,skip_mode=uniform",
    "tgate:gate_step=10,sp_interval=5,fi_interval=1,warm_up=2",
)
PEER_OPTIONS = dict(map(parse, _DEFAULTS))
_FLOOR = {"of": "paper", "levels": None}


@dataclass(frozen=True)
class Method:
    """A way to make images.

    Attributes:
        text: as it was asked for, `name:key=value,key=value`.
        settings: every field, so that the name is not needed to repeat it, and the version of a peer.
    """

    text: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """`stock`, `floor`, `xformers`, a preset, a YAML file or a peer."""
        return self.text.partition(":")[0]

    @property
    def options(self) -> dict[str, Any]:
        """The settings without the version of a peer."""
        return {key: value for key, value in self.settings.items() if key != "version"}

    @property
    def config(self) -> AgentSDConfig | None:
        """The configuration of a preset or file."""
        ours = self.name not in ("stock", "floor", "xformers", *PEERS)
        return AgentSDConfig.from_dict(self.settings) if ours else None

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

    Args:
        text: `stock`, `floor` (the self-attention of the levels that `of` covers, or of `levels`, is left out),
            `xformers`, a preset, a YAML file or a peer; keys of a configuration are those of `AgentSDConfig.assign`.

    Raises:
        ValueError: it does not exist, or an option is none of its fields.
        OSError: a file cannot be read.
    """
    name, options = parse(text)
    if name in ("stock", "xformers") and options:
        raise ValueError(f"method is {text!r}; {name} has no options")
    if name in ("stock", "xformers"):
        return Method(text, {})
    if known := _FLOOR if name == "floor" else PEER_OPTIONS.get(name):
        checks.known_fields(f"method {text!r}: {name}", options, known)
        found = {"version": version(PEERS[name])} if name in PEERS else {}
        return Method(text, found | known | options)
    config = configuration(name)
    try:
        return Method(text, config.assign(options).to_dict())
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}") from None


def configuration(name: str) -> AgentSDConfig:
    """A preset, or the configuration in a YAML file."""
    if name.endswith((".yaml", ".yml")):
        return AgentSDConfig.from_file(name)
    presets = AgentSDConfig.presets()
    if name not in presets:
        names = ("stock", "floor", "xformers", *presets, *PEERS)
        raise ValueError(f"method is {name!r}; it must be one of {', '.join(names)}, or a YAML file")
    return AgentSDConfig.from_preset(name)


def missing(wanted: Sequence[Method]) -> dict[str, str]:
    """The package that each method needs and that is not installed."""
    packages = PEERS | {"xformers": "xformers"}
    return {m.text: packages[m.name] for m in wanted if m.name in packages and version(packages[m.name]) is None}


def sharing_weights(unet: nn.Module) -> nn.Module:
    """A copy of a UNet with modules and hooks of its own."""
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())})


def own_copy(pipe: Any) -> Any:
    """A pipeline with a UNet and a scheduler of its own, which shares the weights."""
    own = copy.copy(pipe)
    own.register_modules(unet=sharing_weights(pipe.unet), scheduler=copy.deepcopy(pipe.scheduler))
    return own


def prepared(pipe: Any, wanted: Method) -> Callable[..., Any]:
    """A function that is called as the pipeline and draws with a method.

    It works on a UNet of its own, which shares its weights with the pipeline's, so that no method meets what another
    one has left behind. What it draws depends on its arguments alone.
    """
    own = own_copy(pipe)
    if config := wanted.config:
        return apply(own, config)
    if wanted.name == "tomesd":
        return partial(_tomesd, own, wanted.options)
    if wanted.name == "tgate":
        import tgate

        load = tgate.TgateSDXLLoader if "XL" in type(own).__name__ else tgate.TgateSDLoader
        return partial(load(own).tgate, **wanted.options)
    put(own, wanted)
    return own


def put(pipe: Any, wanted: Method) -> None:
    """Put a floor, xformers, tomesd or DeepCache on the UNet of a pipeline; of stock there is nothing to put."""
    if wanted.name == "floor":
        leave_out_attention(pipe.unet, wanted.options)
    elif wanted.name == "xformers":
        pipe.unet.enable_xformers_memory_efficient_attention()
    elif wanted.name == "tomesd":
        put_tomesd(pipe.unet, wanted.options)
    elif wanted.name == "deepcache":
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe)
        helper.set_params(**wanted.options)
        helper.enable()


class _Identity:
    """A self-attention that costs nothing."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def floor_levels(unet: nn.Module, options: dict[str, Any]) -> frozenset[int]:
    """The levels of a floor: `levels` (a number, a list or `all`), or those that `of`, a preset, covers."""
    present = {layer.level for layer in find_layers(unet)}
    levels = options["levels"]
    if levels is None:
        return Planner(configuration(str(options["of"])), present, type(unet).__name__).covered
    return frozenset(present if levels == "all" else levels if isinstance(levels, list) else [levels])


def leave_out_attention(unet: nn.Module, options: dict[str, Any]) -> None:
    """Replace self-attention by the identity at the levels of a floor."""
    levels = floor_levels(unet, options)
    for layer in find_layers(unet):
        if layer.level in levels:
            layer.block.attn1.set_processor(_Identity())  # type: ignore[arg-type]


def _tomesd(pipe: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Draw with tomesd, whose random destinations would otherwise depend on all that ran before in the process."""
    with torch.random.fork_rng():
        put_tomesd(pipe, options)
        return pipe(*args, **kwargs)


def put_tomesd(pipe: Any, options: dict[str, Any]) -> None:
    """Patch a pipeline with tomesd, and seed the generator that it will fork."""
    import tomesd

    torch.manual_seed(0)
    tomesd.apply_patch(pipe, **options)
