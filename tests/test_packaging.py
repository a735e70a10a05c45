"""The wheel: what is in it, and that it gives the same answers as a checkout, from anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SCENARIO = """
cluster: {spec: a100-80g-sxm, nodes: 1}
models: {actor: {spec: small-8x512, zero_stage: 3}}
workload:
  prompts: 32
  prompt_tokens: 64
  response_tokens: {distribution: empirical, file: azure_code_2023.csv, column: response_tokens, max_tokens: 256}
"""


def python(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """This Python, without a PYTHONPATH unless one is given. Raises AssertionError where it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | options.pop("environment", {})
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
        env=environment,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def needed() -> list[str]:
    """Files of the checkout that a user's copy must have."""
    kept = ("rlhfsim", "hw_specs", "traces/kernels", "traces/lengths")  # traces/real is for the tests
    return sorted(
        str(path.relative_to(ROOT))
        for folder in kept
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (built,) = out.glob("rlhfsim-*.whl")
    return built


def test_everything_needed_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    inside = {name.removeprefix("rlhfsim/_data/") if name.startswith("rlhfsim/_data/") else name for name in names}
    assert inside >= {name for name in needed() if name.endswith((".py", ".yaml", ".csv"))}
    assert {name.split("/")[0] for name in names} <= {"rlhfsim", "real", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    assert {Path(name).suffix for name in names if "dist-info" not in name} <= {".py", ".yaml", ".csv", ".md", ".typed"}


@pytest.fixture(scope="module")
def copies(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and an editable install, each in a folder of its own."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("installed", "editable")}
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    python(*pip, "--target", folders["installed"], wheel)
    python(*pip, "--no-build-isolation", "--target", folders["editable"], "--editable", ROOT)
    return folders


def rlhfsim(folder: Path, line: str, at: Path) -> subprocess.CompletedProcess[str]:
    """The installed command, with that copy of rlhfsim and no other."""
    start = (
        f"import site, sys; sys.path.insert(0, {str(folder)!r}); site.addsitedir({str(folder)!r}); import rlhfsim; "
        "print(rlhfsim.__file__, file=sys.stderr); from rlhfsim.cli import main; main()"
    )
    return python("-c", start, *line.split(), cwd=at)


def test_wheel_and_checkout_say_the_same(copies: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text(SCENARIO)
    for line in (
        "show gpus --json",
        "show scenario.yaml --json",
        "fits scenario.yaml --json",
        "simulate scenario.yaml --json",
    ):
        answers = {kind: rlhfsim(folder, line, tmp_path) for kind, folder in copies.items()}
        assert answers["installed"].stderr.startswith(str(copies["installed"]))
        assert answers["editable"].stderr.startswith(str(ROOT))
        assert answers["installed"].stdout == answers["editable"].stdout
    assert json.loads(answers["installed"].stdout)["step_seconds"] > 0


def test_the_command_is_installed(copies: dict[str, Path], tmp_path: Path) -> None:
    for folder in copies.values():
        done = python(
            folder / "bin" / "rlhfsim",
            "show",
            "gpus",
            cwd=tmp_path,
            environment={"PYTHONPATH": str(folder if folder.name.startswith("installed") else ROOT)},
        )
        assert "a100-80g-sxm" in done.stdout.splitlines()
