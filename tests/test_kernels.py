"""Kernel curves: physical limits for every shape, and measured rows that the fit has not seen."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from rlhfsim.costs.kernels import (
    CollectiveCurve,
    Kernels,
    KernelTime,
    Rates,
    attention_decode_time,
    attention_prefill_time,
    bus_factor,
    collective_seconds,
    gemm_time,
    load_kernels,
    memory_time,
    p_norm,
)
from rlhfsim.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "hw_specs" / "kernels").glob("*.yaml"))
KERNELS = {path.stem: load_kernels(path) for path in FILES}
ARCHITECTURES = st.sampled_from(sorted(KERNELS))
SIZE = st.integers(1, 40_000)
ROUNDING = 1 + 1e-12


def rates(kernels: Kernels, precision: str = "bf16") -> Rates:
    reference = kernels.reference
    return Rates(reference.flops_per_second[precision], reference.memory_bytes_per_second, reference.multiprocessors)


def assert_split(time: KernelTime) -> None:
    parts = time.flops_seconds + time.memory_seconds + time.launch_seconds
    np.testing.assert_allclose(parts, time.seconds, rtol=1e-12)
    assert (np.minimum(time.flops_seconds, time.memory_seconds) == 0).all()


def test_the_files_are_complete():
    assert set(KERNELS) == {
        "volta", "ampere", "ada", "geforce_ada", "hopper", "h200", "blackwell", "gb200", "gb300", "cdna3", "ascend"
    }  # fmt: skip
    for name, kernels in KERNELS.items():
        assert kernels.name == name
        for curve, fit in kernels.fits().items():
            explained = fit.measured or fit.note or "No measurement" in kernels.sources[fit.source]
            assert explained, f"{name}.{curve}: values without a measurement must say where they come from"
            assert fit.rows > 0 or not fit.measured


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_efficiencies_are_relative_to_the_datasheet_that_the_simulator_uses(name):
    reference = KERNELS[name].reference
    gpu = YAML(typ="safe").load(ROOT / "hw_specs" / "gpus" / f"{reference.gpu}.yaml")
    assert gpu["kernels"] == name
    link = gpu.get("nvlink_bytes_per_second") or gpu["pcie_bytes_per_second"]
    given = {"bf16": gpu["flops_per_second"]["fp16"]["value"]} | {
        key: peak["value"] for key, peak in gpu["flops_per_second"].items() if key in reference.flops_per_second
    }
    assert given == reference.flops_per_second
    assert gpu["memory_bytes_per_second"]["value"] == reference.memory_bytes_per_second
    assert gpu["multiprocessors"]["value"] == reference.multiprocessors
    assert link["value"] == reference.link_bytes_per_second


def test_a_wrong_file_is_refused(tmp_path):
    text = (ROOT / "hw_specs" / "kernels" / "ampere.yaml").read_text()
    for old, new, message in (
        (r"compute_efficiency: 0\.\d+", "compute_efficiency: 1.1", "less than or equal to 1"),
        ("source: vidur,", "source: vidor,", "vidor"),
        (r"- \[1\.0, 16\.0,", "- [16.0, 1.0,", "must rise"),
        (r"- \[1\.0, 16\.0, 64\.0,", "- [1.0, 64.0,", "rows of"),
    ):
        wrong = re.sub(old, new, text, count=1)
        assert wrong != text
        (tmp_path / "bad.yaml").write_text(wrong)
        with pytest.raises(InputError, match=message):
            load_kernels(tmp_path / "bad.yaml")


# ---------------------------------------------------------------- physical limits


@given(ARCHITECTURES, SIZE, SIZE, SIZE, st.booleans(), st.booleans())
def test_gemm_stays_below_the_datasheet(name, m, n, k, ideal, weight_gradient):
    kernels = KERNELS[name]
    for precision, curve in kernels.gemm.items():
        size = 1.0 if precision == "fp8" else 2.0
        r = rates(kernels, precision)
        time = gemm_time(curve, r, m, n, k, input_bytes=size, weight_gradient=weight_gradient, ideal=ideal)
        assert 2.0 * m * n * k / time.seconds <= r.flops_per_second * ROUNDING
        assert (size * (m * k + k * n) + 2 * m * n) / time.seconds <= r.memory_bytes_per_second * ROUNDING
        assert time.seconds >= gemm_time(curve, r, m, n, k, input_bytes=size, ideal=True).seconds
        assert_split(time)


@given(ARCHITECTURES, st.integers(1, 512), st.sampled_from([(8, 1), (32, 8), (64, 64)]), SIZE, st.booleans())
def test_attention_stays_below_the_datasheet(name, batch, heads, tokens, ideal):
    kernels, (query, kv) = KERNELS[name], heads
    r = rates(kernels)
    prefill = attention_prefill_time(kernels.prefill, r, batch, query, kv, tokens, 128, ideal=ideal)
    flops = 4.0 * batch * query * 128 * tokens * (tokens + 1) / 2
    assert flops / prefill.seconds <= r.flops_per_second * ROUNDING
    assert 2.0 * 2 * batch * tokens * 128 * (query + kv) / prefill.seconds <= r.memory_bytes_per_second * ROUNDING
    backward = attention_prefill_time(kernels.prefill, r, batch, query, kv, tokens, 128, backward=True, ideal=ideal)
    assert (
        2.5 * flops / backward.seconds <= r.flops_per_second * ROUNDING
    )  # flash-attention's count of the backward work
    decode = attention_decode_time(kernels.decode, r, batch, kv, batch * tokens, 128, query_heads=query, ideal=ideal)
    assert 2.0 * 2 * batch * tokens * kv * 128 / decode.seconds <= r.memory_bytes_per_second * ROUNDING
    for time in (prefill, backward, decode):
        assert_split(time)


@given(ARCHITECTURES, st.floats(1, 1e11), st.booleans())
def test_streaming_kernels_stay_below_memory_bandwidth(name, moved, ideal):
    kernels = KERNELS[name]
    for curve in kernels.memory.values():
        time = memory_time(curve, rates(kernels), moved, ideal=ideal)
        assert moved / time.seconds <= kernels.reference.memory_bytes_per_second * ROUNDING
        assert_split(time)


@given(ARCHITECTURES, st.floats(1, 1e11), st.booleans())
def test_collectives_stay_below_the_link(name, payload, ideal):
    """In-network reduction moves (n+1) instead of 2(n-1) shares per rank (nccl-tests, PERFORMANCE.md): a limit of 2."""
    kernels = KERNELS[name]
    link = kernels.reference.link_bytes_per_second
    for op, curves in kernels.collectives.items():
        for ranks, curve in curves.items():
            seconds = collective_seconds(curve, op, ranks, payload, link, ideal=ideal)
            limit = 2 * (ranks - 1) / (ranks + 1) if op.endswith("all_reduce") and ranks > 2 else 1.0
            assert payload * bus_factor(op, ranks) / seconds <= link * limit * ROUNDING


@given(ARCHITECTURES, st.integers(1, 8192), st.integers(512, 40_000), st.integers(512, 40_000))
def test_gemm_grows_with_every_dimension(name, m, n, k):
    """Inside the grid. Efficiency saturates, but long kernels run at lower clocks: the fit bounds the exponent
    of time in size between knots to 1.1 (2^1.1 = 2.14), and the ratios have three digits."""
    curve, r = KERNELS[name].gemm["bf16"], rates(KERNELS[name])
    base = gemm_time(curve, r, m, n, k).seconds
    for larger in ((2 * m, n, k), (m, 2 * n, k), (m, n, 2 * k)):
        assert 0.98 * base < gemm_time(curve, r, *larger).seconds < 2.2 * base


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_at_saturation_twice_the_work_takes_twice_the_time(name):
    kernels, r = KERNELS[name], rates(KERNELS[name])
    link = kernels.reference.link_bytes_per_second
    times = {
        "gemm": lambda x: gemm_time(kernels.gemm["bf16"], r, x * 10**6, 16384, 16384).seconds,
        "prefill": lambda x: attention_prefill_time(kernels.prefill, r, x * 4096, 32, 8, 32768, 128).seconds,
        "decode": lambda x: attention_decode_time(kernels.decode, r, 1, 8, x * 10**8, 128).seconds,
        "memory": lambda x: memory_time(kernels.memory["rms_norm"], r, x * 1e11).seconds,
        "collective": lambda x: collective_seconds(
            kernels.collective("all_gather", 8), "all_gather", 8, x * 1e14, link
        ),
    }
    for kernel, seconds in times.items():
        assert seconds(2) / seconds(1) == pytest.approx(2, rel=0.02), kernel


def test_arrays_give_what_scalars_give():
    kernels, r = KERNELS["ampere"], rates(KERNELS["ampere"])
    m = np.array([1, 64, 1000, 8192])
    many = gemm_time(kernels.gemm["bf16"], r, m, 4096, 11008)
    for i, each in enumerate(m):
        assert [part[i] for part in many] == [
            float(part) for part in gemm_time(kernels.gemm["bf16"], r, each, 4096, 11008)
        ]


def test_decode_steps_have_a_closed_form():
    kernels, r = KERNELS["hopper"], rates(KERNELS["hopper"])
    batch, context, steps = 17, 5000, 300
    one_by_one = sum(
        attention_decode_time(kernels.decode, r, batch, 8, context + batch * step, 128).seconds for step in range(steps)
    )
    mean = attention_decode_time(kernels.decode, r, batch, 8, context + batch * (steps - 1) / 2, 128).seconds
    assert steps * mean == pytest.approx(one_by_one, rel=1e-12)


def test_p_norm_against_its_definition_and_for_tiny_times():
    assert p_norm(3.0, 4.0, 2.0) == pytest.approx(5.0)
    assert p_norm(1.0, 1.0, 0.5) == pytest.approx(4.0)
    assert p_norm(0.0, 0.0, 6.0) == 0.0
    assert p_norm(1e-9, 1e-9, 60.0) == pytest.approx(1e-9 * 2 ** (1 / 60))


def test_the_nearest_number_of_ranks_and_the_fallback_without_nvlink():
    hopper, ada = KERNELS["hopper"], KERNELS["ada"]
    assert hopper.collective("all_gather", 16) == hopper.collectives["all_gather"][8]
    assert hopper.collective("all_gather", 3) == hopper.collectives["all_gather"][4]
    assert ada.collective("custom_all_reduce", 4) == ada.collectives["all_reduce"][4]


# ---------------------------------------------------------------- measured rows


def measured(kind: str) -> Iterator[dict[str, str]]:
    with (ROOT / "traces" / "kernels" / f"{kind}.csv").open() as lines:
        for row in csv.DictReader(lines):
            assert row["held_out"] == "True" and row["source"]
            yield row


def predicted(kernels: Kernels, kind: str, row: dict[str, str]) -> tuple[float, float]:
    """Seconds, and the mean error that the file states for this curve."""
    number = {
        key: float(value) for key, value in row.items() if key not in {"architecture", "kernel", "held_out", "source"}
    }
    r = rates(kernels)
    if kind == "gemm":
        curve = kernels.gemm["bf16"]
        time = gemm_time(curve, r, number["m"], number["n"], number["k"]).seconds
    elif kind == "prefill":
        curve = kernels.prefill
        shape = [number[key] for key in ("batch", "heads", "kv_heads", "tokens")]
        time = attention_prefill_time(curve, r, *shape, 128).seconds
    elif kind == "decode":
        curve = kernels.decode
        context = number["batch"] * number["tokens"]
        time = attention_decode_time(
            curve, r, number["batch"], number["kv_heads"], context, 128, query_heads=number["heads"]
        ).seconds
    elif kind == "memory":
        curve = kernels.memory[row["kernel"]]
        time = memory_time(curve, r, number["bytes"]).seconds
    else:
        ranks, link = int(number["ranks"]), kernels.reference.link_bytes_per_second
        curve = kernels.collective(row["kernel"], ranks)
        time = collective_seconds(curve, row["kernel"], ranks, number["bytes"], link)
    return float(time), curve.fit.mean_error


def misses(kernels: dict[str, Kernels], kind: str) -> list[str]:
    """Architectures whose held-out rows are off by more than stated.

    The mean of a few rows scatters around the stated mean of many: the allowance is half of it.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for row in measured(kind):
        time, stated = predicted(kernels[row["architecture"]], kind, row)
        errors.setdefault(row["architecture"], []).append((abs(time / float(row["seconds"]) - 1), stated))
    means = {name: np.mean(pairs, axis=0) for name, pairs in errors.items()}
    return [name for name, (error, stated) in means.items() if error > 1.5 * stated]


KINDS = ("gemm", "prefill", "decode", "memory", "collectives")


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_measurements_are_reproduced_within_the_stated_error(kind):
    assert misses(KERNELS, kind) == []


def changed(kernels: Kernels, path: str, factor: float) -> Kernels:
    """The same file with every coefficient under `path` (a.*.b matches any key) multiplied."""
    record = kernels.model_dump()
    nodes, (*parents, leaf) = [record], path.split(".")
    for key in parents:
        nodes = [child for node in nodes for child in (node.values() if key == "*" else [node[key]])]
    for node in filter(None, nodes):  # not every kernel has a grid
        if leaf == "measured":
            node[leaf] = [(wire, factor * seconds) for wire, seconds in node[leaf]]
        elif leaf == "ratios":
            node[leaf] = [[factor * ratio for ratio in row] for row in node[leaf]]
        else:
            node[leaf] *= factor
    return Kernels.model_validate(record)


@pytest.mark.parametrize(
    ("kind", "path", "factor"),
    [
        ("gemm", "gemm.bf16.compute_efficiency", 0.5),
        ("gemm", "gemm.bf16.memory_efficiency", 0.5),
        ("prefill", "prefill.compute_efficiency", 0.5),
        ("prefill", "prefill.kernel_seconds", 2.0),
        ("decode", "decode.memory_efficiency", 0.5),
        ("decode", "decode.kernel_seconds", 2.0),
        ("memory", "memory.*.memory_efficiency", 0.5),
        ("gemm", "gemm.bf16.residuals.ratios", 2.0),
        ("prefill", "prefill.residuals.ratios", 2.0),
        ("decode", "decode.residuals.ratios", 2.0),
        ("memory", "memory.*.residuals.ratios", 2.0),
        ("collectives", "collectives.*.*.measured", 2.0),
        ("collectives", "collectives.*.*.efficiency", 0.5),
    ],
)
def test_the_measurements_notice_a_coefficient_that_is_off_by_two(kind, path, factor):
    wrong = {name: changed(kernels, path, factor) for name, kernels in KERNELS.items()}
    assert {"ampere", "hopper"} <= set(misses(wrong, kind))


def test_an_efficiency_above_one_is_refused_except_for_in_network_reduction():
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        changed(KERNELS["ampere"], "gemm.bf16.compute_efficiency", 2.0)
    for kernels in KERNELS.values():
        over = {op for op, curves in kernels.collectives.items() for c in curves.values() if c.efficiency > 1}
        assert over <= {"all_reduce", "custom_all_reduce"}
        assert not over or kernels.name in ("hopper", "h200")
    assert isinstance(KERNELS["hopper"].collectives["all_reduce"][8], CollectiveCurve)
