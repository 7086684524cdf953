"""The method written out token by token in float64, independent of the package: plain loops and an explicit softmax.

Every function below treats one picture and one head at a time. Tokens are rows; a group is the list of the tokens that
stand together; destinations are given as a list of token indices.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

Grid = tuple[int, int]  # (height, width)


def similarity(u: Sequence[float], v: Sequence[float]) -> float:
    """Cosine similarity."""
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(a * a for a in u)) / math.sqrt(sum(b * b for b in v))


def match(x: Tensor, dst: Sequence[int], steps: int = 0) -> list[tuple[float, int, int]]:
    """(similarity, source, most similar destination) for every source in token order; ties go to the earlier one.

    After every step of k-means a destination is compared to as the mean of the tokens that it stands for.
    """
    tokens = x.double().tolist()
    anchors = {destination: tokens[destination] for destination in dst}
    for _ in range(steps + 1):
        matches = []
        for source in range(len(tokens)):
            if source in dst:
                continue
            best, target = -math.inf, -1
            for destination in dst:
                s = similarity(tokens[source], anchors[destination])
                if s > best:
                    best, target = s, destination
            matches.append((best, source, target))
        for destination in dst:
            members = [destination, *(source for _, source, target in matches if target == destination)]
            anchors[destination] = x.double()[members].mean(0).tolist()
    return matches


def fold(x: Tensor, dst: Sequence[int], count: int, steps: int = 0) -> list[list[int]]:
    """The groups after folding the `count` most similar sources (ties in token order) into their destinations."""
    best_first = sorted(match(x, dst, steps), key=lambda m: -m[0])
    target = {source: destination for _, source, destination in best_first[:count]}
    groups = {token: [token] for token in range(len(x)) if token not in target}
    for source, destination in target.items():
        groups[destination].append(source)
    return list(groups.values())


Fold = Callable[[Tensor, Sequence[int], int], list[list[int]]]


def merge(y: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """The plain mean of each group."""
    rows = []
    for group in groups:
        total = torch.zeros_like(y[0])
        for token in group:
            total = total + y[token]
        rows.append(total / len(group))
    return torch.stack(rows)


def unmerge(o: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Every token receives the output of its group."""
    rows: dict[int, Tensor] = {}
    for row, group in zip(o, groups, strict=True):
        for token in group:
            rows[token] = row
    return torch.stack([rows[token] for token in range(len(rows))])


def pool(y: Tensor, grid: Grid, cells: Grid) -> Tensor:
    """Adaptive average pooling of the tokens on their grid."""
    (h, w), (rows, columns) = grid, cells
    pooled = []
    for i in range(rows):
        for j in range(columns):
            window = [
                r * w + c
                for r in range(i * h // rows, math.ceil((i + 1) * h / rows))
                for c in range(j * w // columns, math.ceil((j + 1) * w / columns))
            ]
            pooled.append(merge(y, [window])[0])
    return torch.stack(pooled)


def softmax(logits: Tensor) -> Tensor:
    weights = torch.exp(logits - logits.max())
    return weights / weights.sum()


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, sizes: Sequence[int] | None = None) -> Tensor:
    """softmax(q kᵀ · scale + log s) v, query by query."""
    rows = []
    for query in q:
        logits = (k @ query) * scale
        if sizes is not None:
            logits = logits + torch.tensor([math.log(s) for s in sizes], dtype=logits.dtype)
        rows.append(softmax(logits) @ v)
    return torch.stack(rows)


def agent_attention(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, scale2: float, shortcut: float, sizes: Sequence[int] | None = None
) -> Tensor:
    """Aggregation by the agents, broadcast to the queries, shortcut of the values."""
    v_agents = attention(agents, k, v, q.shape[1] ** -0.5, sizes)
    return attention(q, agents, v_agents, scale2) + shortcut * v


def project(linear: nn.Module, tokens: Tensor) -> Tensor:
    weight = linear.weight.double()
    out = torch.stack([weight @ token for token in tokens])
    return out if linear.bias is None else out + linear.bias.double()


def stride_of(phase: Any) -> tuple[int, int]:
    """(sy, sx) of a phase, whose own order is (sx, sy)."""
    if isinstance(phase.stride, int):
        return phase.stride, phase.stride
    sx, sy = phase.stride
    return sy, sx


def reference_attention(
    attn: Attention,
    x: Tensor,
    y: Tensor,
    grid: Grid,
    phase: Any,
    ratio: float,
    dst: Sequence[int],
    fold: Fold = fold,
) -> Tensor:
    """One self-attention layer for one picture: block input x and normed y, each N×C, to the output of `to_out`.

    `phase` is anything with the fields of `agentsd.Phase`; `dst` are the destinations, one of each cell.
    """
    n = len(x)
    y = y.double()
    sy, sx = stride_of(phase)
    agents = None

    if phase.attention == "kv":
        groups = fold(x, dst, int(n * phase.kv_ratio))
        means = merge(y, groups)
        q, k, v = project(attn.to_q, y), project(attn.to_k, means), project(attn.to_v, means)
        groups_out = [[token] for token in range(n)]
        key_sizes = [len(group) for group in groups]
    else:
        groups = groups_out = fold(x, dst, int(n * ratio) if phase.merge_attn else 0)
        f = merge(y, groups)
        q, k, v = project(attn.to_q, f), project(attn.to_k, f), project(attn.to_v, f)
        key_sizes = [len(group) for group in groups] if phase.proportional else None
        if phase.attention == "agent":
            if phase.agents == "pool":
                a = pool(y, grid, (grid[0] // sy, grid[1] // sx))
            else:
                a = merge(y, fold(x, dst, int(n * phase.agent_ratio)))
            if 2 * len(a) < len(f):
                agents = project(attn.to_q, a)

    d = q.shape[1] // attn.heads
    heads = []
    for head in range(attn.heads):
        part = slice(head * d, (head + 1) * d)
        if agents is None:
            o = attention(q[:, part], k[:, part], v[:, part], d**-0.5, key_sizes)
        else:
            scale2 = d ** (-0.5 * phase.k_scale2)
            o = agent_attention(
                q[:, part], k[:, part], v[:, part], agents[:, part], scale2, phase.k_shortcut, key_sizes
            )
        heads.append(o)
    return unmerge(project(attn.to_out[0], torch.cat(heads, dim=1)), groups_out)


def self_attention_levels(unet: UNet2DConditionModel) -> Iterator[tuple[int, Transformer2DModel]]:
    """(level, transformer) of every spatial transformer; level 1 is the latent grid."""
    n = len(unet.down_blocks)
    blocks = [(i + 1, block) for i, block in enumerate(unet.down_blocks)]
    blocks += [(n, unet.mid_block)]
    blocks += [(n - j, block) for j, block in enumerate(unet.up_blocks)]
    for level, block in blocks:
        for transformer in getattr(block, "attentions", []):
            yield level, transformer


@contextmanager
def reference_unet(
    unet: UNet2DConditionModel,
    phase: Any,
    ratio: float,
    destinations: Callable[[Grid, tuple[int, int]], Sequence[int]],
    levels: Sequence[int] = (1,),
    matched_on: Sequence[Tensor] = (),
    fold: Fold = fold,
) -> Iterator[UNet2DConditionModel]:
    """The UNet with the reference in place of the self-attention of the given levels.

    A grid smaller than one cell keeps its stock attention. `destinations(grid, (sy, sx))` gives the destinations.
    `matched_on` holds block inputs, in the order of the calls, to match on in place of the UNet's own, and `fold` can
    make the groups in another way.
    """
    sy, sx = stride_of(phase)
    if phase.kmeans_steps:
        fold = partial(fold, steps=phase.kmeans_steps)
    hooks, patched = [], []
    given = iter(matched_on)

    def on_merged(part: nn.Module, inputs: list[Tensor], grid: list[int]) -> None:
        """Call a part of a block with merged tokens, picture by picture (ToMe for SD)."""
        stock = part.forward

        def forward(y: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any) -> Tensor:
            (h, w), (x,) = grid, inputs
            dst = list(destinations((h, w), (sy, sx))) if h >= sy and w >= sx else []
            rows = []
            for i in range(len(y)):
                groups = fold(x[i], dst, int(h * w * ratio)) if dst else [[token] for token in range(h * w)]
                context = () if encoder_hidden_states is None else (encoder_hidden_states[i : i + 1],)
                rows.append(unmerge(stock(merge(y[i], groups)[None], *context, **kwargs)[0], groups))
            return torch.stack(rows)

        part.forward = forward
        patched.append(part)

    def patch(block: nn.Module, grid: list[int]) -> None:
        stock = block.attn1.forward
        inputs: list[Tensor] = []
        seen: list[Tensor] = []
        if phase.merge_crossattn:
            on_merged(block.attn2, seen, grid)
        if phase.merge_mlp:
            on_merged(block.ff, seen, grid)
        hooks.append(block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))

        def forward(y: Tensor, **kwargs: Any) -> Tensor:
            x = next(given, inputs.pop())
            seen[:] = [x]
            h, w = grid
            if h < sy or w < sx or phase.attention == "stock":
                return stock(y, **kwargs)
            dst = list(destinations((h, w), (sy, sx)))
            out = [reference_attention(block.attn1, x[i], y[i], (h, w), phase, ratio, dst, fold) for i in range(len(y))]
            return torch.stack(out).to(y.dtype)

        block.attn1.forward = forward
        patched.append(block.attn1)

    for level, transformer in self_attention_levels(unet):
        if level in levels:
            grid: list[int] = []
            hooks.append(
                transformer.register_forward_pre_hook(
                    lambda _, args, grid=grid: grid.__setitem__(slice(None), args[0].shape[-2:])
                )
            )
            for block in transformer.transformer_blocks:
                patch(block, grid)
    try:
        yield unet
    finally:
        for hook in hooks:
            hook.remove()
        for part in patched:
            del part.forward
