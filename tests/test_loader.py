"""What a scenario file means: names, shorthand, defaults, overrides, sweeps, places and sources."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfsim.errors import InputError
from rlhfsim.spec.data import data_dir
from rlhfsim.spec.loader import (
    expand_sweep,
    load_cluster,
    load_rows,
    load_scenario,
    scenario_from_dict,
    scenario_sources,
)
from rlhfsim.spec.yaml_file import parse_value, read_yaml

# What the core schema of YAML 1.2.2 (section 10.3.2 and its examples) makes of scalars.
SCALARS = [
    ("1e9", 1e9),
    ("1E-3", 1e-3),
    ("12.5e9", 12.5e9),
    ("12e03", 12000.0),
    ("-2E+05", -200000.0),
    (".5", 0.5),
    ("0.", 0.0),
    ("-0.0", -0.0),
    ("0o7", 7),
    ("0x3A", 58),
    ("-19", -19),
    ("+12", 12),
    ("012", 12),
    ("1_000", "1_000"),
    ("1:30", "1:30"),
    ("on", "on"),
    ("off", "off"),
    ("yes", "yes"),
    ("No", "No"),
    ("y", "y"),
    ("true", True),
    ("False", False),
    ("TRUE", True),
    ("tRUE", "tRUE"),
    ("null", None),
    ("~", None),
    ("", None),
    ("none", "none"),
    (".inf", math.inf),
    ("-.Inf", -math.inf),
    (".NAN", math.nan),
    ("nan", "nan"),
    ("'1e9'", "1e9"),
    ('"true"', "true"),
    ("2026-11-25", "2026-11-25"),
    ("200Gbps", "200Gbps"),
    ("[0, 1]", [0, 1]),
    ("{a: 1e9, b: on}", {"a": 1e9, "b": "on"}),
]

BASE = """\
cluster: {spec: a100-80g-sxm, nodes: 2}
models:
  actor: llama-7b
workload:
  prompt_tokens: 256
  response_tokens: 256
"""


def write(folder: Path, text: str, name: str = "case.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def load(folder: Path, text: str = BASE, *overrides: str):
    return load_scenario(write(folder, text), overrides)


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_yaml_1_2(text, value):
    read = parse_value(text, "")
    assert type(read) is type(value)
    assert read == value or (isinstance(value, float) and math.isnan(value) and math.isnan(read))


def test_every_value_knows_its_line(tmp_path):
    text = "a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n'on': |\n  text\n"
    document = read_yaml(write(tmp_path, text), "top")
    assert document.data == {"a": 1, "b": ["x", {"c": 2, "d": 3}], "on": "text\n"}
    lines = {path: place.rpartition(":")[2] for path, place in document.where.items() if path != "top"}
    assert lines == {"top.a": "1", "top.b": "2", "top.b.0": "3", "top.b.1": "4", "top.b.1.c": "4", "top.b.1.d": "5",
                     "top.on": "6"}  # fmt: skip


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(json_values)
def test_json_is_read_as_json_reads_it(value):
    assert parse_value(json.dumps(value, ensure_ascii=False), "") == value


# --- names, shorthand and defaults -----------------------------------------------------------------------------------


def test_shorthand_is_the_long_form(tmp_path):
    long = load(
        tmp_path,
        """\
name: case
cluster: {spec: a100-80g-sxm, nodes: 2}
models: {actor: {spec: llama-7b}, critic: {spec: llama-7b}, reference: {spec: llama-7b}, reward: {spec: llama-7b}}
workload:
  prompt_tokens: {distribution: fixed, tokens: 256}
  response_tokens: {distribution: fixed, tokens: 256}
strategy: {name: colocated}
algorithm: {name: ppo}
""",
    )
    assert load(tmp_path, BASE + "strategy: colocated\nalgorithm: ppo\n") == long
    assert long.models.reference.zero_stage == long.models.reward.zero_stage == 3


def test_models_take_their_defaults_from_each_other(tmp_path):
    text = BASE.replace(
        "  actor: llama-7b\n",
        "  actor: {spec: llama-7b, zero_stage: 1, tensor_parallel: 4, pipeline_parallel: 2, precision: fp16}\n"
        "  critic: {spec: opt-1.3b}\n",
    )
    models = load(tmp_path, text).models
    assert [models.reference.spec, models.reward.spec] == ["llama-7b", "opt-1.3b"]
    assert [models.reference.shape, models.reward.shape] == [models.actor.shape, models.critic.shape]
    reference = models.reference
    assert (reference.zero_stage, reference.tensor_parallel, reference.pipeline_parallel) == (0, 4, 2)
    assert reference.precision == "fp16"
    assert (models.reward.zero_stage, models.reward.tensor_parallel, models.reward.precision) == (3, 1, "bf16")


def test_a_frozen_model_with_its_own_tensor_parallelism_is_not_sharded(tmp_path):
    models = load(tmp_path, BASE, "models.reward={tensor_parallel: 2}", "models.reference.zero_stage=0").models
    assert (models.reward.zero_stage, models.reward.tensor_parallel) == (0, 2)
    assert (models.actor.zero_stage, models.reference.zero_stage) == (3, 0)


def test_numbers_may_be_written_with_an_exponent(tmp_path):
    scenario = load(tmp_path, BASE + "simulation: {seed: 1e3}\n", "workload.prompts=1e2")
    assert (scenario.simulation.seed, scenario.workload.prompts) == (1000, 100)
    assert type(scenario.workload.prompts) is int


def test_a_hugging_face_config_relative_to_the_scenario(tmp_path):
    (tmp_path / "mine").mkdir()
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
              "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 512}  # fmt: skip
    write(tmp_path / "mine", json.dumps(config), "config.json")
    assert load(tmp_path, BASE, "models.actor=mine/config.json").models.reward.shape.hidden == 64


def test_every_shipped_cluster_loads_by_name_and_by_path():
    paths = sorted((data_dir("hw_specs") / "clusters").glob("*.yaml"))
    assert paths
    for path in paths:
        assert load_cluster(path.stem) == load_cluster(path.name, path.parent)
        assert load_cluster(path.stem).name == path.stem


def test_values_beside_a_spec_change_single_values(tmp_path):
    named = load_cluster("a100-80g-sxm")
    cluster = load(
        tmp_path,
        BASE.replace(
            "{spec: a100-80g-sxm, nodes: 2}",
            "{spec: a100-80g-sxm, nodes: 3, gpus_per_node: 4, network: {nic_bytes_per_second: 12.5e9}}",
        ),
        "cluster.gpu.memory_bytes=40e9",
    ).cluster
    assert (cluster.nodes, cluster.gpus) == (3, 12)
    assert (cluster.network.nic_bytes_per_second.value, cluster.network.nic_bytes_per_second.source) == (
        12.5e9, "unverified")  # fmt: skip
    assert cluster.gpu.memory_bytes.value == 40e9 and not cluster.gpu.memory_bytes.verified
    assert cluster.network.latency_seconds == named.network.latency_seconds
    assert cluster.node.host_memory_bytes == named.node.host_memory_bytes
    assert cluster.gpu.flops_per_second == named.gpu.flops_per_second


def test_another_gpu_or_node_replaces_the_whole(tmp_path):
    cluster = load(tmp_path, BASE, "cluster.gpu=h100-80g-sxm").cluster
    assert cluster.gpu == load_cluster("h100-80g-sxm").gpu
    assert cluster.node.gpu == "h100-80g-sxm" and cluster.node.name == "a100-80g-sxm-x8"
    cluster = load(tmp_path, BASE, "cluster.node=h100-80g-sxm-x8").cluster
    assert (cluster.node, cluster.gpu) == (load_cluster("h100-80g-sxm").node, load_cluster("h100-80g-sxm").gpu)
    assert cluster.network == load_cluster("a100-80g-sxm").network


def test_own_files_name_each_other_relative_to_themselves(tmp_path):
    specs = tmp_path / "specs"
    specs.mkdir()
    write(specs, "node: ./box.yaml\nnodes: 2\nnetwork: {nics_per_node: 1, nic_bytes_per_second: 1e9}\n", "lab.yaml")
    write(
        specs,
        "gpu: {name: card, architecture: own, kernels: ampere, memory_bytes: 8e9, memory_bytes_per_second: 4e11,\n"
        "      flops_per_second: {bf16: 1e13}, multiprocessors: 30, pcie_bytes_per_second: 16e9}\n"
        "gpus_per_node: 2\ngpu_link: pcie\nhost_memory_bytes: 64e9\nhost_memory_bytes_per_second: 20e9\n",
        "box.yaml",
    )
    cluster = load(tmp_path, BASE.replace("{spec: a100-80g-sxm, nodes: 2}", "specs/lab.yaml")).cluster
    assert (cluster.name, cluster.node.name, cluster.node.gpu, cluster.gpu.name) == ("lab", "box", "card", "card")
    assert cluster.gpu.flops_per_second["bf16"].value == 1e13 and not cluster.gpu.flops_per_second["bf16"].verified
    with pytest.raises(InputError, match=r"box.yaml:3: cluster.node.gpus_per_node: is 0, but must be at least 1"):
        write(specs, (specs / "box.yaml").read_text().replace("gpus_per_node: 2", "gpus_per_node: 0"), "box.yaml")
        load_scenario(tmp_path / "case.yaml")


def test_a_cluster_written_out_is_the_cluster_it_names(tmp_path):
    scenario = load(tmp_path, BASE, "models.actor.shape.layers=16")
    assert scenario.models.actor.shape.layers == 16 and scenario.models.critic.shape.layers == 32
    assert scenario_from_dict(scenario.model_dump(), "/nonexistent") == scenario


# --- overrides and sweeps --------------------------------------------------------------------------------------------


def test_overrides_reach_below_shorthand_and_make_sections(tmp_path):
    scenario = load(
        tmp_path, BASE, "models.critic.spec=opt-1.3b", "models.actor.micro_batch_samples=2", "effects.links=false",
        "workload.response_tokens={distribution: uniform, min_tokens: 8, max_tokens: 64}", "strategy.colour=[0,1]",
    )  # fmt: skip
    assert (scenario.models.critic.spec, scenario.models.reward.spec) == ("opt-1.3b", "opt-1.3b")
    assert scenario.models.actor.micro_batch_samples == 2 and not scenario.effects.links
    assert scenario.workload.response_tokens.longest == 64
    assert scenario.strategy.options == {"colour": [0, 1]}


def test_a_sweep_point_is_a_set_of_overrides(tmp_path):
    path = write(tmp_path, BASE)
    points = expand_sweep(["workload.prompts=8,16", "models.actor.zero_stage=2"])
    assert [load_scenario(path, point).workload.prompts for point in points] == [8, 16]
    assert load_scenario(path, points[0]) == load_scenario(path, ["workload.prompts=8", "models.actor.zero_stage=2"])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=1,2", [1, 2]),
        ("a=[0,1]", [[0, 1]]),
        ("a=[0,1],[2]", [[0, 1], [2]]),
        ("a={b: 1, c: 2},3", [{"b": 1, "c": 2}, 3]),
        ("a='x,y',z", ["x,y", "z"]),
        ("a=[']', \",\"],on", [["]", ","], "on"]),
        ("a=it's,1e9", ["it's", 1e9]),
        ("a=null", [None]),
        ("a=x=y", ["x=y"]),
    ],
)
def test_only_commas_outside_brackets_and_quotes_sweep(text, values):
    assert [point["a"] for point in expand_sweep([text])] == values


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), max_size=4))
def test_a_sweep_is_the_product_in_the_order_given(axes):
    overrides = [f"k{i}={','.join(map(str, axis))}" for i, axis in enumerate(axes)]
    assert [tuple(point.values()) for point in expand_sweep(overrides)] == list(itertools.product(*axes))


def test_rows_of_a_comparison(tmp_path):
    text = BASE + (
        "compare:\n  baseline: small\n  rows:\n    small: {}\n"
        "    large:\n      workload.prompts: 64\n      strategy: {name: colocated, calls: 2}\n"
    )
    path = write(tmp_path, text)
    rows = load_rows(path, ["workload.prompts=32"])
    assert {label: row.workload.prompts for label, row in rows.items()} == {"small": 32, "large": 64}
    assert rows["large"].strategy.options == {"calls": 2} and rows["large"].compare is None
    write(tmp_path, text.replace("workload.prompts: 64", "workload.promts: 64"))
    with pytest.raises(InputError, match=r"case.yaml:12: workload.promts: unknown key \(did you mean 'prompts'\?\)"):
        load_rows(path)


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_number_tells_its_source(tmp_path):
    scenario = load(tmp_path, BASE, "cluster.network.nic_bytes_per_second=7e9", "models.critic=opt-1.3b")
    sources = {field: (value, source) for field, value, source in scenario_sources(scenario)}
    assert sources["cluster.network.nic_bytes_per_second"] == (7e9, "unverified")
    value, source = sources["cluster.gpu.flops_per_second.bf16"]
    assert value == 312e12 and "NVIDIA" in source
    assert sources["models.actor.shape.layers"][0] == 32 and sources["models.critic.shape.layers"][0] == 24
    for part in ("node", "gpu", "network"):
        record = getattr(scenario.cluster, part)
        for name in record.quantities():
            assert f"cluster.{part}.{name}" in sources
