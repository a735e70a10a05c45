"""Records of published runs: a YAML file with a list `anchors` (our own layout, for figures copied out of documents).

    tolerance: {Some paper: 0.1}    # optional: by title of the source; else 0.3
    anchors:
      - id: my-run
        kind: training              # or generation, prefill, prefill+decode, collective
        source: {title: ..., ref: ..., location: ...}
        gpu: H100                   # as the document writes it
        gpus: 8
        model: {name: GPT 7B, layers: 32, hidden: 4096, heads: 32, seq: 4096}   # or the name of a shipped one
        parallel: {tp: 2, pp: 1, dp: 4}
        global_batch: 128
        micro_batch: 1
        precision: bf16
        options: {overlap_grad_reduce: true}   # fields of a model in a scenario (`rlhfsim show fields`)
        attention_flops: causal     # or full: as a rate in TFLOP/s counts attention
        measured: {iteration_s: 3.2}

`{low: 1, high: 4}` in place of a value is what the document does not say; it is predicted at both ends.

Measured quantities, by kind: training `iteration_s`, `tflops_per_gpu`, `tokens_per_s_per_gpu`; generation
`output_tok_s_per_gpu`; prefill `first_token_ms`; prefill+decode `ttft_ms` or `prefill_ms`, `tpot_ms` or
`decode_ms_per_token`, `e2e_ms` or `total_ms`; collective `busbw_gb_s` (bus bandwidth as nccl-tests defines it),
`time_us`, `bytes`. Several of one run are checked one by one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhfsim.errors import InputError, nearest
from rlhfsim.formats import Probe
from rlhfsim.measurements import Record, Records, finite
from rlhfsim.spec.problems import place_of
from rlhfsim.spec.yaml_file import Where, read_yaml

TITLE = "records of runs (*.yaml with `anchors`)"
QUANTITIES = {
    "training": ("iteration_s", "tflops_per_gpu", "tokens_per_s_per_gpu", "mfu"),
    "generation": ("output_tok_s_per_gpu",),
    "prefill": ("first_token_ms",),
    "prefill+decode": (
        "ttft_ms", "prefill_ms", "tpot_ms", "decode_ms_per_token", "e2e_ms", "total_ms",
    ),
    "collective": ("busbw_gb_s", "algbw_gb_s", "time_us", "bytes", "approximate"),
}  # fmt: skip


def recognises(probe: Probe) -> bool:
    return "anchors" in probe.keys


def read(path: Path) -> Records:
    document = read_yaml(path)
    given = document.data["anchors"]
    if not isinstance(given, list) or not given:
        raise InputError("must be a list with at least one record", field="anchors", where=str(path))
    records = [_record(one, f"anchors.{i}", document.where, path) for i, one in enumerate(given)]
    tolerance = document.data.get("tolerance", {})
    if not isinstance(tolerance, dict) or not all(map(finite, tolerance.values())):
        raise InputError(
            "must be a mapping of positive numbers by title",
            field="tolerance",
            where=place_of(document.where, "tolerance"),
        )
    for title in tolerance:
        titles = {record.source for record in records}
        if title not in titles:
            message = f"has no record whose source has this title{nearest(title, titles)}"
            raise InputError(message, field=f"tolerance.{title}", where=place_of(document.where, "tolerance"))
    return Records(path, [replace(record, tolerance=tolerance.get(record.source)) for record in records])


def _record(given: Any, field: str, where: Where, path: Path) -> Record:
    if not isinstance(given, dict):
        raise InputError("must be a mapping", field=field, where=place_of(where, field))
    place = place_of(where, f"{field}.id") or str(path)
    for key in ("id", "kind", "gpu", "gpus", "measured"):
        if given.get(key) in (None, "", {}):
            raise InputError("is missing", field=f"{field}.{key}", where=place)
    kind, measured = given["kind"], given["measured"]
    if kind not in QUANTITIES:
        raise InputError(f"is {kind!r}{nearest(str(kind), QUANTITIES)}", field=f"{field}.kind", where=place)
    if not isinstance(measured, dict):
        raise InputError("must be a mapping of quantities", field=f"{field}.measured", where=place)
    for name, value in measured.items():
        at = place_of(where, f"{field}.measured.{name}")
        if name not in QUANTITIES[kind]:
            message = f"is no quantity of {kind}{nearest(name, QUANTITIES[kind])}"
            raise InputError(message, field=f"{field}.measured.{name}", where=at)
        if name != "approximate" and not finite(value):
            raise InputError(f"is {value!r}, but must be a positive number", field=f"{field}.measured.{name}", where=at)
    if not finite(given["gpus"]) or given["gpus"] != int(given["gpus"]):
        raise InputError(f"is {given['gpus']!r}, but must be a whole number", field=f"{field}.gpus", where=place)
    source = given.get("source") or {}
    title = source.get("title", "") if isinstance(source, dict) else str(source)
    return Record(str(given["id"]), kind, str(given["gpu"]), given, measured, place, title)
