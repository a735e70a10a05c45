"""StageGraph: which stages an iteration has, what each needs, and what moves between them.

The graph is the only description of a strategy. It knows ranks and order; it knows no clock, no byte and no process.

Words. A *stage* runs in *places*: ranks that start and end together (a tensor-parallel engine, a ZeRO-3 domain).
The batch of an iteration is cut in *lanes* (data-parallel pieces, spread over the places) and in *chunks* (pieces in
time). A *firing* is one chunk of one stage on one place in one iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import wraps
from math import ceil
from typing import Any, Literal, NamedTuple

import networkx as nx

from .firing import Firing

Kind = Literal["generate", "score", "train", "sync", "swap", "store"]
Spread = Literal["each", "robin", "first"]
Enters = Literal["in_order", "when_ready", "interrupts"]
Unfinished = Literal["wait", "keep", "carry", "drop"]

ANY_PLACE = -1  # of a firing whose place is decided while it runs (spread "first")


@dataclass(frozen=True)
class Stage:
    """What runs where, how often.

    kind: generate | score | train | sync (weights move to another copy) | swap (a hand-over without work) | store
        (states go to storage).
    model: whose weights it uses (`actor`, `shadow_actor`, ...); target: whose weights a sync writes.
    ranks: every rank that the stage uses; size: ranks per place. serves: the lanes that it handles.
    chunks: pieces of the batch per epoch; epochs: passes over the batch.
    spread: each: every place fires every chunk, on its own lanes | robin: chunk k runs on place k mod places |
        first: the next chunk goes to whichever place is free.
    every: has work only in every so many iterations, in the last of them.
    enters: in_order: in its turn on each of its ranks | when_ready: as soon as its needs are met and its ranks are
        between two firings, whatever their turn | interrupts: the same, and a `generate` firing (in its own turn) on
        them stops at its next decode step, to go on afterwards. Nothing else starts on ranks that are waited for.
    loop: alternates chunk by chunk with this stage (edges that stream imply it).
    order: the line of the strategy that named it: on a rank, stages run in this order.

    Of a `generate` stage, whose one place holds all engines unless it waits for every response:
    unfinished: what becomes of responses that are not done when a firing has as many as its chunk needs. wait: there
        are none, a firing ends with its last response | keep: they stay in the engines, which go on | carry: their
        tokens are kept and a later firing computes the cache again and goes on | drop: they are thrown away.
    oversampling: responses begun for each one needed (carry, drop).
    recompute: the cache of running sequences is computed again when new weights enter (keep).
    max_age: a response that would be trained with weights more than so many versions newer than those that began it is
        thrown away (keep, carry); None: it is not.
    """

    name: str
    kind: Kind
    model: str
    ranks: tuple[int, ...]
    size: int
    serves: range
    chunks: int = 1
    epochs: int = 1
    spread: Spread = "each"
    every: int = 1
    enters: Enters = "in_order"
    loop: str | None = None
    target: str | None = None
    unfinished: Unfinished = "wait"
    oversampling: float = 1.0
    recompute: bool = True
    max_age: int | None = None
    order: int = 0

    @property
    def places(self) -> int:
        return len(self.ranks) // self.size

    @property
    def firings(self) -> int:
        """Firings per place and iteration (over all places for robin and first)."""
        return self.chunks * self.epochs

    @property
    def makers(self) -> int:
        """How many chunks of this stage may be at work at once: the place of chunk k fires k - makers before it."""
        return 1 if self.spread == "each" else self.places

    def works_in(self, iteration: int) -> bool:
        return (iteration + 1) % self.every == 0

    def ranks_of(self, place: int) -> tuple[int, ...]:
        return self.ranks[place * self.size : (place + 1) * self.size]

    def lanes_of(self, place: int) -> range:
        """The lanes that a firing on this place handles."""
        if self.spread != "each":
            return self.serves
        per_place = len(self.serves) // self.places
        return self.serves[place * per_place : (place + 1) * per_place]

    def places_for(self, lanes: range, chunk: int) -> Iterable[int]:
        """The places that hold any of `lanes` for this chunk."""
        if self.spread == "first":
            return (ANY_PLACE,)
        if self.spread == "robin":
            return (chunk % self.places,)
        per_place = len(self.serves) // self.places
        shared = overlap(lanes, self.serves)
        if not shared:
            return ()
        first, last = shared[0] - self.serves.start, shared[-1] - self.serves.start
        return range(first // per_place, last // per_place + 1)

    def home(self, lane: int, place: int) -> int:
        """The rank of `place` that keeps `lane`."""
        lanes = self.lanes_of(place)
        return self.ranks_of(place)[(lane - lanes.start) * self.size // len(lanes)]

    def all_places(self, chunk: int) -> Iterable[int]:
        """The places on which this chunk fires."""
        return self.places_for(self.serves, chunk)


class Message(NamedTuple):
    """One lane of a result on its way from a producer's rank to a consumer's."""

    producer: Firing
    consumer: str
    place: int
    lane: int
    source: int
    destination: int
    fields: tuple[str, ...]


def overlap(a: range, b: range) -> range:
    """The common part of two ranges of step 1."""
    return range(max(a.start, b.start), min(a.stop, b.stop))


def earlier(f: Firing, count: int, stage: Stage) -> Firing:
    """The firing `count` before `f` of the same stage (negative: after), across iterations."""
    iterations, chunk = divmod(f.chunk - count, stage.firings)
    place = chunk % stage.places if stage.spread == "robin" else f.place
    return Firing(f.iteration + iterations, f.stage, chunk, place)


def latest(firings: Iterable[Firing]) -> tuple[Firing, ...]:
    """Of each stage and place the last: a place fires in order, so the last implies the others."""
    last: dict[tuple[str, int], Firing] = {}
    for f in firings:
        key = f.stage, f.place
        last[key] = max(f, last.get(key, f))
    return tuple(last.values())


def _memo(method: Callable[..., Any]) -> Callable[..., Any]:
    """Remember results in the graph itself, so that they go when the graph changes or is dropped."""

    @wraps(method)
    def remembered(self: StageGraph, *key: Any) -> Any:
        cache = self._results.setdefault(method.__name__, {})
        if key not in cache:
            cache[key] = method(self, *key)
        return cache[key]

    return remembered


class StageGraph(nx.DiGraph):  # type: ignore[misc]  # networkx is not typed
    """Nodes are stages (attribute `stage`), edges are uses of results (`lag`, `stream`, `capacity`, `carries`)."""

    def __init__(self, incoming_graph_data: Any = None, *, lanes: int = 1, **attributes: Any) -> None:
        super().__init__(incoming_graph_data, **attributes)
        self.lanes = lanes
        self._results: dict[str, dict[Any, Any]] = {}

    # -- building -----------------------------------------------------------------------------------------

    def stage(
        self,
        name: str,
        kind: Kind,
        model: str,
        ranks: Iterable[int],
        *,
        size: int | None = None,
        serves: range | None = None,
        after: Iterable[str] = (),
        **more: Any,
    ) -> str:
        """Add a stage; `size` defaults to all its ranks, `serves` to all lanes. Returns the name.

        Raises ValueError where ranks are not whole places, lanes do not spread evenly over the places, or there is
        nothing to do.
        """
        ranks = tuple(ranks)
        if not ranks:
            raise ValueError(f"stage {name}: it has no ranks")
        if len(set(ranks)) != len(ranks):
            raise ValueError(f"stage {name}: a rank is named twice in {list(ranks)}")
        size = len(ranks) if size is None else size
        if size < 1 or len(ranks) % size:
            raise ValueError(f"stage {name}: {len(ranks)} ranks do not divide into places of {size}")
        serves = range(self.lanes) if serves is None else serves
        stage = Stage(name, kind, model, ranks, size, serves, order=len(self), **more)
        if stage.chunks < 1 or stage.epochs < 1:
            raise ValueError(f"stage {name}: {stage.chunks} chunks and {stage.epochs} epochs (at least 1 is needed)")
        if stage.spread == "each" and len(serves) % stage.places:
            raise ValueError(f"stage {name}: {len(serves)} lanes do not spread over {stage.places} places")
        if stage.enters != "in_order" and (stage.spread != "each" or stage.loop):
            raise ValueError(f"stage {name}: what enters {stage.enters} takes no turns")
        if stage.unfinished != "wait" and (stage.kind != "generate" or stage.places > 1):
            raise ValueError(
                f"stage {name}: only a generate stage of one place can {stage.unfinished} what is unfinished"
            )
        if not 1 <= stage.oversampling < float("inf"):
            raise ValueError(f"stage {name}: oversampling is {stage.oversampling} (at least 1 is needed)")
        self.add_node(name, stage=stage)
        for source in after:
            self.link(source, name)
        self._results.clear()
        return name

    def alter(self, name: str, **changes: Any) -> None:
        """Change fields of a stage, which another strategy may have built. Raises ValueError as `stage` does."""
        before = self.at(name)
        kept = {f.name: getattr(before, f.name) for f in fields(before) if f.name != "order"}
        self.stage(**(kept | changes))
        self.nodes[name]["stage"] = replace(self.at(name), order=before.order)

    def link(
        self,
        u: str,
        v: str,
        *,
        lag: int = 0,
        stream: bool = False,
        capacity: int | None = None,
        carries: tuple[str, ...] = (),
    ) -> None:
        """v needs u's output of `lag` iterations ago: all of it, or (stream) the chunks and lanes that it handles.

        capacity: how many chunks may lie on the edge, sent and not taken (back-pressure); None: any number.
        carries: the fields that move along the edge.
        Raises ValueError for unknown stages, capacities below 1, lags below 0, and messages to a stage whose place is
        not yet known when they leave.
        """
        for name in (u, v):
            if name not in self:
                raise ValueError(f"link {u} -> {v}: there is no stage {name!r}")
        if lag < 0 or (capacity is not None and capacity < 1):
            raise ValueError(f"link {u} -> {v}: lag {lag} (at least 0), capacity {capacity} (at least 1)")
        if carries and self.at(v).spread == "first":
            raise ValueError(f"link {u} -> {v}: nothing can be sent to a stage of spread 'first'")
        self.add_edge(u, v, lag=lag, stream=stream, capacity=capacity, carries=tuple(carries))
        self._results.clear()

    def at(self, name: str) -> Stage:
        stage: Stage = self.nodes[name]["stage"]
        return stage

    def stages(self) -> list[Stage]:
        return [stage for _, stage in self.nodes(data="stage")]

    def ranks(self, f: Firing) -> tuple[int, ...]:
        return self.at(f.stage).ranks_of(f.place)

    # -- age of the weights -------------------------------------------------------------------------------

    def refreshed_by(self, model: str) -> list[Stage]:
        """The stages that give a copy of a model new weights: syncs to it, or else its own training."""
        syncs = [s for s in self.stages() if s.kind == "sync" and s.target == model]
        return syncs or [s for s in self.stages() if s.kind == "train" and s.model == model]

    def staleness(self, name: str) -> int:
        """By how many versions the weights of a stage may lag when it starts: 0 is on-policy."""
        lags = [
            self.edges[s.name, name]["lag"]
            for s in self.refreshed_by(self.at(name).model)
            if (s.name, name) in self.edges
        ]
        return max(0, min(lags, default=1) - 1)

    def at_work(self, name: str) -> float:
        """Responses that a firing has at work at once, for each one that it needs."""
        stage = self.at(name)
        return (1 + self.staleness(name)) * stage.chunks if stage.unfinished == "keep" else stage.oversampling

    @property
    def off_policy(self) -> bool:
        """Whether training may see responses of older weights: another algorithm than the on-policy one."""
        return any(
            self.staleness(s.name) > 0 or (s.unfinished == "carry" and s.oversampling * len(s.serves) > self.lanes)
            for s in self.stages()
            if s.kind == "generate" and s.every == 1
        )

    # -- what must be done first --------------------------------------------------------------------------

    @staticmethod
    def _chunks_used(u: Stage, v: Stage, chunk: int) -> range:
        """The chunks of u that chunk `chunk` of v overlaps, whatever the two counts."""
        if u.epochs == v.epochs:
            mine, of, theirs = chunk, v.firings, u.firings
        else:  # every epoch of v reads the same batch again, as u's last epoch leaves it
            mine, of, theirs = chunk % v.chunks, v.chunks, u.chunks
        before = u.firings - theirs
        return range(before + mine * theirs // of, before - (-(mine + 1) * theirs // of))

    def _sources(self, f: Firing, u: str, edge: dict[str, Any], *, data: bool = False) -> Iterator[Firing]:
        """Firings of u that f waits for along an edge; with `data`, those whose output it uses."""
        producer, consumer, iteration = self.at(u), self.at(f.stage), f.iteration - edge["lag"]
        if edge["stream"] or data:
            lanes = consumer.lanes_of(f.place)
            for chunk in self._chunks_used(producer, consumer, f.chunk):
                for place in producer.places_for(lanes, chunk):
                    yield Firing(iteration, u, chunk, place)
        else:  # a barrier: places fire in order, so the last chunk of each place says that all are done
            last = producer.firings - 1
            for chunk in (last,) if producer.spread == "each" else range(producer.firings):
                for place in producer.all_places(chunk):
                    yield Firing(iteration, u, chunk, place)

    # Back-pressure, written as needs: a maker hands its result over to all consumers at once, then holds nothing.

    @_memo
    def _handed(self, g: Firing) -> tuple[Firing, ...]:
        """What is done when g's result lies on all its bounded edges."""
        producer, done = self.at(g.stage), [g]
        for _, v, edge in self.out_edges(g.stage, data=True):
            if edge["capacity"] is not None:
                done += self._taken(g.stage, v, earlier(g, edge["capacity"] * producer.makers, producer))
        return latest(done)

    @_memo
    def _taken(self, u: str, v: str, g: Firing) -> tuple[Firing, ...]:
        """What is done when v has come for g: v's firing before, what v receives earlier in the same firing, and
        what it needs of earlier iterations (it takes nothing while it waits for weights)."""
        producer, consumer = self.at(u), self.at(v)
        chunk = g.chunk * consumer.chunks // producer.chunks
        if g.iteration < -self._reach() or chunk >= consumer.chunks:  # later epochs take nothing
            return ()
        done: list[Firing] = []
        for place in consumer.places_for(producer.lanes_of(g.place), chunk):
            f = Firing(g.iteration, v, chunk, place)
            done += self._handed(earlier(f, consumer.makers, consumer))
            earlier_line = True
            for w, _, edge in self.in_edges(v, data=True):
                earlier_line = earlier_line and w != u
                if edge["lag"] and edge["capacity"] is None:
                    done += self._sources(f, w, edge)
                elif earlier_line and edge["capacity"] is not None:
                    for source in self._sources(f, w, edge):
                        done += self._handed(source)
        return latest(done)

    @_memo
    def _reach(self) -> int:
        """How many iterations back-pressure reaches: through every bounded edge its capacity and one firing."""
        steps: list[float] = [
            (edge["capacity"] + 1) * self.at(u).makers / self.at(u).firings + self.at(v).makers / self.at(v).chunks
            for u, v, edge in self.edges(data=True)
            if edge["capacity"] is not None
        ]
        return ceil(sum(steps))

    @_memo
    def _hand_over(self) -> None:
        """Remember `_handed` from the oldest firing on: asked for the last first, it would recurse through them all."""
        makers = {u: self.at(u) for u, _, capacity in self.edges(data="capacity") if capacity is not None}
        for iteration in range(-self._reach(), 1):
            chunks = [(chunk / s.firings, s.name, chunk) for s in makers.values() for chunk in range(s.firings)]
            for _, name, chunk in sorted(chunks):
                for place in makers[name].all_places(chunk):
                    self._handed(Firing(iteration, name, chunk, place))

    @_memo
    def _needs(self, stage: str, chunk: int, place: int) -> tuple[Firing, ...]:
        self._hand_over()
        f, consumer = Firing(0, stage, chunk, place), self.at(stage)
        needed: list[Firing] = []
        for u, _, edge in self.in_edges(stage, data=True):
            bounded = edge["capacity"] is not None and chunk < consumer.chunks
            for source in self._sources(f, u, edge):
                needed += self._handed(source) if bounded else (source,)
        if any(edge["capacity"] is not None for *_, edge in self.out_edges(stage, data=True)):
            needed += self._handed(earlier(f, consumer.makers, consumer))
        return latest(n for n in needed if n != f)

    def needs(self, f: Firing) -> list[Firing]:
        """All firings that must be done before f may start."""
        return [
            n._replace(iteration=n.iteration + f.iteration)
            for n in self._needs(f.stage, f.chunk, f.place)
            if n.iteration + f.iteration >= 0
        ]

    # -- what moves ---------------------------------------------------------------------------------------

    def sends(self, f: Firing, place: int | None = None) -> Iterator[Message]:
        """What leaves when f is done; `place` is where f ran if its own place was decided late (spread "first")."""
        producer = self.at(f.stage)
        where = f.place if place is None else place
        for _, v, edge in self.out_edges(f.stage, data=True):
            if not edge["carries"]:
                continue
            consumer = self.at(v)
            for chunk in self._chunks_reached(producer, consumer, f.chunk):
                for lane in overlap(producer.lanes_of(where), consumer.serves):
                    for p in consumer.places_for(range(lane, lane + 1), chunk):
                        yield Message(
                            f, v, p, lane, producer.home(lane, where), consumer.home(lane, p), edge["carries"]
                        )

    def receives(self, f: Firing) -> Iterator[tuple[Firing, int, tuple[str, ...]]]:
        """(producer firing, lane, fields) for everything that f must hold before it starts."""
        consumer = self.at(f.stage)
        for u, _, edge in self.in_edges(f.stage, data=True):
            if not edge["carries"]:
                continue
            producer = self.at(u)
            for g in self._sources(f, u, edge, data=True):
                if g.iteration >= 0:
                    for lane in overlap(consumer.lanes_of(f.place), producer.lanes_of(g.place)):
                        yield g, lane, edge["carries"]

    def _chunks_reached(self, u: Stage, v: Stage, chunk: int) -> Iterable[int]:
        """Chunks of v that use chunk `chunk` of u, one for all that run on the same places: data go there once."""
        if u.epochs != v.epochs and chunk < u.firings - u.chunks:  # only the last epoch's result is used
            return ()
        if v.spread != "robin":
            return (0,)
        return {c % v.places: c for c in range(v.firings) if chunk in self._chunks_used(u, v, c)}.values()

    # -- order --------------------------------------------------------------------------------------------

    @_memo
    def program(self) -> list[Firing]:
        """One iteration in one global order; a rank's program is its part of it, and one order for all has no deadlock.

        Stages that stream into each other form a loop and alternate chunk by chunk. Firings whose place is decided
        late, or which enter out of turn, are not in it. Raises ValueError where a firing would need itself.
        """
        stages = {s.name: s for s in self.stages()}
        together = nx.Graph()
        together.add_nodes_from(stages)
        together.add_edges_from((u, v) for u, v, e in self.edges(data=True) if e["stream"] and not e["lag"])
        together.add_edges_from((s.name, s.loop) for s in stages.values() if s.loop)
        loop_order = {
            name: min(stages[m].order for m in loop) for loop in nx.connected_components(together) for name in loop
        }

        def key(f: Firing) -> tuple[float, ...]:
            stage = stages[f.stage]
            return loop_order[f.stage], (f.chunk + 1) / stage.chunks, stage.order, f.place

        firings = nx.DiGraph()
        for s in stages.values():
            firings.add_nodes_from(Firing(0, s.name, c, p) for c in range(s.firings) for p in s.all_places(c))
        for f in list(firings):
            firings.add_edges_from((n, f) for n in self.needs(f) if n.iteration == 0 and n in firings)
            before = f._replace(chunk=f.chunk - 1)
            if before in firings:
                firings.add_edge(before, f)
        if not nx.is_directed_acyclic_graph(firings):
            cycle = " -> ".join(f"{u.stage}[{u.chunk}]" for u, _ in nx.find_cycle(firings))
            raise ValueError(f"a firing needs itself: {cycle}")
        order = nx.lexicographical_topological_sort(firings, key)
        return [f for f in order if f.place != ANY_PLACE and stages[f.stage].enters == "in_order"]
