"""Every example in the README and the docs runs, and prints what the page shows.

`python tests/test_docs.py` writes the present output into the pages.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONSOLE = re.compile(r"```console\n\$ (?P<command>[^\n]+)\n(?P<output>.*?)```", re.DOTALL)
YAML = re.compile(r"```yaml\n# (?P<name>[\w.-]+\.yaml)[^\n]*\n(?P<text>.*?)```", re.DOTALL)


def examples() -> list[tuple[Path, str, str]]:
    return [(page, m["command"], m["output"]) for page in PAGES for m in CONSOLE.finditer(page.read_text())]


def run(command: str, folder: Path) -> str:
    """What a command of a page prints; files that the pages show lie in the working folder."""
    words = shlex.split(command)
    assert words[0] == "rlhfsim", f"only rlhfsim commands are run: {command}"
    environment = {**os.environ, "COLUMNS": "118", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "rlhfsim.cli", *words[1:]],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    return re.sub(r"[ \t]+$", "", done.stdout, flags=re.MULTILINE)


def prepare(folder: Path) -> Path:
    """A folder with `experiments/` and the scenario files that the pages print."""
    (folder / "experiments").symlink_to(ROOT / "experiments")
    for page in PAGES:
        for match in YAML.finditer(page.read_text()):
            (folder / match["name"]).write_text(match["text"])
    return folder


@pytest.mark.parametrize(("page", "command", "output"), examples(), ids=[e[1][:60] for e in examples()])
def test_example_prints_what_the_page_shows(page: Path, command: str, output: str, tmp_path: Path) -> None:
    assert run(command, prepare(tmp_path)) == output, f"{page.name} is out of date: run python {Path(__file__).name}"


def test_scenarios_of_the_pages_are_valid(tmp_path: Path) -> None:
    from rlhfsim.spec.loader import load_scenario

    prepare(tmp_path)
    files = sorted(tmp_path.glob("*.yaml"))
    assert files, "the README shows a scenario file"
    for file in files:
        load_scenario(file)


INLINE = re.compile(r"`(rlhfsim (?:fits|simulate|compare|show) [^`]+)`")


@pytest.mark.parametrize(
    "command", sorted({c for page in PAGES for c in INLINE.findall(page.read_text()) if "..." not in c})
)
def test_commands_in_the_text_run(command: str, tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "rlhfsim.cli", *shlex.split(command)[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pages_link_to_what_exists() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def update() -> None:
    """Write the present output of every example into its page."""
    import tempfile

    for page in PAGES:

        def printed(match: re.Match[str]) -> str:
            with tempfile.TemporaryDirectory() as folder:
                return f"```console\n$ {match['command']}\n{run(match['command'], prepare(Path(folder)))}```"

        page.write_text(CONSOLE.sub(printed, page.read_text()))


if __name__ == "__main__":
    update()
