"""The console log of a verl run: `step:12 - timing_s/gen:74.891 - response_length/mean:308.049 - ...`.

Written by verl/utils/logger/aggregate_logger.py (LocalLogger, https://github.com/volcengine/verl); Ray puts
`(TaskRunner pid=...)` and colours before it. Timers are `timing_s/*` seconds of the controller
(verl/trainer/ppo/ray_trainer.py), and `timing/*` in the first versions. What was run is read from the launch command
(`main_ppo a.b=c ...`, also of a shell that echoes it) and from the configuration that the trainer prints at its start.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from rlhfsim.errors import InputError
from rlhfsim.formats import Probe
from rlhfsim.measurements import Log, needs_pandas

TITLE = "console log of verl (*.log)"
STEP = re.compile(r"(?:^|\s)step:(\d+) - (\S+:.*)")
PREFIX = re.compile(r"\x1b?\[[0-9;]*m|^\([\w ]+ pid=\d+[^)]*\)\s?")
TIMER = re.compile(r"^timing(_s)?/")
KEY = re.compile(r"'(\w+)': ?")
SECTIONS = ("actor_rollout_ref", "algorithm", "critic", "data", "reward_model", "trainer")
PARTS = ("actor", "model", "ref", "rollout")  # of the first section
OPTION = re.compile(r"^[+~]*([A-Za-z_]\w*(?:\.\w+)+)=(.*)$", re.DOTALL)


def recognises(probe: Probe) -> bool:
    return probe.path.suffix in (".log", ".txt") or " - timing_s/" in probe.head or "verl.trainer" in probe.head


def read(path: Path) -> Log:
    """A last step that lacks timers of the step before was cut off, and is left out."""
    lines = [_plain(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    rows = list(_steps(lines, path))
    if not rows:
        raise InputError("holds no line `step:N - timing_s/...`", where=str(path))
    truncated = 0
    if len(rows) > 1 and (set(rows[-2]) - set(rows[-1])) & {key for key in rows[-2] if TIMER.match(key)}:
        truncated = int(rows.pop()["line"])
    steps = needs_pandas().DataFrame(rows)
    return Log(path, "verl", steps, _printed(lines) | _launched(lines), truncated)


def _plain(line: str) -> str:
    return PREFIX.sub("", PREFIX.sub("", line))


def _steps(lines: list[str], path: Path) -> Iterator[dict[str, float]]:
    """Step, line and numbers of every training step; lines of validation alone have no timers."""
    for number, line in enumerate(lines, start=1):
        found = STEP.search(line)
        if not found or "timing" not in found[2]:
            continue
        values: dict[str, float] = {"step": int(found[1]), "line": number}
        fields = found[2].split(" - ")
        for at, field in enumerate(fields):
            key, _, value = field.rpartition(":")
            try:
                values[key.strip()] = float(value.split()[0].removeprefix("np.float64(").rstrip(")"))
            except (ValueError, IndexError):
                last = number == len(lines) and at == len(fields) - 1
                if not last and TIMER.match(key):
                    raise InputError(
                        f"is {value!r}, but must be seconds", field=key, where=f"{path}:{number}"
                    ) from None
        for key, value in values.items():
            if TIMER.match(key) and value < 0:
                raise InputError(f"is {value}, but seconds are not negative", field=key, where=f"{path}:{number}")
        yield values


def _launched(lines: list[str]) -> dict[str, str]:
    """Options of the launch command; of several the first."""
    for line in lines:
        if "main_ppo" in line or "n_gpus_per_node=" in line:
            try:
                words = shlex.split(line.replace('"', " "))
            except ValueError:
                words = line.split()
            found = {match[1]: match[2] for word in words if (match := OPTION.match(word))}
            if found:
                return found
    return {}


def _printed(lines: list[str]) -> dict[str, str]:
    """Options of the configuration as pprint shows it, where a nested key stands to the right of its parent.

    The beginning may be cut off: what then lacks its section belongs to the first one.
    """
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in lines:
        keys = list(KEY.finditer(line)) if line.startswith(("{'", " ")) else []
        for number, key in enumerate(keys):
            parents = [(column, name) for column, name in parents if column < key.start()]
            path = [*(name for _, name in parents), key[1]]
            parents.append((key.start(), key[1]))
            end = keys[number + 1].start() if number + 1 < len(keys) else len(line)
            value = line[key.end() : end].strip().rstrip(",}")
            path = [SECTIONS[0], *path] if path[0] in PARTS else path
            if path[0] in SECTIONS and value and not value.startswith("{"):
                found.setdefault(".".join(path), value.strip("'"))
    return found
