"""Interleaved rounds of several cases on one problem: times, and memory above what was held.

On a GPU times are CUDA events, each case behind a filler so that the host is ahead as it is in
training, and memory is the allocator's peak. On a CPU times are cpu-seconds, and memory is what a
fresh process's peak grows by. Gradients count in both.
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
    case = next(case for case in LOSSES if case.name == name)
    run(case, Problem(64, 16, 300, 4, torch.float32, cpu))
    p = Problem(*shape, torch.float32, cpu)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
    held = peak()
    run(case, p)
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


def why_not(case: Case, p: Problem) -> str:
    """Why a case cannot be timed: it does not run, or an op of ours is wrong; else nothing."""
    try:
        error = gradient_error(case, p.hidden.dtype, p.hidden.device)
        run(case, p)
    except Exception as raised:  # not passed over: it is the row's note
        if p.hidden.device.type == "cuda":
            torch.cuda.empty_cache()
        return f"{type(raised).__name__}: {raised}".splitlines()[0][:150]
    bound = GRADIENT_ERROR[p.hidden.dtype]
    if case.group == "ours" and error > bound:
        return f"gradient error {error:.1e}, at most {bound:.0e}"
    return ""


def row_of(
    case: Case,
    times: list[tuple[float, float]],
    floor: list[tuple[float, float]],
) -> dict:
    """Medians and spreads of a case's times, and of their ratios to its floor in the same round."""
    ms = [time for time, _ in times] or [math.nan]
    ratios = [mine[0] / least[0] for mine, least in zip(times, floor, strict=False)]
    ratios = ratios or [math.nan]
    return {
        "case": case.name,
        "work": case.work,
        "group": case.group,
        "ms": statistics.median(ms),
        "ms_low": min(ms),
        "ms_high": max(ms),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "peak_mib": max((peak for _, peak in times), default=math.nan),
    }


def measure(
    p: Problem,
    cases: list[Case],
    rounds: int,
    deadline: float,
) -> list[dict]:
    """Times the cases in turn, round by round; a row each, or its note says why not.

    Nothing is prepared, and no round but the first begins, after `deadline` (time.monotonic()).
    """
    device = p.hidden.device
    time_one = time_on_gpu if device.type == "cuda" else time_on_cpu
    notes = {}
    prepared = {}
    for case in cases:
        start = time.monotonic()
        notes[case.name] = "no time left" if start > deadline else why_not(case, p)
        prepared[case.name] = time.monotonic() - start
    times = {case.name: [] for case in cases}
    for turn in range(rounds + 1):
        if turn > 1 and time.monotonic() > deadline:
            break
        for case in cases:
            if notes[case.name]:
                continue
            result = time_one(case, p)
            if turn > 0:  # the first is not recorded: clocks, caches
                times[case.name].append(result)
    rows = []
    for case in cases:
        row = row_of(case, times[case.name], times[case.floor])
        row["grad_error"] = math.nan
        if times[case.name]:
            row["grad_error"] = gradient_error(case, p.hidden.dtype, device)
        row["prepare_s"] = round(prepared[case.name], 2)
        row["note"] = notes[case.name]
        rows.append(row)
    return rows
