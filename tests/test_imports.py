"""Who may import whom. Read off the source, so that no import runs; lazy imports inside functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("matplotlib", "networkx", "simpy", "pandas", "torch")


def imports(file: Path, *, lazy: bool = True, type_only: bool = True) -> set[str]:
    """Every module that the file names in an import, as an absolute name; `from a import b` gives a and a.b."""
    package = list(file.relative_to(ROOT).with_suffix("").parts[:-1])
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not lazy and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if not type_only and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found


def modules(under: str) -> list[Path]:
    return sorted((ROOT / under).rglob("*.py"))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_imports_are_read_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "p" / "q").mkdir(parents=True)
    file = tmp_path / "p" / "q" / "m.py"
    file.write_text(
        "import a.b\nfrom . import c\nfrom ..d import e\nif TYPE_CHECKING:\n    import t\ndef f():\n    import g\n"
    )
    everything = {"a.b", "p.q", "p.q.c", "p.d", "p.d.e", "t", "g"}
    assert imports(file) == everything
    assert imports(file, lazy=False, type_only=False) == everything - {"t", "g"}


@pytest.mark.parametrize("file", modules("rlhfsim/strategies"), ids=lambda f: f.name)
def test_a_strategy_knows_the_graph_and_the_algorithm(file: Path) -> None:
    ours = {name for name in imports(file) if within(name, "rlhfsim")}
    assert all(within(name, "rlhfsim.graph", "rlhfsim.algorithms", "rlhfsim.strategies") for name in ours)
    if file.name != "__init__.py":
        assert "rlhfsim.graph" in ours  # the file is found at all


@pytest.mark.parametrize("file", modules("rlhfsim/algorithms"), ids=lambda f: f.name)
def test_an_algorithm_knows_at_most_the_graph(file: Path) -> None:
    assert all(within(n, "rlhfsim.graph", "rlhfsim.algorithms") for n in imports(file) if within(n, "rlhfsim"))


def test_the_simulator_needs_no_framework_and_no_real_runs() -> None:
    files = modules("rlhfsim")
    assert len(files) > 30
    wrong = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in imports(file)
        if within(name, "torch", "deepspeed", "transformers", "real")
    }
    assert not wrong


@pytest.mark.parametrize("name", ["metrics", "trace", "plot", "timeline"])
def test_readers_take_a_timeline(name: str) -> None:
    allowed = (
        "rlhfsim.timeline",
        "rlhfsim.firing",
        "rlhfsim.metrics",
        "rlhfsim.errors",
        "rlhfsim.format",
        "rlhfsim.output",
    )
    ours = {n for n in imports(ROOT / "rlhfsim" / f"{name}.py") if within(n, "rlhfsim") and n != "rlhfsim"}
    assert all(within(n, *allowed) for n in ours), ours


@pytest.mark.parametrize("name", ["graph", "schedule"])
def test_the_graph_knows_no_seconds_and_no_bytes(name: str) -> None:
    ours = {n for n in imports(ROOT / "rlhfsim" / f"{name}.py") if within(n, "rlhfsim") and n != "rlhfsim"}
    assert all(within(n, "rlhfsim.graph", "rlhfsim.firing") for n in ours), ours


def test_real_runs_know_nothing_of_the_simulator() -> None:
    wrong = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in modules("real")
        for name in imports(file)
        if within(name, "rlhfsim.sim", "rlhfsim.costs", "rlhfsim.plan", "simpy")
    }
    assert not wrong


@pytest.mark.skipif(not (ROOT / "rlhfsim" / "cli.py").exists(), reason="there is no command line yet")
def test_the_command_line_starts_light() -> None:
    """`rlhfsim --help` must not wait for libraries that only some commands need."""
    code = f"import rlhfsim.cli, sys; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
