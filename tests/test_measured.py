"""Measured tables in place of the curves: synthetic ones of a known machine, and the published ones where installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhfsim.costs import measured as module
from rlhfsim.costs.kernels import Kernels, attention_prefill_time, gemm_time
from rlhfsim.costs.measured import MeasuredKernels, measured_kernels
from rlhfsim.costs.operators import Operators
from rlhfsim.errors import InputError
from rlhfsim.kernel_errors import collective_seconds_on, rates_of
from rlhfsim.measurements import cluster_of
from rlhfsim.render import simulation_json
from rlhfsim.simulate import kernels_of, prepare, simulate
from rlhfsim.spec.hardware import Cluster, Gpu, MeasuredTables
from rlhfsim.spec.loader import scenario_from_dict
from rlhfsim.spec.model_spec import load_model
from rlhfsim.spec.overheads import Overheads
from rlhfsim.spec.scenario import Effects, ModelUse

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

GPU, VERSION = "h100-80g-sxm", "0.24.0"
SLOWER = 1.7  # the synthetic machine's products and prefills, over the curves
FIXED, PER_TOKEN = 30e-6, 2e-9  # of attention in a decode step of one sequence; both grow with the batch's square root
RANKS_SECONDS = {"all_reduce": 50e-6, "all_gather": 20e-6}


def cluster() -> Cluster:
    return cluster_of(GPU)


def write(folder: Path, place: str, rows: list[dict[str, Any]]) -> None:
    path = folder / "h100_sxm" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of aiconfigurator-core with a few shapes; one hole in the grid of products."""
    folder, kernels = tmp_path_factory.mktemp("tables"), kernels_of("hopper")
    rates = rates_of(cluster().gpu, "bf16")
    shapes = [(m, n, k) for m in (1, 16, 256, 4096) for n in (1024, 4096, 16384) for k in (1024, 4096, 16384)]
    shapes.remove((16, 1024, 1024))
    gemms = [
        {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k,
         "latency": 1e3 * SLOWER * float(gemm_time(kernels.gemm["bf16"], rates, m, n, k).seconds)}
        for m, n, k in shapes
    ]  # fmt: skip
    write(folder, f"gemm/vllm/{VERSION}/gemm_perf.parquet", gemms)
    head = {"num_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "kv_cache_dtype": "bfloat16", "window_size": 0}

    def prefill(batch: int, tokens: int) -> float:
        time = attention_prefill_time(kernels.prefill, rates, batch, 16, 4, tokens, 128)
        return 1e3 * SLOWER * float(time.seconds)

    context = [
        head | {"batch_size": b, "isl": s, "step": 0, "latency": prefill(b, s)}
        for b in (1, 8)
        for s in (128, 1024, 8192)
    ]
    write(folder, f"attention/vllm/{VERSION}/context_attention_perf.parquet", context)
    generation = [
        head | {"batch_size": b, "isl": 1, "step": c - 1, "latency": 1e3 * (FIXED + PER_TOKEN * b * c) * b**0.5}
        for b in (1, 4, 64) for c in (16, 256, 4096)
    ]  # fmt: skip
    write(folder, f"attention/vllm/{VERSION}/generation_attention_perf.parquet", generation)
    nccl = [
        {"nccl_dtype": "half", "op_name": op, "num_gpus": 8, "message_size": size,
         "latency": 1e3 * (fixed + 2 * size / 100e9)}
        for op, fixed in RANKS_SECONDS.items() for size in 4 ** np.arange(4, 14)
    ]  # fmt: skip
    write(folder, "comm/nccl/2.29.2/nccl_perf.parquet", nccl)
    return folder


def on(tables: Path, **more: Any) -> Gpu:
    source = MeasuredTables(**({"framework": "vllm", "version": VERSION, "folder": str(tables)} | more))
    return cluster().gpu.model_copy(update={"measured": source})


def of(tables: Path, **more: Any) -> MeasuredKernels:
    return MeasuredKernels(on(tables, **more), kernels_of("hopper"))


def test_a_product_is_the_curve_times_the_measured_ratio(tables: Path) -> None:
    """The ratio is the same everywhere here: on the grid, in its hole, between its points and beyond them."""
    found, curve = of(tables), kernels_of("hopper").gemm["bf16"]
    m, n, k = (np.array(x) for x in ([1, 16, 100, 9000], [1024, 1024, 3000, 50000], [4096, 1024, 2000, 512]))
    time = gemm_time(curve, rates_of(cluster().gpu, "bf16"), m, n, k)
    again = found.gemm(time, "bf16", m, n, k)
    np.testing.assert_allclose(again.seconds, SLOWER * np.asarray(time.seconds))
    np.testing.assert_allclose(
        sum(map(np.asarray, (again.flops_seconds, again.memory_seconds, again.launch_seconds))), again.seconds
    )


def test_interpolation_is_linear_in_logarithms() -> None:
    rows = pd.DataFrame({"x": [1, 4, 1, 4], "y": [1, 1, 100, 100], "v": [0.0, 2.0, 4.0, 6.0]})
    grid = module.Grid.of(rows, ["x", "y"], "v")
    assert grid.at(2, 10) == pytest.approx(3.0)
    np.testing.assert_allclose(grid.at(np.array([1, 4, 8, 0.1]), 1), [0, 2, 2, 0])  # the nearest value outside
    holes = module.Grid.of(rows.iloc[:3], ["x", "y"], "v")
    assert np.isfinite(holes.values).all() and holes.at(4, 100) == 4.0


def test_decode_stays_linear_in_the_context(tables: Path) -> None:
    found = of(tables)
    context = np.array([4 * 16.0, 4 * 1000.0, 4 * 4096.0])
    seconds = np.asarray(found.decode(16, 4, 128, 2.0, 4, context).seconds)
    np.testing.assert_allclose(seconds, (FIXED + PER_TOKEN * context) * 2)
    between = found.decode(16, 4, 128, 2.0, 16, 0.0)  # the square root's power law holds between batches too
    assert float(between.seconds) == pytest.approx(FIXED * 4)


def use() -> ModelUse:
    return ModelUse(spec="llama-3-8b", shape=load_model("llama-3-8b"))


def test_operators_use_them_forward_only(tables: Path) -> None:
    kernels = kernels_of("hopper")
    curves = Operators(cluster().gpu, kernels, Effects(), Overheads())
    found = Operators(on(tables), kernels, Effects(), Overheads())
    lengths = np.array([1000.0])
    assert found.attention_prefill(use(), lengths, 2).seconds == pytest.approx(
        SLOWER * np.asarray(curves.attention_prefill(use(), lengths, 2).seconds)
    )
    head = [np.asarray(o.head_forward(use(), 512, 1, "value").seconds) for o in (found, curves)]
    assert head[0] == pytest.approx(SLOWER * head[1])
    for of_both in (
        lambda o: o.layer_backward(use(), 512, 1),
        lambda o: o.optimizer_step(use(), 1e9),
        lambda o: o.attention_prefill(use(), lengths, 1, backward=True),
    ):
        assert np.asarray(of_both(found).seconds) == pytest.approx(np.asarray(of_both(curves).seconds))
    ideal = Effects(efficiency=False)
    without = [Operators(gpu, kernels, ideal, Overheads()) for gpu in (on(tables), cluster().gpu)]
    assert np.asarray(without[0].layer_forward(use(), 512, 1).seconds) == pytest.approx(
        np.asarray(without[1].layer_forward(use(), 512, 1).seconds)
    )


def test_message_size_counts_elements(tables: Path) -> None:
    kernels = of(tables).with_collectives
    assert isinstance(kernels, Kernels)
    mine = cluster().model_copy(update={"gpu": on(tables)})
    payload = 2.0 * 4.0 ** np.arange(6, 13)
    seconds = collective_seconds_on(mine, "all_reduce", 8, 1, payload)
    np.testing.assert_allclose(seconds, RANKS_SECONDS["all_reduce"] + payload / 100e9, rtol=0.02)


def scenario(folder: Path) -> dict[str, Any]:
    return {
        "name": "measured",
        "cluster": {
            "spec": GPU,
            "nodes": 1,
            "gpu": {"measured": {"framework": "vllm", "version": VERSION, "folder": str(folder)}},
        },
        "models": {"actor": {"spec": "llama-3-8b", "micro_batch_samples": 1, "score_micro_batch_samples": 1}},
        "workload": {"prompts": 16, "responses_per_prompt": 2, "prompt_tokens": 100, "response_tokens": 50},
        "algorithm": {"name": "grpo", "reward": "function"},
        "generation": {"engine": "engine", "tensor_parallel": 2},
        "strategy": {"name": "colocated"},
    }


def test_results_say_what_was_measured(tables: Path) -> None:
    setup = prepare(scenario_from_dict(scenario(tables)))
    (note,) = [note for note in setup.notes if "as measured" in note]
    assert "vllm 0.24.0, NCCL 2.29.2" in note and "gradients" in note
    found = simulation_json(setup, setup.fit(), simulate(setup))
    assert found["measured"] == [note] and found["step_seconds"] > 0
    plain = scenario(tables)
    del plain["cluster"]["gpu"]
    other = prepare(scenario_from_dict(plain))
    without = simulation_json(other, other.fit(), simulate(other))
    assert "measured" not in without
    assert found["stage_seconds"]["ref"] > without["stage_seconds"]["ref"]  # the slower products


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"version": "0.25.0"}, "cluster.gpu.measured.version: is '0.25.0'"),
        ({"framework": "sglang"}, "cluster.gpu.measured.framework: is 'sglang'"),
        ({"system": "h900"}, "cluster.gpu.measured.system: is 'h900'"),
        ({"folder": "/nowhere"}, "there is no folder"),
    ],
)
def test_tables_that_there_are_not(more: dict[str, str], said: str, tables: Path) -> None:
    with pytest.raises(InputError) as error:
        of(tables, **more)
    assert said in str(error.value)


def test_what_the_tables_lack(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = gemm_time(kernels_of("hopper").gemm["bf16"], rates_of(cluster().gpu, "bf16"), 1, 1024, 1024)
    with pytest.raises(InputError, match=r"no product with gemm_dtype fp8 was measured .*there is: bfloat16"):
        of(tables).gemm(time, "fp8", 1, 1024, 1024)
    with pytest.raises(InputError, match=r"head_dim 96 .*there is: 128"):
        of(tables).decode(16, 4, 96, 2.0, 1, 100)
    gpu = cluster_of("v100-32g-sxm").gpu.model_copy(update={"measured": on(tables).measured})
    with pytest.raises(InputError, match="has no tables of v100"):
        MeasuredKernels(gpu, kernels_of("volta"))
    latent = ModelUse(spec="deepseek-v2-lite", shape=load_model("deepseek-v2-lite"))
    operators = Operators(on(tables), kernels_of("hopper"), Effects(), Overheads())
    with pytest.raises(InputError, match="latent attention"):
        operators.attention_decode(latent, 4, 400, 1)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'rlhfsim\[measured\]'"):
        of(tables, folder=None)


def test_nothing_is_measured_unless_asked_for() -> None:
    assert measured_kernels(cluster().gpu, kernels_of("hopper")) is None


@pytest.mark.skipif(find_spec("aiconfigurator_core") is None, reason="aiconfigurator-core is not installed")
def test_the_published_tables() -> None:
    found = measured_kernels(on(Path(), folder=None), kernels_of("hopper"))
    assert found is not None and "aiconfigurator-core 0.12.0" in found.label
    time = gemm_time(kernels_of("hopper").gemm["bf16"], rates_of(cluster().gpu, "bf16"), 32768, 65536, 12288)
    seconds = float(np.asarray(found.gemm(time, "bf16", 32768, 65536, 12288).seconds))
    assert seconds == pytest.approx(60.324042e-3, rel=1e-6)  # gemm_perf.parquet, vllm 0.24.0, its first row
