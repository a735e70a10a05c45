"""A run of vLLM, request by request: a folder with `meta.json` and `requests.jsonl`.

As the bench tool of casys-kaist/LLMServingSim writes it (https://github.com/casys-kaist/LLMServingSim, MIT).
requests.jsonl: `input_toks`, `output_toks`, and `queued_ts`, `scheduled_ts`, `first_token_ts`, `last_token_ts` on
vLLM's monotonic clock (`arrival_time` is wall clock and is not read). meta.json: `model`, `vllm_version`,
`engine_kwargs`, `kv_cache` with the resolved number of blocks, `hardware.device_name`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhfsim.errors import InputError
from rlhfsim.formats import Probe
from rlhfsim.measurements import Served, finite, needs_pandas

TITLE = "served run of vLLM (folder with meta.json and requests.jsonl)"
TIMES = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
NAMES = ("arrival_seconds", "scheduled_seconds", "first_seconds", "last_seconds")

# Block 0 is a placeholder that no sequence is given (vllm/v1/core/block_pool.py, null_block).
NULL_BLOCKS = 1


def recognises(probe: Probe) -> bool:
    return {"meta.json", "requests.jsonl"} <= probe.names


def read(path: Path) -> Served:
    """A last line that was cut off is left out."""
    meta_path, requests_path = path / "meta.json", path / "requests.jsonl"
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"is damaged: {str(error)[:100]}", where=str(meta_path)) from None
    lines = requests_path.read_text(encoding="utf-8").split("\n")
    rows = [
        _request(line, f"{requests_path}:{n}")
        for n, line in enumerate(lines, start=1)
        if line.strip() and not (n == len(lines) and not line.rstrip().endswith("}"))
    ]
    if not rows:
        raise InputError("holds no request", where=str(requests_path))
    requests = needs_pandas().DataFrame(rows).sort_values("arrival_seconds", ignore_index=True)
    for name in reversed(NAMES):
        requests[name] -= requests["arrival_seconds"].iloc[0] if name != "arrival_seconds" else 0
    requests["arrival_seconds"] -= requests["arrival_seconds"].iloc[0]

    def setting(*names: str, default: Any = None) -> Any:
        value: Any = meta
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        value = default if value is None else value
        if value is None:
            raise InputError("is missing", field=".".join(names), where=str(meta_path))
        return value

    return Served(
        path,
        str(setting("model")),
        f"vLLM {setting('vllm_version', default='')}",
        str(setting("hardware", "device_name", default="")),
        requests,
        int(setting("engine_kwargs", "tensor_parallel_size", default=1)),
        int(setting("engine_kwargs", "max_num_seqs", default=256)),
        int(setting("engine_kwargs", "max_num_batched_tokens", default=2048)),
        int(setting("kv_cache", "block_size", default=16)),
        int(setting("kv_cache", "num_gpu_blocks")) - NULL_BLOCKS,
        bool(setting("kv_cache", "enable_prefix_caching", default=True)),
        bool(setting("resolved_config", "scheduler_config", "async_scheduling", default=False)),
    )


def _request(line: str, where: str) -> dict[str, float]:
    try:
        row = json.loads(line)
    except ValueError:
        raise InputError("is no JSON", where=where) from None
    found = {}
    for name, own in (
        ("input_toks", "input_tokens"),
        ("output_toks", "output_tokens"),
        *zip(TIMES, NAMES, strict=True),
    ):
        if not isinstance(row, dict) or not finite(row.get(name)):
            given = row.get(name) if isinstance(row, dict) else row
            raise InputError(f"is {given!r}, but must be a positive number", field=name, where=where)
        found[own] = float(row[name])
    times = [found[name] for name in NAMES]
    if times != sorted(times):
        raise InputError(f"{', '.join(TIMES)} are not in this order", where=where)
    return found
