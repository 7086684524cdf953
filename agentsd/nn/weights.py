"""Weights trained with the authors' code."""

from collections.abc import Mapping

import torch
from torch import Tensor

# The authors' name → ours. Theirs carry axes of size 1 and put the agents of the second product last.
KEYS = {
    "an_bias": "b1.map",
    "ah_bias": "b1.rows",
    "aw_bias": "b1.columns",
    "ac_bias": "b1.prefix",
    "na_bias": "b2.map",
    "ha_bias": "b2.rows",
    "wa_bias": "b2.columns",
    "ca_bias": "b2.prefix",
}


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the authors' Agent-DeiT, Agent-PVT and Agent-Swin code to those of `AgentAttention`.

    The documentation of the module has a table of the names and shapes of both.

    Args:
        state_dict: of one attention module, or of a whole model: what belongs to no agent attention is not changed.
    """
    converted = {}
    for name, value in state_dict.items():
        part, leaf = ["", *name.split(".")][-2:]
        module, owner = name.removesuffix(leaf), name.removesuffix(f"{part}.{leaf}")
        if leaf in KEYS:
            heads, n = state_dict[f"{module}an_bias"].shape[:2]
            if leaf in ("ah_bias", "aw_bias", "ac_bias"):
                value = value.reshape(heads, n, -1)
            elif leaf in ("ha_bias", "wa_bias", "ca_bias"):
                value = value.reshape(heads, -1, n).mT
            converted[module + KEYS[leaf]] = value.contiguous()
        elif part in ("q", "kv") and f"{owner}an_bias" in state_dict:
            if part == "q":
                converted[f"{owner}qkv.{leaf}"] = torch.cat([value, state_dict[f"{owner}kv.{leaf}"]])
        else:
            converted[name] = value
    return converted
