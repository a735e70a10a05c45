"""Which stages an RL algorithm has and what each needs. One file per algorithm; the file name is the name."""

from __future__ import annotations

from dataclasses import dataclass

from rlhfsim.graph import Kind


@dataclass(frozen=True)
class Step:
    """One stage of an algorithm, before anybody says where it runs.

    name: as in verl's logs. kind: generate | score | train. model: whose weights. needs: steps whose results it uses.
    fields: what its result adds to a sample.
    """

    name: str
    kind: Kind
    model: str
    needs: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Algorithm:
    """Steps in program order. An optimizer step is one mini-batch: epochs x minibatches of them per iteration."""

    name: str
    steps: tuple[Step, ...]
    epochs: int = 1
    minibatches: int = 1

    def of_kind(self, *kinds: str) -> tuple[Step, ...]:
        return tuple(s for s in self.steps if s.kind in kinds)

    def step(self, name: str) -> Step:
        return next(s for s in self.steps if s.name == name)
