"""Where the time of a UNet call goes, and how many operations it launches."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from agentsd import layer
from agentsd.bench import calls
from agentsd.bench.architectures import Setting, build
from agentsd.config import AgentSDConfig
from agentsd.drawing import now
from agentsd.hosts.diffusers_unet import AgentSDProcessor, find_layers
from agentsd.methods import sharing_weights
from agentsd.ops import merging

PARTS = ("matching", "merging", "unmerging", "attention", "projections and copies", "rest of the UNet")


@contextmanager
def _timed(owner: Any, name: str, part: str, spent: dict[str, float], device: str) -> Iterator[None]:
    """Context in which the seconds spent in a function, called by a layer, are added to a part."""
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if part != "layers" and spent["depth"] != 1:  # outside of layers, or within another part
            return function(*args, **kwargs)
        spent["depth"] += 1
        began = now(device)
        out = function(*args, **kwargs)
        spent["depth"] -= 1
        spent[part] += now(device) - began
        return out

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, function)


@torch.inference_mode()
def profile(setting: Setting, methods: Sequence[str], repeats: int = 3) -> dict[str, dict[str, float]]:
    """Median seconds of each of `PARTS`, per kind of call.

    Waits for the device after each part, so the sum is more than an undisturbed call takes on a GPU. `stock` and the
    methods of this package only; parts inside a processor that is not ours are not told apart from its projections.

    Raises:
        ValueError: a method is not known, or is none of this package.
    """
    wanted = calls.methods_of(methods)
    if others := [one.text for one in wanted if one.name != "stock" and not one.config]:
        raise ValueError(f"method is {others[0]!r}; the profile is of stock and {', '.join(AgentSDConfig.presets())}")
    stock = build(setting)
    result = {}
    for one in wanted:
        unet: Any = sharing_weights(stock)
        spent = dict.fromkeys(("depth", "layers", *PARTS), 0.0)
        timed: list[tuple[Any, str, str]] = [
            (layer, "match", PARTS[0]),
            (merging.Match, "token_map", PARTS[1]),
            (merging.TokenMap, "merge", PARTS[1]),
            (merging.TokenMap, "unmerge", PARTS[2]),
            (nn.functional, "scaled_dot_product_attention", PARTS[3]),
            *((found.block.attn1, "forward", "layers") for found in find_layers(unet)),
        ]
        several = calls.kinds(one, unet, setting)
        # Processors of ours hold the attention that they call.
        timed += [(p, "attend", PARTS[3]) for p in unet.attn_processors.values() if isinstance(p, AgentSDProcessor)]
        with ExitStack() as stack:
            for owner, name, part in timed:
                stack.enter_context(_timed(owner, name, part, spent, setting.device))
            for kind in several:
                rows = []
                for _ in range(repeats + 1):
                    spent.update(dict.fromkeys(spent, 0.0))
                    began = now(setting.device)
                    kind.call()
                    rest = now(setting.device) - began - spent["layers"]
                    told_apart = sum(spent[part] for part in PARTS)
                    rows.append(spent | {PARTS[4]: spent["layers"] - told_apart, PARTS[5]: rest})
                key = f"{one.text}: {kind.name}"
                result[key] = {part: statistics.median(row[part] for row in rows[1:]) for part in PARTS}
    return result


class Launches(TorchDispatchMode):
    """Counts operations that compute: views and allocations aside. On a GPU each is at least one kernel."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.count += not (func.is_view or "empty" in name or name in ("aten::detach", "aten::_unsafe_view"))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def launches(setting: Setting, methods: Sequence[str]) -> dict[str, int]:
    """The number of operations of one call, per kind of call."""
    stock = build(setting)
    result = {}
    for one in calls.methods_of(methods):
        for kind in calls.kinds(one, sharing_weights(stock), setting):
            kind.call()
            with Launches() as counted:
                kind.call()
            result[f"{one.text}: {kind.name}"] = counted.count
    return result
