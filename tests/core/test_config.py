"""Configurations: presets, YAML, and one clear sentence for whatever is not allowed."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentsd import AgentSDConfig, Phase
from agentsd.config import AGENTS, ATTENTIONS
from agentsd.schedule import phase_at, progress


def phases() -> st.SearchStrategy[Phase]:
    return st.builds(
        Phase,
        attention=st.sampled_from(ATTENTIONS),
        ratio=st.none() | st.floats(0, 0.75),
        stride=st.integers(2, 6) | st.tuples(st.integers(2, 5), st.integers(2, 5)),
        agent_ratio=st.floats(0, 1),
        agents=st.sampled_from(AGENTS),
        proportional=st.booleans(),
        k_scale2=st.floats(0, 2),
        kv_ratio=st.floats(0, 1),
        max_agents=st.none() | st.integers(1, 4096),
        min_tokens=st.none() | st.integers(1, 4096),
        levels=st.none()
        | st.lists(st.integers(-2, 4), min_size=1).map(tuple)
        | st.dictionaries(
            st.integers(-2, 4),
            st.fixed_dictionaries({}, optional={"stride": st.integers(2, 8), "kv_ratio": st.floats(0, 1)}),
            min_size=1,
        ),
    )


@settings(deadline=None)
@given(phases(), st.floats(0, 0.75), st.booleans(), st.integers(0, 2**64 - 1), st.none() | st.just(Path("re fine.st")))
def test_yaml_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, phase: Phase, ratio: float, rand: bool, seed: int, refine: Path | None
) -> None:
    refine = refine if phase.attention == "agent" and not isinstance(phase.levels, dict) else None
    config = AgentSDConfig(ratio=ratio, phases=(phase,), use_rand=rand, seed=seed, refine=refine)
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    config.to_file(path)
    assert AgentSDConfig.from_file(path) == config
    assert AgentSDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    assert AgentSDConfig.from_dict(config.to_dict()) == config


def test_preset_paper_is_the_default_and_is_what_was_published() -> None:
    config = AgentSDConfig.from_preset("paper")
    assert config == AgentSDConfig()
    first, second = config.phases
    assert (first.attention, first.stride, first.agent_ratio, first.k_scale2, first.k_shortcut) == (
        "agent",
        4,
        0.95,
        0.3,
        0.075,
    )
    assert (second.attention, second.stride, second.until) == ("merge", 2, 1.0)


def test_fifty_even_steps_put_the_first_twenty_in_the_first_phase() -> None:
    config = AgentSDConfig()
    attentions = [phase_at(config.phases, progress(t, 1000)).attention for t in range(981, 0, -20)]
    assert attentions == ["agent"] * 20 + ["merge"] * 30


@pytest.mark.parametrize("name", AgentSDConfig.presets())
def test_every_preset_loads(name: str) -> None:
    assert AgentSDConfig.from_preset(name).phases[-1].until == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AgentSDConfig(ratio=0.8), r"ratio is 0\.8; with stride 2 it must be a number from 0 to 0\.75"),
        (lambda: AgentSDConfig(ratio=-0.1), r"ratio is -0\.1; .* from 0 to"),
        (lambda: AgentSDConfig(ratio="0.4"), r"ratio is '0\.4'"),
        (lambda: Phase(stride=3, ratio=0.9), r"ratio is 0\.9; with stride 3 .* to 0\.888889"),
        (lambda: Phase(stride=(2, 3), ratio=0.9), r"with stride \(2, 3\) .* to 0\.833333"),
        (lambda: Phase(attention="agents"), "attention is 'agents'; it must be one of agent, merge, kv, stock"),
        (lambda: Phase(agents="mean"), "agents is 'mean'; it must be one of merge, pool"),
        (lambda: Phase(stride=1), "stride is 1; it must be a whole number from 2"),
        (lambda: Phase(stride=(2, 0)), r"stride is \(2, 0\)"),
        (lambda: Phase(until=1.5), r"until is 1\.5; it must be a number from 0 to 1"),
        (lambda: Phase(levels=()), r"levels is \(\); it must be"),
        (lambda: Phase(levels=(1.5,)), r"levels is \(1.5,\)"),
        (lambda: Phase(levels={1: {"stride": 1}}), "stride is 1"),
        (lambda: Phase(levels={1: {"until": 0.5}}), "level 1 is {'until': 0.5}; it must be a mapping without until"),
        (lambda: Phase(levels={1: {"strid": 2}}), "level 1 has no field 'strid'"),
        (lambda: Phase(levels={1: 2}), "level 1 is 2; it must be a mapping"),
        (lambda: AgentSDConfig(ratio=0.8, phases=(Phase(levels={2: {"stride": 2}}),)), "ratio is 0.8; with stride 2"),
        (lambda: Phase(max_agents=0), "max_agents is 0; it must be null or a whole number from 1"),
        (lambda: Phase(min_tokens=True), "min_tokens is True"),
        (lambda: Phase(kmeans_steps=-1), "kmeans_steps is -1; it must be a whole number from 0"),
        (lambda: Phase(kv_ratio=1.5), "kv_ratio is 1.5"),
        (lambda: Phase(proportional=1), "proportional is 1; it must be true or false"),
        (lambda: AgentSDConfig(phases=(Phase(until=0.5),)), r"until must rise .* be 1 in the last"),
        (lambda: AgentSDConfig(phases=(Phase(until=1.0), Phase(until=1.0))), "until must rise"),
        (lambda: AgentSDConfig(phases=()), "phases is"),
        (lambda: AgentSDConfig(seed=-1), "seed is -1"),
        (lambda: AgentSDConfig(use_rand="yes"), "use_rand is 'yes'"),
        (lambda: AgentSDConfig(refine=3), "refine is 3; it must be null or the path of a safetensors file"),
        (lambda: AgentSDConfig(refine=""), "refine is ''; it must be null or the path"),
        (lambda: AgentSDConfig.from_preset("fast").replace(refine="a"), "refine is 'a'; it refines attention 'agent'"),
        (lambda: AgentSDConfig().replace(rato=0.4), "no field 'rato'; its fields are ratio, phases"),
        (lambda: AgentSDConfig.from_dict({"phases": [{"strid": 2}]}), "phase has no field 'strid'"),
        (lambda: AgentSDConfig.from_dict([1]), "must be a mapping"),
        (lambda: AgentSDConfig.from_preset("best"), "preset is 'best'; it must be one of .*paper"),
    ],
)
def test_one_sentence_names_field_value_and_what_is_allowed(build, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_a_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("ratio: [", "phases: 3", "spam: 1", "- 1"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml") as error:
            AgentSDConfig.from_file(path)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        AgentSDConfig.from_file(tmp_path / "none.yaml")
