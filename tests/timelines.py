"""Timelines for tests: by hand, and at random by a scheduler of a few lines that knows why each span starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from rlhfsim.firing import Firing
from rlhfsim.timeline import MemorySample, Span, Timeline, check

STAGES = ("gen", "ref.0", "ref.1", "reward", "update_actor")


def span(
    stage: str,
    ranks: range | tuple[int, ...],
    start: float,
    compute: float = 0.0,
    communication: float = 0.0,
    *,
    iteration: int = 0,
    chunk: int = 0,
    place: int = 0,
    data: float = 0.0,
    link: float = 0.0,
    after: Span | None = None,
    **more: Any,
) -> Span:
    """A span of one replica that ends when its parts have passed."""
    end = start + compute + communication + data + link
    return Span(
        Firing(iteration, stage, chunk, place),
        "train",
        "actor",
        tuple(ranks),
        start,
        end,
        (compute,),
        (communication,),
        (0.0,),
        data,
        link,
        released_by=after and after.firing,
        **more,
    )


def disaggregated() -> Timeline:
    """Two iterations of 10 s on 6 ranks of 3 nodes; rank 5 is idle. Generation on 0-1, scoring and training on 2-4.

    gen 4 s on rank 0, 3 s on rank 1 (not folded); ref 2 s on 2-3, reward 3 s on 4; update_actor 3 s on 2-4.
    """
    spans: list[Span] = []
    before = None
    for iteration in range(2):
        t, i = 10.0 * iteration, {"iteration": iteration}
        gen = span("gen", (0,), t, 3.0, 1.0, after=before, bound={"hbm": 2.0, "launch": 1.0}, **i)
        short = span("gen", (1,), t, 2.0, 1.0, place=1, after=before, **i)
        ref = span("ref.0", (2, 3), t + 4, 2.0, after=gen, **i)
        reward = span("reward", (4,), t + 4, 2.5, 0.5, after=gen, **i)
        train = span("update_actor", (2, 3, 4), t + 7, 2.0, 0.5, link=0.5, after=reward, bound={"flops": 2.0}, **i)
        spans += [gen, short, ref, reward, train]
        before = train
    memory = [
        MemorySample(0, 0.0, "generate", {"weights": 10.0, "kv_cache": 30.0}),
        MemorySample(0, 4.0, "idle", {"weights": 10.0}),
        MemorySample(2, 4.0, "score", {"weights": 20.0, "logits": 5.0}),
        MemorySample(2, 7.0, "train", {"weights": 20.0, "optimizer": 60.0}),
        MemorySample(2, 17.0, "train", {"weights": 20.0, "optimizer": 60.0}),
    ]
    info = {"strategy": "disaggregated", "cluster": "3 x test node", "ranks_per_node": 2}
    return check(Timeline(spans, ranks=6, iterations=2, memory=memory, info=info))


def colocated() -> Timeline:
    """Two iterations of 15 s, everything on ranks 0-5, one stage after the other."""
    spans: list[Span] = []
    t = 0.0
    for iteration in range(2):
        for stage, compute, communication in (
            ("gen", 4.0, 4.0),
            ("ref", 1.0, 0.0),
            ("reward", 1.5, 0.5),
            ("update_actor", 3.0, 1.0),
        ):
            spans.append(
                span(
                    stage, range(6), t, compute, communication, iteration=iteration, after=spans[-1] if spans else None
                )
            )
            t = spans[-1].end_seconds
    return check(Timeline(spans, ranks=6, iterations=2, info={"strategy": "colocated", "cluster": "3 x test node"}))


@st.composite
def timelines(draw: st.DrawFn, max_ranks: int = 6, max_spans: int = 14) -> Timeline:
    """Spans of whole seconds that start as soon as their ranks are free and an earlier firing has ended.

    Some take their ranks at once and wait for that firing inside the span, as real executors do.
    """
    ranks = draw(st.integers(1, max_ranks))
    free: list[tuple[int, Span | None]] = [(0, None)] * ranks
    spans: list[Span] = []
    iteration = 0
    for number in range(draw(st.integers(1, max_spans))):
        iteration += draw(st.booleans()) if spans else 0
        chosen = sorted(draw(st.sets(st.integers(0, ranks - 1), min_size=1)))
        ready = max((free[rank] for rank in chosen), key=lambda f: f[0])
        need = draw(st.sampled_from([None, *spans]))
        given_at = int(need.end_seconds) if need else 0
        inside = draw(st.booleans())
        start = ready[0] if inside else max(ready[0], given_at)
        data = max(0, given_at - start)
        releaser = need if given_at > ready[0] else ready[1]
        replicas = draw(st.sampled_from([n for n in (1, 2, 3) if len(chosen) % n == 0]))
        work = [(draw(st.integers(0, 4)), draw(st.integers(0, 4))) for _ in range(replicas)]
        longest, link = max(map(sum, work)), draw(st.integers(0, 2))
        firing = Firing(iteration, draw(st.sampled_from(STAGES)), number, 0)
        one = Span(
            firing,
            "train",
            "actor",
            tuple(chosen),
            float(start),
            float(start + data + longest + link),
            tuple(float(c) for c, _ in work),
            tuple(float(m) for _, m in work),
            tuple(float(longest - c - m) for c, m in work),
            float(data),
            float(link),
            released_by=releaser.firing if releaser else None,
        )
        for rank in chosen:
            free[rank] = (int(one.end_seconds), one)
        spans.append(one)
    return check(Timeline(spans, ranks, iteration + 1))


def scaled(timeline: Timeline, factor: float) -> Timeline:
    """Every duration times a factor."""

    def many(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(value * factor for value in values)

    spans = [
        replace(
            s,
            start_seconds=s.start_seconds * factor,
            end_seconds=s.end_seconds * factor,
            compute_seconds=many(s.compute_seconds),
            communication_seconds=many(s.communication_seconds),
            peer_seconds=many(s.peer_seconds),
            data_seconds=s.data_seconds * factor,
            link_seconds=s.link_seconds * factor,
        )
        for s in timeline.spans
    ]
    return check(replace(timeline, spans=spans))
