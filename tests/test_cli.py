"""The command line as people and scripts use it: exit codes, one JSON object, messages instead of tracebacks."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlhfsim.cli import main

ROOT = Path(__file__).parents[1]
SMALL = """
cluster: {spec: a100-80g-sxm, nodes: 1, gpus_per_node: 8}
models:
  actor: {spec: small-8x512, zero_stage: 3, micro_batch_samples: 1}
  critic: {spec: small-8x512, zero_stage: 3, micro_batch_samples: 1}
workload:
  prompts: 32
  prompt_tokens: 64
  response_tokens: {distribution: lognormal, mean_tokens: 60, sigma: 0.8, max_tokens: 256}
algorithm: {name: ppo, minibatches: 2}
simulation: {iterations: 1}
"""
STREAMED = "strategy.name=disaggregated generation.engine=engine"
TOO_LARGE = "models.actor.spec=llama-2-70b"
STEPS = {"gen", "old_log_prob", "ref", "reward", "values", "update_critic", "update_actor"}


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """All of stdout as one JSON value."""
        return json.loads(self.out)


Run = Callable[..., Answer]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`rlhfsim` with these words, in this process, in a folder with the scenario `small.yaml`."""
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)

    def call(line: str, *words: str) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([*shlex.split(line), *words])
            sys.exit(0)  # a verb may simply return
        captured = capsys.readouterr()
        return Answer(left.value.code or 0, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `small.yaml` for processes of their own."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "small.yaml").write_text(SMALL)
    return folder


def process(folder: Path, code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
        **options,
    )


# -- exit codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "-h",
        "--version",
        "fits --help",
        "fits small.yaml",
        "simulate small.yaml",
        "compare small.yaml --as-given",
        "sweep small.yaml --jobs 1",
        "show gpus",
        "show small.yaml",
    ],
)
def test_fine_is_0(run: Run, line: str) -> None:
    code, out, _ = run(line)
    assert code == 0
    assert out or line.startswith("sweep")


@pytest.mark.parametrize("verb", ["fits", "simulate", "compare --as-given", "sweep --jobs 1"])
def test_not_fitting_is_3(run: Run, verb: str) -> None:
    code, _, err = run(f"{verb} small.yaml {TOO_LARGE}")
    assert code == 3
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "line, hint",
    [
        ("shw", "'show'"),
        ("simulate small.yaml --jsn", "--json"),
        ("simulate", "SCENARIO"),
        ("simulate smal.yaml", "smal.yaml"),
        ("fits small.yaml cluster.nods=2", "nodes"),
        ("fits small.yaml cluster.nodes=two", "cluster.nodes"),
        ("fits small.yaml cluster.nodes", "cluster.nodes"),
        ("simulate small.yaml strategy.name=colocatd", "'colocated'"),
        ("simulate small.yaml strategy.cals=2", "'calls'"),
        ("simulate small.yaml strategy.calls=foo", "strategy.calls: is 'foo', but must be a whole number"),
        ("simulate small.yaml strategy.calls=true", "strategy.calls: is true, but must be a whole number"),
        ("simulate small.yaml strategy.calls=0", "strategy.calls: is 0, but must be at least 1"),
        ("simulate small.yaml strategy.calls=33", "strategy.calls: is 33, but there are only 32 samples"),
        (f"simulate small.yaml {STREAMED} strategy.batches=33", "strategy.batches: is 33, but there are only 32"),
        (f"simulate small.yaml {STREAMED} 'strategy.split={{actor: x}}'", "strategy.split.actor: is 'x'"),
        (f"simulate small.yaml {STREAMED} strategy.barrier=1", "strategy.barrier: is 1, but must be true or false"),
        ("sweep small.yaml cluster.nodes=1,foo", "cluster.nodes: is 'foo', but must be a whole number"),
        ("sweep small.yaml generation.engine=hybrid,hybird", "did you mean 'hybrid'"),
        ("sweep small.yaml models.actor.zero_stage=3,4", "models.actor.zero_stage: is 4, but must be at most 3"),
        ("sweep small.yaml strategy.calls=1,foo", "strategy.calls: is 'foo'"),
        ("sweep small.yaml --strategies cluster.nodes=1,foo", "cluster.nodes: is 'foo'"),
        ("compare small.yaml --baseline 'colocated, hybird'", "'colocated, hybrid'"),
        ("compare small.yaml cluster.gpus_per_node=1 --baseline 'disaggregated, engine'", "too few"),
        ("sweep small.yaml --x gpus", "--plot"),
        ("sweep small.yaml --jobs 0", "--jobs"),
        ("show gpu", "'gpus'"),
        ("show smal.yaml", "smal.yaml"),
        ("show gpus cluster.nodes=1", "cluster.nodes=1"),
        ("trace", "TIMELINES"),
        ("trace none.jsonl", "none.jsonl"),
        ("plot none.jsonl", "none.jsonl"),
    ],
)
def test_bad_input_is_2_and_says_what_is_meant(run: Run, line: str, hint: str) -> None:
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert hint in err
    assert "Traceback" not in err


def test_anything_else_is_1_with_a_traceback(outside: Path) -> None:
    """A defect of the program is not the user's: it must neither look like bad input nor be hidden."""
    done = process(
        outside,
        "import rlhfsim.simulate, rlhfsim.cli\n"
        "rlhfsim.simulate.prepare = lambda scenario: {}['defect']\n"
        "rlhfsim.cli.main(['simulate', 'small.yaml'])",
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "defect" in done.stderr


def test_interrupted_is_130_without_a_traceback(outside: Path) -> None:
    done = process(
        outside,
        "import os, signal, time\nimport rlhfsim.simulate, rlhfsim.cli\n"
        "def long(setup):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(30)\n"
        "rlhfsim.simulate.simulate = long\n"
        "rlhfsim.cli.main(['simulate', 'small.yaml'])",
    )
    assert done.returncode == 130
    assert done.stdout == "" and "interrupted" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("line", ["show fields", "fits small.yaml", "fits small.yaml --json", "simulate small.yaml"])
def test_a_closed_pipe_is_no_traceback(outside: Path, line: str) -> None:
    """`rlhfsim ... | head -1`, with a reader that has gone before anything is written."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{shlex.quote(sys.executable)} -m rlhfsim.cli {line} | true"
    done = subprocess.run(
        command, shell=True, cwd=outside, env=environment, text=True, capture_output=True, timeout=60, check=False
    )
    assert done.stderr == ""


# -- JSON ---------------------------------------------------------------------------------------------------------


def test_fits_as_json(run: Run) -> None:
    found = run("fits small.yaml --json").json
    assert {
        "fits",
        "peak_memory_bytes",
        "capacity_bytes",
        "by_component",
        "by_phase",
        "limiting",
        "largest_micro_batch",
    } <= set(found)
    assert found["fits"] is True
    assert sum(found["by_component"].values()) == pytest.approx(found["peak_memory_bytes"], rel=1e-12)
    for phase in found["by_phase"].values():
        assert sum(phase["by_component"].values()) == pytest.approx(phase["bytes"], rel=1e-12)
    assert found["peak_memory_bytes"] == max(phase["bytes"] for phase in found["by_phase"].values())
    assert found["by_phase"][found["limiting"]["phase"]]["bytes"] == found["peak_memory_bytes"]
    assert found["by_component"][found["limiting"]["component"]] == max(found["by_component"].values())
    assert found["headroom_bytes"] == found["capacity_bytes"] - found["peak_memory_bytes"] > 0
    assert found["p99_peak_memory_bytes"] <= found["peak_memory_bytes"]


def test_largest_micro_batch_fits_and_the_next_does_not(run: Run) -> None:
    """Pasted back as an override, for a scenario in which memory and not the samples is the limit."""
    crowded = (
        "fits small.yaml --json workload.prompts=4096 workload.prompt_tokens=2048 algorithm.minibatches=1 "
        "generation.batch_samples=64 models.actor.flash_attention=false models.critic.flash_attention=false"
    )
    found = run(crowded).json["largest_micro_batch"]
    key = "models.actor.micro_batch_samples"
    assert 1 < found[key] < 4096 / 8
    others = [f"{name}=1" for name in found if name != key]
    assert run(crowded, *others, f"{key}={found[key]}").code == 0
    assert run(crowded, *others, f"{key}={found[key] + 1}").code == 3


def test_printed_micro_batches_can_be_pasted(run: Run) -> None:
    printed = run("fits small.yaml").out.partition("Largest micro-batches that fit: ")[2].split("Unverified")[0].split()
    found = run("fits small.yaml --json").json["largest_micro_batch"]
    assert printed == [f"{key}={size}" for key, size in found.items()]
    assert run("fits small.yaml", *printed).code == 0


def test_the_reason_keeps_names_as_they_are(run: Run) -> None:
    """`gen` is a stage's name: no sentence may begin with `Gen`."""
    reason = run(f"fits small.yaml --json {TOO_LARGE}").json["reason"]
    assert f"Reason: {reason}." in " ".join(run(f"fits small.yaml {TOO_LARGE}").out.split())


UNITS = {
    "cluster.network.nic_bytes_per_second": (25, "GB/s"),
    "cluster.gpu.nvlink_bytes_per_second": (300, "GB/s"),
    "cluster.gpu.pcie_bytes_per_second": (32, "GB/s"),
    "cluster.gpu.flops_per_second.bf16": (312, "TFLOP/s"),
}


@pytest.mark.parametrize("verb", ["fits", "simulate", "compare --as-given"])
def test_numbers_in_another_unit_are_asked_about(run: Run, verb: str) -> None:
    overrides = [f"{field}={value}" for field, (value, _) in UNITS.items()]
    code, _, err = run(f"{verb} small.yaml", *overrides)
    assert code == 0  # a question, not an error
    notes = [line for line in err.splitlines() if line.endswith("?")]
    assert len(notes) == len(UNITS)
    for field, (value, unit) in UNITS.items():
        assert any(n.startswith(f"note: {field} is {value}") and f"in {unit} instead of" in n for n in notes), field
    assert "note: cluster.gpu.memory_bytes is 80" in run("fits small.yaml cluster.gpu.memory_bytes=80").err
    assert run("fits small.yaml cluster.network.nic_bytes_per_second=1e8").err == ""


def test_simulate_as_json(run: Run) -> None:
    found = run("simulate small.yaml --json").json
    assert {
        "step_seconds",
        "stage_seconds",
        "samples_per_second",
        "tokens_per_second",
        "peak_memory_bytes",
        "fits",
    } <= set(found)
    assert set(found["stage_seconds"]) == STEPS
    assert sum(found["stage_seconds"].values()) == pytest.approx(found["step_seconds"], rel=1e-9)  # one after the other
    assert found["samples_per_second"] == pytest.approx(32 / found["step_seconds"])
    mean_tokens = found["tokens_per_second"] / found["samples_per_second"]
    assert 64 < mean_tokens < 64 + 256
    assert found["peak_memory_bytes"] == run("fits small.yaml --json").json["peak_memory_bytes"]


def test_simulate_that_does_not_fit_as_json(run: Run) -> None:
    code, out, _ = run(f"simulate small.yaml --json {TOO_LARGE}")
    found = json.loads(out)
    assert (code, found["fits"], found["step_seconds"], found["stage_seconds"]) == (3, False, None, {})
    assert found["peak_memory_bytes"] > found["capacity_bytes"]
    assert "try " in found["reason"]


@pytest.fixture(scope="module")
def compared(outside: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`compare --json`: tuned, and as given."""
    found = [
        process(outside, f"from rlhfsim.cli import main\nmain(['compare', 'small.yaml', '--json', *{more}])")
        for more in ([], ["--as-given"])
    ]
    assert [done.stderr for done in found] == ["", ""]
    tuned, given = (json.loads(done.stdout) for done in found)
    return tuned, given


def test_compare_as_json(compared: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for found in compared:
        assert found["baseline"] == "colocated, hybrid"
        rows = {row["strategy"]: row for row in found["rows"]}
        assert len(rows) == len(found["rows"]) == 6
        base = rows[found["baseline"]]
        assert base["speedup"] == 1.0
        for row in rows.values():
            assert {"strategy", "step_seconds", "speedup", "bound_by", "fits"} <= set(row)
            assert row["fits"] and row["bound_by"]
            assert row["speedup"] == pytest.approx(base["step_seconds"] / row["step_seconds"], rel=1e-12)
        assert rows[found["winner"]]["step_seconds"] == min(row["step_seconds"] for row in rows.values())


def test_tuning_changes_settings_and_never_loses(compared: tuple[dict[str, Any], dict[str, Any]]) -> None:
    tuned, given = compared
    assert (tuned["tuned"], given["tuned"]) == (True, False)
    for best, row in zip(tuned["rows"], given["rows"], strict=True):
        assert row["used"]["models.actor.micro_batch_samples"] == 1
        assert best["used"]["models.actor.micro_batch_samples"] > 1
        assert best["step_seconds"] < row["step_seconds"]


def test_simulate_repeats_a_row_of_compare(run: Run, compared: tuple[dict[str, Any], dict[str, Any]]) -> None:
    row = next(r for r in compared[1]["rows"] if r["strategy"] == "colocated, engine")
    found = run("simulate small.yaml --json generation.engine=engine").json
    assert found["step_seconds"] == row["step_seconds"]
    assert found["stage_seconds"] == row["stage_seconds"]


ROWS = "compare: {baseline: small, rows: {small: {}, large: {models.actor.spec: llama-2-70b}}}"


def test_compare_is_3_only_if_no_row_fits(run: Run) -> None:
    Path("rows.yaml").write_text(SMALL + ROWS)
    answer = run("compare rows.yaml --as-given --json")
    assert answer.code == 0
    small, large = answer.json["rows"]
    assert (small["fits"], large["fits"], large["speedup"], large["step_seconds"]) == (True, False, None, None)
    assert "try " in large["reason"]
    answer = run("compare rows.yaml --as-given --json --baseline large")
    assert (answer.code, answer.json["winner"]) == (0, "small")
    assert [row["speedup"] for row in answer.json["rows"]] == [None, None]
    answer = run(f"compare rows.yaml --as-given --json {TOO_LARGE}")
    assert (answer.code, answer.json["winner"]) == (3, None)


def test_a_cluster_too_small_for_one_placement_still_compares_the_others(run: Run) -> None:
    answer = run("compare small.yaml --as-given --json cluster.gpus_per_node=4")
    assert answer.code == 0
    impossible = [row for row in answer.json["rows"] if not row["fits"]]
    assert [row["strategy"] for row in impossible] == ["disaggregated, engine"]
    assert "6 are needed" in impossible[0]["reason"]


# -- files --------------------------------------------------------------------------------------------------------


def no_work(*_: Any, **__: Any) -> None:
    raise AssertionError("work was done before the output was looked at")


@pytest.mark.parametrize(
    "line",
    [
        "simulate small.yaml --timeline missing/t.jsonl",
        "simulate small.yaml --trace missing/t.json",
        "simulate small.yaml --plot missing/t.png",
        "simulate small.yaml --plot t.pdf",
        "simulate small.yaml --timeline .",
        "simulate small.yaml --trace small.yaml/t.json",
        "compare small.yaml --out small.yaml",
        "compare small.yaml --out small.yaml/out",
        "trace t.jsonl --out missing/t.json",
        "plot t.jsonl --out missing/t.png",
        "plot t.jsonl --out t.gif",
        "sweep small.yaml --out missing/t.csv",
        "sweep small.yaml --out t.xlsx",
        "sweep small.yaml --plot missing/t.png",
        "sweep small.yaml --plot t.pdf",
    ],
)
def test_unusable_outputs_are_refused_before_any_work(run: Run, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for work in ("simulate.prepare", "compare.compare", "timeline.read", "sweep._simulated"):
        monkeypatch.setattr(f"rlhfsim.{work}", no_work)
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert err.startswith("rlhfsim: ")
    assert line.split()[-1] in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(run: Run) -> None:
    Path("closed").mkdir(mode=0o500)
    assert run("simulate small.yaml --timeline closed/t.jsonl").code == 2
    assert run("compare small.yaml --out closed").code == 2


def test_files_of_one_simulation(run: Run) -> None:
    answer = run("simulate small.yaml --json --timeline t.jsonl --plot t.svg --trace t.json")
    assert answer.code == 0
    assert answer.json["fits"]
    events = json.loads(Path("t.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {"gen", "update_actor"} <= {name.split("[")[0].split()[0] for name in names}
    assert "</svg>" in Path("t.svg").read_text()
    assert run("trace t.jsonl --out again.json").code == 0
    assert len(json.loads(Path("again.json").read_text())["traceEvents"]) == len(events)


@pytest.mark.parametrize("option, name", [("timeline", "t.jsonl"), ("trace", "t.json"), ("plot", "t.svg")])
def test_an_earlier_file_survives_a_full_disk(
    run: Run, option: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the content is written, then there is no space left."""
    original = io.open

    def full(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        opened = original(file, mode, *more, **options)
        if name in str(file) and "w" in mode:
            opened.write("half" if "b" not in mode else b"half")
            opened.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened

    Path(name).write_text("earlier")
    with monkeypatch.context() as patch:
        patch.setattr("io.open", full)
        patch.setattr("builtins.open", full)
        code, out, err = run(f"simulate small.yaml --{option} {name}")
    assert (code, out, err) == (2, "", f"rlhfsim: {name}: cannot be written: No space left on device\n")
    assert Path(name).read_text() == "earlier"
    assert {path.name for path in Path().iterdir()} <= {"small.yaml", name}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize(
    "output", ["--timeline /dev/full", "--trace /dev/full", "--trace /proc/x", "--plot /proc/x.png"]
)
def test_places_that_take_no_file(run: Run, output: str) -> None:
    code, out, err = run(f"simulate small.yaml {output}")
    assert (code, out) == (2, "")
    assert err.startswith(f"rlhfsim: {output.split()[1]}: ")
    assert not Path("/dev/full").is_file()


def test_a_pipe_is_written_not_replaced(outside: Path) -> None:
    done = process(outside, "from rlhfsim.cli import main\nmain(['simulate', 'small.yaml', '--trace', '/dev/stderr'])")
    assert done.returncode == 0
    assert "traceEvents" in json.loads(done.stderr)


def test_timelines_side_by_side_even_with_equal_names(run: Run) -> None:
    for folder, engine in (("a", "hybrid"), ("b", "engine")):
        Path(folder).mkdir()
        assert run(f"simulate small.yaml generation.engine={engine} --timeline {folder}/t.jsonl").code == 0
    assert run("trace a/t.jsonl b/t.jsonl -o both.json").code == 0
    text = Path("both.json").read_text()
    assert "a/t.jsonl" in text and "b/t.jsonl" in text
    assert run("plot a/t.jsonl b/t.jsonl -o both.svg").code == 0
    assert Path("both.svg").stat().st_size > 10_000


@pytest.mark.parametrize("verb", ["trace", "plot"])
@pytest.mark.parametrize(
    "damage, line",
    [
        (lambda lines: [], 1),
        (lambda lines: ["{}", *lines[1:]], 1),
        (lambda lines: ["\x00", *lines], 1),
        (lambda lines: [lines[0].replace('"rlhfsim_timeline": 1', '"rlhfsim_timeline": 99'), *lines[1:]], 1),
        (lambda lines: lines[:-1], None),
        (lambda lines: [*lines[:-1], lines[-1][:20]], None),
        (lambda lines: [lines[0], lines[1].replace('"start_seconds"', '"start"'), *lines[2:]], 2),
    ],
    ids=["empty", "no header", "binary", "version", "cut", "cut inside a line", "field"],
)
def test_broken_timelines(run: Run, verb: str, damage: Callable[[list[str]], list[str]], line: int | None) -> None:
    assert run("simulate small.yaml --timeline good.jsonl").code == 0
    lines = Path("good.jsonl").read_text().splitlines()
    broken = damage(list(lines))
    assert broken != lines
    Path("broken.jsonl").write_text("\n".join(broken))
    code, out, err = run(f"{verb} good.jsonl broken.jsonl --out out.{'json' if verb == 'trace' else 'png'}")
    assert (code, out) == (2, "")
    assert re.search(rf"broken\.jsonl:{line or len(broken)}\b", err)
    assert "Traceback" not in err and not list(Path().glob("out.*"))


def test_figures_of_compare(run: Run) -> None:
    answer = run("compare small.yaml --as-given --out new/folder")
    assert answer.code == 0
    assert "speedup.png" in answer.err and "timeline.png" in answer.err
    assert all(Path(f"new/folder/{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("speedup", "timeline"))
    answer = run(f"compare small.yaml --as-given --out none {TOO_LARGE}")
    assert answer.code == 3
    assert not list(Path("none").iterdir()) and ".png" not in answer.err


# -- show ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what, some",
    [
        ("models", {"llama-7b", "qwen2.5-0.5b"}),
        ("gpus", {"a100-80g-sxm"}),
        ("nodes", {"a100-80g-sxm-x8"}),
        ("clusters", {"a100-80g-sxm"}),
        ("kernels", {"ampere"}),
        ("algorithms", {"ppo"}),
        ("strategies", {"colocated", "interleaved", "disaggregated"}),
    ],
)
def test_show_names(run: Run, what: str, some: set[str]) -> None:
    text, names = run(f"show {what}"), run(f"show {what} --json").json
    assert text.code == 0
    assert text.out.splitlines() == names == sorted(names)
    assert some <= set(names)


def test_show_alone_lists_what_can_be_shown(run: Run) -> None:
    names = run("show").out.split()
    assert names == run("show --json").json
    assert {"models", "fields"} < set(names)
    assert all(run(f"show {name}").code == 0 for name in names)


def test_show_explains_every_section(run: Run) -> None:
    from rlhfsim.spec.scenario import Scenario

    found = run("show fields --json").json
    explained = {name for names in found for name in names.split(", ")}
    assert {name for name in Scenario.model_fields if name not in ("name", "description")} <= explained
    assert all(found.values())
    assert all(name in run("show fields").out for name in found)


def test_show_says_where_numbers_come_from(run: Run) -> None:
    found = run("show small.yaml cluster.network.nic_bytes_per_second=1e9 --json").json
    entries = {entry["field"]: entry for entry in found}
    assert entries["cluster.network.nic_bytes_per_second"]["value"] == 1e9
    assert all({"field", "value", "source"} == set(entry) for entry in found)
    assert "nvidia-smi" in entries["cluster.gpu.memory_bytes"]["source"]
    assert "cluster.gpu.memory_bytes" in run("show small.yaml").out


# -- terminals ----------------------------------------------------------------------------------------------------


def on_terminal(folder: Path, columns: int, lines: list[str], **environment: str) -> str:
    """What these commands print on a terminal of so many columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    code = (
        "import shlex, sys\nfrom rlhfsim.cli import main\nfor line in sys.argv[1:]:\n    try:\n"
        "        main(shlex.split(line))\n    except SystemExit:\n        pass\n"
    )
    given = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", code, *lines],
        cwd=folder,
        stdout=follower,
        stderr=follower,
        env={**given, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment},
    ) as child:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            shown += part
        os.close(leader)
        assert child.wait(60) == 0
    return shown.decode()


def test_narrow_terminals_and_no_colour(outside: Path) -> None:
    lines = [
        "fits small.yaml",
        "simulate small.yaml",
        f"simulate small.yaml {TOO_LARGE}",
        "compare small.yaml --as-given",
        "show gpus",
        "show small.yaml",
    ]
    shown = on_terminal(outside, 60, lines, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*\b(3|4|9|10)[0-8]", shown)  # no colours; bold and italics may be there
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert max(map(len, re.split(r"[\r\n]+", plain))) <= 60
    assert "…" not in plain  # no number is cropped
    squeezed = re.sub(r"\s+", "", plain)
    for words in ("largestpart", "timing_s/update_critic", "Doesnotfit", "disaggregated,engine", "a100-80g-sxm"):
        assert words in squeezed


def test_labels_are_shown_as_they_are(run: Run) -> None:
    """Square brackets and colons are no markup."""
    Path("rows.yaml").write_text(SMALL + "compare: {baseline: 'a[/b] :x:', rows: {'a[/b] :x:': {}, '[red]c': {}}}")
    code, out, _ = run("compare rows.yaml --as-given")
    assert code == 0
    assert "a[/b] :x:" in out and "[red]c" in out


# -- start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, unneeded",
    [
        ("--help", ("numpy", "pydantic", "networkx", "rich")),
        ("show gpus", ("numpy", "pydantic", "networkx", "rich")),
        ("fits small.yaml", ("simpy", "matplotlib", "joblib", "scipy")),
        ("compare small.yaml --as-given", ("matplotlib", "joblib", "scipy")),
    ],
)
def test_only_what_is_needed_is_imported(outside: Path, line: str, unneeded: tuple[str, ...]) -> None:
    done = process(
        outside,
        f"import sys\nfrom rlhfsim.cli import main\ntry:\n    main({shlex.split(line)})\n"
        f"finally:\n    print([m for m in {unneeded} if m in sys.modules], file=sys.stderr)",
    )
    assert done.stderr == "[]\n"
