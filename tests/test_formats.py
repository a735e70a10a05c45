"""Files of other projects: what is read from rows written by hand, what a fit recovers, and what is refused, where."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from rlhfsim import serving, training_log
from rlhfsim.calibrate_tables import calibrate_any
from rlhfsim.cli import cli, main
from rlhfsim.costs.generation import ENGINE_STEP_SECONDS
from rlhfsim.costs.kernels import gemm_time, memory_time
from rlhfsim.errors import InputError
from rlhfsim.formats import format_of, formats, read
from rlhfsim.kernel_errors import predicted, rates_of
from rlhfsim.measurements import Log, Served, Tables, cluster_of, device_of, gpu_named, model_named
from rlhfsim.simulate import kernels_of

GPU = "a100-80g-sxm"
# Of a machine unlike the shipped one.
TRUE = {"compute_efficiency": 0.5, "memory_efficiency": 0.4, "kernel_seconds": 9e-6, "residuals": None}
TIMES = ("min", "max", "mean", "median", "std")
GEMMS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
STREAMS = {  # operator: kernel, bytes over tokens x width
    "emb": ("embedding", 4), "input_layernorm": ("rms_norm", 4), "post_attention_layernorm": ("rms_norm", 4),
    "attn_rope": ("rope", 8), "mlp_act": ("gated_activation", 18), "add": ("residual_add", 6),
}  # fmt: skip


def failure(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as found:
        call()
    return str(found.value)


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and output, as from a shell."""
    result = CliRunner().invoke(cli, list(arguments))
    if isinstance(result.exception, InputError):
        return 2, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


# --- operator tables -------------------------------------------------------------------------------------------------


def operator_rows() -> list[dict[str, Any]]:
    """A layer of width 4096, 32 heads, MLP 3 x 4096, in a machine with the coefficients TRUE, in milliseconds."""
    kernels, rates = kernels_of("ampere"), rates_of(cluster_of(GPU).gpu, "bf16")
    gemm = kernels.gemm["bf16"].model_copy(update=TRUE)
    streams = {name: curve.model_copy(update={"residuals": None}) for name, curve in kernels.memory.items()}
    rows = []
    for width in (2048, 4096, 8192):
        for tp in (1, 2):
            for tokens in (1, 8, 64, 200, 512, 1000, 2048, 4096):
                ffn = 3 * width // tp
                shapes = [(3 * width // tp, width), (width, width // tp), (2 * ffn, width), (width, ffn)]
                times = {
                    op: float(gemm_time(gemm, rates, tokens, n, k).seconds)
                    for op, (n, k) in zip(GEMMS, shapes, strict=True)
                }
                for op, (kernel, factor) in STREAMS.items():
                    moved = factor * tokens * width / (tp if op in ("attn_rope", "mlp_act") else 1)
                    times[op] = float(memory_time(streams[kernel], rates, moved).seconds)  # type: ignore[index]
                row: dict[str, Any] = {f"time_stats.{op}.{t}": 1e3 * s for op, s in times.items() for t in TIMES}
                rows.append(
                    row
                    | {"n_head": width // 128, "n_kv_head": width // 128, "n_embd": width, "n_expanded_embd": 3 * width,
                       "vocab_size": 32000, "use_gated_mlp": True, "num_tokens": tokens,
                       "num_tensor_parallel_workers": tp}
                )  # fmt: skip
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("vidur") / "mlp.csv", operator_rows())


def test_operator_shapes_and_seconds_are_the_rows(operators: Path) -> None:
    found = read(operators)
    assert isinstance(found, Tables)
    gemm = found.tables["gemm"]
    first = gemm[gemm.line == 2].set_index("op")
    assert first.loc["attn_pre_proj", ["m", "n", "k"]].tolist() == [1, 6144, 2048]
    assert first.loc["mlp_down_proj", ["m", "n", "k"]].tolist() == [1, 2048, 6144]
    assert found.tables["memory"].query("op == 'add' and line == 2")["bytes"].item() == 6 * 2048
    true = kernels_of("ampere").gemm["bf16"].model_copy(update=TRUE)
    seconds = gemm_time(true, rates_of(cluster_of(GPU).gpu, "bf16"), gemm.m, gemm.n, gemm.k).seconds
    np.testing.assert_allclose(gemm.seconds, seconds)


def test_a_fit_recovers_the_machine_and_a_wrong_coefficient_fails(operators: Path, tmp_path: Path) -> None:
    code, text = command("validate", str(operators), "--gpu", GPU)
    assert code == 1 and "TOO FAR" in text  # the shipped A100 is another machine
    spec = tmp_path / "mine.yaml"
    code, text = command("calibrate", str(operators), "--gpu", GPU, "--name", "mine", "--out", str(spec))
    assert code == 0 and "prefill (as in ampere.yaml)" in text  # what was not measured is said
    code, text = command("validate", str(operators), "--gpu", str(spec), "--json")
    errors = {e["operator"]: e for e in json.loads(text)["operators"]}
    assert code == 0
    assert max(e["mean_error"] for e in errors.values()) < 0.02
    assert errors["sum of a layer's products"]["rows"] == 48
    kernels = tmp_path / "mine.kernels.yaml"
    written_as = re.compile(r"compute_efficiency: ([\d.]+)")
    halved = written_as.sub(lambda m: f"compute_efficiency: {float(m[1]) / 2}", kernels.read_text(), count=1)
    kernels.write_text(halved)
    kernels_of.cache_clear()
    assert command("validate", str(operators), "--gpu", str(spec))[0] == 1
    kernels_of.cache_clear()


def change(column: str, value: Any, row: int = 3) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[row].update({column: value})


def scale(factor: float) -> Callable[[list[dict[str, Any]]], None]:
    def apply(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row.update({name: value * factor for name, value in row.items() if name.startswith("time_stats")})

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (change("time_stats.add.median", "n/a"), ["mlp.csv:5", "time_stats.add.median", "'n/a'", "number above 0"]),
        (change("time_stats.add.median", ""), ["mlp.csv:5", "is missing"]),
        (change("num_tokens", -4), ["mlp.csv:5", "num_tokens", "'-4'"]),
        (lambda rows: [row.pop("n_kv_head") for row in rows], ["n_kv_head", "column is missing", "n_head"]),
        (scale(1e-3), ["times as fast", "another unit of time"]),  # seconds instead of milliseconds
        (scale(1e3), ["no other row is faster", "microseconds"]),
        (change("time_stats.mlp_up_proj.median", 1e-6), ["mlp.csv:5", "mlp_up_proj", "damaged row"]),
    ],
)
def test_what_is_wrong_in_a_table_is_named(damage: Any, said: list[str], tmp_path: Path) -> None:
    rows = operator_rows()
    damage(rows)
    code, text = command("validate", str(written(tmp_path / "mlp.csv", rows)), "--gpu", GPU)
    assert code == 2
    assert all(part in text for part in said), text


def test_lines_with_too_many_fields_and_empty_files(operators: Path, tmp_path: Path) -> None:
    lines = operators.read_text().splitlines()
    (tmp_path / "long.csv").write_text("\n".join([*lines[:4], lines[4] + ",7"]))
    fields = len(lines[4].split(","))
    said = failure(lambda: read(tmp_path / "long.csv"))
    assert f"long.csv:5: has {fields + 1} fields, but the header names {fields}" in said
    (tmp_path / "head.csv").write_text(lines[0] + "\n")
    assert "no rows" in failure(lambda: read(tmp_path / "head.csv"))
    (tmp_path / "empty.csv").write_text("")
    assert "is empty" in failure(lambda: read(tmp_path / "empty.csv"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert "no format that is read" in failure(lambda: read(tmp_path / "other.csv"))


def test_the_gpu_must_be_known_and_one(operators: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["validate", str(operators)])
    assert left.value.code == 2 and "--gpu" in capsys.readouterr().err
    assert "did you mean 'h100-80g-sxm'" in command("validate", str(operators), "--gpu", "b100-80g-sxm")[1]
    assert "no meaning" in command("validate", str(operators), "--gpu", GPU, "--scenario", "x.yaml")[1]
    system = {"sys_name": "a100_pcie", "accelerator": {"op": {"matmul": {
        "tflops": 312, "accurate_efficient_factor": {"b=1, m=4096, k=5120, n=1536, layout=TN": 0.75}}}}}  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(system))
    assert "the file says a100-80g-pcie" in command("validate", str(tmp_path / "s.json"), "--gpu", "h100-80g-sxm")[1]
    other = tmp_path / "h100.json"
    other.write_text(json.dumps(system | {"sys_name": "h100_sxm"}))
    mixed = [str(tmp_path / "s.json"), str(other)]
    assert "one spec is of one GPU" in failure(lambda: calibrate_any(mixed, name="x", gpu=None))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g-sxm"),
        ("A100-PCIe", "a100-80g-pcie"),
        ("A100-40G", "a100-40g-sxm"),
        ("a100_pcie_bf16", "a100-80g-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090-24g"),
        ("GB200", "gb200-186g"),
        ("L40S", "l40s-48g"),
    ],
)
def test_gpus_as_files_call_them(text: str, name: str) -> None:
    assert gpu_named(text) == name


def test_models_as_papers_call_them() -> None:
    assert model_named("/x/models--Qwen--Qwen2-7B-Instruct/snapshots/f28") == "qwen2-7b"
    assert model_named("LLAMA3_8B") == "llama-3-8b" and model_named("LLaMA 7B") == "llama-7b"
    assert "no model" in failure(lambda: model_named("qwen9-7b"))


# --- collectives, training kernels -----------------------------------------------------------------------------------


def network(folder: Path, **more: Any) -> Path:
    """40 us and 200 GB/s bus bandwidth on 8 ranks of one node."""
    rows = []
    for size in 2 ** np.arange(12, 31, dtype=np.int64):
        for rank in (0, 1):
            row = {"rank": rank, "num_workers": 8, "size": int(size), "collective": "all_reduce", "devices_per_node": 8}
            time = 1e3 * (40e-6 + 2 * 7 / 8 * float(size) / 200e9)
            rows.append(row | {"time_stats.all_reduce.median": time * (1 + 9 * rank)} | more)  # only rank 0 counts
    return written(folder / "all_reduce.csv", rows)


def test_collectives_by_size_and_their_calibration(tmp_path: Path) -> None:
    table = read(network(tmp_path))
    assert isinstance(table, Tables)
    rows = table.tables["collectives"]
    assert rows.nodes.unique().tolist() == [1] and len(rows) == 19
    spec = tmp_path / "mine.yaml"
    code, text = command(
        "calibrate", str(tmp_path / "all_reduce.csv"), "--gpu", GPU, "--name", "mine", "--out", str(spec)
    )
    assert code == 0, text
    found = predicted("collectives", rows, table, cluster_of(str(spec)))
    assert np.abs(found / rows.seconds - 1).mean() < 0.05
    two = network(tmp_path, devices_per_node=4)
    assert read(two).tables["collectives"].nodes.unique().tolist() == [2]  # type: ignore[union-attr]
    assert "all_reduce or send_recv" in failure(lambda: read(network(tmp_path, collective="all_redcue")))


def simumax(folder: Path, key: str, efficiency: float, op: str = "matmul") -> Path:
    data = {"tflops": 312, "accurate_efficient_factor": {key: efficiency}}
    path = folder / "system.json"
    path.write_text(json.dumps({"sys_name": "a100_pcie_bf16", "accelerator": {"op": {op: data}}}))
    return path


def test_training_kernels_from_their_efficiencies(tmp_path: Path) -> None:
    found = read(simumax(tmp_path, "b=1, m=4096, k=5120, n=1536, layout=NT, accumulate=True", 0.5))
    assert isinstance(found, Tables) and device_of(found) == {"a100-80g-pcie"}
    row = found.tables["weight_gradient"].iloc[0]
    assert row.seconds == pytest.approx(2 * 4096 * 5120 * 1536 / (0.5 * 312e12))
    key = "batch=1, seq_len=4096, head_num=32, kv_head_num=8, qk_head_dim=128, v_head_dim=128"
    forward = read(simumax(tmp_path, key, 1.0, "sdp_fwd")).tables["prefill"].iloc[0]  # type: ignore[union-attr]
    assert forward.seconds == pytest.approx(4 * 4096**2 * 128 * 32 / 312e12)
    assert "an efficiency is above 0" in failure(lambda: read(simumax(tmp_path, "m=1, n=2, k=3, layout=NT", 71.0)))
    assert "does not say layout" in failure(lambda: read(simumax(tmp_path, "m=1, n=2, k=3", 0.7)))
    assert "layout 'XY'" in failure(lambda: read(simumax(tmp_path, "m=1, n=2, k=3, layout=XY", 0.7)))


# --- records ---------------------------------------------------------------------------------------------------------

TRAINING = """anchors:
- id: small
  kind: training
  gpu: H100
  gpus: 8
  model: {name: GPT, layers: 4, hidden: 2048, heads: 16, seq: 1024}
  parallel: {tp: 2, pp: 1, dp: 4}
  global_batch: 64
  micro_batch: 4
  precision: bf16
  measured: {MEASURED}
- id: bridge
  kind: collective
  gpu: H100-PCIe
  gpus: 2
  fabric: NVLink bridge
  op: all_reduce
  measured: {bytes: 1000000, time_us: 50}
"""


def records(folder: Path, measured: str, **change: str) -> str:
    text = TRAINING.replace("MEASURED", measured)
    for old, new in change.items():
        text = text.replace(f"{old}: ", f"{new}: ", 1)
    (folder / "runs.yaml").write_text(text)
    return str(folder / "runs.yaml")


def test_records_in_any_unit_are_the_same_seconds(tmp_path: Path) -> None:
    _, text = command("validate", records(tmp_path, "iteration_s: 0.2"), "--json")
    found = json.loads(text)
    (case,) = found["cases"]
    assert case["measured"] == 0.2 and 0.02 < case["predicted"] < 0.4
    assert found["summary"]["gaps"][0]["reason"] == "NVLink bridges between PCIe cards"
    _, text = command("validate", records(tmp_path, f"tokens_per_s_per_gpu: {64 * 1024 / 8 / 0.2}"), "--json")
    assert json.loads(text)["cases"][0]["measured"] == pytest.approx(0.2)
    code, _ = command("validate", records(tmp_path, f"iteration_s: {case['predicted']}"))
    assert code == 0
    assert command("validate", records(tmp_path, f"iteration_s: {2 * case['predicted']}"))[0] == 1


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ("tflops_per_gpu: 400000", "another unit"),
        ("iteration_s: 0.0002", "another unit"),
        ("iteration_s: fast", "runs.yaml:11: anchors.0.measured.iteration_s: is 'fast'"),
        ("iteration_ms: 200", "did you mean 'iteration_s'"),
    ],
)
def test_impossible_records(measured: str, said: str, tmp_path: Path) -> None:
    code, text = command("validate", records(tmp_path, measured))
    assert code == 2 and said in text, text


def test_records_without_a_gpu_or_of_an_unknown_one(tmp_path: Path) -> None:
    path = records(tmp_path, "iteration_s: 0.2", gpus="cards")
    assert "anchors.0.gpus: is missing" in command("validate", path)[1]
    (tmp_path / "runs.yaml").write_text(TRAINING.replace("MEASURED", "iteration_s: 1").replace("H100\n", "H900\n"))
    assert "'H900', which is no GPU" in command("validate", path)[1]
    records(tmp_path, "iteration_s: 0.2")
    assert "holds measurements of" not in command("validate", path)[1]
    assert "nothing is fitted" in failure(lambda: calibrate_any([path], name="x", gpu=None))
    (tmp_path / "runs.yaml").write_text("anchors: []\n")
    assert "at least one record" in command("validate", path)[1]


# --- logs ------------------------------------------------------------------------------------------------------------

OPTIONS = (
    "data.train_batch_size=64 actor_rollout_ref.rollout.n=4 data.max_response_length=512 data.max_prompt_length=256 "
    "actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 "
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4 "
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4 "
    "actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.rollout.tensor_model_parallel_size=1 "
    "actor_rollout_ref.actor.use_kl_loss=True algorithm.adv_estimator=grpo trainer.n_gpus_per_node=8 trainer.nnodes=1"
)
PRINTED = "(TaskRunner pid=7)   'model': {'enable_gradient_checkpointing': True,\n" \
    "(TaskRunner pid=7)             'path': 'Qwen/Qwen2.5-1.5B-Instruct'},\n"  # fmt: skip


def step_line(step: int, gen: float, update: float, tokens: float, prefix: str = "timing_s/", more: str = "") -> str:
    values = {f"{prefix}gen": gen, f"{prefix}update_actor": update, "response_length/mean": tokens,
              "response_length/min": 20, "response_length/max": 512, "response_length/clip_ratio": 0.05,
              "prompt_length/mean": 100, "prompt_length/max": 180, "prompt_length/min": 60}  # fmt: skip
    fields = " - ".join(f"{key}:{value:.4f}" for key, value in values.items())
    return f"\x1b[36m(TaskRunner pid=7)\x1b[0m step:{step} - {fields}{more}\n"


def log(folder: Path, steps: list[str], head: str = "") -> Path:
    (folder / "run.log").write_text(f"python3 -m verl.trainer.main_ppo {OPTIONS}\n{PRINTED}{head}{''.join(steps)}")
    return folder / "run.log"


def noisy_steps(noise: float, count: int = 400) -> list[str]:
    random = np.random.default_rng(0)
    tokens = random.uniform(200, 300, count)
    gens = 0.05 * tokens * np.exp(noise * random.standard_normal(count))
    updates = 0.1 * tokens * np.exp(0.001 * random.standard_normal(count))
    gens[0] *= 3
    return [step_line(i, *values) for i, values in enumerate(zip(gens, updates, tokens, strict=True))]


def test_noise_medians_and_the_first_step(tmp_path: Path) -> None:
    found = read(log(tmp_path, noisy_steps(0.08)))
    assert isinstance(found, Log)
    report = training_log.report(found)
    gen, update = report.timers
    assert gen.noise == pytest.approx(0.08, rel=0.2) and update.noise is not None and update.noise < 0.005
    assert gen.median == pytest.approx(12.5, rel=0.05) and gen.first_is_outlier and not update.first_is_outlier
    assert any("first step is an outlier in gen" in note for note in report.notes)
    assert found.options["actor_rollout_ref.model.path"] == "Qwen/Qwen2.5-1.5B-Instruct"  # of the printed configuration


def test_a_clipped_lognormal_is_found_again() -> None:
    mean, sigma = training_log.lognormal_with(250.0, 0.05, 512)
    drawn = np.exp(np.log(mean) - sigma**2 / 2 + sigma * np.random.default_rng(1).standard_normal(400_000))
    assert np.minimum(drawn, 512).mean() == pytest.approx(250, rel=0.01)
    assert (drawn > 512).mean() == pytest.approx(0.05, abs=0.002)


def test_timers_by_version(tmp_path: Path) -> None:
    def stages(prefix: str, more: str = "") -> tuple[str, ...]:
        steps = [step_line(i, 10, 20, 250, prefix, more) for i in range(3)]
        return training_log.report(read(log(tmp_path, steps))).timers[0].stages  # type: ignore[arg-type]

    assert stages("timing/") == ("update_weights", "gen", "old_log_prob")
    assert stages("timing_s/") == ("update_weights", "gen")
    assert stages("timing_s/", " - timing_s/update_weights:1.5") == ("gen",)


def test_damaged_logs(tmp_path: Path) -> None:
    steps = [step_line(i, 10, 20, 250) for i in range(3)]
    cut = log(tmp_path, [*steps[:2], steps[2][:60]])
    found = read(cut)
    assert isinstance(found, Log) and len(found.steps) == 2 and found.truncated == 6
    assert "line 6 is cut off" in command("validate", str(cut))[1]
    assert "holds no line" in failure(lambda: read(log(tmp_path, [])))
    bad = step_line(1, 10, 20, 250).replace("timing_s/gen:10.0000", "timing_s/gen:oops")
    assert "run.log:5: timing_s/gen: is 'oops'" in failure(lambda: read(log(tmp_path, [steps[0], bad, steps[2]])))
    lengths = [step.split(" - response_length")[0] + "\n" for step in steps]
    assert "response_length/mean" in command("validate", str(log(tmp_path, lengths)))[1]


def test_a_log_is_predicted_from_its_own_options(tmp_path: Path) -> None:
    path = log(tmp_path, noisy_steps(0.01, 40))
    _, text = command("validate", str(path), "--gpu", "h100-80g-sxm", "--json")
    found = json.loads(text)
    assert {case["quantity"] for case in found["cases"]} == {"gen", "update_actor"}
    assert all(case["predicted"] > 0 for case in found["cases"])
    assert found["logs"][0]["workload"]["response_tokens"]["max_tokens"] == 512
    workload = calibrate_any([str(path)], name=None, gpu=None)
    assert isinstance(workload, dict) and workload["workload"]["responses_per_prompt"] == 4
    path.write_text(path.read_text().replace("adv_estimator=grpo", "adv_estimator=grpoo"))
    assert "did you mean 'grpo'" in command("validate", str(path), "--gpu", "h100-80g-sxm")[1]


# --- served runs -----------------------------------------------------------------------------------------------------


def served(folder: Path, seconds: Callable[[int], tuple[float, float]], **change: Any) -> Path:
    """Requests one after the other: (to the first token, to the last one) of each."""
    rows, clock = [], 1000.0
    for i in range(12):
        first, last = seconds(i)
        times = (clock, clock, clock + first, clock + last)
        names = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
        rows.append({"input_toks": 100, "output_toks": 64 + i, **dict(zip(names, times, strict=True))} | change)
        clock += last + 1
    meta = {
        "model": "meta-llama/Llama-3.1-8B",
        "vllm_version": "0.19.0",
        "kv_cache": {"num_gpu_blocks": 2588},
        "hardware": {"device_name": "NVIDIA H100 80GB HBM3"},
        "engine_kwargs": {"max_num_batched_tokens": 2048},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_host_times_of_a_served_run_are_found_again(tmp_path: Path) -> None:
    """Requests alone: a token is a step of one sequence, whose host time is known here."""
    cluster = cluster_of("h100-80g-sxm")
    plain = read(served(tmp_path, lambda i: (0.02, 1.0)))
    assert isinstance(plain, Served)
    steps = serving.step_seconds(plain, cluster)
    replay = serving.Replay(plain, cluster)
    replay.replay()
    per_token = (replay.last - replay.first) / (plain.requests.output_tokens.to_numpy() - 1)
    added = 4e-3 - steps.step_seconds
    path = served(tmp_path, lambda i: (0.02, 0.02 + (per_token[i] + added) * (63 + i)))
    found = read(path)
    assert isinstance(found, Served)
    times, errors = serving.host_times(found, cluster)
    assert sum(times.values()) == pytest.approx(4e-3, rel=0.05)  # one sequence: a step's and a sequence's are the same
    assert errors["mean_error"] < 0.01
    results = {r.quantity: r for r in serving.results_of(found, cluster)}
    assert results["time_per_output_token"].predicted == pytest.approx(per_token.mean(), rel=1e-6)


def test_async_scheduling_hides_the_host(tmp_path: Path) -> None:
    path = served(tmp_path, lambda i: (0.02, 1.0))
    meta = json.loads((path / "meta.json").read_text())
    alone = read(path)
    (path / "meta.json").write_text(
        json.dumps(meta | {"resolved_config": {"scheduler_config": {"async_scheduling": True}}})
    )
    hidden = read(path)
    assert isinstance(alone, Served) and isinstance(hidden, Served)
    cluster = cluster_of("h100-80g-sxm")
    step = (1, 8, 8000, 0, 8, 8)
    plain, quick = (serving.step_seconds(run, cluster).single.of(step) for run in (alone, hidden))
    assert plain - quick == pytest.approx(ENGINE_STEP_SECONDS)


def test_damaged_served_runs(tmp_path: Path) -> None:
    path = served(tmp_path, lambda i: (0.02, 1.0))
    assert format_of(path) is formats()["vllm_bench"]
    whole = (path / "requests.jsonl").read_text()
    (path / "requests.jsonl").write_text(whole[:-30])  # the last line is cut off
    assert len(read(path).requests) == 11  # type: ignore[union-attr]
    (path / "requests.jsonl").write_text(whole.replace('"input_toks": 100', '"input_toks": null', 1))
    assert "requests.jsonl:1: input_toks: is None" in failure(lambda: read(path))
    served(tmp_path, lambda i: (2.0, 1.0))
    assert "not in this order" in failure(lambda: read(path))
    served(tmp_path, lambda i: (2e-5, 1e-3))
    assert "another unit of time" in failure(
        lambda: serving.results_of(read(path), cluster_of("h100-80g-sxm"))  # type: ignore[arg-type]
    )
    (path / "requests.jsonl").write_text("")
    assert "holds no request" in failure(lambda: read(path))


# --- all of them -----------------------------------------------------------------------------------------------------


def test_every_format_is_one_file_with_its_source() -> None:
    for name, module in formats().items():
        assert module.TITLE and callable(module.recognises) and callable(module.read), name
        assert module.__doc__ and ("https://" in module.__doc__ or "our own" in module.__doc__), name


@pytest.mark.parametrize(
    "make", [network, lambda f: records(f, "iteration_s: 1"), lambda f: log(f, noisy_steps(0.1, 9))]
)
def test_a_file_is_of_one_format(make: Callable[[Path], Any], tmp_path: Path) -> None:
    from rlhfsim.formats import probe

    found = probe(make(tmp_path))
    assert sum(module.recognises(found) for module in formats().values()) == 1


def test_host_times_are_beyond_the_curves_that_are_fitted_beside_them(operators: Path, tmp_path: Path) -> None:
    """The same run with curves of a machine slower than the shipped one leaves less to the host."""
    path = served(tmp_path, lambda i: (0.05, 0.05 + 0.04 * (63 + i)))
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"hardware": {"device_name": "NVIDIA A100-SXM4-80GB"}}))

    def host(*files: Path) -> float:
        found = calibrate_any([str(file) for file in files], name="mine", gpu=GPU)
        assert not isinstance(found, dict)
        return sum(found.cluster["overheads"][f"decode_{of}_seconds"] for of in ("step", "sequence"))

    alone, both = host(path), host(path, operators)
    assert 0 < both < alone - 0.005
