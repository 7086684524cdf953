"""The trainable module written out token by token in float64, independent of the package: plain loops."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from reference import Grid, softmax

Table = Callable[[int, int], float]


def resized(table: Tensor, size: Grid) -> Table:
    """Bilinear resizing with corners not aligned, entry by entry."""

    def corners(index: int, length: int, target: int) -> tuple[int, int, float]:
        at = max(0.0, (index + 0.5) * length / target - 0.5)
        low = min(int(at), length - 1)
        return low, min(low + 1, length - 1), at - low

    def entry(row: int, column: int) -> float:
        top, bottom, down = corners(row, table.shape[0], size[0])
        left, right, across = corners(column, table.shape[1], size[1])
        upper = table[top, left] * (1 - across) + table[top, right] * across
        lower = table[bottom, left] * (1 - across) + table[bottom, right] * across
        return float(upper * (1 - down) + lower * down)

    return entry


def bias_table(state: dict[str, Tensor], names: str, head: int, agent: int, grid: Grid, prefix: int) -> Tensor:
    """The terms of one agent for the tokens before the grid and on it, from the authors' parameters."""
    if "an_bias" not in state:
        return torch.zeros(prefix + grid[0] * grid[1], dtype=torch.float64)
    square, rows, columns, before = (state.get(f"{name}_bias") for name in names.split())
    assert square is not None
    assert rows is not None
    assert columns is not None
    if names.startswith("na"):
        rows, columns = rows.movedim(-1, 2), columns.movedim(-1, 2)
        before = None if before is None else before.movedim(-1, 2)
    of_map = resized(square[head, agent], grid)
    of_rows = resized(rows[0, head, agent].reshape(-1, 1), (grid[0], 1))
    of_columns = resized(columns[0, head, agent].reshape(1, -1), (1, grid[1]))
    on_grid = [of_map(i, j) + of_rows(i, 0) + of_columns(0, j) for i in range(grid[0]) for j in range(grid[1])]
    first = [] if before is None else before[0, head, agent].flatten().tolist()
    return torch.tensor(first + on_grid, dtype=torch.float64)


def pooled(q: Tensor, grid: Grid, side: int, keep: list[bool]) -> list[Tensor | None]:
    """The mean of the kept queries of every cell; None where there is none."""
    means: list[Tensor | None] = []
    for i in range(side):
        for j in range(side):
            cell = [
                q[row * grid[1] + column]
                for row in range(i * grid[0] // side, math.ceil((i + 1) * grid[0] / side))
                for column in range(j * grid[1] // side, math.ceil((j + 1) * grid[1] / side))
                if keep[row * grid[1] + column]
            ]
            means.append(sum(cell[1:], cell[0]) / len(cell) if cell else None)
    return means


def convolved(v: Tensor, grid: Grid, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise 3×3 convolution of the tokens of a grid, zero outside."""
    rows = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            total = bias.clone()
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    if 0 <= i + a < grid[0] and 0 <= j + b < grid[1]:
                        total = total + weight[:, 0, a + 1, b + 1] * v[(i + a) * grid[1] + j + b]
            rows.append(total)
    return torch.stack(rows)


def reduced(x: Tensor, grid: Grid, state: dict[str, Tensor], sr: int) -> Tensor:
    """The tokens of PVT's spatial reduction."""
    rows = []
    for i in range(grid[0] // sr):
        for j in range(grid[1] // sr):
            y = state["sr.bias"].clone()
            for a in range(sr):
                for b in range(sr):
                    y = y + state["sr.weight"][:, :, a, b] @ x[(i * sr + a) * grid[1] + j * sr + b]
            y = (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()
            rows.append(y * state["norm.weight"] + state["norm.bias"])
    return torch.stack(rows)


def reference(
    state: dict[str, Tensor],
    x: Tensor,
    grid: Grid,
    heads: int,
    agents: int,
    prefix: int = 0,
    sr: int = 1,
    keep: list[bool] | None = None,
) -> Tensor:
    """Agent attention of one picture, N×C, with parameters named and shaped as in the authors' code."""
    keep = keep or [True] * len(x)
    C = x.shape[1]
    d = C // heads
    if "q.weight" in state:
        Wq, Wkv, bq, bkv = (state[name] for name in ("q.weight", "kv.weight", "q.bias", "kv.bias"))
    else:
        (Wq, Wkv), (bq, bkv) = (state[f"qkv.{name}"].split((C, 2 * C)) for name in ("weight", "bias"))
    small = (grid[0] // sr, grid[1] // sr)
    source = x if sr == 1 else reduced(x, grid, state, sr)
    seen = keep if sr == 1 else [True] * len(source)
    q = torch.stack([Wq @ token + bq for token in x])
    kv = torch.stack([Wkv @ token + bkv for token in source])
    k, v = kv.split(C, dim=1)
    outs = torch.zeros_like(x)
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        tokens = pooled(q[prefix:, part], grid, math.isqrt(agents), keep[prefix:])
        used = [agent for agent, token in enumerate(tokens) if token is not None]
        hidden = torch.tensor([0.0 if visible else -math.inf for visible in seen], dtype=torch.float64)
        gathered = {}
        for agent in used:
            bias = bias_table(state, "an ah aw ac", head, agent, small, prefix) + hidden
            gathered[agent] = softmax(k[:, part] @ tokens[agent] / math.sqrt(d) + bias) @ v[:, part]
        tables = {agent: bias_table(state, "na ha wa ca", head, agent, grid, prefix) for agent in used}
        for token in range(len(x)):
            logits = torch.stack([q[token, part] @ tokens[a] / math.sqrt(d) + tables[a][token] for a in used])
            outs[token, part] = softmax(logits) @ torch.stack([gathered[a] for a in used])
    if "dwc.weight" in state:
        visible = torch.stack([token if kept else 0 * token for token, kept in zip(v, seen, strict=True)])[prefix:]
        if sr > 1:
            enlarge = [resized(visible.detach()[:, c].reshape(small), grid) for c in range(C)]
            visible = torch.tensor(
                [[table(i, j) for table in enlarge] for i in range(grid[0]) for j in range(grid[1])],
                dtype=torch.float64,
            )
        outs[prefix:] += convolved(visible, grid, state["dwc.weight"], state["dwc.bias"])
    return torch.stack([state["proj.weight"] @ token + state["proj.bias"] for token in outs])


def authors_state(
    dim: int,
    heads: int,
    agents: int,
    grid: Grid,
    *,
    seed: int = 0,
    bias: bool = True,
    dwc: bool = True,
    prefix: int = 0,
    sr: int = 1,
    separate: bool = False,
) -> dict[str, Tensor]:
    """Random parameters with the names and shapes of the authors' code."""
    H, W = grid
    shapes: dict[str, tuple[int, ...]] = {"proj.weight": (dim, dim), "proj.bias": (dim,)}
    for name, parts in (("q", 1), ("kv", 2)) if separate else (("qkv", 3),):
        shapes |= {f"{name}.weight": (parts * dim, dim), f"{name}.bias": (parts * dim,)}
    if bias:
        shapes |= {
            "an_bias": (heads, agents, 7, 7),
            "na_bias": (heads, agents, 7, 7),
            "ah_bias": (1, heads, agents, H // sr, 1),
            "aw_bias": (1, heads, agents, 1, W // sr),
            "ha_bias": (1, heads, H, 1, agents),
            "wa_bias": (1, heads, 1, W, agents),
        }
    if bias and prefix:
        shapes |= {"ac_bias": (1, heads, agents, prefix), "ca_bias": (1, heads, prefix, agents)}
    if dwc:
        shapes |= {"dwc.weight": (dim, 1, 3, 3), "dwc.bias": (dim,)}
    if sr > 1:
        shapes |= {"sr.weight": (dim, dim, sr, sr), "sr.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
