"""What the stages of a graph do on a rank: generate, score, train, move weights, store.

Everything is addressed by sample: a lane's samples are `rlhfsim.batch.samples_of`, a rank takes its contiguous share of
a place's samples, and what is drawn for a sample depends on nothing but its number. Where lanes lie on fewer ranks than
work on them, the ranks of a place exchange samples first, and results afterwards.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from itertools import islice
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhfsim.batch import Split, kept_together
from rlhfsim.graph import Firing, Stage, StageGraph
from rlhfsim.layout import Holding, algorithm_of
from rlhfsim.rollouts import VALIDATION, Held, Request, ages, request, to_begin
from rlhfsim.spec.lengths import draw_lengths
from rlhfsim.spec.loader import length_dir
from rlhfsim.spec.scenario import Scenario

from . import generate, models, ppo
from .engines import Engine, WholeCopy, fill, flat
from .executor import Inbox, LaneStore, Paused, Turn, base_name
from .groups import Fields, Groups
from .ppo import Sample
from .rollout import Rollout

Holdings = dict[str, Holding]
Samples = dict[int, Sample]

END_OF_SEQUENCE = 0  # the token that ends a sampled response
NOBODY = -1  # a sample of no weight, where a rank has none and must take part


class Stages:
    """The work of one rank. All ranks make theirs at the same time: engines are set up together, model by model.

    store: the executor's, in which it keeps results that stay on this rank.
    """

    def __init__(
        self, scenario: Scenario, graph: StageGraph, holdings: Holdings, rank: int, groups: Groups, store: LaneStore
    ) -> None:
        if groups.device.type == "cpu":  # where half precision is slower than single, and nothing is won by it
            single = {"precision": "fp32"}
            holdings = {name: replace(held, use=held.use.model_copy(update=single)) for name, held in holdings.items()}
        self.scenario, self.graph, self.holdings = scenario, graph, holdings
        self.rank, self.groups, self.store = rank, groups, store
        self.algorithm, self.steps = scenario.algorithm, algorithm_of(scenario)
        self.samples, self.seed = scenario.workload.samples, scenario.simulation.seed
        self.kl_in_loss = "ref_log_probs" in self.steps.batch
        unpaid = self.kl_in_loss or "reference" not in scenario.roles
        self.kl_in_reward = 0.0 if unpaid else self.algorithm.kl_coefficient
        together = kept_together(graph, self.samples, scenario.workload.responses_per_prompt)
        self.split = Split(graph, self.samples, together)
        self.engines = {n: self._engine(h) for n, h in holdings.items() if rank in h.ranks}
        self._copy = cache(lambda name: WholeCopy(self.engines[name], scenario.weight_sync.bucket_bytes))
        self._lengths = cache(lambda iteration: draw_lengths(scenario.workload, self.seed, iteration, length_dir()))
        self.versions: dict[str, int] = defaultdict(int)  # of the weights of each copy: updates behind them
        self.rollouts: dict[str, Rollout] = {}  # by stage

    def __call__(self, f: Firing, stage: Stage, inbox: Inbox, turn: Turn) -> dict[int, Fields] | None:
        """(What the inbox holds lies in the store as well.) A swap has no work."""
        if stage.kind == "swap":
            return None
        if stage.unfinished != "wait":
            return self._roll_out(f, stage, turn)
        made: dict[int, Fields] | None = getattr(self, f"_{stage.kind}")(f, stage)
        if stage.kind in ("train", "sync") and f.chunk == stage.firings - 1:
            self._enter(stage.target or stage.model, f.iteration + 1)
        return made

    def _enter(self, model: str, version: int) -> None:
        self.versions[model] = version
        for name, rollout in self.rollouts.items():
            if self.graph.at(name).model == model:
                rollout.enter(version, self.graph.at(name).recompute)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    def weights(self, name: str) -> dict[str, Tensor]:
        """All parameters of a model copy, whole, on the host; all ranks of the copy call it."""
        engine = self.engines[name]
        with engine.session():
            names = [n for n, _ in engine.module.named_parameters()]
            return {n: w.cpu().clone() for bucket in engine.buckets(names, 1e9) for n, w in bucket}

    def _heads(self, name: str) -> dict[str, bool]:
        actor = name.removeprefix("shadow_") in ("actor", "reference")
        return {"lm": actor, "value": not actor or (name == "actor" and self.scenario.models.share_actor_critic)}

    def _engine(self, held: Holding) -> Engine:
        role = held.name.removeprefix("shadow_")
        module = models.build(role, held.use, self.seed, train=held.purpose == "train", **self._heads(held.name))
        return Engine(held, module, self.groups, self.algorithm)

    def _mine(self, f: Firing, stage: Stage) -> Samples:
        """This rank's share with all that is known of it. Raises KeyError where a lane's data have not come."""
        known: Samples = {}
        for lane in stage.lanes_of(f.place):
            if stage.home(lane, f.place) == self.rank:
                known |= self._known(f.iteration, lane, self.split.of_lane(f, lane))
        if not self.split.at_home(f):
            known = self.groups.exchange(known, stage.ranks_of(f.place))
        return {s: ppo.trimmed(known[s]) for s in self.split.share(f, self.rank)}

    def _known(self, iteration: int, lane: int, wanted: Sequence[int]) -> Samples:
        """Everything that lies here of some samples of a lane; later stages replace what earlier ones said."""
        known: Samples = {s: {} for s in wanted}
        for stage in self.graph.stages():
            if stage.kind not in ("generate", "score") or lane not in stage.serves:
                continue
            for chunk, fields in self.store.chunks(iteration, stage.name, lane).items():
                place = next(iter(stage.places_for(range(lane, lane + 1), chunk)))
                ids = self.split.of_lane(Firing(iteration, stage.name, chunk, max(place, 0)), lane)
                for s, sample in _unpacked(fields, ids).items():
                    known.get(s, {}).update(sample)
        for s, sample in known.items():
            if "mask" not in sample:
                raise KeyError(f"sample {s} of iteration {iteration} is not on rank {self.rank}")
        return known

    def _home(self, f: Firing, stage: Stage, results: Samples, names: Sequence[str]) -> dict[int, Fields]:
        """Results by lane, on the ranks where the lanes are at home."""
        if not self.split.at_home(f):
            results = self.groups.exchange(results, stage.ranks_of(f.place))
        return self._by_lane(f, stage, results, names)

    def _by_lane(self, f: Firing, stage: Stage, results: Samples, names: Sequence[str]) -> dict[int, Fields]:
        return {
            lane: ppo.packed([results[s] for s in self.split.of_lane(f, lane)], names)
            for lane in stage.lanes_of(f.place)
            if stage.home(lane, f.place) == self.rank
        }

    def _carried(self, stage: Stage) -> set[str]:
        """The fields that some stage wants of this one as messages."""
        return {name for *_, carries in self.graph.out_edges(stage.name, data="carries") for name in carries}

    def _drawn(self, stage: Stage) -> tuple[str, ...]:
        """The fields of a response that is handed over."""
        return ("tokens", "mask", *({"log_probs"} & self._carried(stage)))

    def _generate(self, f: Firing, stage: Stage) -> dict[int, Fields] | None:
        validation = stage.name == "testing"
        samples = self.scenario.periodic.validation_prompts if validation else self.samples
        share = replace(self.split, samples=samples).share(f, self.rank)
        requests = [self._request(f.iteration, s, validation, samples) for s in share]
        together = self.engines[stage.model].sharded and self.scenario.generation.engine == "zero3_per_token"
        with self._decoding(stage, together) as module:
            work = self._generation(stage, module, requests)
            generate.run(work, self._in_step(work, stage.ranks_of(f.place)) if together else None)
        if validation:
            return None
        if self.graph.off_policy:
            self.groups.meter.counts |= ages(requests, f.iteration)
        return self._home(f, stage, {r.sample: _sample(r) for r in requests}, self._drawn(stage))

    def _roll_out(self, f: Firing, stage: Stage, turn: Turn) -> dict[int, Fields]:
        """A chunk of responses, of those that earlier firings began or this one; what has not ended stays unfinished.

        Raises Paused where the engines were stopped before the chunk was full.
        """
        ids = sorted(s for share in self.split.shares(f).values() for s in share)
        with self._decoding(stage, False) as module:
            rollout = self._rollout(stage, module)
            held, lost = rollout.held, 0.0
            if stage.max_age is not None:
                lost += rollout.throw_away(f.iteration - stage.max_age)
            begun = to_begin(self.graph, stage, self.samples, len(ids), held.version, held.begun, held.handed_over)
            rollout.begin([self._numbered(n) for n in held.numbers(begun)])
            done = rollout.run(len(ids), turn)
        if done is not None and stage.unfinished == "drop":
            lost += rollout.throw_away()
        counts = {"recomputed_tokens": float(rollout.engine.recomputed)}
        rollout.engine.recomputed = 0
        if self.rank == stage.ranks[0]:  # what all ranks know counts once
            counts |= {"thrown_away_tokens": lost} | (ages(done, f.iteration) if done is not None else {})
        self.groups.meter.counts |= counts
        if done is None:
            raise Paused
        return self._by_lane(f, stage, dict(zip(ids, map(_sample, done), strict=True)), self._drawn(stage))

    def _rollout(self, stage: Stage, module: nn.Module) -> Rollout:
        if stage.name not in self.rollouts:
            engine, workload = self._generation(stage, module), self.scenario.workload
            held, keeps = Held(workload.responses_per_prompt), stage.unfinished == "keep"
            self.rollouts[stage.name] = Rollout(engine, held, stage.ranks, self.groups, keeps)
        return self.rollouts[stage.name]

    def _numbered(self, number: int) -> Request:
        """Of all responses, in the order in which iterations have them."""
        return replace(self._request(*divmod(number, self.samples)), sample=number)

    @contextmanager
    def _decoding(self, stage: Stage, together: bool) -> Iterator[nn.Module]:
        """The module that decodes: the engine's own, or under ZeRO-3 a whole copy for this call; LoRA's factors in."""
        engine = self.engines[stage.model]
        decoder = engine if together or not engine.sharded else self._copy(engine.holding.name)
        with ExitStack() as stack, self.groups.meter.section("generate"):
            module = stack.enter_context(decoder.session())
            if not together:
                stack.enter_context(models.merged(module))
            yield module

    def _generation(
        self, stage: Stage, module: nn.Module, requests: Sequence[Request] | None = None
    ) -> generate.Generation:
        """Of these requests, or (None) an engine that will be given others."""
        chosen, workload, columns = self.scenario.generation, self.scenario.workload, None
        rows = chosen.max_sequences if chosen.continuous else chosen.batch_samples or len(requests or ())
        if requests is None:
            most = ceil(self.graph.at_work(stage.name) * self.samples / stage.chunks) + workload.responses_per_prompt
            rows, columns = min(rows, most), workload.longest_sample
        work = generate.Generation(
            module,
            requests or (),
            rows=rows,
            columns=columns,
            continuous=chosen.continuous,
            prefill_tokens=chosen.prefill_tokens,
            end=END_OF_SEQUENCE if workload.responses == "sampled" else None,
            log_probs="log_probs" in self._drawn(stage),
            device=self.groups.device,
        )
        work.version = self.versions[stage.model]
        return work

    def _request(self, iteration: int, sample: int, validation: bool = False, samples: int = 0) -> Request:
        samples = samples or self.samples
        workload = self.scenario.workload
        prompts, responses = (np.resize(tokens, samples) for tokens in self._lengths(iteration))
        limit = workload.response_tokens.longest if workload.responses == "sampled" else int(responses[sample])
        key = (self.seed, iteration, *([VALIDATION] if validation else []))
        prompt, vocabulary = sample // workload.responses_per_prompt, self.scenario.models.actor.shape.vocabulary
        return request(key, sample, prompt, int(prompts[sample]), limit, vocabulary)

    def _in_step(self, work: generate.Generation, place: Sequence[int]) -> Callable[[bool], bool]:
        """Every rank makes as many passes as the slowest: agreed on beforehand where lengths are forced."""
        if work.end is None and not work.continuous:
            passes = torch.tensor([work.forward_passes], device=self.groups.device)
            return generate.counted(int(self.groups.all_reduce(passes, place, dist.ReduceOp.MAX)))

        def any_busy(mine: bool) -> bool:
            flag = torch.tensor([int(mine)], device=self.groups.device)
            return bool(self.groups.all_reduce(flag, place, dist.ReduceOp.MAX))

        return any_busy

    def _score(self, f: Firing, stage: Stage) -> dict[int, Fields]:
        fields: Sequence[str] = self.steps.step(base_name(stage.name)).fields
        samples = self._mine(f, stage)
        if stage.model in self.holdings:
            results = self._judged(f, stage, samples, fields)
        else:
            results = {s: {"score": ppo.share_of_even_tokens(sample)} for s, sample in samples.items()}
        if "rewards" in self._carried(stage):  # it has all that was said of a sample, and hands it to the trainers
            fields = sorted(self._carried(stage))
            results = {s: self._rewarded(samples[s] | found) for s, found in results.items()}
        return self._home(f, stage, results, fields)

    def _rewarded(self, sample: Sample) -> Sample:
        return {"rewards": ppo.shaped_rewards(sample, self.kl_in_reward)} | sample if "score" in sample else sample

    @torch.no_grad()
    def _judged(self, f: Firing, stage: Stage, samples: Samples, fields: Sequence[str]) -> Samples:
        engine, results = self.engines[stage.model], defaultdict[int, Sample](dict)
        with engine.session() as module:
            for some in self._micro_batches(f, samples, engine.use.score_micro_batch_samples):
                batch = self._batch([sample for _, sample in some])
                out = module(**batch.inputs)
                sizes = [int((sample["mask"] == ppo.RESPONSE).sum()) for _, sample in some]
                judged = {"score": ("state_values", batch.ends), "values": ("state_values", batch.before)}
                for name in fields:
                    head, at = judged.get(name, ("log_probs", batch.responses))
                    found = out[head][at].cpu()
                    for (s, _), part in zip(some, found.split(sizes) if name != "score" else found, strict=True):
                        results[s][name] = part
        results.pop(NOBODY, None)
        return results

    def _micro_batches(self, f: Firing, mine: Samples, size: int) -> Iterator[list[tuple[int, Sample]]]:
        """As many on every rank, since ranks meet in each; without samples of its own a rank takes one of no weight."""
        count, waiting = max(1, *(-(-len(own) // size) for own in self.split.shares(f).values())), iter(mine.items())
        nothing = {"tokens": torch.zeros(2, dtype=torch.long), "mask": torch.tensor([ppo.PROMPT, ppo.RESPONSE])}
        for _ in range(count):
            yield list(islice(waiting, size)) or [(NOBODY, nothing)]

    def _batch(self, samples: Sequence[Sample]) -> ppo.Batch:
        workload = self.scenario.workload
        longest = workload.prompt_tokens.longest + workload.response_tokens.longest
        return ppo.batch(samples, longest if workload.padded else None, self.groups.device)

    def _train(self, f: Firing, stage: Stage) -> None:
        """One update on a mini-batch: a mean over all its response tokens, however they are split."""
        engine, chosen = self.engines[stage.model], self.algorithm
        mine = {s: self._rewarded(sample) for s, sample in self._mine(f, stage).items()}
        if "values" in self.steps.batch:
            ready = ppo.with_advantages(mine, chosen.discount, chosen.gae_lambda)
        else:
            own, per_prompt = (
                {s: {"": x["rewards"]} for s, x in mine.items()},
                self.scenario.workload.responses_per_prompt,
            )
            rewards = {s: x[""] for s, x in self.groups.exchange(own, stage.ranks_of(f.place)).items()}
            found = ppo.relative_advantages(chosen.name, rewards, per_prompt, chosen.discount)
            ready = {s: sample | {"advantages": found[s]} for s, sample in mine.items()}
        tokens = torch.tensor(float(sum(len(s["rewards"]) for s in ready.values())), device=self.groups.device)
        if stage.size > 1:
            self.groups.all_reduce(tokens, stage.ranks_of(f.place))
        micro_batches = list(self._micro_batches(f, ready, engine.use.micro_batch_samples))
        with engine.session():
            engine.callable.train()
            for k, some in enumerate(micro_batches):
                loss = self._loss(engine, [sample for _, sample in some], stage.model)
                engine.backward(loss / tokens, last=k == len(micro_batches) - 1)
            with self.groups.meter.section("optimizer"):
                engine.step()
            engine.callable.eval()

    def _loss(self, engine: Engine, samples: Sequence[Sample], model: str) -> Tensor:
        """The sum over response tokens; of a sample of no weight, zero that depends on all parameters."""
        batch, chosen = self._batch(samples), self.algorithm
        out = engine.callable(**batch.inputs)
        if "rewards" not in samples[0]:
            return sum(x.sum() for x in out.values()) * 0.0
        names = {"log_probs", "ref_log_probs", "values", "advantages", "returns"} & samples[0].keys()
        of = {name: torch.cat([s[name] for s in samples]).to(self.groups.device) for name in names}
        value = policy = torch.zeros((), device=self.groups.device)
        if "state_values" in out:
            values = out["state_values"][batch.before]
            value = ppo.value_loss(values, of["values"], of["returns"], chosen.clip_values)
        if "log_probs" in out:
            log_probs = out["log_probs"][batch.responses]
            old = log_probs.detach() if chosen.name == "gpg" else of["log_probs"]  # GPG: no ratio, no clipping
            policy = ppo.policy_loss(log_probs, old, of["advantages"], chosen.clip_ratio)
            if self.kl_in_loss:
                policy = policy + chosen.kl_coefficient * ppo.divergence(log_probs, of["ref_log_probs"])
        return value if model == "critic" else policy + chosen.value_coefficient * value

    def _sync(self, f: Firing, stage: Stage) -> None:
        """New weights into the other copy, in buckets: in place on the same ranks, else from the first that trains."""
        chosen = self.scenario.weight_sync
        source, target = self.holdings[stage.model], self.holdings[stage.target]
        engine, copy = self.engines.get(stage.model), self.engines.get(stage.target)
        with torch.no_grad(), ExitStack() as stack:
            for held in (engine, copy):
                if held is not None:
                    stack.enter_context(held.session())
            if source.ranks[0] in target.ranks:  # all are: strategies place a copy on the same ranks or on others
                written = dict(copy.module.named_parameters())
                for bucket in engine.buckets(self._moved(engine, stage.target), chosen.bucket_bytes):
                    for name, weight in bucket:
                        written[name].copy_(weight)
            elif (held := engine or copy) is not None:
                names, write = self._moved(held, stage.target), held is copy
                for bucket in held.buckets(names, chosen.bucket_bytes, write=write):
                    weights = [weight for _, weight in bucket]
                    passed = flat(weights)
                    self._pass_on(passed, source, target, chosen.method)
                    if write:
                        fill(weights, passed)

    def _moved(self, engine: Engine, target: str) -> list[str]:
        """What trains, as far as the copy has it; both ends list it in the same order."""
        names = models.trained_names(engine.module, engine.use)
        return [n for n in names if self._heads(target)["value"] or not n.startswith("value_head")]

    def _pass_on(self, weights: Tensor, source: Holding, target: Holding, method: str) -> None:
        """From the first rank of `source` to every rank of `target`: once to all, or to one after the other."""
        first = source.ranks[0]
        apart = [(first, other) for other in target.ranks]
        for ranks in [(first, *target.ranks)] if method == "broadcast" else apart:
            if self.rank in ranks:
                self.groups.broadcast(weights, first, ranks)

    def _store(self, f: Firing, stage: Stage) -> None:
        """A checkpoint of all that trains here, dropped at once: what counts is the time that it takes."""
        with tempfile.TemporaryDirectory(prefix="rlhfsim-") as folder:
            for engine in self.engines.values():
                if engine.train:
                    engine.write(Path(folder))


def _sample(r: Request) -> Sample:
    mask = torch.tensor([ppo.PROMPT] * len(r.prompt) + [ppo.RESPONSE] * len(r.tokens))
    found = {"tokens": torch.tensor([*r.prompt.tolist(), *r.tokens]), "mask": mask}
    return found | ({"log_probs": torch.tensor(r.log_probs)} if r.log_probs else {})


def _unpacked(fields: dict[str, Tensor], ids: Sequence[int]) -> Samples:
    """The samples of a message, on the host: their arithmetic is small and goes sample by sample."""
    on_host = {name: rows.cpu() for name, rows in fields.items()}
    return {s: {name: rows[i] for name, rows in on_host.items()} for i, s in enumerate(ids)} if fields else {}
