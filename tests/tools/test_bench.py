"""agentsd-bench: what is timed is what it says, and the tables come from the files."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentsd import AgentSDConfig, attention, benchmark
from agentsd.benchmark import STEPS, Setting, Timing, configuration, exponent, kinds, measure, over_schedule, parse
from agentsd.cli.bench import MARKS, main

TINY = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
SETTING = Setting("tiny", (16, 16), 2, "float32")
METHODS = ["stock", "floor", "paper", "fast:stride=2", "tomesd:ratio=0.5", "deepcache:cache_interval=4"]


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(benchmark.ARCHITECTURES, "tiny", TINY)
    yield
    torch._dynamo.reset()


def first(result: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result[0]


def test_every_method_computes_something_of_its_own() -> None:
    stock = benchmark.build(SETTING)
    plain = first(benchmark.caller(stock, SETTING, 2)(stock, torch.tensor(999)))
    outputs = {}
    for method in METHODS:
        several = kinds(method, benchmark.build(SETTING), SETTING)
        assert sum(kind.share for kind in several) == pytest.approx(1)
        outputs[method] = [first(kind.call()) for kind in several]
        assert all(out.isfinite().all() for out in outputs[method])
    assert torch.equal(outputs["stock"][0], plain)
    # DeepCache's whole call is the stock one; whatever merges or skips attention is not.
    assert torch.equal(outputs["deepcache:cache_interval=4"][0], plain)
    assert not torch.equal(outputs["deepcache:cache_interval=4"][1], outputs["deepcache:cache_interval=4"][0])
    for method in METHODS[1:5]:
        assert not torch.allclose(outputs[method][0], plain)


def test_the_floor_leaves_out_the_self_attention_of_its_levels() -> None:
    def calls(method: str) -> list[str]:
        unet, seen = benchmark.build(SETTING), []
        (kind,) = kinds(method, unet, SETTING)
        for name, module in unet.named_modules():
            if name.endswith("attn1"):
                module.to_q.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        kind.call()
        return seen

    everywhere = calls("stock")
    assert calls("floor:levels=all") == []
    outer = [name for name in everywhere if name.startswith(("down_blocks.0", "up_blocks.2"))]
    assert calls("floor") == [name for name in everywhere if name not in outer]
    assert len(calls("floor:levels=[1+2]")) < len(calls("floor"))


def test_shares_are_those_of_the_schedule() -> None:
    shares = {method: [kind.share for kind in kinds(method, benchmark.build(SETTING), SETTING)] for method in METHODS}
    assert shares["paper"] == [20 / STEPS, 30 / STEPS]
    assert shares["deepcache:cache_interval=4"] == [pytest.approx(13 / 50), pytest.approx(37 / 50)]
    assert shares["fast:stride=2"] == [1.0]


def test_measurements_are_interleaved_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    true = benchmark.kinds

    def watched(method: str, *args: Any) -> list[benchmark.Kind]:
        def noting(kind: benchmark.Kind) -> benchmark.Kind:
            return benchmark.Kind(kind.name, kind.share, lambda: (order.append(method), kind.call()))

        return [noting(kind) for kind in true(method, *args)]

    monkeypatch.setattr(benchmark, "kinds", watched)
    timings = measure(SETTING, ["stock", "paper", "floor"], repeats=3, warmup=1)
    assert order == ["stock", "paper", "paper", "floor"] * 4
    assert [(t.method, len(t.seconds)) for t in timings] == [("stock", 3), ("paper", 3), ("paper", 3), ("floor", 3)]
    assert all(second > 0 for timing in timings for second in timing.seconds)


def test_means_over_the_schedule_are_weighted() -> None:
    timings = [Timing("a", "x", 0.25, [4.0, 1.0, 100.0]), Timing("a", "y", 0.75, [2.0]), Timing("b", "z", 1.0, [3.0])]
    assert over_schedule(timings) == {"a": 0.25 * 4 + 0.75 * 2, "b": 3.0}
    assert Timing("a", "x", 1.0, [1.0, 2.0, 3.0, 4.0, 5.0]).spread == 1.0


@pytest.mark.parametrize("power", [1.0, 1.7, 2.0])
def test_the_exponent_of_a_power_law(power: float) -> None:
    times = {n: 3e-6 * n**power for n in (4096, 16384, 65536)}
    assert exponent({1024: 1.0, **times}) == pytest.approx(power)


def test_layers_are_measured_one_by_one() -> None:
    config = AgentSDConfig.from_preset("fast")
    layers = {"stock": benchmark.STOCK, "kv": config, "nn": benchmark.MODULE}
    times = benchmark.micro([256, 1024], layers, Setting(batch=1, dtype="float32"), repeats=2)
    assert set(times) == {"stock", "kv", "nn"}
    assert all(set(values) == {256, 1024} and min(values.values()) > 0 for values in times.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is set back through /proc")
def test_the_memory_of_a_layer_is_what_it_takes() -> None:
    # Linux hands the peak of this process on to those that it starts.
    ballast = torch.ones(2**28)
    taken = benchmark.layer_memory(benchmark.STOCK, 9216, Setting(batch=1, dtype="float32"))
    # Queries, keys, values and output at least; attention that kept its map would take 2.5 GiB.
    assert 4 * 320 * 4 * 9216 <= taken < 16 * 320 * 4 * 9216 < ballast.nbytes


def test_options_are_read() -> None:
    assert parse("paper") == ("paper", {})
    levels = configuration("fast", {"stride": 2}).phases[0]
    assert {part.stride for part in levels.parts} == {2}
    assert parse("floor:levels=[1+2],x=0.5") == ("floor", {"levels": [1, 2], "x": 0.5})


def test_the_parts_of_a_profile_add_up() -> None:
    parts = benchmark.profile(SETTING, ["stock", "paper", "faithful"], repeats=2)
    assert list(parts) == ["stock: stock", "paper: agent until 0.4", "paper: merge until 1", "faithful: kv until 1"]
    for name, spent in parts.items():
        assert list(spent) == list(benchmark.PARTS)
        assert (spent["matching"] > 0) == (spent["folding and merging"] > 0) == (name != "stock: stock")
        assert (spent["unmerging"] > 0) == name.startswith("paper")
        assert min(spent["attention"], spent["projections and copies"], spent["rest of the UNet"]) > 0


def test_fused_turns_the_attention_by_blocks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentsd.attention._PRODUCTS_ARE_FASTER", True)
    taken: list[bool] = []
    true = attention.blockwise_attention
    monkeypatch.setattr(attention, "blockwise_attention", lambda *a, **k: taken.append(True) or true(*a, **k))
    for fused in (True, False):
        assert not taken
        measure(replace(SETTING, dtype="bfloat16", fused=fused), ["paper"], repeats=1)
    assert taken


@pytest.mark.parametrize(
    ("text", "results"),
    [
        (
            "README.md",
            "cpu-sd15.json cpu-closeness.json cpu-reuse.json cpu-reuse-closeness.json cpu-hires.json "
            "cpu-hires-closeness.json",
        ),
        ("docs/reuse.md", "cpu-reuse.json cpu-reuse-closeness.json cpu-reuse-few-steps.json"),
        ("docs/benchmarks.md", "cpu-*.json"),
    ],
)
def test_the_tables_of_the_texts_are_those_of_the_results(
    text: str, results: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[1]
    files = [str(file) for glob in results.split() for file in sorted((root / "benchmarks" / "results").glob(glob))]
    assert main(["--table", *files]) == 0
    between = (root / text).read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert between.strip() == capsys.readouterr().out.strip()


def test_tables_go_into_a_text_between_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = next((Path(__file__).parents[1] / "benchmarks" / "results").glob("cpu-*.json"))
    text = tmp_path / "text.md"
    text.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    assert main(["--table", str(results)]) == 0
    table = capsys.readouterr().out.strip()
    for _ in range(2):
        assert main(["--table", str(results), "--into", str(text)]) == 0
        assert text.read_text() == f"before\n{MARKS[0]}\n\n{table}\n\n{MARKS[1]}\nafter\n"
    text.write_text("no marks")
    assert main(["--table", str(results), "--into", str(text)]) == 2
    assert text.read_text() == "no marks"


def test_the_command_writes_what_its_table_is_made_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    options = ["--model", "tiny", "--latent", "8", "16", "--repeats", "2", "--dtype", "float32", "--output", str(file)]
    assert main([*options, "--method", "stock", "--method", "paper"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert [run["setting"]["latent"] for run in result["runs"]] == [[8, 8], [16, 16]]
    assert torch.__version__.startswith(result["environment"]["torch"])
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert main(["--table", str(file)]) == 0
    table = capsys.readouterr().out
    run = result["runs"][1]
    ratio = run["schedule"]["stock"] / run["schedule"]["paper"]
    assert f"| paper |  | {run['schedule']['paper'] * 1000:.0f} | {ratio:.2f}× |" in table
    assert f"{ratio:.2f}×" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "nothing"], "method is 'nothing'; it must be one of stock, xformers, floor, "),
        (["--method", "paper:rato=1"], "phase has no field 'rato'"),
        (["--method", "paper:ratio"], "options are written name:key=value"),
        (["--latent", "13"], "must be a multiple of 8"),
        (["--repeats", "0"], "must be a whole number from 1"),
        (["--output", "missing/x.json"], "its folder does not exist"),
        (["--model", "missing"], "missing"),
        (["--table", "missing.json"], "missing.json"),
        (["--into", "README.md"], "--into goes with --table"),
        (["--method", "xformers"], "needs the package xformers and a CUDA device"),
        (["--profile", "--method", "floor"], "method is 'floor'; the profile is of stock and faithful, fast, hires"),
        (["--device", "cuda:9"], "cuda:9"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["--model", "tiny", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    setting = Setting("demo", (16, 16), 1, "float32")
    peak = benchmark.peak_memory(setting, "paper")
    assert 100 * 2**20 < peak < 8 * 2**30
