"""UNets with the original names: the same plans as for diffusers, and no need of it."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import agentsd
from agentsd import Agent, AgentSDConfig, Phase
from agentsd.hosts import ldm
from agentsd.hosts.diffusers_unet import patch_of
from agentsd.planning import LayerPlan
from ldm_host import VARIANTS, build, inputs


def unplaced(plans: dict[int, LayerPlan]) -> dict[int, LayerPlan]:
    return {level: replace(plan, destinations=None) for level, plan in plans.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_both_hosts_plan_the_same(name: str, tiny_unet: Any) -> None:
    config, unet = VARIANTS[name], build()
    theirs = tiny_unet()
    text = torch.zeros(2, 3, 32)
    x, context = inputs(20, 12)
    agentsd.apply(theirs, config)
    patch, hooks = patch_of(theirs), ldm.apply(unet, config)
    assert patch
    assert hooks.planner.covered == patch.planner.covered
    for timestep in (900, 300):
        unet(x, torch.full((2,), timestep), context)
        theirs(x.float(), timestep, text)
        assert unplaced(hooks.plans) == unplaced(patch.plans)
        for level, plan in hooks.plans.items():
            other = patch.plans[level].destinations
            assert other is not None
            assert plan.destinations is not None
            assert torch.equal(plan.destinations, other)


@pytest.mark.parametrize(
    ("xl", "levels", "covered"),
    [
        (False, 0, {1}),
        (False, 1, {1}),
        (False, -1, {2}),
        (False, (0, -1), {1, 2}),
        (True, 0, {2}),
        (True, 2, {2}),
        (True, -1, {3}),
    ],
)
def test_levels_are_counted_from_the_latent_or_from_the_finest_grid(xl: bool, levels: Any, covered: set[int]) -> None:
    unet = build(xl=xl)
    assert {layer.level for layer in ldm.find_layers(unet)} == ({2, 3} if xl else {1, 2})
    patch = ldm.apply(unet, AgentSDConfig((Phase(attention=Agent(), levels=levels),)))
    assert patch.planner.covered == covered


def test_hosts_need_no_diffusers() -> None:
    modules = "agentsd.hosts.ldm, agentsd.hosts.comfyui.nodes, agentsd.nn, agentsd.layer, agentsd.ops.kernels"
    code = f"import sys; sys.modules['diffusers'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
