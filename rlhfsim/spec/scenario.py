"""One scenario: what is trained, on what, with which algorithm and placement.

`rlhfsim.spec.loader` reads the YAML, resolves names (cluster, models) and builds these records; every field is
documented here once, and `rlhfsim show fields` prints this text.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from .base import BytesPerSecond, Count, Fraction, NonNegativeCount, Record, Seconds
from .hardware import Cluster
from .model_spec import ModelSpec
from .overheads import Overheads as Overheads

Role = Literal["actor", "critic", "reference", "reward"]
# Each is simulated: so many take 5 s (`rlhfsim simulate` of the quickstart, three iterations, one core).
MAX_STEPS = 2000
ROLES: tuple[Role, ...] = ("actor", "critic", "reference", "reward")


class ModelUse(Record):
    """How one of the four models is held and run, wherever the strategy places it.

    spec: a shipped model's name, or the path of a Hugging Face config.json.
    precision: of weights, activations and gradients; Adam keeps fp32 master weights and two moments.
    zero_stage: what is sharded over the model's data-parallel ranks: 0 nothing, 1 optimizer, 2 + gradients,
        3 + weights. A frozen model has only weights: 3 shards them, anything else keeps a full copy per rank.
    tensor_parallel, pipeline_parallel: ranks per replica; pipeline_chunks > 1 is the interleaved 1F1B schedule.
    sequence_parallel: activations between tensor-parallel regions are split as well.
    micro_batch_samples: samples per forward/backward of one replica; score_micro_batch_samples: of a scoring pass.
    recompute: activations kept in the forward pass (none: all are kept, full: only the layer inputs).
    logits_chunk_tokens: log-probabilities from logits of this many tokens at a time; absent: all at once.
    offload_optimizer: Adam on the host, gradients and weights over PCIe at every step.
    offload_parameters: weights rest in host memory and stream in for each pass.
    lora_rank: 0 trains everything. trainable_layers: only the top so many layers train; absent: all.
    backend: what trains it in a real run: `deepspeed`, or plain `torch` (at zero_stage 0).
    """

    spec: str
    shape: ModelSpec
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 3
    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    pipeline_chunks: Count = 1
    sequence_parallel: bool = True
    micro_batch_samples: Count = 4
    score_micro_batch_samples: Count = 16
    recompute: Literal["none", "selective", "full"] = "full"
    flash_attention: bool = True
    logits_chunk_tokens: Count | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    lora_rank: NonNegativeCount = 0
    trainable_layers: Count | None = None
    backend: Literal["deepspeed", "torch"] = "deepspeed"

    @property
    def bytes_per_parameter(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def ranks_per_replica(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

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
        if self.zero_stage == 3 and self.ranks_per_replica > 1:
            raise ValueError(
                "zero_stage 3 shards weights over data-parallel ranks; with tensor_parallel or "
                "pipeline_parallel above 1 use stage 0, 1 or 2"
            )
        if self.backend == "torch" and self.zero_stage:
            raise ValueError(f"backend torch shards nothing: zero_stage must be 0, given {self.zero_stage}")
        return self


class Models(Record):
    """The four models of PPO. share_actor_critic: the critic is a value head on the actor (three models)."""

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


class Workload(Record):
    """What one iteration processes.

    prompts x responses_per_prompt = samples. padded: scoring and training compute every sample at the maximum
    length (plain Hugging Face batches); otherwise padding is removed.
    responses: in a real run, `forced` to the lengths that are drawn here, or `sampled` until the end-of-sequence token,
        up to the longest of them.
    """

    prompts: Count = 512
    responses_per_prompt: Count = 1
    prompt_tokens: Lengths
    response_tokens: Lengths
    padded: bool = True
    responses: Literal["forced", "sampled"] = "forced"

    @property
    def samples(self) -> int:
        return self.prompts * self.responses_per_prompt


class Algorithm(Record):
    """name: a file of `rlhfsim/algorithms`. Optimizer steps per iteration = epochs x minibatches, at most 2000.

    reward: the reward `model`'s score, or a `function` on the host instead of a model: nothing of `models.reward` is
        held or run. (In a real run: the share of response tokens with an even id.)
    reward_function_seconds: what the function takes for one sample on one core. Default 0.
    reward_function_workers: processes per node that compute it for all ranks there; absent: each rank, for its samples.
    The rest is for real runs only; the simulator assumes Adam, and no number below changes a time.
    optimizer, learning_rate, adam_epsilon, gradient_clip: of actor and critic (clip: of the gradient's norm).
    kl_coefficient: reward lost per nat by which the actor leaves the reference. discount, gae_lambda: of GAE.
    clip_ratio, clip_values: limits of PPO's policy and value losses; value_coefficient: weight of the value loss where
        actor and critic share one model.
    """

    name: str = "ppo"
    epochs: Annotated[int, Field(ge=1, le=100)] = 1
    minibatches: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 1
    reward: Literal["model", "function"] = "model"
    reward_function_seconds: Seconds = 0.0
    reward_function_workers: Count | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = 1e-5
    adam_epsilon: Annotated[float, Field(gt=0, le=1e3)] = 1e-8
    gradient_clip: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    kl_coefficient: Annotated[float, Field(ge=0, le=1e3)] = 0.1
    discount: Fraction = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    clip_ratio: Annotated[float, Field(gt=0, le=1e3)] = 0.2
    clip_values: Annotated[float, Field(gt=0, le=1e3)] = 0.2
    value_coefficient: Annotated[float, Field(ge=0, le=1e3)] = 0.5

    @model_validator(mode="after")
    def _ends(self) -> Algorithm:
        if self.epochs * self.minibatches > MAX_STEPS:
            raise ValueError(
                f"epochs {self.epochs} x minibatches {self.minibatches} are {self.epochs * self.minibatches} optimizer "
                f"steps an iteration; at most {MAX_STEPS} are allowed"
            )
        return self


class Generation(Record):
    """How responses are generated.

    engine: `zero3_per_token` gathers the sharded weights again for every decoded token, `hybrid` gathers them once per
        generation call into an inference layout, `engine` holds an own inference copy (vLLM, SGLang, shadow actor).
    tensor_parallel: ranks per engine (hybrid, engine).
    batching: `static` pads and runs until the longest of the batch has ended, `continuous` retires finished sequences
        and admits waiting ones (paged KV cache). Default: continuous for `engine`, else static.
    batch_samples: static batches of at most so many samples per replica; absent: all at once.
    memory_fraction: share of the GPU's memory for weights and KV cache of the engine; absent: what is left.
    max_sequences, prefill_tokens, block_tokens: scheduler limits of a continuous engine.
    chunked_prefill: prompts of a continuous engine are cut and share steps with decoding sequences (vLLM's V1); else
        prompts go first, whole, while nobody decodes (vLLM's V0 by default, and real runs).
    cuda_graphs: decode steps launched as one graph. Default: yes for `engine`, else no.
    kv_cache: `concatenated` copies what is cached at every step (Hugging Face's DynamicCache). `preallocated` rows are
        as long as the longest sequence and read to its end. `paged` sequences read their own tokens only; static
        batches are padded in any case. Default: concatenated for `zero3_per_token`, preallocated for `hybrid`, paged
        for `engine`. Real runs preallocate, whatever is named here.
    routing: which engine gets which sample: `static` contiguous equal shares, `least_loaded` by tokens so far.
    """

    engine: Literal["zero3_per_token", "hybrid", "engine"] = "hybrid"
    tensor_parallel: Count = 1
    batching: Literal["static", "continuous"] | None = None
    batch_samples: Count | None = None
    memory_fraction: Fraction | None = None
    max_sequences: Count = 256
    prefill_tokens: Count = 8192
    block_tokens: Count = 16
    chunked_prefill: bool = True
    cuda_graphs: bool | None = None
    kv_cache: Literal["concatenated", "preallocated", "paged"] | None = None
    routing: Literal["static", "least_loaded"] = "static"

    @property
    def continuous(self) -> bool:
        return self.batching == "continuous" if self.batching else self.engine == "engine"

    @property
    def graphs(self) -> bool:
        return self.cuda_graphs if self.cuda_graphs is not None else self.engine == "engine"

    @property
    def copies_cache(self) -> bool:
        return self.kv_cache == "concatenated" if self.kv_cache else self.engine == "zero3_per_token"

    @model_validator(mode="after")
    def _consistent(self) -> Generation:
        if self.engine == "zero3_per_token" and self.tensor_parallel > 1:
            raise ValueError("engine zero3_per_token runs every rank on its own samples: tensor_parallel must be 1")
        return self


class WeightSync(Record):
    """How new weights reach another copy of the model.

    method: `p2p` sends them to each replica in turn, blocking, bucket by bucket; `broadcast` once to all replicas.
        A copy on the same ranks is refreshed in place (all-gathers), whatever is named here.
    bucket_bytes: weights are flattened into messages of this size (the paper's code: 100 MB).
    With LoRA only the factors move.
    """

    method: Literal["p2p", "broadcast"] = "p2p"
    bucket_bytes: Annotated[float, Field(ge=1, le=1e12)] = 100e6


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

    keep: dotted fields that `compare` and `sweep` leave as they are when they tune a strategy; what is set on the
        command line, swept, or named in a row of `compare` is added by itself.
    """

    name: str = "scenario"
    description: str = ""
    cluster: Cluster
    models: Models
    workload: Workload
    algorithm: Algorithm = Algorithm()
    generation: Generation = Generation()
    strategy: StrategyChoice = StrategyChoice()
    weight_sync: WeightSync = WeightSync()
    overheads: Overheads = Overheads()
    periodic: Periodic = Periodic()
    effects: Effects = Effects()
    simulation: Simulation = Simulation()
    compare: Compare | None = None
    keep: list[str] = Field(default_factory=list)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The models that there are: no model gives the reward where a function does."""
        return tuple(role for role in ROLES if role != "reward" or self.algorithm.reward == "model")
