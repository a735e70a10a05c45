"""Time of the host that no kernel and no link explains, of a scenario or measured on a machine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import BytesPerSecond, Record, Seconds

EnginePhase = Literal["forward", "backward", "step", "gather"]
ZeroStage = Literal["zero_0", "zero_1", "zero_2", "zero_3"]


class HostTime(Record):
    """Seconds of a call = call_seconds + layers x layer_seconds + parameters x parameter_seconds."""

    call_seconds: Seconds = 0.0
    layer_seconds: Seconds = 0.0
    parameter_seconds: Seconds = 0.0

    def of(self, layers: float, parameters: float) -> float:
        return self.call_seconds + layers * self.layer_seconds + parameters * self.parameter_seconds


class EngineTime(Record):
    """What a training engine adds to a model's own passes, besides its collectives: hooks, copies into buckets.

    forward, backward: of one micro-batch. step: of one update. gather: of all weights once, for a hybrid engine to
    generate with.
    """

    forward: HostTime = HostTime()
    backward: HostTime = HostTime()
    step: HostTime = HostTime()
    gather: HostTime = HostTime()


Factor = Annotated[float, Field(gt=0, le=1e3)]


class Unexplained(Record):
    """Compute of a stage over what kernels and host times say: what a profile found by measurement and cannot name."""

    generation: Factor = 1.0
    scoring: Factor = 1.0
    training: Factor = 1.0


class Overheads(Record):
    """Time that no kernel and no link explains; each is a component of its own in the results.

    What a scenario leaves out is its cluster's (`cluster.overheads`), which `rlhfsim calibrate` measures.

    eager_layer_seconds: host time to launch one layer's forward kernels without CUDA graphs (a floor per layer and
        pass; where the host is the device, time of its own).
    eager_layer_backward_seconds: likewise of a layer's backward; absent: twice the forward.
    eager_pass_seconds: host time of one forward pass of a micro-batch or decode step outside the layers; a backward
        pass has as much. Default 0: hidden behind the device on a GPU.
    deepspeed: by ZeRO stage (`zero_0` to `zero_3`), what DeepSpeed adds on the host to the passes of a micro-batch and
        to an update. Default nothing: on GPUs its host runs ahead of the device, and how far was not measured.
    firing_seconds: host time of one stage's turn on one place outside its work (handing over data). Default 0.
    decode_layer_seconds: host time of one layer in a decode step without CUDA graphs; absent: eager_layer_seconds.
    decode_step_seconds: host time per decode step of an engine (scheduling, sampling, detokenising).
    decode_sequence_seconds: the same per running sequence and step.
    decode_hosts_seconds: the same per step and host of an engine with several ranks, where a driver hands out the work:
        what each rank has to do goes out, the tokens come back (vLLM's Ray executor: a compiled graph with one call per
        rank, whose channels to other hosts are remote calls). Default 0, unverified.
    controller_bytes_per_second: serialisation rate of a single controller that hands padded batches to workers and
        gathers results, serial at the driver (`execution: controller`); absent: that takes no time.
    controller_call_seconds: fixed cost of one such call, on the workers too (what every stage begins and ends with).
    sync_layer_seconds: host time of any weight sync, per layer of the model: gathering the parameters of a sharded unit
        and giving the allocator's memory back.
    sync_tensor_seconds, sync_bucket_seconds: host time of a weight sync to another copy, per tensor (naming it, calling
        the engines, loading it there) and per message of `weight_sync.bucket_bytes`, on each rank that sends. Default
        0, unverified: frameworks call every engine for each tensor (OpenRLHF, TRL) or each bucket (verl, slime, AReaL,
        NeMo-RL), and no source separates what that takes.
    lora_unit_seconds: host time of a forward pass through a LoRA factor that is a sharded unit of its own at zero_stage
        3, with a gather and hooks of its own (verl wraps every trained leaf with FSDP: get_fsdp_wrap_policy with
        is_lora, verl/utils/fsdp_utils.py @v0.4.1). It adds to the layer's, for at most two gathers run ahead of the
        device (limit_all_gathers of FSDP). Default 0: factors are gathered with their layer.
    lora_unit_backward_seconds: likewise of its backward pass, without a recomputation; absent: as long.
    decode_lora_layer_seconds: host time that served adapters (`generation.lora`) add to one layer of a decode step
        without CUDA graphs; absent: in proportion to their kernels.
    pageable_bytes_per_second: rate at which one process copies states between its GPU and pageable memory
        (offload_states: calls), either way; absent: the PCIe link's, as from pinned memory.
    host_adam_bytes_per_second: that Adam on the host (`offload_optimizer`) streams in one process; absent: its share of
        the node's memory bandwidth. Ray gives a process one thread unless told otherwise (OMP_NUM_THREADS =
        max(1, num_cpus), python/ray/_private/utils.py): PyTorch's fused AdamW, Megatron-LM's choice, reaches 32e9 with
        it on an EPYC of family 25, model 17 (0.88 ns a parameter in fp32, best of 15 steps; torch 2.13).
    map_bytes_per_second: rate at which a sleeping engine gives device memory back and takes it again
        (`generation.sleep`); absent: that takes no time.
    unexplained: factors by which generation, scoring and training compute longer than all other terms say.
    reserved_bytes: device memory that no tensor uses (context, NCCL buffers, allocator slack).
    engine_process_bytes: device memory that the process of an engine keeps beside a process that trains, asleep or not
        (a context and NCCL buffers of its own; its graphs are generation.cuda_graph_bytes). Default 0, unverified.
    process_host_bytes: host memory of every process of a rank (one that trains, one of an engine) beside states.
        Default 0, unverified.
    host_memory_share: of the host's memory, what may be used. Default all; Ray ends workers above 0.95
        (memory_usage_threshold, src/ray/common/ray_config_def.h).
    """

    eager_layer_seconds: Seconds | None = None
    eager_layer_backward_seconds: Seconds | None = None
    eager_pass_seconds: Seconds = 0.0
    deepspeed: dict[ZeroStage, EngineTime] = Field(default_factory=dict)
    firing_seconds: Seconds = 0.0
    decode_layer_seconds: Seconds | None = None
    decode_step_seconds: Seconds | None = None
    decode_sequence_seconds: Seconds | None = None
    decode_hosts_seconds: Seconds = 0.0
    controller_bytes_per_second: BytesPerSecond | None = None
    controller_call_seconds: Seconds = 0.0
    sync_layer_seconds: Seconds = 0.0
    sync_tensor_seconds: Seconds = 0.0
    sync_bucket_seconds: Seconds = 0.0
    lora_unit_seconds: Seconds = 0.0
    lora_unit_backward_seconds: Seconds | None = None
    decode_lora_layer_seconds: Seconds | None = None
    pageable_bytes_per_second: BytesPerSecond | None = None
    host_adam_bytes_per_second: BytesPerSecond | None = None
    map_bytes_per_second: BytesPerSecond | None = None
    unexplained: Unexplained = Unexplained()
    reserved_bytes: Annotated[float, Field(ge=0, le=1e13)] | None = None
    engine_process_bytes: Annotated[float, Field(ge=0, le=1e13)] = 0.0
    process_host_bytes: Annotated[float, Field(ge=0, le=1e13)] = 0.0
    host_memory_share: Annotated[float, Field(gt=0, le=1)] = 1.0
