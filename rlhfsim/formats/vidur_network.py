"""Times of all-reduce and send/receive, as microsoft/vidur profiles them.

https://github.com/microsoft/vidur, data/profiling/network/<cluster>/{all_reduce,send_recv}.csv (MIT): one row for each
rank, number of workers and `size` in bytes; `time_stats.<collective>.{min,max,mean,median,std}` in milliseconds;
`devices_per_node` says how many workers share a node. The medians of rank 0 are read (the ranks time the same calls).
"""

from __future__ import annotations

from pathlib import Path

from rlhfsim.errors import InputError
from rlhfsim.formats import Probe
from rlhfsim.measurements import Tables, joined, numbers, read_csv, table

TITLE = "collective table of vidur (all_reduce.csv, send_recv.csv)"
OPS = {"all_reduce": "all_reduce", "send_recv": "send"}


def recognises(probe: Probe) -> bool:
    return {"collective", "devices_per_node", "size"} <= probe.columns


def read(path: Path) -> Tables:
    rows = read_csv(path)
    unknown = rows[~rows.collective.isin(OPS)]
    if len(unknown):
        raise InputError(
            f"is {unknown.collective.iloc[0]!r}, but must be {' or '.join(OPS)}",
            field="collective",
            where=f"{path}:{unknown.line.iloc[0]}",
        )
    rows = numbers(rows, ["rank"], path, least=-1.0)
    rows = numbers(rows, ["num_workers", "size", "devices_per_node"], path)
    parts = []
    for collective, own in rows[rows["rank"] == 0].groupby("collective"):
        own = numbers(own, [f"time_stats.{collective}.median"], path)
        columns = {
            "collective": OPS[collective],
            "ranks": own.num_workers,
            "nodes": -(-own.num_workers // own.devices_per_node),
            "bytes": own["size"],
        }
        seconds = own[f"time_stats.{collective}.median"] * 1e-3
        parts.append(table("collectives", collective, columns, seconds, own.line))
    return Tables(path, "microsoft/vidur, network profile (MIT)", {"collectives": joined(parts)})
