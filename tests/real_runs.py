"""Start `real_ranks.py` on some jobs and read what the ranks say."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run(folder: Path, ranks: int, jobs: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Results of all jobs, by processes that stay for all of them and end within so many seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    (folder / "ranks").write_text(str(ranks))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("real_ranks.py")), str(folder)]
    with (folder / "errors").open("w") as errors:
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        try:
            code = running.wait(timeout=seconds)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
    assert code == 0, (folder / "errors").read_text()[-5000:]
    return {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}
