"""agentsd-tune: the search against brute force, every measured error against the public interface, and the files."""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import agentsd
from agentsd import KV, AgentSDConfig, Phase, StepCache
from agentsd.cache.steps import full_steps
from agentsd.cli import generate
from agentsd.cli.tune import main
from agentsd.tune import Measurements, Target, Tuner
from agentsd.tune.candidates import ATTENTIONS, Candidates
from agentsd.tune.search import Choice, Point, pareto, search
from families import FAMILIES

PROMPTS = ["a red circle", "a blue star"]
CALL = {"num_inference_steps": 9, "guidance_scale": 3.0}


class Work:
    """A clock that counts work: the inputs of the UNet's linear and convolution layers, the same on every machine."""

    def __init__(self, pipe: Any) -> None:
        self.done = self.calls = 0
        for module in pipe.unet.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.register_forward_pre_hook(self.count)
        pipe.unet.register_forward_pre_hook(self.count_call)

    def count(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.done += args[0].numel()

    def count_call(self, *_: Any) -> None:
        self.calls += 1

    def __call__(self) -> float:
        return float(self.done)


def working(pipe: Any, file: Path) -> tuple[Tuner, Work]:
    work = Work(pipe)
    return Tuner(pipe, PROMPTS, CALL, Measurements(file, {"model": "tiny"}), repeats=1, now=work), work


def pipeline() -> Any:
    return FAMILIES["SD 1.x text-to-image"].build()


@pytest.fixture(scope="module")
def tuner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuner]:
    """A tuner that has measured everything."""
    tuner, _ = working(pipeline(), tmp_path_factory.mktemp("tuning") / "tuned.json")
    tuner.tune(Target(speedup=1.3))
    return tuner


table = st.lists(st.builds(Point, st.integers(0, 9).map(float), st.integers(0, 9).map(float)), min_size=1, max_size=4)
alternatives = st.lists(st.lists(table, min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(alternatives, min_size=1, max_size=3))
def test_the_search_finds_the_front_of_all_combinations(parts: list[list[list[list[Point]]]]) -> None:
    numbered = [
        [
            [[p._replace(choice=((i, j * 100 + k * 10, str(n)),)) for n, p in enumerate(g)] for k, g in enumerate(a)]
            for j, a in enumerate(part)
        ]
        for i, part in enumerate(parts)
    ]
    every = {}
    for one in product(*([c for a in part for c in product(*a)] for part in numbered)):
        chosen = [point for combination in one for point in combination]
        every[sum((p.choice for p in chosen), ())] = (sum(p.time for p in chosen), sum(p.error for p in chosen))
    beaten = {
        (t, e) for t, e in every.values() if any(a <= t and b <= e and (a, b) != (t, e) for a, b in every.values())
    }
    found = search(numbered)
    assert [p[:2] for p in found] == sorted(set(every.values()) - beaten)
    assert all(every[p.choice] == p[:2] for p in found)
    assert pareto(found) == found


def relative(out: torch.Tensor, stock: torch.Tensor) -> float:
    return float((out.double() - stock.double()).norm() ** 2 / stock.double().norm() ** 2)


@pytest.mark.slow
def test_errors_of_attention_are_those_of_the_configuration_on_the_stock_inputs(tuner: Tuner) -> None:
    names = tuner.candidates.attentions[1]
    assert tuner.candidates.attentions == {1: ["kv 2, half", "kv 2", "kv 4"]}
    assert tuner.candidates.layers == [1, 2]
    pipe = pipeline()
    for part, calls in enumerate(tuner.candidates.parts):
        values = tuner.measurements.values[f"calls, part {part}, turn 0"]
        call = tuner.runs.stock(0).calls[calls[len(calls) // 2]]
        for name in names:
            agentsd.apply(pipe, AgentSDConfig(phases=(Phase(attention=ATTENTIONS[name]),)))
            with torch.no_grad():
                out = pipe.unet(*call.args, **call.kwargs)[0]
            assert values[f"level 1: {name}"][1] == pytest.approx(relative(out, call.output), rel=1e-6)
            assert values[f"level 1: {name}"][0] < values["stock"][0]
            for layers in (1, 2):
                assert values[f"{layers} layers: {name}"][0] < values[f"{layers} layers: None"][0] < values["stock"][0]
        errors = [values[f"level 1: {name}"][1] for name in names]
        assert 0 < errors[0] < errors[2]


@pytest.mark.slow
def test_errors_of_the_step_cache_are_those_of_a_run_with_it_on_the_stock_inputs(tuner: Tuner) -> None:
    pipe, calls = pipeline(), tuner.runs.stock(0).calls
    assert len(tuner.candidates.caches) == 12
    for name, cache in tuner.candidates.caches.items():
        agentsd.apply(pipe, AgentSDConfig(phases=(Phase(attention=None),), steps=cache))
        with torch.no_grad():
            outs = [pipe.unet(*call.args, **call.kwargs)[0] for call in calls]
        expected = [relative(out, call.output) for out, call in zip(outs, calls, strict=True)]
        found = tuner.measurements.values[f"{name}, prompt 0"]
        assert found == pytest.approx(expected, rel=1e-5)
        assert [i for i, error in enumerate(found) if not error] == full_steps(len(calls), cache)


@pytest.mark.slow
def test_an_image_says_how_much_errors_of_a_part_matter(tuner: Tuner) -> None:
    """The calls before the part, which are not computed there, are computed here."""
    pipe = pipeline()
    for part in range(len(tuner.candidates.parts)):
        agentsd.apply(pipe, tuner.candidates.config(((part, "steps", tuner.probe(part, "steps")),)))
        image = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="np", **CALL).images[0]
        square = np.square(image.astype(np.float64) - tuner.runs.stock(0).image).mean()
        assert tuner.measurements.values[f"image, part {part}, steps, prompt 0"] == pytest.approx(square, rel=1e-6)
    assert not agentsd.is_applied(tuner.runs.pipe)
    assert "forward" not in vars(tuner.runs.pipe.unet)


@pytest.mark.parametrize(
    ("choice", "config"),
    [
        ((), AgentSDConfig(phases=(Phase(attention=None),))),
        (
            ((0, 1, "kv 2"), (1, 1, "kv 2"), (2, 1, "kv 4"), (2, 2, "kv 4")),
            AgentSDConfig(
                phases=(
                    Phase(0.7, KV(2), (1,), 256),
                    Phase(0.7, None, (2,)),
                    Phase(1.0, KV(4), (1, 2), 256),
                )
            ),
        ),
        (
            ((1, "steps", "every other"), (2, "steps", "every other")),
            AgentSDConfig((Phase(attention=None),), (StepCache(0.3, interval=1), StepCache(1.0, interval=2))),
        ),
    ],
)
def test_a_choice_is_the_shortest_configuration_that_does_it(choice: Choice, config: AgentSDConfig) -> None:
    candidates = Candidates((0.3, 0.7, 1.0), ((0,), (1,), (2,)), {1: [], 2: []}, {"every other": StepCache(interval=2)})
    assert candidates.config(choice) == config


def test_the_choice_is_the_best_of_the_verified_and_the_same_without_measuring_again(
    tuner: Tuner, tmp_path: Path
) -> None:
    file = tmp_path / "tuned.json"
    file.write_bytes(tuner.measurements.path.read_bytes())
    again, work = working(pipeline(), file)
    best, verified = again.tune(Target(speedup=1.3))
    assert work.calls == 0
    assert len(verified) >= 2
    assert best.speedup >= 1.3
    assert best.error == min(one.error for one in verified if one.speedup >= 1.3)
    for one in verified:
        # Work is counted exactly; what part boundaries and the first steps of a part cost is not predicted.
        assert one.predicted is not None
        assert one.speedup == pytest.approx(one.predicted[0], rel=0.25)
    assert (best, verified) == tuner.tune(Target(speedup=1.3))
    close, some = again.tune(Target(error=best.error))
    assert close.error <= best.error
    assert close.speedup == max(one.speedup for one in some if one.error <= best.error)
    with pytest.raises(ValueError, match=r"no configuration is 50 times as fast as stock here: .* reaches \d+\.\d\d"):
        again.tune(Target(speedup=50))


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_choice(tuner: Tuner, tmp_path: Path) -> None:
    file, pipe, left = tmp_path / "tuned.json", pipeline(), 90

    def fail(*_: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pipe.unet.register_forward_pre_hook(fail), pytest.raises(KeyboardInterrupt):
        working(pipe, file)[0].tune(Target(speedup=1.3))
    before = json.loads(file.read_text())["measurements"]
    assert {"stock, prompt 1", "calls, part 2, turn 0"} <= before.keys()
    assert not agentsd.is_applied(pipe)
    resumed, _ = working(pipeline(), file)
    assert resumed.tune(Target(speedup=1.3)) == tuner.tune(Target(speedup=1.3))
    assert resumed.measurements.values.items() >= before.items()


def arguments(model: Path, output: Path, *more: str) -> list[str]:
    prompts = output.parent / "prompts.txt"
    prompts.write_text("a red circle\n")
    start = ["--model", str(model), "--device", "cpu", "--prompts", str(prompts), "--steps", "3", "--repeats", "1"]
    return [*start, "-o", str(output), *more]


def test_the_command_writes_a_configuration_that_others_use(
    tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tuned.yaml"
    assert main(arguments(tiny_pipeline_folder, output, "--target-speedup", "1000")) == 2
    error = capsys.readouterr().err
    assert "agentsd-tune: error: no configuration is 1000 times as fast as stock here: the fastest" in error
    assert "Traceback" not in error
    assert not output.exists()
    measured = json.loads(output.with_suffix(".json").read_text())["measurements"]

    assert main(arguments(tiny_pipeline_folder, output, "--max-error", "1", "--compare")) == 0
    said = capsys.readouterr().out
    result = json.loads(output.with_suffix(".json").read_text())
    assert result["measurements"].items() >= measured.items()
    chosen = next(one for one in result["result"]["verified"] if one["name"] == result["result"]["chosen"])
    assert f"→ {chosen['name']}: {chosen['speedup']:.2f} times as fast as stock" in said
    assert {"paper", "turbo"} <= {one["name"] for one in result["result"]["verified"]}
    config = AgentSDConfig.from_file(output)
    assert config == AgentSDConfig.from_dict(chosen["config"])
    head = [line for line in output.read_text().splitlines() if line.startswith("#")]
    assert "agentsd-tune --model" in head[0]
    assert f"# measured: {chosen['speedup']:.2f} times as fast as stock, error {chosen['error']:.4f}" in head[3]
    assert yaml.safe_load(output.read_text()) == config.to_dict()
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "tuned.json", "tuned.png", "tuned.yaml"]

    assert agentsd.is_applied(agentsd.apply(pipeline(), config))
    draw = ["--prompt", "a red circle", "--model", str(tiny_pipeline_folder), "--steps", "2", "--device", "cpu"]
    assert generate.main([*draw, "--config", str(output), "--output", str(tmp_path / "image.png"), "--quiet"]) == 0
    assert (tmp_path / "image.png").exists()

    assert main(arguments(tiny_pipeline_folder, output, "--max-error", "1", "--guidance-scale", "2")) == 2
    assert "tuned.json has measurements with call {" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-speedup", "0.9"], "--target-speedup is 0.9; it must be a number from 1"),
        (["--target-speedup", "nan"], "--target-speedup is nan; it must be a number from 1"),
        (["--max-error", "0"], "--max-error is 0; it must be a number above 0, at most 1"),
        ([], "one of the arguments --target-speedup --max-error is required (see agentsd-tune --help)"),
        (["--target-speedup", "2", "--max-error", "0.1"], "not allowed with argument --target-speedup"),
        (["--max-error", "0.1", "--prompts", "missing.txt"], "missing.txt: No such file or directory"),
        (["--max-error", "0.1", "-o", "missing/tuned.yaml"], "'missing/tuned.yaml'; its folder does not exist"),
        (["--max-error", "0.1", "-o", "tuned.txt"], "--output is 'tuned.txt'; it must end in .yaml"),
        (["--max-error", "0.1", "--model", "missing"], "unknown model 'missing'"),
        (["--max-error", "0.1", "--steps", "0"], "argument --steps: must be a whole number from 1, not '0'"),
        (["--max-error", "0.1", "-o", "other.yaml"], "other.json is not a file of agentsd-tune; name another output"),
    ],
)
def test_bad_input_gets_one_sentence_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text("[]")
    assert main([*arguments(tmp_path, tmp_path / "tuned.yaml"), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("agentsd-tune: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"other.json", "prompts.txt"}
