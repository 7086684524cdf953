"""The method written out token by token in float64: plain loops and an explicit softmax, nothing of the package.

Every function below treats one picture and one head at a time. Tokens are rows; a group is the list of the tokens that
stand together; destinations are given as a list of token indices. `technique` is an `Agent`, `Merge` or `KV`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from agentsd import KV, Agent, Merge

Grid = tuple[int, int]  # (height, width)


def similarity(u: Sequence[float], v: Sequence[float]) -> float:
    """Cosine similarity."""
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(a * a for a in u)) / math.sqrt(sum(b * b for b in v))


def match(x: Tensor, dst: Sequence[int]) -> list[tuple[float, int, int]]:
    """(similarity, source, most similar destination) for every source in token order; ties go to the earlier one."""
    tokens = x.double().tolist()
    matches = []
    for source in range(len(tokens)):
        if source in dst:
            continue
        best, target = -math.inf, -1
        for destination in dst:
            s = similarity(tokens[source], tokens[destination])
            if s > best:
                best, target = s, destination
        matches.append((best, source, target))
    return matches


def groups_of(x: Tensor, dst: Sequence[int], count: int) -> list[list[int]]:
    """The groups after merging the `count` most similar sources (ties in token order) into their destinations."""
    best_first = sorted(match(x, dst), key=lambda m: -m[0])
    target = {source: destination for _, source, destination in best_first[:count]}
    groups = {token: [token] for token in range(len(x)) if token not in target}
    for source, destination in target.items():
        groups[destination].append(source)
    return list(groups.values())


Grouping = Callable[[Tensor, Sequence[int], int], list[list[int]]]


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


def agent_attention(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, scale2: float, shortcut: float) -> Tensor:
    """Aggregation by the agents, broadcast to the queries, shortcut of the values."""
    v_agents = attention(agents, k, v, q.shape[1] ** -0.5)
    return attention(q, agents, v_agents, scale2) + shortcut * v


def project(linear: nn.Module, tokens: Tensor) -> Tensor:
    weight = linear.weight.double()
    out = torch.stack([weight @ token for token in tokens])
    return out if linear.bias is None else out + linear.bias.double()


def cell_on(technique: Agent | Merge | KV, grid: Grid) -> Grid:
    """(sy, sx) of a technique, whose stride is (sx, sy); cells grow where there would be more than `max_agents`."""
    sx, sy = (technique.stride,) * 2 if isinstance(technique.stride, int) else technique.stride
    most = technique.max_agents if isinstance(technique, KV) else None
    factor = 1
    while most and (grid[0] // (factor * sy)) * (grid[1] // (factor * sx)) > most:
        factor += 1
    return factor * sy, factor * sx


def reference_attention(
    attn: Attention,
    x: Tensor,
    y: Tensor,
    technique: Agent | Merge | KV,
    dst: Sequence[int],
    grouping: Grouping = groups_of,
) -> Tensor:
    """One self-attention layer for one picture: block input x and normed y, each N×C, to the output of `to_out`.

    `dst` are the destinations, one of each cell.
    """
    n = len(x)
    y = y.double()
    agents = key_sizes = None

    if isinstance(technique, KV):
        groups = grouping(x, dst, int(n * technique.kv_ratio))
        means = merge(y, groups)
        q, k, v = project(attn.to_q, y), project(attn.to_k, means), project(attn.to_v, means)
        groups_out = [[token] for token in range(n)]
        key_sizes = [len(group) for group in groups]
    else:
        groups_out = grouping(x, dst, int(n * technique.ratio))
        f = merge(y, groups_out)
        q, k, v = project(attn.to_q, f), project(attn.to_k, f), project(attn.to_v, f)
        if isinstance(technique, Agent):
            a = merge(y, grouping(x, dst, int(n * technique.agent_ratio)))
            if 2 * len(a) < len(f):
                agents = project(attn.to_q, a)
        elif technique.proportional:
            key_sizes = [len(group) for group in groups_out]

    d = q.shape[1] // attn.heads
    heads = []
    for head in range(attn.heads):
        part = slice(head * d, (head + 1) * d)
        if agents is None:
            o = attention(q[:, part], k[:, part], v[:, part], d**-0.5, key_sizes)
        else:
            assert isinstance(technique, Agent)
            scale2 = d ** (-0.5 * technique.k_scale2)
            o = agent_attention(q[:, part], k[:, part], v[:, part], agents[:, part], scale2, technique.k_shortcut)
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
    techniques: Mapping[int, Agent | Merge | KV],
    destinations: Callable[[Grid, Grid], Sequence[int]],
    matched_on: Sequence[Tensor] = (),
    grouping: Grouping = groups_of,
) -> Iterator[UNet2DConditionModel]:
    """The UNet with the reference as the self-attention of some levels.

    Args:
        unet: stock again afterwards.
        techniques: by level. A grid smaller than one cell keeps its stock attention.
        destinations: those of a grid with cells of (sy, sx).
        matched_on: block inputs, in the order of the calls, to match on instead of the UNet's.
        grouping: another way of making the groups.
    """
    hooks, patched = [], []
    given = iter(matched_on)

    def chosen(technique: Agent | Merge | KV, grid: list[int]) -> list[int]:
        """The destinations; none on a grid that is smaller than a cell."""
        (h, w), (sy, sx) = grid, cell_on(technique, (grid[0], grid[1]))
        return list(destinations((h, w), (sy, sx))) if h >= sy and w >= sx else []

    def on_merged(part: nn.Module, inputs: list[Tensor], grid: list[int], technique: Merge) -> None:
        """Call a part of a block with merged tokens, picture by picture (ToMe for SD)."""
        stock = part.forward

        def forward(y: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any) -> Tensor:
            (x,), dst, n = inputs, chosen(technique, grid), y.shape[1]
            rows = []
            for i in range(len(y)):
                groups = grouping(x[i], dst, int(n * technique.ratio)) if dst else [[token] for token in range(n)]
                context = () if encoder_hidden_states is None else (encoder_hidden_states[i : i + 1],)
                rows.append(unmerge(stock(merge(y[i], groups)[None], *context, **kwargs)[0], groups))
            return torch.stack(rows)

        part.forward = forward
        patched.append(part)

    def patch(block: nn.Module, grid: list[int], technique: Agent | Merge | KV) -> None:
        stock = block.attn1.forward
        inputs: list[Tensor] = []
        seen: list[Tensor] = []
        parts: Sequence[str] = ("attn",)
        if isinstance(technique, Merge):
            parts = technique.parts
            for name, part in (("crossattn", block.attn2), ("mlp", block.ff)):
                if name in parts:
                    on_merged(part, seen, grid, technique)
        hooks.append(block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))

        def forward(y: Tensor, **kwargs: Any) -> Tensor:
            x = next(given, inputs.pop())
            seen[:] = [x]
            dst = chosen(technique, grid)
            if not dst or "attn" not in parts:
                return stock(y, **kwargs)
            out = [reference_attention(block.attn1, x[i], y[i], technique, dst, grouping) for i in range(len(y))]
            return torch.stack(out).to(y.dtype)

        block.attn1.forward = forward
        patched.append(block.attn1)

    for level, transformer in self_attention_levels(unet):
        if level in techniques:
            grid: list[int] = []
            hooks.append(
                transformer.register_forward_pre_hook(
                    lambda _, args, grid=grid: grid.__setitem__(slice(None), args[0].shape[-2:])
                )
            )
            for block in transformer.transformer_blocks:
                patch(block, grid, techniques[level])
    try:
        yield unet
    finally:
        for hook in hooks:
            hook.remove()
        for part in patched:
            del part.forward
