"""Processes and devices: one process alone, or the ranks that torchrun started."""

import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from engine import UserError

# Dense bf16 peak in TFLOP/s (vendors' data sheets, without sparsity), by the words of the name that
# CUDA reports. The first match counts, so that the longer of two names stands first.
PEAK_BF16_TFLOPS = {
    "GB200": 2500,
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


@dataclass
class Ranks:
    """This process's place among its peers. Without peers the methods need no process group."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: object = None  # a gloo group for flags and names: waiting on it leaves the GPU free
    stop: str | None = None  # the name of the signal that came, if one did; agree on it with `any`
    training: bool = False  # whether there is something to save

    @property
    def main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank; every rank must call it."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def share(self, value):
        """Rank 0's `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def local_rows(self, batch_size: int, micro: int) -> list[int]:
        """The rows of a batch that are this rank's, micro-batch after micro-batch."""
        rows = []
        for start in range(self.rank * micro, batch_size, self.world * micro):
            rows.extend(range(start, start + micro))
        return rows

    def say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)


def pick_device(name: str, local_rank: int) -> torch.device:
    """`auto` takes CUDA, else Apple's mps, else the CPU; a device given by name must be there."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    kind = available[0] if name == "auto" else name
    if kind not in available:
        missing = "this machine has none that torch can use"
        raise UserError(f"device={name}: {missing}; device=auto takes what is there")
    return torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)


def open_device(name: str, local_rank: int = 0) -> torch.device:
    """Picks the device and sets how it computes, for every script that runs a model."""
    device = pick_device(name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # TF32 for fp32 matrix products, in every script: else eval.py and the evaluation inside
        # training would report different losses for one checkpoint. Full fp32 everywhere was the
        # other choice, but then dtype=float32 trains several times slower, for digits far below
        # the spread between seeds.
        # Under bfloat16 autocast little changes: most products are coarser than TF32 there.
        torch.set_float32_matmul_precision("high")
    return device


def start_ranks(device: str) -> Ranks:
    """Joins torchrun's process group, if there is one, and opens the device.

    The ranks talk through nccl on CUDA and gloo elsewhere.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    ranks = Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
        device=open_device(device, local_rank),
    )
    if ranks.world > 1:
        day = timedelta(days=1)  # rank 0 may make a token file while the others wait
        dist.init_process_group("nccl" if ranks.device.type == "cuda" else "gloo", timeout=day)
        ranks.control = dist.new_group(backend="gloo", timeout=day)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, frame: request_stop(ranks, number))
    return ranks


def request_stop(ranks: Ranks, number: int) -> None:
    """Training saves at the next micro-step and leaves.

    A second Ctrl-C, or one before there is something to save, leaves at once.
    """
    if number == signal.SIGINT and (ranks.stop or not ranks.training):
        raise KeyboardInterrupt
    ranks.stop = signal.Signals(number).name


def stop_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def copy_to_host_async(values: torch.Tensor) -> Callable[[], tuple[list[float], float]]:
    """Starts copying `values` to the host and returns a function that waits for the copy.

    It waits for these values alone, not for work queued later, and returns them with the time
    (time.perf_counter) at which they were there.
    """
    if values.device.type != "cuda":
        result = (values.tolist(), time.perf_counter())
        return lambda: result

    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> tuple[list[float], float]:
        copied.synchronize()
        return host.tolist(), time.perf_counter()

    return read


def autocast(device: torch.device, dtype: str) -> partial:
    """The autocast context of the key `dtype`; auto is bfloat16 on CUDA, else float32 (off)."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    enabled = dtype != "float32"
    return partial(torch.autocast, device.type, dtype=getattr(torch, dtype), enabled=enabled)


def explain_memory(error: RuntimeError, step: int, config) -> None:
    """Raises UserError with the keys to change if `error` says that memory ran out."""
    if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: " not in str(error):
        return
    micro = config.micro_batch_size
    advice = "a smaller model, or a smaller model.block_size"
    if not config.activation_checkpointing:
        advice = "activation_checkpointing=true"
    for size in range(micro // 2, 0, -1):
        if micro % size == 0:  # it still divides this rank's share of the batch
            advice = f"micro_batch_size={size}, which has the same gradient"
            break
    raise UserError(
        f"out of memory at step {step} with micro_batch_size={micro} sequences of"
        f" {config.model.block_size} tokens; set {advice}"
    ) from None


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None if it is unknown."""
    if device.type != "cuda":
        return None
    device_name = torch.cuda.get_device_name(device)
    for words, tflops in PEAK_BF16_TFLOPS.items():
        if re.search(rf"\b{words}\b", device_name):
            return tflops * 1e12
    return None


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the allocator's on CUDA, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, else KiB
