"""torch.compile of every family's UNet before and after `apply`: the images of the uncompiled pipeline, bit for bit."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import agentsd
from compatibility import Compatibility
from families import FAMILIES, Family
from operations import CONFIG, OPERATIONS, Operation, draw, graphs, images

pytestmark = pytest.mark.slow

COMPILING = [operation for operation in OPERATIONS.values() if operation.compiles]
FIRST = next(iter(FAMILIES))


@pytest.fixture(scope="module", autouse=True)
def many_graphs() -> Iterator[None]:
    """Let every family have graphs of its own."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 64}):
        yield
    torch._dynamo.reset()


@lru_cache(maxsize=1)
def forget_graphs_of_others(config: str) -> None:
    """Keep a graph as long as it may serve the next family too; each of the others costs time at every new one."""
    torch._dynamo.reset()


def drawn(family: Family, pipe: Any) -> tuple[Tensor, int]:
    """An image, and how many graphs ran for it."""
    graphs.runs = 0
    return draw(family, pipe), graphs.runs


@pytest.mark.parametrize("operation", [pytest.param(operation, id=operation.name) for operation in COMPILING])
@pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in FAMILIES.values()])
def test_both_orders_give_the_image_without_compilation(
    family: Family, operation: Operation, compatibility: Compatibility
) -> None:
    before = family.build()
    if reason := operation.unfit(before):
        compatibility(family.name, operation.name, "–", reason)
        return
    forget_graphs_of_others(str(before.unet.config))
    stock, accelerated = images(family.name)
    before = operation.do(before)
    image, runs = drawn(family, before)
    assert torch.equal(image, stock)
    assert runs

    def check(pipe: Any, expected: Tensor) -> None:
        image, again = drawn(family, pipe)
        assert torch.equal(image, expected)
        assert again == runs

    check(agentsd.apply(before, CONFIG), accelerated)
    after = operation.do(agentsd.apply(family.build(), CONFIG))
    check(after, accelerated)
    check(agentsd.remove(after), stock)
    compatibility(family.name, operation.name)


@pytest.mark.parametrize("operation", [pytest.param(operation, id=operation.name) for operation in COMPILING])
def test_compilation_may_end_whenever_it_likes(operation: Operation) -> None:
    family = FAMILIES[FIRST]
    stock, accelerated = images(FIRST)
    assert operation.undo
    torch._dynamo.reset()
    pipe = operation.do(agentsd.apply(family.build(), CONFIG))
    assert drawn(family, pipe)[1]
    pipe = operation.undo(pipe)
    image, runs = drawn(family, pipe)
    assert torch.equal(image, accelerated)
    assert runs == 0
    assert torch.equal(draw(family, agentsd.remove(pipe)), stock)
