"""Hosts that differ in everything else do what the planner says."""

from typing import Any

import pytest
import torch

import agentsd
import ldm_host
from agentsd import AgentSDConfig
from agentsd.hosts import ldm
from agentsd.hosts.diffusers_unet import find_layers, patch_of
from agentsd.planning import LayerPlan, Planner, level_grid
from conftest import TinyUNet

EARLY, LATE = 901, 301  # on both sides of progress 0.4


def diffusers_plans(tiny_unet: TinyUNet, config: AgentSDConfig, timestep: int) -> tuple[set[int], dict[int, LayerPlan]]:
    unet = agentsd.apply(tiny_unet(), config)
    unet(torch.randn(1, 4, 20, 28), timestep, torch.randn(1, 5, 32))
    patch = patch_of(unet)
    assert patch is not None
    return {layer.level for layer in find_layers(unet)}, patch.plans


def ldm_plans(tiny_unet: TinyUNet, config: AgentSDConfig, timestep: int) -> tuple[set[int], dict[int, LayerPlan]]:
    unet = ldm_host.build()
    patch = ldm.apply(unet, config)
    sample, context = ldm_host.inputs(20, 28)
    unet(sample, torch.tensor([timestep, timestep]), context)
    return {layer.level for layer in ldm.find_layers(unet)}, patch.plans


@pytest.mark.parametrize("preset", ["paper", "faithful", "fast", "hires"])
@pytest.mark.parametrize("timestep", [EARLY, LATE])
@pytest.mark.parametrize("host", [diffusers_plans, ldm_plans])
def test_a_host_does_what_the_planner_says(tiny_unet: TinyUNet, host: Any, timestep: int, preset: str) -> None:
    config = AgentSDConfig.from_preset(preset)
    levels, plans = host(tiny_unet, config, timestep)
    planner = Planner(config, levels)
    expected = {
        level: plan
        for level in levels
        if (plan := planner.plan(level, level_grid((20, 28), level), timestep, 1000, "cpu"))
    }
    assert plans.keys() == expected.keys() == planner.covered
    for level, plan in plans.items():
        wanted = vars(expected[level])
        assert torch.equal(plan.destinations, wanted["destinations"])
        assert {**vars(plan), "destinations": None} == {**wanted, "destinations": None}
