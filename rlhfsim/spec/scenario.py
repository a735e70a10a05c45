"""One scenario: what is trained, on what, with which algorithm and placement.

`rlhfsim.spec.loader` reads the YAML, resolves names (cluster, models) and builds these records; every field is
documented here once, and `rlhfsim show fields` prints this text.
"""

from __future__ import annotations

from fractions import Fraction as Ratio
from math import ceil, lcm
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from ..algorithms import IN_ROUNDS, named, options_of
from ..algorithms import Algorithm as Steps
from ..errors import InputError
from ..lora import ALL_LINEAR, LoraTargets, lora_parameters, targets_problem
from .algorithm import Algorithm as Algorithm
from .algorithm import Latency as Latency
from .base import BytesPerSecond, Count, Fraction, NonNegativeCount, Record
from .framework import Framework
from .hardware import Cluster
from .model_spec import ExpertSplit, ModelSpec
from .overheads import Overheads as Overheads

Role = Literal["actor", "critic", "reference", "reward"]
ROLES: tuple[Role, ...] = ("actor", "critic", "reference", "reward")


class ModelUse(Record):
    """How one of the four models is held and run, wherever the strategy places it.

    spec: a shipped model's name, or the path of a Hugging Face config.json.
    precision: of weights, activations and gradients; Adam keeps fp32 master weights and two moments.
    gradient_precision: `fp32` where gradients are summed and reduced in fp32 beside 16-bit weights. zero_stage 0 to 2:
        in a buffer over all of a rank's weights (Megatron-LM's accumulate_allreduce_grads_in_fp32, its default with
        bf16; NeMo-RL's grad_reduce_in_fp32, off by default). zero_stage 3: shards of gradients and of weights are fp32,
        what is gathered is not (FSDP's MixedPrecision with reduce_dtype fp32, verl's default). Absent: as precision.
    zero_stage: what is sharded over the model's data-parallel ranks: 0 nothing, 1 optimizer, 2 + gradients,
        3 + weights. A frozen model has only weights: 3 shards them, anything else keeps a full copy per rank. With
        tensor_parallel each rank's part of the weights is sharded (FSDP2's two-dimensional mesh).
    shard_ranks: zero_stage 3 shards over so many neighbouring ranks (of those with the same part), and every such group
        holds a copy: weights are gathered inside a group, gradients reduced inside and then summed across (FSDP's
        HYBRID_SHARD; verl's fsdp_size). Absent: over all ranks.
    gemm_precision: of the layers' matrix products where it is not `precision`: `fp8` casts their inputs (Transformer
        Engine); weights, gradients and optimizer stay as they are. The GPU must have such a rate.
    tensor_parallel, pipeline_parallel: ranks per replica; pipeline_chunks > 1 is the interleaved 1F1B schedule.
    context_parallel: ranks that share every sequence, neighbours after the tensor-parallel ones. context_exchange: what
        they exchange for attention. `ring`: keys and values go round, beside the attention that they are for
        (Megatron-LM's cp_comm_type p2p). `all_gather`: keys and values of whole sequences first. `all_to_all`: from
        pieces of sequences to pieces of the heads and back (Ulysses; verl's ulysses_sequence_parallel_size), whose
        number must divide the heads; KV heads are copied where they are too few.
    first_stage_layers, last_stage_layers: of the first and last pipeline stage, where they have more or fewer than the
        others, which share the rest evenly (Megatron-LM's num_layers_in_first_pipeline_stage). Absent: all alike.
    sequence_parallel: activations between tensor-parallel regions are split as well.
    expert_parallel: ranks that share the routed experts of a layer, and exchange tokens by all-to-all; neighbours of
        the tensor- and data-parallel ranks of a pipeline stage. expert_tensor_parallel: ranks that share the matrices
        of one expert; absent: as tensor_parallel (Megatron-LM's default).
    routing_imbalance: rows of the busiest expert-parallel rank over the mean; 1: balanced. Without expert_parallel all
        experts are on one rank, and it counts for nothing.
    micro_batch_samples: samples per forward/backward of one replica; score_micro_batch_samples: of a scoring pass.
    micro_batch_tokens, score_micro_batch_tokens: instead, samples are packed without padding in micro-batches of at
        most so many tokens of one replica (verl: use_dynamic_bsz, ppo_max_token_len_per_gpu times the ranks that share
        a sequence; NeMo-RL: sequence_packing). All replicas have equally many, and balanced ones.
    recompute: activations kept in the forward pass (none: all are kept, full: only the layer inputs).
    fused_kernels: norms, rotary embedding and activation of a pass are one kernel each (Transformer Engine in
        Megatron-LM, Liger's kernels in Hugging Face's models); false: each of their operations reads and writes memory,
        as eager PyTorch runs Hugging Face's models. Engines for generation always have fused ones.
    logits_chunk_tokens: log-probabilities from logits of this many tokens at a time; absent: all at once.
    logits_in_place: one fp32 buffer holds logits, then probabilities, then gradients, beside one of the model's
        precision (Megatron-LM's vocab_parallel_cross_entropy, megatron/core/tensor_parallel/cross_entropy.py; verl with
        Megatron). Otherwise new tensors at every step, 2.77 times the logits in fp32 (measured with TRL).
    overlap_grad_reduce: gradients are reduced beside the backward pass that makes them, layer by layer (DDP, FSDP,
        DeepSpeed's overlap_comm, Megatron-LM's overlap_grad_reduce); otherwise once it has ended. Absent: true where a
        replica is one rank and at zero_stage 3, false with any other parallelism (Megatron-LM's default).
    overlap_param_gather: weights are gathered ahead of the layer that needs them. zero_stage 3: in every pass (FSDP,
        DeepSpeed); absent: true. zero_stage 1 and 2: updated weights come beside the first forward pass of the next
        update (Megatron-LM's overlap_param_gather), those of an iteration's last update at its end; absent: false.
    overlap_tensor_parallel: collectives of tensor-parallel ranks run beside the products next to them, in as many
        pieces as ranks, all but one of which can hide (Megatron-LM's tp_comm_overlap).
    offload_optimizer: Adam on the host, gradients and weights over PCIe at every step. offload_optimizer_fraction: of
        so many of the parameters, those of the others on the GPU meanwhile (Megatron-LM's optimizer_offload_fraction,
        `ratio` of DeepSpeed's ZeRO-Offload++).
    offload_states: what leaves a trained model's GPUs for the host while it is not needed, and comes back. `optimizer`:
        master weights and moments between updates (OpenRLHF's deepspeed_enable_sleep, verl's optimizer_offload). `all`:
        the weights too, from the last stage of an iteration that uses them to the first of the next (NeMo-RL; verl's
        param_offload with it). Gradients have ended by then, and their memory is given back. `image`: as `all`, but all
        memory is copied, gradients too (slime's offload_train, by torch_memory_saver). Room on the host is kept.
    offload_gradients: with an offloaded optimizer, gradients leave for the host as each layer's backward makes them,
        beside the backward, and do not stay on the GPU (ZeRO-Offload; zero_stage 2 or 3). What earlier micro-batches
        have left there comes back to be added to. Otherwise they leave once, after the last backward.
    host_gradient_precision: `fp32` where offloaded gradients are summed in fp32, and cross PCIe so (DeepSpeed's
        grad_accum_dtype under ZeRO-3). Default: gradient_precision.
    offload_activations: what a layer keeps for its backward goes to the host beside the layer's forward and comes back
        beside its backward, as far as their compute is long enough (Transformer Engine's cpu offloading; verl's
        enable_activation_offload); two layers at a time are on the GPU.
    offload_parameters: weights rest in host memory and stream in for each pass.
    lora_rank: 0 trains everything. lora_target_modules: which linear modules have factors: `all-linear`, `attention`
        (those of attention alone), or a list of names as PEFT (q_proj, o_proj, down_proj, ...) or as Megatron Bridge
        (linear_qkv, linear_proj, linear_fc1, linear_fc2: one pair of factors for q, k and v, and for gate and up) has
        them. Routed experts have none. verl's default is all-linear with FSDP (verl/trainer/config/model/hf_model.yaml
        @17aa18cb) and those four with Megatron (its lora.target_modules).
    trainable_layers: only the top so many layers train; absent: all.
    backend: what trains it in a real run: `deepspeed`, or plain `torch` (at zero_stage 0).
    """

    spec: str
    shape: ModelSpec
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    gradient_precision: Literal["fp32"] | None = None
    gemm_precision: Literal["fp8", "int8"] | None = None
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 3
    shard_ranks: Count | None = None
    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    context_parallel: Count = 1
    context_exchange: Literal["ring", "all_gather", "all_to_all"] = "ring"
    pipeline_chunks: Count = 1
    first_stage_layers: Count | None = None
    last_stage_layers: Count | None = None
    sequence_parallel: bool = True
    expert_parallel: Count = 1
    expert_tensor_parallel: Count | None = None
    routing_imbalance: Annotated[float, Field(ge=1, le=1e3)] = 1.0
    micro_batch_samples: Count = 4
    score_micro_batch_samples: Count = 16
    micro_batch_tokens: Count | None = None
    score_micro_batch_tokens: Count | None = None
    recompute: Literal["none", "selective", "full"] = "full"
    flash_attention: bool = True
    fused_kernels: bool = True
    logits_chunk_tokens: Count | None = None
    logits_in_place: bool = False
    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None
    overlap_tensor_parallel: bool = False
    offload_optimizer: bool = False
    offload_optimizer_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    offload_states: Literal["optimizer", "all", "image"] | None = None
    offload_gradients: bool = False
    host_gradient_precision: Literal["fp32"] | None = None
    offload_activations: bool = False
    offload_parameters: bool = False
    lora_rank: NonNegativeCount = 0
    lora_target_modules: LoraTargets = ALL_LINEAR
    trainable_layers: Count | None = None
    backend: Literal["deepspeed", "torch"] = "deepspeed"

    @property
    def bytes_per_parameter(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def lora_parameters(self, layers: int | None = None) -> int:
        """Of LoRA's factors in so many layers, or in all."""
        return lora_parameters(self.shape, self.lora_rank, layers, self.lora_target_modules)

    @property
    def gradient_bytes(self) -> int:
        """Of one element, as it is kept and reduced."""
        return 4 if self.gradient_precision else self.bytes_per_parameter

    @property
    def shards_master(self) -> bool:
        """Whether the sharded weights of a trained model are the fp32 master itself, gathered in 16 bits (FSDP)."""
        return self.zero_stage == 3 and self.gradient_precision is not None and self.precision != "fp32"

    @property
    def ranks_per_replica(self) -> int:
        return self.tensor_parallel * self.context_parallel * self.pipeline_parallel

    @property
    def ranks_per_copy(self) -> int:
        """Ranks that hold the weights once, unless they are sharded over data-parallel ranks."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def given_stages(self) -> list[int]:
        """Layers of the stages that are not like the others."""
        return [count for count in (self.first_stage_layers, self.last_stage_layers) if count is not None]

    def stage_layers(self, stage: int) -> range:
        """The layers of a pipeline stage, both counted from 0."""
        last = self.pipeline_parallel - 1
        others = self.pipeline_parallel - len(self.given_stages)
        each = (self.shape.layers - sum(self.given_stages)) // max(others, 1)
        first = each if self.first_stage_layers is None else self.first_stage_layers
        start = 0 if stage == 0 else first + (stage - 1) * each
        if stage == last:
            return range(start, self.shape.layers)
        return range(start, start + (first if stage == 0 else each))

    @property
    def ranks_together(self) -> int:
        """The fewest ranks that hold whole replicas and whole sets of experts."""
        return self.pipeline_parallel * lcm(self.tensor_parallel * self.context_parallel, self.expert_ranks)

    @property
    def reduces_beside(self) -> bool:
        """Whether gradients are reduced beside the backward pass."""
        if self.overlap_grad_reduce is not None:
            return self.overlap_grad_reduce
        return self.zero_stage == 3 or self.ranks_together == 1

    @property
    def gathers_ahead(self) -> bool:
        """Whether weights are gathered beside a forward pass."""
        return self.zero_stage == 3 if self.overlap_param_gather is None else self.overlap_param_gather

    def shard_groups(self, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The ranks that hold one tensor-parallel part of the weights once together, under zero_stage 3."""
        alike = [ranks[part :: self.tensor_parallel] for part in range(self.tensor_parallel)]
        size = self.shard_ranks or len(alike[0])
        return tuple(part[first : first + size] for part in alike for first in range(0, len(part), size))

    def expert_split(self, tensor_parallel: int | None = None) -> ExpertSplit:
        """How routed experts lie on the ranks (of an engine, with its own `tensor_parallel`)."""
        return ExpertSplit(self.expert_parallel, self.expert_tensor_parallel or tensor_parallel or self.tensor_parallel)

    @property
    def expert_ranks(self) -> int:
        """Ranks of a pipeline stage over which the routed experts of a layer are spread once."""
        return self.expert_parallel * self.expert_split().tensor

    @property
    def matrix_bytes(self) -> int:
        """Bytes per element that the layers' products read."""
        return 1 if self.gemm_precision else self.bytes_per_parameter

    @model_validator(mode="after")
    def _stages_hold_all_layers(self) -> ModelUse:
        given, stages, layers = self.given_stages, self.pipeline_parallel, self.shape.layers
        if not given:
            return self
        if stages < 2 or self.pipeline_chunks > 1:
            raise ValueError(
                "first_stage_layers and last_stage_layers need pipeline_parallel above 1 and pipeline_chunks 1, given "
                f"{stages} and {self.pipeline_chunks}"
            )
        rest, others = layers - sum(given), stages - len(given)
        if rest < others or (rest % others if others else rest):
            raise ValueError(
                f"first_stage_layers and last_stage_layers leave {rest} of the {layers} layers of {self.spec} for "
                f"{others} stages; each must have as many, and at least one"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_split(self) -> ModelUse:
        shape, degree = self.shape, self.expert_parallel
        split = {"expert_parallel": degree, "expert_tensor_parallel": self.expert_tensor_parallel or 1}
        for name, value in split.items():
            if value > 1 and not shape.experts:
                raise ValueError(f"{name} is {value}, but {self.spec} has no experts")
        if shape.experts % degree:
            raise ValueError(f"expert_parallel is {degree}, but must divide the {shape.experts} experts of {self.spec}")
        tensor = self.expert_tensor_parallel or self.tensor_parallel
        if shape.expert_ffn % tensor:
            raise ValueError(
                f"expert_tensor_parallel is {tensor}, but must divide the width {shape.expert_ffn} of an expert of "
                f"{self.spec}"
            )
        if self.zero_stage == 3 and max(split.values()) > 1:
            raise ValueError("zero_stage 3 shards all experts over all ranks; with expert_parallel use stage 0, 1 or 2")
        return self

    @model_validator(mode="after")
    def _linear_attention_is_whole(self) -> ModelUse:
        if self.shape.linear and self.context_parallel > 1:
            raise ValueError(
                f"context_parallel is {self.context_parallel}, but the linear attention of {self.spec}, whose state "
                "passes from token to token, is not modelled on ranks that share sequences (allowed: 1)"
            )
        return self

    @model_validator(mode="after")
    def _heads_can_be_split(self) -> ModelUse:
        shape, degree = self.shape, self.context_parallel
        if degree == 1 or self.context_exchange != "all_to_all":
            return self
        heads, kv_heads = shape.heads // self.tensor_parallel, max(1, shape.kv_heads // self.tensor_parallel)
        allowed = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        if degree not in allowed:
            raise ValueError(
                f"context_parallel is {degree}, but all_to_all must split the {heads} heads of {self.spec} on a "
                f"tensor-parallel rank, and split or copy its {kv_heads} KV heads, evenly (allowed: "
                f"{', '.join(map(str, allowed))}; ring and all_gather: any)"
            )
        return self

    @model_validator(mode="after")
    def _offload_is_possible(self) -> ModelUse:
        if self.offload_gradients and (not self.offload_optimizer or self.zero_stage < 2):
            raise ValueError(
                "offload_gradients needs offload_optimizer: true and zero_stage 2 or 3, given "
                f"{str(self.offload_optimizer).lower()} and {self.zero_stage}"
            )
        if self.offload_gradients and self.ranks_together > 1:
            raise ValueError("offload_gradients needs replicas of one rank (DeepSpeed): no tensor or other parallelism")
        if self.host_gradient_precision and not self.offload_gradients:
            raise ValueError(
                "host_gradient_precision is fp32, but gradients stay on the GPU: offload_gradients is false"
            )
        if self.offload_activations and not self.flash_attention and self.recompute == "none":
            raise ValueError(
                "offload_activations leaves out the scores of attention, which are kept without flash_attention "
                "(allowed: flash_attention, or recompute selective or full)"
            )
        return self

    @model_validator(mode="after")
    def _states_can_move(self) -> ModelUse:
        if self.offload_optimizer_fraction < 1 and not self.offload_optimizer:
            raise ValueError(
                f"offload_optimizer_fraction is {self.offload_optimizer_fraction:g}, but needs offload_optimizer: true"
            )
        if self.offload_optimizer_fraction < 1 and self.offload_gradients:
            raise ValueError("offload_gradients takes all gradients: offload_optimizer_fraction must be 1")
        if self.offload_states == "optimizer" and self.offload_optimizer:
            raise ValueError(
                "offload_states is optimizer, but with offload_optimizer: true it is on the host (allowed: all, image)"
            )
        if self.offload_states not in (None, "optimizer") and self.offload_parameters:
            raise ValueError(
                f"offload_states is {self.offload_states}, but with offload_parameters: true weights rest on the host "
                "(allowed: optimizer)"
            )
        if self.shards_master and self.offload_optimizer and not self.offload_parameters:
            raise ValueError(
                "gradient_precision fp32 at zero_stage 3 makes the sharded weights the optimizer's: with "
                "offload_optimizer, offload_parameters must be true"
            )
        return self

    @model_validator(mode="after")
    def _overlap_is_possible(self) -> ModelUse:
        if self.overlap_param_gather and self.zero_stage == 0:
            raise ValueError(
                "overlap_param_gather is true, but at zero_stage 0 no weights are gathered (allowed: 1 to 3)"
            )
        if self.overlap_param_gather and self.zero_stage < 3 and not self.reduces_beside:
            raise ValueError("overlap_param_gather needs overlap_grad_reduce: true, as in Megatron-LM")
        if self.overlap_tensor_parallel and (self.tensor_parallel == 1 or not self.sequence_parallel):
            raise ValueError(
                "overlap_tensor_parallel needs tensor_parallel above 1 and sequence_parallel, given "
                f"{self.tensor_parallel} and {str(self.sequence_parallel).lower()}"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> ModelUse:
        if self.trainable_layers is not None and self.trainable_layers > self.shape.layers:
            raise ValueError(
                f"trainable_layers is {self.trainable_layers}, but {self.spec} has {self.shape.layers} layers"
            )
        if self.lora_rank > self.shape.hidden:
            raise ValueError(
                f"lora_rank is {self.lora_rank}, but the hidden size of {self.spec} is {self.shape.hidden}"
            )
        if self.lora_target_modules != ALL_LINEAR and not self.lora_rank:
            raise ValueError("lora_target_modules is given, but lora_rank is 0: nothing is adapted")
        if problem := targets_problem(self.shape, self.lora_target_modules):
            raise ValueError(f"lora_target_modules {problem}")
        if self.zero_stage == 3 and self.pipeline_parallel > 1:
            raise ValueError(
                "zero_stage 3 shards weights over data-parallel ranks; with pipeline_parallel above 1 use stage 0, 1 "
                "or 2"
            )
        if self.shard_ranks is not None and self.zero_stage < 3:
            raise ValueError(f"shard_ranks is {self.shard_ranks}, but weights are sharded at zero_stage 3 only")
        if self.backend == "torch" and self.zero_stage:
            raise ValueError(f"backend torch shards nothing: zero_stage must be 0, given {self.zero_stage}")
        return self


class Models(Record):
    """The four models of PPO; those that the algorithm does not have are neither held nor run.

    share_actor_critic: the critic is a value head on the actor (three models).
    """

    actor: ModelUse
    critic: ModelUse
    reference: ModelUse
    reward: ModelUse
    share_actor_critic: bool = False


class Lengths(Record):
    """A distribution of token counts per sequence.

    fixed: tokens. uniform: min_tokens..max_tokens. lognormal: mean_tokens of the unclipped distribution and sigma of
    its logarithm. empirical: a column of a CSV file of `traces/lengths` or a path. All are clipped at max_tokens.
    within_prompt_correlation: correlation of the logarithms among the responses to one prompt.
    """

    distribution: Literal["fixed", "uniform", "lognormal", "empirical"] = "fixed"
    tokens: Count | None = None
    min_tokens: Count = 1
    max_tokens: Count | None = None
    mean_tokens: Annotated[float, Field(gt=0, le=1e9)] | None = None
    sigma: Annotated[float, Field(gt=0, le=5)] | None = None
    file: str | None = None
    column: str | None = None
    within_prompt_correlation: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _complete(self) -> Lengths:
        needed = {
            "fixed": ("tokens",),
            "uniform": ("max_tokens",),
            "lognormal": ("mean_tokens", "sigma", "max_tokens"),
            "empirical": ("file", "column", "max_tokens"),
        }[self.distribution]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"distribution {self.distribution!r} needs {', '.join(missing)}")
        if self.distribution != "fixed" and self.min_tokens > (self.max_tokens or 1):
            raise ValueError(f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}")
        return self

    @property
    def longest(self) -> int:
        """The largest length that can occur, in tokens."""
        return self.tokens if self.distribution == "fixed" else self.max_tokens  # type: ignore[return-value]


class Turns(Record):
    """Responses in several turns, with calls of a tool (or steps of an environment) between them.

    number: turns of a response, a distribution as of tokens (its counts are turns). workload.response_tokens are those
        that each turn generates.
    observation_tokens: that a tool's answer adds to the context; absent: none. They take part in caches, scoring and
        training as other tokens do; that no loss is on them saves nothing.
    tool_latency: of one call, a number of seconds or a distribution; absent: 0.
    tool_concurrency: calls at work at once for each engine, first come, first served; absent: any number. (Of a tool
        that n engines share, give a share.)
    keep_prefix: the engine keeps the blocks of a context while its tool is at work, until others need them (prefix
        caching of a sample's own context; `generation.prefix_caching` adds what samples share); otherwise a turn
        computes its whole context again.
    max_tokens: of a response, all turns and observations together. What exceeds it is cut off; an observation that
        leaves no room for another token ends the response (as verl's tool_agent_loop). Absent: whatever is drawn.
    """

    number: Lengths
    observation_tokens: Lengths | None = None
    tool_latency: Latency = Latency(seconds=0.0)
    tool_concurrency: Count | None = None
    keep_prefix: bool = True
    max_tokens: Count | None = None


class Workload(Record):
    """What one iteration processes.

    prompts x responses_per_prompt = samples. padded: scoring and training compute every sample at the maximum
    length (plain Hugging Face batches); otherwise padding is removed.
    turns: of responses with tool calls between them; absent: one turn.
    balanced: the samples of a stage are shared among the replicas of a place by tokens, equally many each (verl's
        balance_batch, for every mini-batch by itself); otherwise in order. Without a controller (`execution: spmd`)
        co-located replicas that hold whole models keep what they have generated.
    responses: in a real run, `forced` to the lengths that are drawn here, or `sampled` until the end-of-sequence token,
        up to the longest of them.
    """

    prompts: Count = 512
    responses_per_prompt: Count = 1
    prompt_tokens: Lengths
    response_tokens: Lengths
    turns: Turns | None = None
    padded: bool = True
    balanced: bool = False
    responses: Literal["forced", "sampled"] = "forced"

    @property
    def samples(self) -> int:
        return self.prompts * self.responses_per_prompt

    @property
    def turns_alike(self) -> bool:
        """Whether samples of equal length have the same turns in any case."""
        if self.turns is None:
            return True
        drawn = self.turns.number, self.turns.tool_latency, self.turns.observation_tokens, self.response_tokens
        return all(d is None or d.distribution == "fixed" for d in drawn)

    @property
    def longest_response(self) -> int:
        """Tokens after the prompt of the longest sample that can occur, those of tools included."""
        if self.turns is None:
            return self.response_tokens.longest
        number, observed = self.turns.number.longest, self.turns.observation_tokens
        longest = number * self.response_tokens.longest + (number - 1) * (observed.longest if observed else 0)
        return min(longest, self.turns.max_tokens or longest)

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest sample that can occur."""
        return self.prompt_tokens.longest + self.longest_response


def _last_layers(shape: ModelSpec, layers: int) -> ModelSpec:
    """A model of so many layers like a model's own, those without linear attention."""
    changes: dict[str, Any] = {"layers": layers}
    if shape.linear:
        names = ("key_heads", "value_heads", "key_head_dim", "value_head_dim", "conv_kernel")
        changes |= {"attention_pattern": ("full",)} | {f"linear_{name}": 0 for name in names}
    return shape.model_copy(update=changes)


class Speculative(Record):
    """Speculative decoding of a continuous engine: `tokens` drafts of each sequence are verified in one step.

    acceptance_length: mean tokens that a sequence gains in a step, the one included that the model draws by itself: 1
        to tokens + 1 (counted in hundredths). Every step brings the mean to every sequence.
    draft: the model that drafts (a shipped model's name, or the path of a config.json), split as the engine is. Absent:
        a head of `layers` layers like the model's own, with its embedding and head (EAGLE, multi-token prediction), and
        with full attention where the model's is linear (Qwen3-Next, Qwen3.5); 0 layers: drafts cost nothing (look-up of
        n-grams).
    """

    tokens: Count
    acceptance_length: Annotated[float, Field(ge=1, le=1e3)]
    draft: str | None = None
    shape: ModelSpec | None = None
    layers: NonNegativeCount = 1

    @property
    def advance(self) -> Ratio:
        """acceptance_length."""
        return Ratio(str(self.acceptance_length)).limit_denominator(100)

    @property
    def slots(self) -> int:
        """Tokens for which a sequence may need room in the cache beyond its own: drafts, and drawn beyond its end."""
        return self.tokens + ceil(self.advance - Ratio(1, self.advance.denominator))

    @model_validator(mode="after")
    def _consistent(self) -> Speculative:
        if self.acceptance_length > self.tokens + 1:
            raise ValueError(
                f"acceptance_length is {self.acceptance_length:g}, but a step with {self.tokens} drafts gives at most "
                f"{self.tokens + 1} tokens"
            )
        if self.draft is not None and self.shape is None:
            raise ValueError(f"the shape of draft {self.draft!r} is missing")
        return self


class Generation(Record):
    """How responses are generated.

    engine: `zero3_per_token` gathers the sharded weights again for every decoded token, `hybrid` gathers them once per
        generation call into an inference layout, `engine` holds an own inference copy (vLLM, SGLang, shadow actor).
    tensor_parallel: ranks per engine (hybrid, engine).
    batching: `static` pads and runs until the longest of the batch has ended, `continuous` retires finished sequences
        and admits waiting ones (paged KV cache). Default: continuous for `engine`, else static.
    batch_samples: static batches of at most so many samples per replica; absent: all at once.
    expert_parallel: of the ranks of an engine, so many share the routed experts, the rest their matrices. The ranks of
        an engine hold the same tokens, so that nothing is exchanged but the all-reduce that sums their outputs.
    weights_precision, kv_precision: of the layers' matrices and the cache in the engine where they are not the model's.
        Products run at the GPU's rate for that precision if it has one, else at the model's (weights are unpacked on
        the way, as vLLM's Marlin kernels do). Embedding and head stay as they are.
    lora: `merged` into the weights before generation, or `served`: its factors run beside the weights at every step.
    memory_fraction: share of the GPU's memory for the engine; absent: what is left. Never more than that, either.
    memory_fraction_covers: what has to fit into it besides weights and KV cache. `profile`: the peak of one step at the
        scheduler's limits (vLLM's gpu_memory_utilization; what was there before the engine, as the CUDA context, is not
        counted). `profile_and_graphs`: the CUDA graphs too (vLLM from 0.21 on). `static`: nothing, and it is a share of
        what is free before the weights are loaded (SGLang's mem_fraction_static).
    cuda_graph_bytes: device memory of the engine's captured graphs on each rank ("Graph capturing finished ... took" in
        vLLM's log); they stay where they are while an engine sleeps.
    kv_cache_tokens: room in the KV cache as the engine's log gives it ("GPU KV cache size"), instead of a fraction.
    sleep: of an `engine` that shares its GPUs with training, between generation and the next weights. `level_1` copies
        the weights to host memory, where room for them is kept, and back before they are overwritten; `level_2` forgets
        them, so that it can generate once for each sync (vLLM's sleep levels). Both give memory back and take it again
        (`overheads.map_bytes_per_second`). Absent: it makes room and comes back in no time.
    max_sequences, prefill_tokens, block_tokens: scheduler limits of a continuous engine. The states of linear attention
        take blocks too. (vLLM makes them longer then: "Setting attention block size to ... tokens" in its log.)
    chunked_prefill: prompts of a continuous engine are cut and share steps with decoding sequences (vLLM's V1); else
        prompts go first, whole, while nobody decodes (vLLM's V0 by default, and real runs).
    prefix_caching: the responses to a prompt that run in one engine share the whole blocks of its tokens, which are
        computed once (vLLM's and SGLang's default; off here unless asked for).
    speculative: drafts are verified instead of one token drawn at a time; absent: no drafts.
    cuda_graphs: decode steps launched as one graph. Default: yes for `engine`, else no.
    kv_cache: `concatenated` copies what is cached at every step (Hugging Face's DynamicCache). `unpadded` then puts it
        in another order and takes padding out (its FlashAttention-2 with padded prompts). `preallocated` rows are
        as long as the longest sequence and read to its end. `paged` sequences read their own tokens only; static
        batches are padded in any case. Default: concatenated for `zero3_per_token`, preallocated for `hybrid`, paged
        for `engine`. Real runs preallocate, whatever is named here.
    routing: which engine gets which sample: `static` contiguous equal shares, `least_loaded` by tokens so far.
    """

    engine: Literal["zero3_per_token", "hybrid", "engine"] = "hybrid"
    tensor_parallel: Count = 1
    expert_parallel: Count = 1
    weights_precision: Literal["fp8", "int8"] | None = None
    kv_precision: Literal["fp8", "int8"] | None = None
    lora: Literal["merged", "served"] = "merged"
    batching: Literal["static", "continuous"] | None = None
    batch_samples: Count | None = None
    memory_fraction: Fraction | None = None
    memory_fraction_covers: Literal["profile", "profile_and_graphs", "static"] = "profile"
    cuda_graph_bytes: Annotated[float, Field(ge=0, le=1e12)] = 0.0
    kv_cache_tokens: Count | None = None
    sleep: Literal["level_1", "level_2"] | None = None
    max_sequences: Count = 256
    prefill_tokens: Count = 8192
    block_tokens: Count = 16
    chunked_prefill: bool = True
    prefix_caching: bool = False
    speculative: Speculative | None = None
    cuda_graphs: bool | None = None
    kv_cache: Literal["concatenated", "unpadded", "preallocated", "paged"] | None = None
    routing: Literal["static", "least_loaded"] = "static"

    @property
    def continuous(self) -> bool:
        return self.batching == "continuous" if self.batching else self.engine == "engine"

    @property
    def graphs(self) -> bool:
        return self.cuda_graphs if self.cuda_graphs is not None else self.engine == "engine"

    @property
    def copies_cache(self) -> bool:
        return self.kv_cache in ("concatenated", "unpadded") if self.kv_cache else self.engine == "zero3_per_token"

    @property
    def runs_adapters(self) -> bool:
        """Whether LoRA's factors are not merged while generating."""
        return self.lora == "served" or self.engine == "zero3_per_token"

    def kv_bytes(self, use: ModelUse) -> int:
        """Bytes of one cached element."""
        return 1 if self.kv_precision else use.bytes_per_parameter

    def engine_use(self, use: ModelUse) -> ModelUse:
        """How the layers of a model are split and computed in the engine."""
        changes: dict[str, Any] = {
            "context_parallel": 1,
            "expert_parallel": self.expert_parallel,
            "expert_tensor_parallel": self.tensor_parallel // self.expert_parallel,
            "gemm_precision": self.weights_precision,
            "fused_kernels": use.fused_kernels if self.engine == "zero3_per_token" else True,
        }
        return use.model_copy(update=changes)

    def without_drafts(self) -> Generation:
        return self.model_copy(update={"speculative": None})

    def draft_use(self, use: ModelUse) -> ModelUse | None:
        """What drafts for this model: a model of its own, or layers like the model's; None: nothing that runs."""
        if self.speculative is None or not (self.speculative.shape or self.speculative.layers):
            return None
        shape = self.speculative.shape or _last_layers(use.shape, self.speculative.layers)
        changes = {"spec": shape.name, "shape": shape, "lora_rank": 0, "lora_target_modules": ALL_LINEAR}
        return use.model_copy(update=changes)

    @model_validator(mode="after")
    def _consistent(self) -> Generation:
        if self.sleep and self.engine != "engine":
            raise ValueError(
                f"engine {self.engine} uses the training weights: sleep must be absent, given {self.sleep}"
            )
        if self.speculative and not self.continuous:
            raise ValueError("speculative decoding needs a continuous engine: batching must be continuous")
        if self.engine == "zero3_per_token" and self.tensor_parallel > 1:
            raise ValueError("engine zero3_per_token runs every rank on its own samples: tensor_parallel must be 1")
        if self.engine == "zero3_per_token" and self.weights_precision:
            raise ValueError(
                f"engine zero3_per_token computes with the training weights: weights_precision must be absent, given "
                f"{self.weights_precision}"
            )
        if self.prefix_caching and not self.continuous:
            raise ValueError("prefix_caching needs a paged KV cache: batching must be continuous")
        if self.kv_cache_tokens is not None and self.memory_fraction is not None:
            raise ValueError("kv_cache_tokens and memory_fraction both say how large the KV cache is: leave out one")
        if self.tensor_parallel % self.expert_parallel:
            raise ValueError(
                f"expert_parallel is {self.expert_parallel}, but must divide tensor_parallel {self.tensor_parallel}"
            )
        return self


class WeightSync(Record):
    """How new weights reach another copy of the model.

    method: `p2p` sends them to each replica in turn, blocking, bucket by bucket; `broadcast` once to all replicas.
        A copy on the same ranks is refreshed in place (all-gathers), whatever is named here.
    bucket_bytes: weights are flattened into messages of this size (the paper's code: 100 MB; slime's
        update_weight_buffer_size, AReaL's weight_chunked_mem_mb 1024).
    senders: who sends, each by the NIC nearest to it. `replica` every rank of the first replica its shard (of ZeRO-3
        ranks the first, which has gathered all). `stage_heads` the first rank of each of its pipeline stages, after an
        all-gather in every tensor-parallel group (slime: update_weight_from_distributed.py @02a644a7, ranks with data-
        and tensor-parallel rank 0). `first_rank` the first rank alone, after all others have sent it their parts
        (OpenRLHF: ppo_actor.py @012aae8c; AReaL's fsdp_engine; verl: nccl_checkpoint_engine.py @29f38651; NeMo-RL's
        packed_broadcast_producer, src 0; TRL). `all_ranks` every rank its own part, nothing is gathered before
        (verl: kimi_checkpoint_engine.py @28e60ee3; torchforge's push_weights @05359b09).
    through: `gpu` from GPU to GPU; `host` to the host's memory, from there by network or shared memory to the host of
        the other copy, and up again, one after the other; `disk` written to a storage that all share, and read again
        (slime: update_weight_from_disk.py @5a3552f2; AReaL's weight_update_mode disk). Through host or disk each
        replica fetches a copy of its own with `p2p`, each node one for all its ranks with `broadcast`.
    storage_bytes_per_second: at which the storage is written, and read, by all together; needed for `disk`.
    With LoRA only the factors move.
    """

    method: Literal["p2p", "broadcast"] = "p2p"
    bucket_bytes: Annotated[float, Field(ge=1, le=1e12)] = 100e6
    senders: Literal["replica", "stage_heads", "first_rank", "all_ranks"] = "replica"
    through: Literal["gpu", "host", "disk"] = "gpu"
    storage_bytes_per_second: BytesPerSecond | None = None

    @model_validator(mode="after")
    def _disk_has_a_rate(self) -> WeightSync:
        if self.through == "disk" and self.storage_bytes_per_second is None:
            raise ValueError("through disk needs storage_bytes_per_second")
        return self


class Periodic(Record):
    """Work every so many iterations. checkpoint: bytes over a storage rate; validation: prompts that are generated."""

    checkpoint_every: NonNegativeCount = 0
    checkpoint_bytes_per_second: BytesPerSecond = 2e9
    validation_every: NonNegativeCount = 0
    validation_prompts: Count = 256


class Effects(Record):
    """The five switches that a predicted speedup must be traceable to; off takes the effect away.

    decode: off = seconds proportional to tokens, equal lengths, one weight gather per call.
    links: off = transfers are free. memory: off = memory is infinite.
    sync: off = weight sync, reshard and offload take no time.
    efficiency: off = constant efficiency, no overhead, no bubble, no imbalance.
    """

    decode: bool = True
    links: bool = True
    memory: bool = True
    sync: bool = True
    efficiency: bool = True


class StrategyChoice(Record):
    """name: a file of `rlhfsim/strategies`; every other key is an option of its `build` function."""

    model_config = ConfigDict(extra="allow")
    name: str = "colocated"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Simulation(Record):
    """iterations: how many to simulate (the interval after the first is reported). seed: of the length draws.
    draws: independent length draws behind an interval."""

    iterations: Annotated[int, Field(ge=1, le=1000)] = 3
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    draws: Annotated[int, Field(ge=1, le=1000)] = 1


class Compare(Record):
    """Rows of `rlhfsim compare`: a label and the overrides that make the row out of this scenario."""

    baseline: str
    rows: dict[str, dict[str, Any]] = Field(min_length=1)

    @model_validator(mode="after")
    def _baseline_is_a_row(self) -> Compare:
        if self.baseline not in self.rows:
            raise ValueError(f"baseline {self.baseline!r} is not a row (rows: {', '.join(self.rows)})")
        return self


class Scenario(Record):
    """A complete question to the simulator.

    framework: with what it runs, a file of `hw_specs/frameworks/` or the path of one: its host times and kernels stand
        where nothing else is said.
    execution: who runs the program. `controller`: one process, which gathers what all ranks have made in a stage before
        it hands out the next: no rank scores before the last response is there, and samples can be dealt again in
        between (verl, NeMo RL, OpenRLHF, slime, ReaL). `spmd`: every rank, which goes on with its own samples as soon
        as it can (DeepSpeed-Chat, TRL, the paper's code, real runs here).
    keep: dotted fields that `compare` and `sweep` leave as they are when they tune a strategy; what is set on the
        command line, swept, or named in a row of `compare` is added by itself.
    """

    name: str = "scenario"
    description: str = ""
    framework: Framework | None = None
    cluster: Cluster
    models: Models
    workload: Workload
    algorithm: Algorithm = Algorithm()
    generation: Generation = Generation()
    strategy: StrategyChoice = StrategyChoice()
    execution: Literal["controller", "spmd"] = "controller"
    weight_sync: WeightSync = WeightSync()
    overheads: Overheads = Overheads()
    periodic: Periodic = Periodic()
    effects: Effects = Effects()
    simulation: Simulation = Simulation()
    compare: Compare | None = None
    keep: list[str] = Field(default_factory=list)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The models that there are: those of the algorithm, but none gives the reward where something else does."""
        models = self.steps.models
        return tuple(r for r in ROLES if r in models and (r != "reward" or self.algorithm.reward == "model"))

    @property
    def steps(self) -> Steps:
        """The algorithm's stages under these settings.

        Raises InputError for a setting that the algorithm does not have, or that leaves it without an advantage.
        """
        chosen, workload = self.algorithm, self.workload
        filtered = "algorithm.gen_prompts" if chosen.gen_prompts else "algorithm.filter_accept_probability"
        choices = (  # option of the algorithm, value, what it is without being named, field
            ("share_actor_critic", self.models.share_actor_critic, False, "models.share_actor_critic"),
            ("reference", False if chosen.kl_coefficient == 0 else chosen.reference, None, "algorithm.reference"),
            ("old_log_prob", chosen.old_log_prob, "always", "algorithm.old_log_prob"),
            ("rounds", self.rounds, 1, filtered),
        )
        options: dict[str, Any] = {"epochs": chosen.epochs, "minibatches": chosen.minibatches}
        for option, value, usual, field in choices:
            if value != usual:
                options[option] = value
                if option not in (allowed := options_of(chosen.name)):
                    message = f"algorithm {chosen.name} has nothing of the kind (it has {', '.join(allowed)})"
                    raise InputError(message, field=field)
        try:
            steps = named(chosen.name, **options)
        except ValueError as error:
            raise InputError(str(error), field="algorithm") from error
        if workload.responses_per_prompt < steps.least_responses:
            raise InputError(
                f"is {workload.responses_per_prompt}, but {chosen.name} compares the responses to a prompt: at least "
                f"{steps.least_responses} are needed",
                field="workload.responses_per_prompt",
            )
        return steps

    def overheads_of(self, part: Cluster) -> Overheads:
        """Those on the machines of a part of the cluster: what the scenario says, then what the part does."""
        if not self.cluster.parts:
            return self.overheads
        said = {name: getattr(self.overheads, name) for name in self.overheads.model_fields_set}
        return part.overheads.model_copy(update=said)

    @property
    def gen_prompts(self) -> int:
        """Prompts that are generated in a round."""
        return self.algorithm.gen_prompts or self.workload.prompts

    @property
    def rounds(self) -> int:
        """Rounds of generation in an iteration, at most."""
        once = self.algorithm.filter_accept_probability == 1 and self.gen_prompts == self.workload.prompts
        return 1 if once else self.algorithm.max_rounds

    def samples_through(self, stage: str) -> int:
        """Samples that pass through a stage in an iteration (if all rounds were needed, where there are several)."""
        if stage == "testing":
            return self.periodic.validation_prompts
        if self.rounds > 1 and stage.partition(".")[0] in IN_ROUNDS:
            return self.rounds * self.gen_prompts * self.workload.responses_per_prompt
        return self.workload.samples
