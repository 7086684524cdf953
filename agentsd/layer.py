"""One transformer block in one call: its token maps, and its self-attention under a plan. For every host."""

from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from agentsd.ops.attention import Attend, agent_attention, log_size_bias, size_weighted_attention
from agentsd.ops.merging import Match, TokenMap, match
from agentsd.planning import LayerPlan


class SelfAttention(Protocol):
    """What a host knows of a self-attention layer: its projections, tokens B×N×C to heads B×H×N×d and back.

    Attributes:
        attend: the fused attention to call.
    """

    attend: Attend

    def query(self, tokens: Tensor) -> Tensor: ...
    def key(self, tokens: Tensor) -> Tensor: ...
    def value(self, tokens: Tensor) -> Tensor: ...
    def out(self, heads: Tensor) -> Tensor: ...

    def stock(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """The host's own attention among these tokens, B×N×C; `bias` B×1×1×N is added to the scores."""


class BlockState:
    """What the parts of one transformer block share in a call: the block's input, by which tokens are matched.

    Args:
        plans: of the call in progress, by level; its owner changes it from call to call.
        level: of the block.
        x: the metric, B×N×C, where it is known already.
    """

    def __init__(self, plans: dict[int, LayerPlan], level: int, x: Tensor | None = None) -> None:
        self.plans = plans
        self.level = level
        self.x = x
        self._match: Match | None = None
        self._map: TokenMap | None = None

    def forget(self, *_: Any) -> None:
        """Hold no tensor longer than the block runs."""
        self.x = self._match = self._map = None

    def remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the block's first norm."""
        self.forget()
        self.x = args[0]

    def plan(self, tokens: Tensor) -> LayerPlan | None:
        """The plan for a part of the block that is called with `tokens`; None leaves it unmodified."""
        plan = self.plans.get(self.level)
        known = self.x is not None and self.x.shape[:-1] == tokens.shape[:-1]
        return plan if plan and known and tokens.shape[1:-1] == (plan.tokens,) else None

    def token_map(self, plan: LayerPlan, count: int) -> TokenMap:
        """The map that merges `count` tokens away; tokens are matched once per call."""
        if self._match is None:
            assert self.x is not None
            assert plan.destinations is not None
            self._match = match(self.x, plan.destinations)
        return self._match.token_map(count)

    def merged(self, plan: LayerPlan) -> TokenMap | None:
        """The map of ToMe for SD, made once per call; None where nothing is merged."""
        if self._map is None and plan.merged:
            self._map = self.token_map(plan, plan.merged)
        return self._map

    def merge_part(
        self, part: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the cross-attention or the feed-forward part: it computes merged tokens."""
        plan = self.plan(args[0])
        # An IP-Adapter's masks are laid out on the whole grid.
        whole = kwargs.get("encoder_hidden_states") is None or kwargs.get("ip_adapter_masks") is not None
        if plan is None or part not in plan.parts or (part == "crossattn" and whole):
            return None
        merged = self.merged(plan)
        return ((merged.merge(args[0]), *args[1:]), kwargs) if merged else None

    def unmerge(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """Forward hook of a part that may have been called with merged tokens."""
        return self._map.unmerge(out) if self._map and args[0].shape[1] == self._map.groups else None

    def hook(self, block: Any, parts: frozenset[str]) -> list[RemovableHandle]:
        """Put on a transformer block the hooks that merging these parts of it needs."""
        handles = [block.norm1.register_forward_pre_hook(self.remember)]
        last = block.attn1
        for part, module in (("crossattn", block.attn2), ("mlp", block.ff)):
            if part in parts and module is not None:
                handles.append(module.register_forward_pre_hook(partial(self.merge_part, part), with_kwargs=True))
                handles.append(module.register_forward_hook(self.unmerge))
                last = block.ff
        handles.append(last.register_forward_hook(self.forget))
        return handles


def accelerated_attention(y: Tensor, plan: LayerPlan, state: BlockState, layer: SelfAttention) -> Tensor:
    """A layer's self-attention under a plan: AgentSD, ToMe for SD, or attention to size-weighted groups.

    Args:
        y: normed tokens, B×N×C.
        plan: with an attention.
        state: of the block, which knows its input.
        layer: the layer as its host knows it.

    Returns:
        B×N×C.
    """
    if plan.attention == "kv":
        groups = state.token_map(plan, plan.tokens - plan.keys)
        a = groups.merge(y)
        q, k, v = layer.query(y), layer.key(a), layer.value(a)
        return layer.out(size_weighted_attention(q, k, v, groups.sizes, attend=layer.attend))
    merged = state.merged(plan)
    f = merged.merge(y) if merged else y
    if plan.attention == "agent":
        a = state.token_map(plan, plan.tokens - plan.agents).merge(y)
        q, k, v, agents = layer.query(f), layer.key(f), layer.value(f), layer.query(a)
        scale2 = q.shape[-1] ** (-0.5 * plan.k_scale2)
        heads = agent_attention(q, k, v, agents, scale2=scale2, shortcut=plan.k_shortcut, attend=layer.attend)
        out = layer.out(heads)
    else:
        out = layer.stock(f, log_size_bias(merged.sizes, f) if plan.proportional and merged else None)
    return merged.unmerge(out) if merged else out
