"""Hypothesis strategies: any technique, any configuration."""

from typing import Any

from hypothesis import strategies as st

from agentsd import KV, Agent, AgentSDConfig, Merge, Phase, StepCache

share = st.floats(0, 1)
strides = st.integers(2, 6) | st.tuples(st.integers(2, 5), st.integers(2, 5))
ratios = st.floats(0, 0.75)
attentions = st.one_of(
    st.none(),
    st.builds(Agent, ratio=ratios, stride=strides, agent_ratio=share, k_scale2=st.floats(0, 2)),
    st.builds(
        Merge,
        ratio=ratios,
        stride=strides,
        proportional=st.booleans(),
        parts=st.lists(st.sampled_from(["attn", "crossattn", "mlp"]), min_size=1, unique=True).map(tuple),
    ),
    st.builds(KV, stride=strides, kv_ratio=share, max_agents=st.none() | st.integers(1, 4096)),
)
levels = st.integers(-2, 4) | st.lists(st.integers(-2, 4), min_size=1, unique=True).map(tuple)
step_caches = st.builds(
    StepCache,
    interval=st.integers(1, 9),
    layers=st.integers(1, 9),
    max_gap=st.none() | share,
    extrapolate=st.floats(0, 2),
)


@st.composite
def configs(draw: Any) -> AgentSDConfig:
    ends = [*sorted(draw(st.lists(st.floats(0.01, 0.99), max_size=2, unique=True))), 1.0]
    covered = draw(levels)
    phases = [Phase(end, draw(attentions), covered, draw(st.none() | st.integers(1, 4096))) for end in ends]
    steps = tuple(draw(st.lists(step_caches, max_size=1)))
    return AgentSDConfig(tuple(phases), steps, draw(st.none() | st.integers(0, 2**64 - 1)))
