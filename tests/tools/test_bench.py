"""agentsd-bench: what is timed is what it says, and the tables come from the files."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentsd import AgentSDConfig
from agentsd.bench import architectures, calls, layers, memory, tables
from agentsd.bench.architectures import Setting, build, caller
from agentsd.bench.calls import STEPS, Kind, kinds
from agentsd.bench.latency import Timing, measure, over_schedule
from agentsd.bench.profile import PARTS, launches, profile
from agentsd.cli.bench import main
from agentsd.hosts.diffusers_unet import AgentSDProcessor
from agentsd.methods import Method, method
from agentsd.ops import kernels
from agentsd.ops.attention import sdpa

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
ROOT = Path(__file__).resolve().parents[2]
METHODS = ["stock", "floor", "paper", "fast:stride=2", "tomesd:ratio=0.5", "deepcache:cache_interval=4"]


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", TINY)
    yield
    torch._dynamo.reset()


def first(result: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result[0]


def kinds_of(text: str, unet: Any = None) -> list[Kind]:
    return kinds(method(text), build(SETTING) if unet is None else unet, SETTING)


def test_every_method_computes_something_of_its_own() -> None:
    stock = build(SETTING)
    plain = first(caller(stock, SETTING, 2)(stock, torch.tensor(999)))
    outputs = {}
    for text in METHODS:
        several = kinds_of(text)
        assert sum(kind.share for kind in several) == pytest.approx(1)
        outputs[text] = [first(kind.call()) for kind in several]
        assert all(out.isfinite().all() for out in outputs[text])
    assert torch.equal(outputs["stock"][0], plain)
    # DeepCache's full step is the stock call; whatever merges or skips attention is not.
    assert torch.equal(outputs["deepcache:cache_interval=4"][0], plain)
    assert not torch.equal(outputs["deepcache:cache_interval=4"][1], outputs["deepcache:cache_interval=4"][0])
    for text in METHODS[1:5]:
        assert not torch.allclose(outputs[text][0], plain)


def test_the_floor_leaves_out_the_self_attention_of_its_levels() -> None:
    def called(text: str) -> list[str]:
        unet, seen = build(SETTING), []
        (kind,) = kinds_of(text, unet)
        for name, module in unet.named_modules():
            if name.endswith("attn1"):
                module.to_q.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        kind.call()
        return seen

    everywhere = called("stock")
    assert called("floor:levels=all") == called("floor:of=fast") == []
    outer = [name for name in everywhere if name.startswith(("down_blocks.0", "up_blocks.2"))]
    assert called("floor") == called("floor:levels=1") == [name for name in everywhere if name not in outer]
    assert len(called("floor:levels=[1+2]")) < len(called("floor"))


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("floor", [1]),
        ("floor:of=fast", [1, 2, 3]),
        ("paper", [1]),
        ("fast", [1, 2, 3]),
        ("paper:levels=2", [2]),
        ("tomesd", [1]),
        ("tomesd:max_downsample=2", [1, 2]),
        # Whatever acts on more than self-attention has no floor.
        ("stock", None),
        ("turbo", None),
        ("deepcache", None),
        ("tomesd:merge_mlp=true", None),
        ("paper:1/parts=[attn+mlp]", None),
    ],
)
def test_the_levels_that_a_method_covers(text: str, levels: list[int] | None) -> None:
    assert calls.covered(build(SETTING), method(text)) == levels


def test_shares_are_those_of_the_schedule() -> None:
    shares = {text: [kind.share for kind in kinds_of(text)] for text in METHODS}
    assert shares["paper"] == [20 / STEPS, 30 / STEPS]
    assert shares["deepcache:cache_interval=4"] == [pytest.approx(13 / 50), pytest.approx(37 / 50)]
    assert shares["fast:stride=2"] == [1.0]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("turbo:steps/extrapolate=0", {"full step", "cached step"}),
        (
            "paper:steps/interval=5",
            {f"{p}, {s} step" for p in ("agent until 0.4", "merge until 1") for s in ("full", "cached")},
        ),
    ],
)
def test_steps_of_the_cache_are_kinds_of_calls(text: str, names: set[str]) -> None:
    unet = build(SETTING)
    several = kinds_of(text, unet)
    assert {kind.name for kind in several} == names
    assert sum(kind.share for kind in several) == pytest.approx(1)
    middle: list[str] = []
    for kind in several:
        with unet.mid_block.resnets[0].register_forward_pre_hook(lambda *_, kind=kind: middle.append(kind.name)):
            outputs = [first(kind.call()) for _ in range(3)]
        # A repeated call is the same call, whatever ran in between.
        assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert set(middle) == {name for name in names if "full" in name}


def test_entries_of_the_cache_that_compute_other_layers_are_kinds_of_their_own() -> None:
    names = [kind.name for kind in kinds_of("faithful:steps=[{until: 0.5 + interval: 2} + {interval: 2 + layers: 2}]")]
    assert names == [f"kv until {end}, {step} step" for end in ("0.5", "1") for step in ("full", "cached")]


def test_measurements_are_interleaved_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    true = kinds

    def watched(wanted: Method, *args: Any) -> list[Kind]:
        def noting(kind: Kind) -> Kind:
            return Kind(kind.name, kind.share, lambda: (order.append(wanted.text), kind.call()))

        return [noting(kind) for kind in true(wanted, *args)]

    monkeypatch.setattr(calls, "kinds", watched)
    timings = measure(SETTING, ["stock", "paper", "floor"], repeats=3, warmup=1)
    assert order == ["stock", "paper", "paper", "floor"] * 4
    assert [(t.method, len(t.seconds)) for t in timings] == [("stock", 3), ("paper", 3), ("paper", 3), ("floor", 3)]
    assert [t.covered for t in timings] == [None, [1], [1], [1]]
    assert all(second > 0 for timing in timings for second in timing.seconds)


def test_means_over_the_schedule_are_weighted() -> None:
    timings = [
        Timing("a", "x", 0.25, None, [4.0, 1.0, 100.0]),
        Timing("a", "y", 0.75, None, [2.0]),
        Timing("b", "z", 1.0, None, [3.0]),
    ]
    assert over_schedule(timings) == {"a": 0.25 * 4 + 0.75 * 2, "b": 3.0}
    assert Timing("a", "x", 1.0, None, [1.0, 2.0, 3.0, 4.0, 5.0]).spread == 1.0
    assert Timing("a", "x", 1.0, None, [1.0]).spread is None


@pytest.mark.parametrize("power", [1.0, 1.7, 2.0])
def test_the_exponent_of_a_power_law(power: float) -> None:
    times = {n: 3e-6 * n**power for n in (4096, 16384, 65536)}
    assert layers.exponent({1024: 1.0, **times}) == pytest.approx(power)


def test_layers_are_measured_one_by_one() -> None:
    config = AgentSDConfig.from_preset("fast")
    several = {"stock": layers.STOCK, "kv": config, "nn": layers.MODULE}
    times = layers.measure_layers([256, 1024], several, Setting(batch=1, dtype="float32"), repeats=2)
    assert set(times) == {"stock", "kv", "nn"}
    assert all(set(values) == {256, 1024} and min(values.values()) > 0 for values in times.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is set back through /proc")
def test_the_memory_of_a_layer_is_what_it_takes() -> None:
    # Linux hands the peak of this process on to those that it starts.
    ballast = torch.ones(2**28)
    taken = memory.layer_memory(layers.STOCK, 9216, Setting(batch=1, dtype="float32"))
    # Queries, keys, values and output at least; attention that kept its map would take 2.5 GiB.
    assert 4 * 320 * 4 * 9216 <= taken < 16 * 320 * 4 * 9216 < ballast.nbytes


def test_the_parts_of_a_profile_add_up() -> None:
    parts = profile(SETTING, ["stock", "paper", "faithful"], repeats=2)
    assert list(parts) == ["stock: stock", "paper: agent until 0.4", "paper: merge until 1", "faithful: kv until 1"]
    for name, spent in parts.items():
        assert list(spent) == list(PARTS)
        assert (spent["matching"] > 0) == (spent["merging"] > 0) == (name != "stock: stock")
        assert (spent["unmerging"] > 0) == name.startswith("paper")
        assert min(spent["attention"], spent["projections and copies"], spent["rest of the UNet"]) > 0


def test_operations_of_a_call_are_counted() -> None:
    counts = launches(SETTING, ["stock", "turbo"])
    assert counts == launches(SETTING, ["stock", "turbo"])
    assert list(counts) == ["stock: stock", "turbo: full step", "turbo: cached step"]
    assert counts["turbo: cached step"] < counts["stock: stock"] < counts["turbo: full step"]


@pytest.mark.parametrize("fused", [False, True])
def test_fused_turns_the_attention_by_blocks_off(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "plain_products_are_faster", lambda: True)
    unet = build(SETTING)
    kinds(method("paper"), unet, replace(SETTING, fused=fused))
    ours = [p for p in unet.attn_processors.values() if isinstance(p, AgentSDProcessor)]
    assert ours
    assert {p.attend for p in ours} == {sdpa if fused else kernels.attention}
    call = layers.layer_call(AgentSDConfig(), 1024, Setting(batch=1, dtype="bfloat16", fused=fused))
    taken: list[bool] = []
    true = kernels.blockwise_attention
    monkeypatch.setattr(kernels, "blockwise_attention", lambda *a, **k: taken.append(True) or true(*a, **k))
    with torch.inference_mode():
        call()
    assert bool(taken) != fused


def result(*timings: Timing, **memory: int) -> dict[str, Any]:
    run = {
        "setting": vars(SETTING),
        "timings": [vars(timing) for timing in timings],
        "schedule": over_schedule(timings),
        "memory": memory,
    }
    about = {"device": "a machine", "threads": 1, "torch": "2", "diffusers": "0"}
    return {"environment": about, "runs": [run], "command": "agentsd-bench"}


def test_phases_are_below_their_method_and_beside_the_floor_of_its_levels() -> None:
    table = tables.rows(
        result(
            Timing("stock", "stock", 1.0, None, [8.0, 8.0]),
            Timing("floor", "floor", 1.0, [1], [4.0, 4.0]),
            Timing("floor:of=fast", "floor", 1.0, [1, 2], [2.0, 2.0]),
            Timing("paper", "agent", 0.5, [1], [4.0, 4.0]),
            Timing("paper", "merge", 0.5, [1], [6.0, 6.0]),
            Timing("fast", "kv", 1.0, [1, 2], [2.5, 2.5]),
            Timing("turbo", "full step", 1.0, None, [1.0, 1.0]),
        )["runs"][0]
    )
    assert [(row[0], row[2], row[4]) for row in table] == [
        ("stock", "8000 ± 0", ""),
        ("floor", "4000 ± 0", "1.00×"),
        ("floor:of=fast", "2000 ± 0", "1.00×"),
        ("paper", "5000", "0.80×"),
        ("– agent", "4000 ± 0", "1.00×"),
        ("– merge", "6000 ± 0", "0.67×"),
        ("fast", "2500 ± 0", "0.80×"),
        ("turbo", "1000 ± 0", ""),
    ]


def test_one_repetition_has_no_spread() -> None:
    once = result(Timing("stock", "stock", 1.0, None, [8.0]), stock=3 * 2**30)
    for table in (tables.text(once), tables.markdown(once)):
        assert "±" not in table
        assert "eager, one repetition, a machine" in table
        assert "3.00" in table


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("cpu-*.json")), ids=lambda path: path.name)
def test_stored_results_have_tables_in_which_nothing_is_faster_than_its_floor(path: Path) -> None:
    stored = tables.read(path)
    assert tables.markdown(stored).count("|") > 8
    for run in stored.get("runs", ()):
        # 5 % are noise.
        assert all(float(row[4].rstrip("×") or 0) <= 1.05 for row in tables.rows(run))


def test_the_tables_of_the_documents_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(file) for file in sorted((ROOT / "benchmarks/results").glob("cpu-*.json"))]
    assert main(["--table", *files]) == 0
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    between = text.partition("<!-- agentsd-bench -->")[2].partition("<!-- /agentsd-bench -->")[0]
    assert between.strip() == capsys.readouterr().out.strip()


def test_tables_go_into_a_document_between_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "benchmarks/results/cpu-hires.json")
    start, end = "<!-- agentsd-bench -->", "<!-- /agentsd-bench -->"
    document = tmp_path / "document.md"
    document.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    assert main(["--table", file]) == 0
    table = capsys.readouterr().out.strip()
    for _ in range(2):
        assert main(["--table", file, "--into", str(document)]) == 0
        assert document.read_text() == f"before\n{start}\n\n{table}\n\n{end}\nafter\n"
    document.write_text("no marks")
    assert main(["--table", file, "--into", str(document)]) == 2
    assert document.read_text() == "no marks"


def test_the_command_writes_what_its_table_is_made_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    options = ["--model", "tiny", "--latent", "8", "16", "--repeats", "2", "--dtype", "float32", "--output", str(file)]
    assert main([*options, "--method", "stock", "--method", "paper"]) == 0
    printed = capsys.readouterr().out
    stored = json.loads(file.read_text())
    assert [run["setting"]["latent"] for run in stored["runs"]] == [[8, 8], [16, 16]]
    assert torch.__version__.startswith(stored["environment"]["torch"])
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert main(["--table", str(file)]) == 0
    table = capsys.readouterr().out
    run = stored["runs"][1]
    ratio = run["schedule"]["stock"] / run["schedule"]["paper"]
    assert f"| paper |  | {run['schedule']['paper'] * 1000:.0f} | {ratio:.2f}× |" in table
    assert f"{ratio:.2f}×" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "nothing"], "method is 'nothing'; it must be one of stock, floor, xformers, "),
        (["--method", "paper:rato=1"], "the configuration has no field 'rato'"),
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
    peak = memory.peak_memory(setting, "paper")
    assert 100 * 2**20 < peak < 8 * 2**30
