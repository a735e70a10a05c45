"""Whatever is wrong in what a person wrote: one InputError with place, field, value and what is allowed."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhfsim.errors import InputError
from rlhfsim.spec.loader import expand_sweep, load_cluster, load_scenario, scenario_from_dict
from rlhfsim.spec.scenario import Scenario
from rlhfsim.spec.yaml_file import MAX_BYTES

VALID = """\
cluster:
  spec: a100-80g-sxm
  nodes: 2
models:
  actor: {spec: opt-1.3b, zero_stage: 2}
  critic: {spec: opt-350m, zero_stage: 3}
workload:
  prompts: 64
  responses_per_prompt: 2
  prompt_tokens: 256
  response_tokens: {distribution: lognormal, mean_tokens: 150, sigma: 0.6, max_tokens: 512}
algorithm: {name: ppo, epochs: 1, minibatches: 2}
generation:
  engine: engine
  tensor_parallel: 2
  memory_fraction: 0.6
strategy:
  name: colocated
overheads: {controller_call_seconds: 0.1}
simulation: {iterations: 3, seed: 1e3}
"""


def write(folder: Path, content: str | bytes, name: str = "case.yaml") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load_scenario(path, overrides)
    return str(error.value)


def test_the_valid_one_is_valid(tmp_path):
    assert isinstance(load_scenario(write(tmp_path, VALID)), Scenario)


# --- files -----------------------------------------------------------------------------------------------------------

FILES = {
    "empty": (b"", "case.yaml: is empty"),
    "only a comment": (b"# nothing\n", "case.yaml: is empty"),
    "only a marker": (b"---\n", "case.yaml: is empty"),
    "a list": (b"- a\n", "case.yaml: must hold a mapping (key: value), not a list"),
    "a word": (b"hello", "case.yaml: must hold a mapping (key: value), not 'hello'"),
    "broken": (b"a: [1, 2\nb: 3\n", "case.yaml:2: is not YAML: "),
    "a tab": (b"a:\n\tb: 1\n", "case.yaml:2: is not YAML: "),
    "binary": (b"a: 1\n\x00\x01", "case.yaml: is a binary file"),
    "not UTF-8": (b"a: 1\nb: \xff\xfe", "case.yaml:2: is not text in UTF-8"),
    "an archive": (b"PK\x03\x04" + bytes(range(256)), "is not text in UTF-8"),
    "control characters": (b"a: \x07", "case.yaml: is not YAML: "),
    "half a character": (b'a: "\\ud800"', "case.yaml:1: has half a character"),
    "too large": (b"#" * (MAX_BYTES + 1), f"case.yaml: is larger than {MAX_BYTES} bytes"),
    "deep": (b"a: " + b"[" * 100_000, "case.yaml:1: is nested more than 30 deep"),
    "deep mappings": (b"a: " + b"{a: " * 5000, "case.yaml:1: is nested more than 30 deep"),
    "a bomb of aliases": (b"a: &a [1, 1]\nb: [*a, *a]\n", "case.yaml:1: anchors and aliases"),
    "a merge key": (b"a: 1\n<<: *x\n", "case.yaml:2: anchors and aliases"),
    "a tag": (b"a: !!python/object:os.system x\n", "case.yaml:1: tags are not read"),
    "two documents": (b"a: 1\n---\nb: 2\n", "case.yaml:2: a second document begins here"),
    "YAML 1.1": (b"%YAML 1.1\n---\na: on\n", "only YAML 1.2 is read"),
    "a key twice": (b"a: 1\nb: 2\na: 3\n", "case.yaml:3: key 'a' is given twice, first at "),
    "a key twice below": (b"x:\n  a: 1\n  a: 3\n", "case.yaml:3: key 'a' is given twice, first at "),
    "a list as a key": (b"[a, b]: 1\n", "case.yaml:1: a key must be a plain word"),
    "endless digits": (b"a: " + b"9" * 5000, "case.yaml:1: a number of 5000 digits"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files(tmp_path, case):
    content, fragment = FILES[case]
    assert fragment in complaint(write(tmp_path, content))


def test_missing_files_and_folders(tmp_path):
    write(tmp_path, VALID)
    assert "cse.yaml: there is no such file (did you mean 'case.yaml'?)" in complaint(tmp_path / "cse.yaml")
    assert "there is no such file; there is no folder" in complaint(tmp_path / "no" / "case.yaml")
    assert f"{tmp_path}: is not a regular file" in complaint(tmp_path)
    assert "cannot be read: " in complaint(tmp_path / ("x" * 5000))
    assert "no" in complaint(Path(f"{tmp_path}/a\0b.yaml"))
    os.mkfifo(tmp_path / "pipe.yaml")  # reading it would never end
    assert "is not a regular file" in complaint(tmp_path / "pipe.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path):
    path = write(tmp_path, VALID)
    path.chmod(0)
    assert "cannot be read: Permission denied" in complaint(path)


def test_a_byte_order_mark_is_fine(tmp_path):
    assert load_scenario(write(tmp_path, b"\xef\xbb\xbf" + VALID.encode())).workload.prompts == 64


# --- values ----------------------------------------------------------------------------------------------------------

# (what stands in VALID, what is written instead, the whole complaint after the folder)
LINES = [
    ("  prompts: 64", "  promts: 64", "case.yaml:8: workload.promts: unknown key (did you mean 'prompts'?)"),
    ("  prompts: 64", "  prompts: 0", "case.yaml:8: workload.prompts: is 0, but must be at least 1"),
    ("  prompts: 64", "  prompts: -3", "case.yaml:8: workload.prompts: is -3, but must be at least 1"),
    ("  prompts: 64", "  prompts: 6.5", "case.yaml:8: workload.prompts: is 6.5, but must be a whole number"),
    ("  prompts: 64", "  prompts: '64'", "case.yaml:8: workload.prompts: is '64', but must be a whole number"),
    ("  prompts: 64", "  prompts: true", "case.yaml:8: workload.prompts: is true, but must be a whole number"),
    ("  prompts: 64", "  prompts:", "case.yaml:8: workload.prompts: is empty, but must be a whole number"),
    ("  prompts: 64", "  prompts: [64]", "case.yaml:8: workload.prompts: is a list, but must be a whole number"),
    ("  prompts: 64", "  prompts: .nan", "case.yaml:8: workload.prompts: is nan, but must be a whole number"),
    ("  prompts: 64", "  prompts: .inf",
     "case.yaml:8: workload.prompts: is inf, but must be a whole number of at most 1e12"),
    ("  prompts: 64", "  prompts: 1e15",
     "case.yaml:8: workload.prompts: is 1000000000000000, which is unreasonably large (at most 1e12)"),
    ("  prompts: 64", "  prompts: 1e300",
     "case.yaml:8: workload.prompts: is 1e+300, but must be a whole number of at most 1e12"),
    ("  prompts: 64", "  prompts: 1e11", "case.yaml:8: workload.prompts: times responses_per_prompt makes 200000000000 "
     "samples; at most 10000000 are allowed"),
    ("  nodes: 2", "  nodes: 1e9", "case.yaml:3: cluster.nodes: makes 8000000000 GPUs; at most 1000000 are allowed"),
    ("  nodes: 2", "  node: 2", "case.yaml:3: cluster.node: is 2, but must be a mapping"),
    ("  nodes: 2", "  gpus_per_nod: 2",
     "case.yaml:3: cluster.gpus_per_nod: unknown key (did you mean 'gpus_per_node'?)"),
    ("spec: a100-80g-sxm", "spec: a100-80gb-sxm",
     "case.yaml:2: cluster.spec: there is no cluster 'a100-80gb-sxm' (did you mean 'a100-80g-sxm'?)"),
    ("spec: a100-80g-sxm", "spec: 7", "case.yaml:2: cluster.spec: is 7, but must be a name or the path of a YAML file"),
    ("  nodes: 2", "  network: {nic_gbps: 200}", "case.yaml:3: cluster.network.nic_gbps: unknown key "
     "(did you mean 'nic_bytes_per_second', in bytes per second: 1 Gbit/s is 1.25e8?)"),
    ("  nodes: 2", "  network: {latency_us: 2}", "case.yaml:3: cluster.network.latency_us: unknown key "
     "(did you mean 'latency_seconds', in seconds: 1 us is 1e-6?)"),
    ("  nodes: 2", "  gpu: {memory_gb: 80}", "case.yaml:3: cluster.gpu.memory_gb: unknown key "
     "(did you mean 'memory_bytes', in bytes: 1 GB is 1e9?)"),
    ("  nodes: 2", "  gpu: {memory_gb_per_s: 80}", "case.yaml:3: cluster.gpu.memory_gb_per_s: unknown key "
     "(did you mean 'memory_bytes_per_second', in bytes per second: 1 GB is 1e9?)"),
    ("  nodes: 2", "  gpu: {tflops: 312}", "case.yaml:3: cluster.gpu.tflops: unknown key "
     "(did you mean 'flops_per_second', in flops per second: 1 TFLOP/s is 1e12?)"),
    ("  nodes: 2", "  gpu: {flops_per_second: {bf61: 1e12}}",
     "case.yaml:3: cluster.gpu.flops_per_second.bf61: unknown key (did you mean 'bf16'?)"),
    ("  nodes: 2", "  gpu: {flops_per_second: {bf16: 0}}",
     "case.yaml:3: cluster.gpu.flops_per_second.bf16: is 0, but must be above 0, in flops per second"),
    ("  nodes: 2", "  network: {nic_bytes_per_second: 200 Gbit/s}",
     "case.yaml:3: cluster.network.nic_bytes_per_second: "
     "is '200 Gbit/s', but must be a plain number, in bytes per second"),
    ("  nodes: 2", "  network: {nic_bytes_per_second: -1}", "case.yaml:3: cluster.network.nic_bytes_per_second: "
     "is -1, but must be above 0, in bytes per second"),
    ("  nodes: 2", "  network: {nic_bytes_per_second: .nan}", "case.yaml:3: cluster.network.nic_bytes_per_second: "
     "is nan, but must be a finite number, in bytes per second"),
    ("  nodes: 2", "  network: {nic_bytes_per_second: {value: 1, source: me}}", "case.yaml:3: cluster.network: "
     "nic_bytes_per_second: source 'me' is not among the keys of 'sources'"),
    ("zero_stage: 2", "zero_stage: 4", "case.yaml:5: models.actor.zero_stage: is 4, but must be at most 3"),
    ("zero_stage: 2", "zerostage: 2", "case.yaml:5: models.actor.zerostage: unknown key (did you mean 'zero_stage'?)"),
    ("zero_stage: 2", "precision: fp61",
     "case.yaml:5: models.actor.precision: is 'fp61', but must be one of bf16, fp16, fp32 (did you mean 'fp16'?)"),
    ("zero_stage: 2", "precision: 16",
     "case.yaml:5: models.actor.precision: is 16, but must be one of bf16, fp16, fp32"),
    ("zero_stage: 2", "sequence_parallel: on",
     "case.yaml:5: models.actor.sequence_parallel: is 'on', but must be true or false"),
    ("zero_stage: 2", "pipeline_parallel: 2", "case.yaml:5: models.actor: zero_stage 3 shards weights over "
     "data-parallel ranks; with pipeline_parallel above 1 use stage 0, 1 or 2"),
    ("zero_stage: 2", "zero_stage: 2, tensor_parallel: 3", "case.yaml:5: models.actor.tensor_parallel: is 3, but must "
     "divide the 32 heads and the MLP width 8192 of opt-1.3b"),
    ("zero_stage: 2", "zero_stage: 2, tensor_parallel: 32", "case.yaml:5: models.actor.tensor_parallel: "
     "x pipeline_parallel is 32, but the cluster has 16 GPUs"),
    ("zero_stage: 2", "zero_stage: 2, pipeline_parallel: 5", "case.yaml:5: models.actor.pipeline_parallel: "
     "x pipeline_chunks is 5, but must divide the 24 layers of opt-1.3b"),
    ("zero_stage: 2", "trainable_layers: 99",
     "case.yaml:5: models.actor: trainable_layers is 99, but opt-1.3b has 24 layers"),
    ("spec: opt-1.3b", "spec: opt1.3b", "case.yaml:5: models.actor.spec: 'opt1.3b' is neither a shipped model"),
    ("spec: opt-1.3b", "spec: null", "case.yaml:5: models.actor.spec: is empty, but must be a shipped model's name"),
    ("spec: opt-1.3b, ", "", "case.yaml:5: models.actor.spec: is missing: a shipped model's name or the path of a "
     "config.json"),
    ("  critic:", "  crtic:", "case.yaml:6: models.crtic: unknown key (did you mean 'critic'?)"),
    ("  prompt_tokens: 256", "  prompt_tokens: 256 tokens",
     "case.yaml:10: workload.prompt_tokens.tokens: is '256 tokens', but must be a whole number, in tokens"),
    ("  prompt_tokens: 256\n", "", "case.yaml:7: workload.prompt_tokens: is missing"),
    ("  prompt_tokens: 256", "  prompt_tokens: 2000",
     "case.yaml:7: workload: prompt and response have up to 2512 tokens, "
     "but opt-1.3b (actor) has positions for 2048"),
    ("  prompt_tokens: 256", "  prompt_tokens: 1e8",
     "case.yaml:10: workload.prompt_tokens: allows 100000000 tokens; at most 10000000 are allowed"),
    ("sigma: 0.6, ", "", "case.yaml:11: workload.response_tokens: distribution 'lognormal' needs sigma"),
    ("distribution: lognormal", "distribution: lognorm", "case.yaml:11: workload.response_tokens.distribution: is "
     "'lognorm', but must be one of fixed, uniform, lognormal, empirical (did you mean 'lognormal'?)"),
    ("max_tokens: 512", "max_tokens: 512, min_tokens: 513",
     "case.yaml:11: workload.response_tokens: min_tokens is 513, above max_tokens 512"),
    ("  prompt_tokens: 256", "  prompt_tokens: {tokens: 256, within_prompt_correlation: 0.5}",
     "case.yaml:10: workload.prompt_tokens.within_prompt_correlation: is for responses"),
    ("{distribution: lognormal, mean_tokens: 150, sigma: 0.6, max_tokens: 512}",
     "{distribution: empirical, file: azure_code_2024.csv, column: response_tokens, max_tokens: 512}",
     "case.yaml:11: workload.response_tokens.file: is 'azure_code_2024.csv', which is neither a shipped file"),
    ("{distribution: lognormal, mean_tokens: 150, sigma: 0.6, max_tokens: 512}",
     "{distribution: empirical, file: azure_code_2023.csv, column: responses, max_tokens: 512}",
     "there is no such column (did you mean 'response_tokens'?)"),
    ("minibatches: 2", "minibatches: 999",
     "case.yaml:12: algorithm.minibatches: is 999, but there are only 128 samples in an iteration"),
    ("epochs: 1", "epochs: 1e12", "case.yaml:12: algorithm.epochs: is 1000000000000, but must be at most 100"),
    ("epochs: 1", "epochs: 101", "case.yaml:12: algorithm.epochs: is 101, but must be at most 100"),
    ("minibatches: 2", "minibatches: 2001", "case.yaml:12: algorithm.minibatches: is 2001, but must be at most 2000"),
    ("epochs: 1, minibatches: 2", "epochs: 50, minibatches: 41", "case.yaml:12: algorithm: epochs 50 x minibatches 41 "
     "are 2050 optimizer steps an iteration; at most 2000 are allowed"),
    ("name: ppo", "name: pppo", "case.yaml:12: algorithm.name: is 'pppo', but must be one of "),
    ("  name: colocated", "  name: collocated", "case.yaml:18: strategy.name: is 'collocated', but must be one of "),
    ("  name: colocated", "  name: ../colocated",
     "case.yaml:18: strategy.name: is '../colocated', but must be one of "),
    ("  tensor_parallel: 2", "  tensor_parallel: 3", "case.yaml:15: generation.tensor_parallel: is 3, but must divide"),
    ("  engine: engine", "  engine: zero3_per_token",
     "case.yaml:13: generation: engine zero3_per_token runs every rank on its own samples: tensor_parallel must be 1"),
    ("memory_fraction: 0.6", "memory_fraction: 60",
     "case.yaml:16: generation.memory_fraction: is 60, but must be at most 1"),
    ("controller_call_seconds: 0.1", "controller_call_ms: 100",
     "case.yaml:19: overheads.controller_call_ms: unknown key "
     "(did you mean 'controller_call_seconds', in seconds: 1 ms is 1e-3?)"),
    ("seed: 1e3", "seed: 1e12", "case.yaml:20: simulation.seed: is 1000000000000, but must be at most 4294967295"),
    ("workload:\n", "effects: {decode: no}\nworkload:\n",
     "case.yaml:7: effects.decode: is 'no', but must be true or false"),
    ("workload:\n", "compare: {baseline: x, rows: {}}\nworkload:\n",
     "case.yaml:7: compare.rows: is a mapping with 0 entries, but needs 1"),
    ("workload:\n", "compare: {baseline: x, rows: {y: {}}}\nworkload:\n",
     "case.yaml:7: compare: baseline 'x' is not a row (rows: y)"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "written", "expected"), LINES)
def test_bad_values(tmp_path, found, written, expected):
    assert VALID.count(found) == 1
    text = complaint(write(tmp_path, VALID.replace(found, written)))
    assert expected in text
    assert "\n" not in text and "pydantic" not in text and "Input should" not in text and "type=" not in text


def test_several_problems_are_listed_five_then_counted(tmp_path):
    extra = "".join(f"wrong_{i}: {i}\n" for i in range(7))
    lines = complaint(write(tmp_path, VALID + extra)).splitlines()
    assert len(lines) == 6 and lines[-1] == "and 2 more"
    for i, line in enumerate(lines[:5]):
        assert re.search(rf"case.yaml:{21 + i}: wrong_{i}: unknown key", line)


def test_a_value_taken_over_by_another_model_is_complained_about_once(tmp_path):
    text = complaint(write(tmp_path, VALID.replace("zero_stage: 2", "precision: half")))
    assert text.count("precision") == 1 and "models.actor.precision" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("models.actor.zero_stge=1", "override: models.actor.zero_stge: unknown key (did you mean 'zero_stage'?)"),
        ("modles.actor.zero_stage=1", "modles: unknown key (did you mean 'models'?)"),
        ("models.actor.zero_stage=9", "override: models.actor.zero_stage: is 9, but must be at most 3"),
        ("workload.prompts.x=9", "override: workload.prompts.x: workload.prompts is 64, so 'workload.prompts.x' "),
        ("workload.prompts=1,2", "workload.prompts: is given 2 values, which is a sweep"),
        ("workload.prompts=", "workload.prompts: has an empty value (null unsets it)"),
        ("workload.prompts=[1", "workload.prompts: ] is missing in '[1'"),
        ("workload.prompts='1", "workload.prompts: ' is missing in"),
        ("workload.prompts=*x", "workload.prompts: has the value '*x', which anchors and aliases"),
        ("workload.prompts=a: b", "workload.prompts: has the value 'a: b'; a list is written [a,b], a mapping {a: b}"),
        ("workload.prompts=#1", "workload.prompts: has the value '#1', which is a comment"),
        ("workload.prompts", "an override is written key.subkey=value, given 'workload.prompts'"),
        ("=3", "an override is written key.subkey=value, given '=3'"),
        ("a..b=3", "an override is written key.subkey=value, given 'a..b=3'"),
        ("cluster=missing.yaml", "override: cluster.spec: "),
        ("cluster.node=nodes/none.yaml", "override: cluster.node: "),
    ],
)
def test_bad_overrides(tmp_path, override, expected):
    assert expected in complaint(write(tmp_path, VALID), override)


def test_a_key_overridden_twice_and_a_sweep_without_end():
    with pytest.raises(InputError, match="a: is overridden twice"):
        expand_sweep(["a=1", "b=2", "a=3"])
    with pytest.raises(InputError, match="the sweep has 1000000000000 points"):
        expand_sweep([f"k{i}={','.join(map(str, range(100)))}" for i in range(6)])


def test_what_is_missing_in_a_named_file_is_missing_there(tmp_path):
    write(tmp_path, "node: a100-80g-sxm-x8\nnodes: 2\n", "lab.yaml")
    with pytest.raises(InputError, match=r"lab\.yaml: network: is missing"):
        load_cluster("lab.yaml", tmp_path)
    path = write(tmp_path, VALID.replace("spec: a100-80g-sxm", "spec: lab.yaml"))
    assert re.search(r"lab\.yaml: cluster\.network: is missing", complaint(path))
    write(tmp_path, "node: a100-80g-sxm-x8\nnodes: [\n", "lab.yaml")
    assert re.search(r"lab\.yaml:\d: is not YAML", complaint(path))


def test_a_cluster_file_cannot_name_another_cluster(tmp_path):
    write(tmp_path, "spec: lab.yaml\n", "lab.yaml")
    with pytest.raises(InputError, match=r"lab\.yaml:1: spec: unknown key"):
        load_cluster("lab.yaml", tmp_path)


# --- fuzz ------------------------------------------------------------------------------------------------------------

odd_values = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.integers(), st.floats(),
    st.sampled_from(["", "on", "opt-1.3b", "colocated", "1e9", "a/b.yaml", "..", "/", "~", "\0", "x" * 300, "é\ud800"]),
    st.text(max_size=5), st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["spec", "name", "value", "source", "tokens", "x", ""]),
                    st.integers(0, 3) | st.text(max_size=3), max_size=3),
)  # fmt: skip


def paths(data: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inner = [paths(value, (*prefix, key)) for key, value in data.items()] if isinstance(data, dict) else []
    return [prefix, *(path for found in inner for path in found)]


def written_out(folder: Path) -> dict[str, Any]:
    """The scenario with everything that it names in it, so that fuzz reaches every field."""
    return load_scenario(write(folder, VALID)).model_dump()


SHORT = {
    "cluster": {"spec": "a100-80g-sxm", "nodes": 2, "node": {"gpus_per_node": 8}, "network": {"nics_per_node": 8}},
    "models": {"actor": {"spec": "opt-1.3b", "zero_stage": 2}, "critic": "opt-350m", "reward": {"zero_stage": 0}},
    "workload": {"prompts": 8, "prompt_tokens": 8, "response_tokens": {"distribution": "uniform", "max_tokens": 9}},
    "strategy": "colocated",
    "compare": {"baseline": "a", "rows": {"a": {}}},
}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_of_the_data(tmp_path, data):
    scenario = copy.deepcopy(data.draw(st.sampled_from([SHORT, written_out(tmp_path)])))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from([path for path in paths(scenario) if path]))
        target = scenario
        for key in parents:
            target = target[key]
        change = data.draw(st.sampled_from(["set", "delete", "rename"]))
        value = target.pop(last)
        if change != "delete":
            key = last if change == "set" else data.draw(st.sampled_from([last[:-1], f"{last}_gb", ""]))
            target[key] = data.draw(odd_values) if change == "set" else value
    try:
        assert isinstance(scenario_from_dict(scenario, tmp_path), Scenario)
    except InputError as error:
        assert str(error) and "Input should" not in str(error)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_of_the_text(tmp_path, data):
    content = VALID.encode()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = min(len(content), start + data.draw(st.integers(0, 12)))
        junk = st.binary(max_size=6) | st.sampled_from(
            [b": ", b"\n", b"\n  ", b"- ", b"[", b"}", b"&a ", b"*a", b"!!", b"|", b">\n", b"? ", b"%", b"---\n", b"#",
             b"'", b'"', b"\t", b"<<: ", b"1e999", b"\xef\xbb\xbf", b"\xc2\x85", b"\\u"])  # fmt: skip
        content = content[:start] + data.draw(junk) + content[end:]
    try:
        assert isinstance(load_scenario(write(tmp_path, content)), Scenario)
    except InputError as error:
        assert "case.yaml" in str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["workload.prompts", "models.actor", "cluster.gpu.memory_bytes", "strategy.x", "", "a.b.c"]),
    value=st.text("[]{},:'\"#&*!|>-?%@`=\\ ab1.\n\t\0é\ud800", max_size=10),
)
def test_fuzz_of_overrides(tmp_path, key, value):
    path = write(tmp_path, VALID)
    try:
        for point in expand_sweep([f"{key}={value}"]):
            assert isinstance(load_scenario(path, point), Scenario)
    except InputError as error:
        assert str(error)
