"""Free blocks of a paged KV cache in the order in which they are taken: what was in them is found until then.

As in vLLM (vllm/v1/core/block_pool.py): blocks that are given back go to the end of a queue, those of one sequence last
block first, and keep their content until they come to its head and are taken.
"""

from __future__ import annotations

from collections.abc import Mapping

Key = tuple[str, int]


class BlockQueue:
    """Counts of blocks by what is in them: of a sample's own (`own`, sample), of a prompt's (`common`, prompt), or what
    nobody looks for (`unwanted`, a number).

    A scheduler only counts its free blocks; `settle` brings the queue in line with that count.
    """

    def __init__(self, blocks: int) -> None:
        self.counts: dict[Key, int] = {("unwanted", 0): blocks}
        self.total = blocks
        self._number = 0  # of the last unwanted ones

    def own(self, sample: int) -> int:
        """Blocks that hold the beginning of what only this sample has."""
        return self.counts.get(("own", sample), 0)

    def common(self, prompt: int) -> int:
        return self.counts.get(("common", prompt), 0)

    def give_own(self, sample: int, blocks: int) -> None:
        self._give(("own", sample), blocks)

    def give_common(self, prompt: int, blocks: int) -> None:
        self._give(("common", prompt), blocks)

    def give_unwanted(self, blocks: int) -> None:
        self._number += 1
        self._give(("unwanted", self._number), blocks)

    def _give(self, key: Key, blocks: int) -> None:
        if blocks > 0:
            self.counts[key] = blocks
            self.total += blocks

    def take_own(self, sample: int) -> None:
        """They are in use again."""
        self.total -= self.counts.pop(("own", sample), 0)

    def take_common(self, prompt: int) -> None:
        self.total -= self.counts.pop(("common", prompt), 0)

    def settle(self, free: int) -> int:
        """Blocks that are no longer free leave at the head, others come to the end with nothing that is wanted; how
        many of those that left were a sample's own."""
        lost = 0
        while self.total > free:
            key, blocks = next(iter(self.counts.items()))
            taken = min(blocks, self.total - free)
            self.total -= taken
            lost += taken * (key[0] == "own")
            if taken == blocks:
                del self.counts[key]
            else:
                self.counts[key] -= taken
        if self.total < free:
            self.give_unwanted(free - self.total)
        return lost

    def forget(self, samples: set[int] | None = None) -> int:
        """What is in the own blocks of these samples (None: in all blocks) is not looked for any more; the own ones."""
        lost, counts = 0, self.counts
        self.counts = {}
        for (kind, number), blocks in counts.items():
            if kind == "unwanted" or not (samples is None or (kind == "own" and number in samples)):
                self.counts[kind, number] = blocks
                continue
            lost += blocks * (kind == "own")
            self._number += 1
            self.counts["unwanted", self._number] = blocks
        return lost

    def renumbered(self, new: Mapping[int, int]) -> BlockQueue:
        """A copy in which samples have other numbers."""
        other = BlockQueue(0)
        other.counts = {
            (kind, new[number] if kind == "own" else number): blocks for (kind, number), blocks in self.counts.items()
        }
        other.total, other._number = self.total, self._number
        return other
