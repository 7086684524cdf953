"""Configurations: presets, YAML, field assignments, and one sentence for whatever is not allowed."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agentsd import KV, Agent, AgentSDConfig, Merge, Phase, StepCache
from agentsd.schedule import in_force, progress
from strategies import configs


@settings(deadline=None)
@given(config=configs())
def test_yaml_and_json_read_back_equal(tmp_path_factory: pytest.TempPathFactory, config: AgentSDConfig) -> None:
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    config.to_file(path)
    assert AgentSDConfig.from_file(path) == config
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    assert AgentSDConfig.from_dict(config.to_dict()) == config
    assert AgentSDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(config=configs())
def test_the_written_form_is_flat(config: AgentSDConfig) -> None:
    """A phase is one mapping, with the fields of its attention beside the phase's."""
    written = config.to_dict()
    assert list(written) == ["phases", "steps", "seed"]
    names = {Agent: "agent", Merge: "merge", KV: "kv", type(None): None}
    for phase, row in zip(config.phases, written["phases"], strict=True):
        inner = asdict(phase.attention) if phase.attention else {}
        assert list(row) == ["until", "levels", "min_tokens", "attention", *inner]
        assert row["attention"] == names[type(phase.attention)]
        assert all(not isinstance(value, dict) for value in row.values())
    assert written["steps"] == [asdict(entry) for entry in config.steps]


def test_what_yaml_leaves_out_is_the_default_and_one_step_cache_needs_no_list() -> None:
    read = AgentSDConfig.from_dict(
        yaml.safe_load("phases: [{attention: kv, stride: [2, 4], levels: -1}, {}]\nsteps: {interval: 2}")
    )
    assert read.phases == (Phase(attention=KV(stride=(2, 4)), levels=-1), Phase())
    assert read.steps == (StepCache(interval=2),)
    assert read.seed == 0
    assert AgentSDConfig.from_dict({}) == AgentSDConfig()


def test_no_field_is_there_twice_or_without_meaning_for_its_technique() -> None:
    assert sum(len(fields(kind)) for kind in (Agent, Merge, KV, Phase, StepCache, AgentSDConfig)) <= 24


def test_preset_paper_is_the_default_and_is_what_was_published() -> None:
    assert AgentSDConfig.from_preset("paper") == AgentSDConfig()
    assert AgentSDConfig().phases == (
        Phase(0.4, Agent(ratio=0.4, stride=4, agent_ratio=0.95, k_scale2=0.3, k_shortcut=0.075), levels=(0,)),
        Phase(1.0, Merge(ratio=0.4, stride=2, proportional=False, parts=("attn",)), levels=(0,)),
    )


def test_the_other_presets_are_what_the_tables_measured() -> None:
    """The configurations behind the tables in docs/benchmarks.md, written out."""
    fast = (
        Phase(attention=KV(stride=8), levels=0),
        Phase(attention=KV(stride=2, kv_ratio=0.5), levels=-1),
        Phase(attention=KV(stride=2), levels=-2, min_tokens=256),
    )
    cache = {"layers": 1, "extrapolate": 0.7}
    assert sorted(AgentSDConfig.presets()) == ["faithful", "fast", "hires", "paper", "turbo"]
    for name, expected in {
        "faithful": AgentSDConfig((Phase(attention=KV(stride=2)),)),
        "fast": AgentSDConfig(fast),
        "hires": AgentSDConfig(
            (
                Phase(attention=KV(stride=8, max_agents=1024), levels=0),
                Phase(attention=KV(stride=2, kv_ratio=0.5), levels=(-1, -2)),
            )
        ),
        "turbo": AgentSDConfig(
            fast,
            (
                StepCache(until=0.3, interval=3, max_gap=0.08, **cache),
                StepCache(until=0.7, interval=2, max_gap=0.045, **cache),
                StepCache(until=1.0, interval=3, max_gap=0.08, **cache),
            ),
        ),
    }.items():
        assert AgentSDConfig.from_preset(name) == expected


def test_fifty_even_steps_put_the_first_twenty_in_the_first_phase() -> None:
    phases = AgentSDConfig().phases
    seen = [in_force(phases, progress(t, 1000)) for t in range(981, 0, -20)]
    assert seen == [phases[0]] * 20 + [phases[1]] * 30


# --- field assignments: apply's overrides, `--set` and methods share one grammar


FAST = AgentSDConfig.from_preset("fast")


@pytest.mark.parametrize(
    ("start", "assigned", "expected"),
    [
        (AgentSDConfig(), {"seed": 3}, AgentSDConfig(seed=3)),
        (AgentSDConfig(), {"seed": None}, AgentSDConfig(seed=None)),
        (
            AgentSDConfig(),
            {"ratio": 0.5},
            AgentSDConfig((Phase(0.4, Agent(ratio=0.5)), Phase(1.0, Merge(ratio=0.5)))),
        ),
        (AgentSDConfig(), {"k_scale2": 1.0}, AgentSDConfig((Phase(0.4, Agent(k_scale2=1.0)), Phase(1.0, Merge())))),
        (AgentSDConfig(), {"levels": [1, 2]}, AgentSDConfig((Phase(0.4, levels=(1, 2)), Phase(1, Merge(), (1, 2))))),
        (AgentSDConfig(), {"0/stride": 8}, AgentSDConfig((Phase(0.4, Agent(stride=8)), Phase(1.0, Merge())))),
        (AgentSDConfig(), {"1/stride": [3, 2]}, AgentSDConfig((Phase(0.4), Phase(1.0, Merge(stride=(3, 2)))))),
        (AgentSDConfig(), {"0/until": 0.3}, AgentSDConfig((Phase(0.3), Phase(1.0, Merge())))),
        (AgentSDConfig(), {"1/attention": None}, AgentSDConfig((Phase(0.4), Phase(1.0, None)))),
        # Fields that both techniques have stay: the stride; those that the new one lacks go.
        (AgentSDConfig(), {"attention": "kv"}, AgentSDConfig((Phase(0.4, KV(stride=4)), Phase(1.0, KV(stride=2))))),
        (
            AgentSDConfig(),
            {"0/attention": "merge", "0/stride": 2, "0/proportional": True},
            AgentSDConfig((Phase(0.4, Merge(proportional=True)), Phase(1.0, Merge()))),
        ),
        (AgentSDConfig(), {"steps/interval": 4}, AgentSDConfig(steps=StepCache(interval=4))),
        (
            AgentSDConfig(),
            {"steps/interval": 4, "steps/layers": 2},
            AgentSDConfig(steps=(StepCache(interval=4, layers=2),)),
        ),
        (
            AgentSDConfig(steps=(StepCache(0.5), StepCache(1.0, 2))),
            {"steps/extrapolate": 0.5, "steps/0/interval": 5},
            AgentSDConfig(steps=(StepCache(0.5, 5, extrapolate=0.5), StepCache(1.0, 2, extrapolate=0.5))),
        ),
        (AgentSDConfig(), {"steps": [{"interval": 2}]}, AgentSDConfig(steps=StepCache(interval=2))),
        (AgentSDConfig(), {"phases": FAST.to_dict()["phases"]}, FAST),
        (AgentSDConfig(), {"phases": FAST.phases}, FAST),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items())[:40] if isinstance(value, dict) else "",
)
def test_an_assignment_reaches_what_it_names_and_nothing_else(
    start: AgentSDConfig, assigned: dict[str, Any], expected: AgentSDConfig
) -> None:
    assert start.assign(assigned) == expected


@settings(deadline=None)
@given(config=configs(), key=st.sampled_from(["stride", "ratio", "kv_ratio", "k_shortcut", "min_tokens"]))
def test_a_bare_key_is_set_in_every_phase_that_has_it_or_refused(config: AgentSDConfig, key: str) -> None:
    value: Any = {"stride": 3, "min_tokens": 7}.get(key, 0.25)
    having = [row for row in config.to_dict()["phases"] if key in row]
    if not having:
        with pytest.raises(ValueError, match=f"{key}={value} has no effect"):
            config.assign({key: value})
        return
    expected = config.to_dict()
    for row in expected["phases"]:
        row |= {key: value} if key in row else {}
    assert config.assign({key: value}).to_dict() == expected
    assert config.replace(**{key: value}) == config.assign({key: value})


@pytest.mark.parametrize(
    ("assigned", "message"),
    [
        ({"kv_ratio": 0.5}, "kv_ratio=0.5 has no effect"),
        ({"ratio": 0.3, "attention": "kv"}, "ratio=0.3 has no effect"),
        ({"attention": "kv", "ratio": 0.3}, "ratio=0.3 has no effect"),
        ({"0/proportional": True}, "proportional"),
        ({"rato": 0.4}, "rato"),
        ({"2/stride": 4}, "2/stride"),
        ({"steps/1/interval": 4}, "steps/1/interval"),
        ({"steps/stride": 4}, "stride"),
        ({"0/attention": "agents"}, "agents"),
        ({"ratio": 0.8}, r"ratio is 0\.8; with stride 2 it must be a number from 0 to 0\.75"),
        ({"0/until": 1.0}, "until"),
    ],
)
def test_an_assignment_that_reaches_nothing_is_one_sentence(assigned: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        AgentSDConfig().assign(assigned)
    assert "\n" not in str(error.value)


# --- what is not allowed


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Merge(ratio=0.8), r"ratio is 0\.8; with stride 2 it must be a number from 0 to 0\.75"),
        (lambda: Agent(ratio=-0.1), r"ratio is -0\.1; .* from 0 to"),
        (lambda: Agent(ratio="0.4"), r"ratio is '0\.4'"),
        (lambda: Agent(ratio=math.nan), "ratio is nan"),
        (lambda: Merge(ratio=True), "ratio is True"),
        (lambda: Merge(stride=3, ratio=0.9), r"ratio is 0\.9; with stride 3 .* to 0\.888889"),
        (lambda: Agent(stride=(2, 3), ratio=0.9), r"with stride \(2, 3\) .* to 0\.833333"),
        (lambda: KV(stride=1), "stride is 1; it must be an integer of at least 2, or a pair"),
        (lambda: KV(stride=(2, 0)), r"stride is \(2, 0\)"),
        (lambda: KV(stride=(1, 1)), r"stride is \(1, 1\)"),
        (lambda: KV(max_agents=0), "max_agents is 0"),
        (lambda: KV(kv_ratio=1.5), "kv_ratio is 1.5"),
        (lambda: Agent(agent_ratio=1.5), "agent_ratio is 1.5"),
        (lambda: Agent(k_shortcut=-1), "k_shortcut is -1"),
        (lambda: Merge(proportional=1), "proportional is 1; it must be true or false"),
        (lambda: Merge(parts=()), "parts is"),
        (lambda: Merge(parts=("attn", "attn1")), "parts is .*attn, crossattn, mlp"),
        (lambda: Phase(attention="agents"), "attention is 'agents'"),
        (lambda: Phase(until=1.5), r"until is 1\.5; it must be a number from 0 to 1"),
        (lambda: Phase(levels=()), r"levels is \[\]"),
        (lambda: Phase(levels=(1.5,)), r"levels is \[1.5\]"),
        (lambda: Phase(levels=True), r"levels is \[True\]"),
        (lambda: Phase(levels={0: {"stride": 2}}), "levels is .* a list of integers"),
        (lambda: Phase(min_tokens=True), "min_tokens is True"),
        (lambda: StepCache(interval=0), "interval is 0; it must be a whole number from 1"),
        (lambda: StepCache(layers=0.5), "layers is 0.5; it must be a whole number from 1"),
        (lambda: StepCache(max_gap=-0.1), "max_gap is -0.1"),
        (lambda: StepCache(max_gap=True), "max_gap is True"),
        (lambda: StepCache(extrapolate=3), "extrapolate is 3; it must be a number from 0 to 2"),
        (lambda: AgentSDConfig(phases=(Phase(until=1.0), Phase(until=1.0))), "until must rise"),
        (lambda: AgentSDConfig(phases=(Phase(until=0.5), Phase(until=0.4, levels=(0, 1)))), "until must rise"),
        (lambda: AgentSDConfig(phases=()), "phases is"),
        (lambda: AgentSDConfig(steps=(StepCache(until=0.5),)), "until must rise .* 1 in the last"),
        (lambda: AgentSDConfig(steps=(StepCache(), StepCache())), "until must rise"),
        (lambda: AgentSDConfig(steps=3), "steps is 3; it must be a list of StepCache"),
        (lambda: AgentSDConfig(phases=[{"until": 1.0}]), "phases is .*; it must be a list of Phase"),
        (lambda: AgentSDConfig(seed=-1), "seed is -1"),
        (lambda: AgentSDConfig(seed=True), "seed is True"),
        (lambda: AgentSDConfig(seed=2**64), "seed is"),
        (lambda: AgentSDConfig().replace(rato=0.4), "rato"),
        (lambda: AgentSDConfig.from_dict({"ratio": 0.4}), "no field 'ratio'; its fields are phases, steps, seed"),
        (lambda: AgentSDConfig.from_dict({"phases": [{"strid": 2}]}), "no field 'strid'"),
        (lambda: AgentSDConfig.from_dict({"phases": [{"attention": "kv", "ratio": 0.2}]}), "no field 'ratio'"),
        (lambda: AgentSDConfig.from_dict({"phases": [{"attention": None, "stride": 2}]}), "no field 'stride'"),
        (lambda: AgentSDConfig.from_dict({"phases": [{"attention": "best"}]}), "attention is 'best'"),
        (lambda: AgentSDConfig.from_dict({"phases": 3}), "phases is 3"),
        (lambda: AgentSDConfig.from_dict({"steps": [{"intervals": 2}]}), "no field 'intervals'"),
        (lambda: AgentSDConfig.from_dict([1]), "must be a mapping"),
        (lambda: AgentSDConfig.from_preset("best"), "preset is 'best'; it must be one of .*paper"),
    ],
)
def test_one_sentence_names_field_value_and_what_is_allowed(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_phases_of_different_levels_may_end_together() -> None:
    config = AgentSDConfig((Phase(0.4, levels=0), Phase(1.0, KV(), levels=-1), Phase(1.0, Merge(), levels=0)))
    assert [phase.until for phase in config.phases] == [0.4, 1.0, 1.0]


def test_a_file_that_is_not_a_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("seed: [", "phases: 3", "spam: 1", "- 1"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml") as error:
            AgentSDConfig.from_file(path)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        AgentSDConfig.from_file(tmp_path / "none.yaml")


def test_caches_and_has_say_what_a_configuration_has() -> None:
    assert not AgentSDConfig().caches
    assert not AgentSDConfig(steps=StepCache(interval=1)).caches
    assert AgentSDConfig.from_preset("turbo").caches
    assert AgentSDConfig().has("ratio")
    assert not FAST.has("ratio")
    assert FAST.has("kv_ratio")
