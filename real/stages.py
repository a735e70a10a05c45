"""What the stages of a graph do on a rank: generate, score, train, move weights, store.

Everything is addressed by sample: a lane's samples are `rlhfsim.batch.samples_of`, a rank takes its contiguous share of
a place's samples, and what is drawn for a sample depends on nothing but its number. Lanes that lie on fewer ranks than
work on them are handed out within the place first, and their results brought home afterwards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhfsim.batch import kept_together, per_replica, samples_of
from rlhfsim.errors import InputError
from rlhfsim.graph import Firing, Stage, StageGraph
from rlhfsim.layout import Holding, algorithm_of
from rlhfsim.spec.lengths import draw_lengths
from rlhfsim.spec.loader import length_dir
from rlhfsim.spec.scenario import ModelUse, Scenario

from . import generate, models, ppo
from .engines import Engine, WholeCopy
from .executor import Inbox, LaneStore, base_name
from .groups import Fields, Groups
from .ppo import Sample

Numbered = list[tuple[int, Sample]]

END_OF_SEQUENCE = 0  # the token that ends a sampled response


def check(scenario: Scenario) -> None:
    """Raises InputError for what a simulated scenario may have and a real run may not."""
    generation, vocabulary = scenario.generation, scenario.models.actor.shape.vocabulary
    longest = scenario.workload.prompt_tokens.longest + scenario.workload.response_tokens.longest
    if (algorithm := scenario.algorithm.name) != "ppo":
        raise InputError(
            f"is {algorithm!r}; real runs have no other algorithm yet (allowed: ppo)", field="algorithm.name"
        )
    if (origin := scenario.algorithm.old_log_prob) != "always":
        raise InputError(f"is {origin!r}; real runs make that pass (allowed: always)", field="algorithm.old_log_prob")
    if "reference" not in scenario.roles:
        raise InputError("leaves out the reference, which real runs need", field="algorithm.reference")
    if (reward := scenario.algorithm.reward) not in ("model", "function"):
        message = f"is {reward!r}; real runs have no service for it (allowed: model, function)"
        raise InputError(message, field="algorithm.reward")
    for role in scenario.roles:
        use: ModelUse = getattr(scenario.models, role)
        if (split := use.ranks_per_replica) > 1:
            message = f"makes {split} ranks per replica; real runs split no model over ranks (allowed: 1)"
            raise InputError(message, field=f"models.{role}.tensor_parallel")
        if (tokens := use.shape.vocabulary) != vocabulary:
            message = f"has {tokens} tokens, the actor {vocabulary}; in a real run all models read the same tokens"
            raise InputError(message, field=f"models.{role}.spec")
        if longest > (positions := use.shape.max_positions):
            message = f"{use.spec} has {positions} positions, prompt and response up to {longest} tokens"
            raise InputError(message, field=f"models.{role}.spec")
    if (split := generation.tensor_parallel) > 1:
        message = f"is {split}; real runs have no tensor parallelism (allowed: 1)"
        raise InputError(message, field="generation.tensor_parallel")
    if (routing := generation.routing) != "static":
        message = f"is {routing!r}; real runs share samples out beforehand (allowed: static)"
        raise InputError(message, field="generation.routing")


class Stages:
    """The work of one rank. All ranks make theirs at the same time: engines are set up together, model by model.

    store: the executor's, in which it keeps results that stay on this rank.
    """

    def __init__(
        self,
        scenario: Scenario,
        graph: StageGraph,
        holdings: dict[str, Holding],
        rank: int,
        groups: Groups,
        store: LaneStore,
    ) -> None:
        check(scenario)
        if groups.device.type == "cpu":  # where half precision is slower than single, and nothing is won by it
            single = {"precision": "fp32"}
            holdings = {name: replace(held, use=held.use.model_copy(update=single)) for name, held in holdings.items()}
        self.scenario, self.graph, self.holdings = scenario, graph, holdings
        self.rank, self.groups, self.store = rank, groups, store
        self.algorithm, self.steps = scenario.algorithm, algorithm_of(scenario)
        self.samples, self.seed = scenario.workload.samples, scenario.simulation.seed
        self.together = kept_together(graph, self.samples, scenario.workload.responses_per_prompt)
        self.engines = {n: self._engine(h) for n, h in holdings.items() if rank in h.ranks}
        self._whole: dict[str, WholeCopy] = {}
        self._lengths = cache(lambda iteration: draw_lengths(scenario.workload, self.seed, iteration, length_dir()))
        self._kinds: dict[str, Callable[[Firing, Stage], dict[int, Fields] | None]] = {
            "generate": self._generate,
            "score": self._score,
            "train": self._train,
            "sync": self._sync,
            "store": self._store,
        }

    def __call__(self, f: Firing, stage: Stage, inbox: Inbox) -> dict[int, Fields] | None:
        """(What the inbox holds lies in the store as well.)"""
        return self._kinds[stage.kind](f, stage) if stage.kind in self._kinds else None

    def weights(self, name: str) -> dict[str, Tensor]:
        """All parameters of a model copy, whole, on the host; all ranks of the copy call it."""
        engine = self.engines[name]
        with engine.session():
            names = [n for n, _ in engine.module.named_parameters()]
            return {n: w.cpu().clone() for bucket in engine.buckets(names, 1e9) for n, w in bucket}

    # -- models -------------------------------------------------------------------------------------------

    def _heads(self, name: str) -> dict[str, bool]:
        actor = name.removeprefix("shadow_") in ("actor", "reference")
        return {"lm": actor, "value": not actor or (name == "actor" and self.scenario.models.share_actor_critic)}

    def _engine(self, held: Holding) -> Engine:
        role = held.name.removeprefix("shadow_")
        module = models.build(role, held.use, self.seed, train=held.purpose == "train", **self._heads(held.name))
        return Engine(held, module, self.groups, self.algorithm)

    # -- a firing's samples -------------------------------------------------------------------------------

    def _shares(self, f: Firing, stage: Stage, samples: int) -> list[list[int]]:
        """The samples of each rank of the place."""
        ids = samples_of(self.graph, f, samples, together=self.together)
        return [share.tolist() for share in per_replica(ids, stage.size)]

    def _of_lane(self, f: Firing, lane: int) -> list[int]:
        """The samples of a firing that lie in a lane."""
        alone = range(lane, lane + 1)
        found: list[int] = samples_of(self.graph, f, self.samples, together=self.together, lanes=alone).tolist()
        return found

    def _at_home(self, f: Firing, stage: Stage) -> bool:
        """Whether every rank's share lies on it."""
        shares = self._shares(f, stage, self.samples)
        homes = {s: stage.home(lane, f.place) for lane in stage.lanes_of(f.place) for s in self._of_lane(f, lane)}
        return all(homes[s] == rank for rank, own in zip(stage.ranks_of(f.place), shares, strict=True) for s in own)

    def _mine(self, f: Firing, stage: Stage) -> Numbered:
        """This rank's share with all that is known of it. Raises KeyError where a lane's data have not come."""
        place, known, at_home = stage.ranks_of(f.place), dict[int, Sample](), self._at_home(f, stage)
        for lane in stage.lanes_of(f.place):
            home, wanted, found = stage.home(lane, f.place), self._of_lane(f, lane), dict[int, Sample]()
            if home == self.rank:
                found = self._known(f.iteration, lane, wanted)
            if not at_home and wanted:
                fields = ppo.packed(list(found.values()), list(found[wanted[0]])) if home == self.rank else None
                found = _unpacked(self.groups.broadcast_fields(fields, home, place), wanted)
            known |= found
        return [(s, ppo.trimmed(known[s])) for s in self._shares(f, stage, self.samples)[place.index(self.rank)]]

    def _known(self, iteration: int, lane: int, wanted: Sequence[int]) -> dict[int, Sample]:
        """Everything that lies here of some samples of a lane; later stages replace what earlier ones said."""
        known: dict[int, Sample] = {s: {} for s in wanted}
        for stage in self.graph.stages():
            if stage.kind not in ("generate", "score") or lane not in stage.serves:
                continue
            for chunk, fields in self.store.chunks(iteration, stage.name, lane).items():
                place = next(iter(stage.places_for(range(lane, lane + 1), chunk)))
                ids = self._of_lane(Firing(iteration, stage.name, chunk, max(place, 0)), lane)
                for s, sample in _unpacked(fields, ids).items():
                    known.get(s, {}).update(sample)
        for s, sample in known.items():
            if "mask" not in sample:
                raise KeyError(f"sample {s} of iteration {iteration} is not on rank {self.rank}")
        return known

    def _home(self, f: Firing, stage: Stage, results: dict[int, Sample], names: Sequence[str]) -> dict[int, Fields]:
        """Results by lane, on the ranks where the lanes are at home."""
        place, found = stage.ranks_of(f.place), {}
        at_home, shares = self._at_home(f, stage), self._shares(f, stage, self.samples)
        for lane in stage.lanes_of(f.place):
            home, wanted = stage.home(lane, f.place), self._of_lane(f, lane)
            if not at_home:
                mine = [s for s in wanted if s in results]
                parts = self.groups.gather_fields(ppo.packed([results[s] for s in mine], names), home, place)
                for share, part in zip(shares, parts or [], strict=bool(parts)):
                    results |= _unpacked(part, [s for s in wanted if s in share])
            if home == self.rank:
                found[lane] = ppo.packed([results[s] for s in wanted], names)
        return found

    def _carried(self, stage: Stage) -> set[str]:
        """The fields that some stage wants of this one as messages."""
        return {name for *_, carries in self.graph.out_edges(stage.name, data="carries") for name in carries}

    # -- generate -----------------------------------------------------------------------------------------

    def _generate(self, f: Firing, stage: Stage) -> dict[int, Fields] | None:
        chosen, validation = self.scenario.generation, stage.name == "testing"
        samples = self.scenario.periodic.validation_prompts if validation else self.samples
        place, shares = stage.ranks_of(f.place), self._shares(f, stage, samples)
        requests = [self._request(f.iteration, s, validation, samples) for s in shares[place.index(self.rank)]]
        sampled = self.scenario.workload.responses == "sampled"
        fields = ("tokens", "mask", *({"log_probs"} & self._carried(stage)))
        engine = self.engines[stage.model]
        together = engine.sharded and chosen.engine == "zero3_per_token"
        with ExitStack() as stack, self.groups.meter.section("generate"):
            module = stack.enter_context(self._decoder(engine, together))
            if not together:
                stack.enter_context(models.merged(module))
            work = generate.Generation(
                module,
                module.body.config,
                requests,
                continuous=chosen.continuous,
                rows=chosen.max_sequences if chosen.continuous else chosen.batch_samples or len(requests),
                prefill_tokens=chosen.prefill_tokens,
                end=END_OF_SEQUENCE if sampled else None,
                log_probs="log_probs" in fields,
                dtype=models.DTYPES[engine.use.precision],
                device=self.groups.device,
            )
            generate.run(work, self._in_step(work, place, sampled) if together else None)
        if validation:
            return None
        return self._home(f, stage, {r.sample: _sample(r) for r in requests}, fields)

    def _request(self, iteration: int, sample: int, validation: bool, samples: int) -> generate.Request:
        workload = self.scenario.workload
        prompts, responses = (np.resize(tokens, samples) for tokens in self._lengths(iteration))
        limit = workload.response_tokens.longest if workload.responses == "sampled" else int(responses[sample])
        key = (self.seed, iteration, *([generate.VALIDATION] if validation else []))
        prompt, vocabulary = sample // workload.responses_per_prompt, self.scenario.models.actor.shape.vocabulary
        return generate.request(key, sample, prompt, int(prompts[sample]), limit, vocabulary)

    def _decoder(self, engine: Engine, together: bool) -> AbstractContextManager[nn.Module]:
        """The module that decodes: the engine's own, or under ZeRO-3 a whole copy for this call."""
        if together or not engine.sharded:
            return engine.session()
        name = engine.holding.name
        if name not in self._whole:
            self._whole[name] = WholeCopy(engine, self.scenario.weight_sync.bucket_bytes)
        return self._whole[name].session()

    def _in_step(self, work: generate.Generation, place: Sequence[int], sampled: bool) -> Callable[[bool], bool]:
        """Every rank makes as many passes as the slowest: agreed on beforehand where lengths are forced."""
        if not sampled and not work.continuous:
            passes = torch.tensor([work.forward_passes], device=self.groups.device)
            return generate.counted(int(self.groups.all_reduce(passes, place, dist.ReduceOp.MAX)))

        def any_busy(mine: bool) -> bool:
            flag = torch.tensor([int(mine)], device=self.groups.device)
            return bool(self.groups.all_reduce(flag, place, dist.ReduceOp.MAX))

        return any_busy

    # -- score --------------------------------------------------------------------------------------------

    def _score(self, f: Firing, stage: Stage) -> dict[int, Fields]:
        fields: Sequence[str] = self.steps.step(base_name(stage.name)).fields
        samples = dict(self._mine(f, stage))
        if stage.model in self.holdings:
            results = self._judged(f, stage, samples, fields)
        else:
            results = {s: {"score": ppo.share_of_even_tokens(sample)} for s, sample in samples.items()}
        if "rewards" in self._carried(stage):  # it has all that was said of a sample, and hands it to the trainers
            fields = sorted(self._carried(stage))
            for s, found in results.items():
                whole = samples[s] | found
                results[s] = whole | {"rewards": ppo.shaped_rewards(whole, self.algorithm.kl_coefficient)}
        return self._home(f, stage, results, fields)

    @torch.no_grad()
    def _judged(self, f: Firing, stage: Stage, samples: dict[int, Sample], fields: Sequence[str]) -> dict[int, Sample]:
        engine, results = self.engines[stage.model], {s: Sample() for s in samples}
        with engine.session() as module:
            for some in self._micro_batches(f, stage, list(samples.items()), engine.use.score_micro_batch_samples):
                batch = self._batch([sample for _, sample in some])
                out = module(**batch.inputs)
                sizes = [int((sample["mask"] == ppo.RESPONSE).sum()) for _, sample in some]
                for name in fields:
                    if name == "score":
                        parts: Sequence[Tensor] = out["state_values"][batch.ends].cpu().unbind()
                    else:
                        values = name == "values"
                        found = out["state_values"][batch.before] if values else out["log_probs"][batch.responses]
                        parts = found.cpu().split(sizes)
                    for (s, _), part in zip(some, parts, strict=True):
                        if s in results:
                            results[s][name] = part
        return results

    def _micro_batches(self, f: Firing, stage: Stage, mine: Numbered, size: int) -> Iterator[Numbered]:
        """As many on every rank, since ranks meet in each; without samples of its own a rank takes one of no weight."""
        count = max(1, *(-(-len(own) // size) for own in self._shares(f, stage, self.samples)))
        nothing = {"tokens": torch.zeros(2, dtype=torch.long), "mask": torch.tensor([ppo.PROMPT, ppo.RESPONSE])}
        for k in range(count):
            yield mine[k * size : (k + 1) * size] or [(-1, nothing)]

    def _batch(self, samples: Sequence[Sample]) -> ppo.Batch:
        workload = self.scenario.workload
        longest = workload.prompt_tokens.longest + workload.response_tokens.longest
        return ppo.batch(samples, longest if workload.padded else None, self.groups.device)

    # -- train --------------------------------------------------------------------------------------------

    def _train(self, f: Firing, stage: Stage) -> None:
        """One update on a mini-batch: a mean over all its response tokens, however they are split."""
        engine, chosen = self.engines[stage.model], self.algorithm
        mine = dict(self._mine(f, stage))
        for s, sample in mine.items():
            if "rewards" not in sample:
                mine[s] = sample | {"rewards": ppo.shaped_rewards(sample, chosen.kl_coefficient)}
        judged = ppo.with_advantages(list(mine.values()), chosen.discount, chosen.gae_lambda)
        ready = dict(zip(mine, judged, strict=True))
        tokens = torch.tensor(float(sum(len(s["rewards"]) for s in ready.values())), device=self.groups.device)
        if stage.size > 1:
            self.groups.all_reduce(tokens, stage.ranks_of(f.place))
        micro_batches = list(self._micro_batches(f, stage, list(ready.items()), engine.use.micro_batch_samples))
        with engine.session():
            engine.training(True)
            for k, some in enumerate(micro_batches):
                loss = self._loss(engine, [sample for _, sample in some], stage.model)
                engine.backward(loss / tokens, last=k == len(micro_batches) - 1)
            with self.groups.meter.section("optimizer"):
                engine.step()
            engine.training(False)

    def _loss(self, engine: Engine, samples: Sequence[Sample], model: str) -> Tensor:
        """The sum over response tokens; of a sample of no weight, zero that depends on all parameters."""
        batch, chosen = self._batch(samples), self.algorithm
        out = (engine.engine if engine.deepspeed else engine.module)(**batch.inputs)
        if "rewards" not in samples[0]:
            return sum(x.sum() for x in out.values()) * 0.0
        of = {
            name: torch.cat([s[name] for s in samples]).to(self.groups.device)
            for name in ("log_probs", "values", "advantages", "returns")
        }
        value = policy = torch.zeros((), device=self.groups.device)
        if "state_values" in out:
            values = out["state_values"][batch.before]
            value = ppo.value_loss(values, of["values"], of["returns"], chosen.clip_values)
        if "log_probs" in out:
            log_probs = out["log_probs"][batch.responses]
            policy = ppo.policy_loss(log_probs, of["log_probs"], of["advantages"], chosen.clip_ratio)
        return value if model == "critic" else policy + chosen.value_coefficient * value

    # -- weights move -------------------------------------------------------------------------------------

    def _sync(self, f: Firing, stage: Stage) -> None:
        """New weights into the other copy, in buckets: in place on the same ranks, else from the first that trains."""
        assert stage.target is not None
        chosen = self.scenario.weight_sync
        source, target = self.holdings[stage.model], self.holdings[stage.target]
        engine, copy = self.engines.get(stage.model), self.engines.get(stage.target)
        with torch.no_grad(), ExitStack() as stack:
            for held in (engine, copy):
                if held is not None:
                    stack.enter_context(held.session())
            if source.ranks[0] in target.ranks:  # all are: strategies place a copy on the same ranks or on others
                assert engine is not None and copy is not None
                written = dict(copy.module.named_parameters())
                for bucket in engine.buckets(self._moved(engine, stage.target), chosen.bucket_bytes):
                    for name, weight in bucket:
                        written[name].copy_(weight)
            elif engine is not None:
                for bucket in engine.buckets(self._moved(engine, stage.target), chosen.bucket_bytes):
                    self._pass_on(torch.cat([w.reshape(-1) for _, w in bucket]), source, target, chosen.method)
            elif copy is not None:
                for bucket in copy.buckets(self._moved(copy, stage.target), chosen.bucket_bytes, write=True):
                    flat = torch.cat([w.reshape(-1) for _, w in bucket])
                    self._pass_on(flat, source, target, chosen.method)
                    for (_, weight), part in zip(bucket, flat.split([w.numel() for _, w in bucket]), strict=True):
                        weight.copy_(part.view_as(weight))

    def _moved(self, engine: Engine, target: str) -> list[str]:
        """What trains, as far as the copy has it; both ends list it in the same order."""
        names = models.trained_names(engine.module, engine.use)
        return [n for n in names if self._heads(target)["value"] or not n.startswith("value_head")]

    def _pass_on(self, flat: Tensor, source: Holding, target: Holding, method: str) -> None:
        """From the first rank of `source` to every rank of `target`: once to all, or to one after the other."""
        first, ranks = source.ranks[0], (source.ranks[0], *target.ranks)
        if self.rank not in ranks:
            return
        if method == "broadcast":
            self.groups.broadcast(flat, first, ranks)
            return
        for other in target.ranks:
            if self.rank in (first, other):
                self.groups.broadcast(flat, first, (first, other))

    # -- storage ------------------------------------------------------------------------------------------

    def _store(self, f: Firing, stage: Stage) -> None:
        """A checkpoint of all that trains here, dropped at once: what counts is the time that it takes."""
        with tempfile.TemporaryDirectory(prefix="rlhfsim-") as folder:
            for engine in self.engines.values():
                if engine.train:
                    engine.write(Path(folder))


def sync_rank_sets(graph: StageGraph, holdings: dict[str, Holding], method: str) -> set[tuple[int, ...]]:
    """Ranks between which weights move from copy to copy; process groups are needed for them."""
    sets: set[tuple[int, ...]] = set()
    for stage in graph.stages():
        if stage.kind == "sync" and stage.target is not None:
            first, others = holdings[stage.model].ranks[0], holdings[stage.target].ranks
            if first not in others:
                sets |= {(first, *others)} if method == "broadcast" else {(first, other) for other in others}
    return sets


def _sample(r: generate.Request) -> Sample:
    mask = torch.tensor([ppo.PROMPT] * len(r.prompt) + [ppo.RESPONSE] * len(r.tokens))
    found = {"tokens": torch.tensor([*r.prompt.tolist(), *r.tokens]), "mask": mask}
    return found | ({"log_probs": torch.tensor(r.log_probs)} if r.log_probs else {})


def _unpacked(fields: dict[str, Tensor], ids: Sequence[int]) -> dict[int, Sample]:
    """The samples of a message, on the host: their arithmetic is small and goes sample by sample."""
    on_host = {name: rows.cpu() for name, rows in fields.items()}
    return {s: {name: rows[i] for name, rows in on_host.items()} for i, s in enumerate(ids)} if fields else {}
