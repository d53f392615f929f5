"""Interleaved rounds of several cases on one problem: times, and memory above what was held.

On a GPU times are CUDA events, each case behind a filler so that the host is ahead as it is in training,
and memory is the allocator's peak. On a CPU times are cpu-seconds, and memory is what a fresh process's
peak grows by. Gradients count in both.
"""

import math
import multiprocessing
import platform
import re
import statistics
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .cases import LOSSES, Case, Problem, gradient_error

GRADIENT_ERROR = {torch.bfloat16: 5e-3, torch.float32: 1e-5}


def run(case: Case, p: Problem) -> None:
    """One forward and backward."""
    loss = case.call(p)
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    for leaf in p.leaves:
        leaf.grad = None


@cache
def filler() -> tuple[Tensor, Tensor]:
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return square, torch.empty_like(square)


def time_on_gpu(case: Case, p: Problem) -> tuple[float, float]:
    """Milliseconds, and peak MiB above what was held."""
    square, out = filler()
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for _ in range(2):  # some milliseconds, in which the host launches what follows
        torch.mm(square, square, out=out)
    start.record()
    run(case, p)
    end.record()
    end.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    return start.elapsed_time(end), peak / 2**20


def time_on_cpu(case: Case, p: Problem) -> tuple[float, float]:
    """Milliseconds of CPU time; memory is `peak_memory`'s business."""
    start = time.process_time()
    run(case, p)
    return (time.process_time() - start) * 1e3, math.nan


def growth(pipe, name: str, shape: tuple[int, int, int, int]) -> None:
    """In a process of its own: MiB that one step adds to the peak."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    cpu = torch.device("cpu")
    run(LOSSES[name], Problem(64, 16, 300, 4, torch.float32, cpu))
    p = Problem(*shape, torch.float32, cpu)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
    held = peak()
    run(LOSSES[name], p)
    pipe.send((peak() - held) / 1024)


def peak_memory(name: str, shape: tuple[int, int, int, int]) -> float:
    """`growth`, forked from a server that has imported this and run nothing; nan but on Linux."""
    if platform.system() != "Linux":
        return math.nan
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=growth, args=(sender, name, shape))
    process.start()
    process.join()
    return receiver.recv() if process.exitcode == 0 else math.nan


def failure(case: Case, p: Problem, dtype: torch.dtype, error: list[float]) -> str | None:
    """Why a case cannot be timed: it does not run, or an op of ours is wrong. Fills its `error`."""
    device = p.hidden.device
    try:
        error.append(gradient_error(case, dtype, device))
        run(case, p)
    except Exception as raised:  # not passed over: it is the row's note
        return f"{type(raised).__name__}: {raised}".splitlines()[0][:150]
    bound = GRADIENT_ERROR[dtype]
    if case.group in ("ours", "experiment") and error[0] > bound:
        return f"gradient error {error[0]:.1e}, at most {bound:.0e}"
    return None


def measure(
    p: Problem,
    cases: dict[str, Case],
    rounds: int,
    deadline: float,
) -> list[dict]:
    """A row a case: median and spread of its times, and of its ratio to its floor in the same round.

    No round begins after `deadline` (time.monotonic()); a case that fails is a row that says why.
    """
    on_gpu = p.hidden.device.type == "cuda"
    time_one = time_on_gpu if on_gpu else time_on_cpu
    notes: dict[str, str] = {}
    errors: dict[str, list[float]] = {name: [] for name in cases}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for name, case in cases.items():
        if time.monotonic() > deadline:
            notes[name] = "no time left"
        elif why := failure(case, p, p.hidden.dtype, errors[name]):
            notes[name] = why
            if on_gpu:
                torch.cuda.empty_cache()
    for turn in range(rounds + 1):  # the first is not recorded: autotuning, clocks
        if time.monotonic() > deadline and turn > 1:
            break
        for name in cases:
            if name not in notes:
                result = time_one(cases[name], p)
                found[name] += [result] if turn else []
    rows = []
    for name, case in cases.items():
        times = found[name] or [(math.nan, math.nan)]
        ms = [result[0] for result in times]
        floor = [result[0] for result in found[case.floor]] or [math.nan]
        ratios = [mine / least for mine, least in zip(ms, floor, strict=False)]
        rows.append(
            {
                "case": name,
                "work": case.work,
                "group": case.group,
                "ms": statistics.median(ms),
                "ms_low": min(ms),
                "ms_high": max(ms),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "peak_mib": max(result[1] for result in times),
                "grad_error": errors[name][0] if errors[name] else math.nan,
                "note": notes.get(name, ""),
            }
        )
    return rows
