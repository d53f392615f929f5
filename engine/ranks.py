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

# Dense bf16 peak in TFLOP/s by words of the name that CUDA reports (vendors' data sheets, without sparsity); first match wins.
PEAK = {
    "GB200": 2500,
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
}
PEAK |= {"A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125}
PEAK |= {"RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71}


@dataclass
class Ranks:
    """This process's place among its peers. `stop` is set by a signal and agreed upon with `any`."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: object = (
        None  # a gloo group for flags and names: waiting on it never occupies the accelerator
    )
    stop: str | None = None  # the signal's name once one came
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
        """Which sequences of a batch are this rank's, in the order of its micro-batches."""
        starts = range(self.rank * micro, batch_size, self.world * micro)
        return [place for start in starts for place in range(start, start + micro)]

    def say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)


def pick_device(name: str, local_rank: int) -> torch.device:
    """`auto` takes CUDA, else Apple's mps, else the CPU; a device by name must be there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = next(kind for kind in there if there[kind]) if name == "auto" else name
    if not there[kind]:
        raise UserError(
            f"device={name}: this machine has none that torch can use; device=auto takes what is there"
        )
    return torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)


def open_device(name: str, local_rank: int = 0) -> torch.device:
    """Picks the device and sets how it computes. Every script that runs a model gets its device here."""
    device = pick_device(name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # TF32 for fp32 matrix products, in every script: else eval.py and the evaluation inside training
        # would report different losses for one checkpoint. Full fp32 everywhere was the other choice, but
        # then dtype=float32 trains several times slower, for digits far below the spread between seeds.
        # Under bfloat16 autocast little changes: most products are coarser than TF32 there.
        torch.set_float32_matmul_precision("high")
    return device


def start(device: str) -> Ranks:
    """Joins torchrun's process group where there is one, and opens the device (nccl on CUDA, gloo elsewhere)."""
    rank, local_rank, world = (
        int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    ranks = Ranks(rank, max(1, world), open_device(device, local_rank))
    if world > 1:
        day = timedelta(days=1)  # rank 0 may make a token file while the others wait
        dist.init_process_group("nccl" if ranks.device.type == "cuda" else "gloo", timeout=day)
        ranks.control = dist.new_group(backend="gloo", timeout=day)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, frame: request_stop(ranks, number))
    return ranks


def request_stop(ranks: Ranks, number: int) -> None:
    """Training saves at the next micro-step and leaves; a second Ctrl-C, or one before training, leaves at once."""
    if number == signal.SIGINT and (ranks.stop or not ranks.training):
        raise KeyboardInterrupt
    ranks.stop = signal.Signals(number).name


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def copy_to_host_async(values: torch.Tensor) -> Callable[[], tuple[list[float], float]]:
    """Starts copying `values` to the host; the call that it returns waits for them alone, not for work queued since.

    It gives them and the time (time.perf_counter) when they were there.
    """
    if values.device.type != "cuda":
        found = values.tolist(), time.perf_counter()
        return lambda: found
    host, done = torch.empty_like(values, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(values, non_blocking=True)
    done.record()

    def read() -> tuple[list[float], float]:
        done.synchronize()
        return host.tolist(), time.perf_counter()

    return read


def autocast(device: torch.device, dtype: str) -> partial:
    """The autocast context that the key `dtype` asks for; under auto bfloat16 on CUDA and none elsewhere."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    kind = getattr(torch, auto if dtype == "auto" else dtype)
    return partial(torch.autocast, device.type, dtype=kind, enabled=kind != torch.float32)


def explain_memory(error: RuntimeError, step: int, config, micro: int, world: int) -> None:
    """Raises UserError with what to turn, and by how much, where `error` says that memory ran out; else returns."""
    if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: " not in str(error):
        return
    share, block = config.batch_size // world, config.model.block_size
    smaller = max((size for size in range(1, micro // 2 + 1) if share % size == 0), default=None)
    ways = (
        [f"micro_batch_size={smaller} (the same gradient in {share // smaller} rounds)"]
        if smaller
        else []
    )
    ways += [] if config.activation_checkpointing else ["activation_checkpointing=true"]
    ways = ", or ".join(ways) or f"model.block_size={max(1, block // 2)}, or give a smaller model"
    rule = f"out of memory at step {step} with micro_batch_size={micro} sequences of {block} tokens"
    raise UserError(f"{rule}; set {ways}") from None


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, or None where it is unknown (then MFU reads n/a)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next(
        (peak * 1e12 for words, peak in PEAK.items() if re.search(rf"\b{words}\b", name)), None
    )


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the allocator's on CUDA, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
