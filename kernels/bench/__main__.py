"""Times the ops against bare matrix products, plain PyTorch and the peers, interleaved in one run.

python -m kernels.bench                                   # a GPU: bf16; a CPU: fp32, one shape
python -m kernels.bench --quick                           # the same tables in small
python -m kernels.bench --shape 512 64 5000 8 --rounds 3  # at a shape N D V K of one's own
python -m kernels.bench --out results/kernels_cpu.csv     # appends the rows

Every op of ours is checked against the fp64 reference in this very process first; one that is wrong
is not timed, and its row says so. The last lines say where we lose.
"""

import argparse
import time
from pathlib import Path

import torch

from .cases import LOSSES, TEACHER, Case, Problem
from .measure import measure, peak_memory
from .report import facts, record, shortfalls, show

GPU_SHAPES = [
    (16384, 768, 50304, 64),
    (8192, 2048, 128256, 64),
    (8192, 4096, 151936, 128),
]
CPU_SHAPE = (2048, 384, 50304, 32)
QUICK_SHAPE = (256, 64, 1031, 8)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", nargs=4, type=int, metavar=("N", "D", "V", "K"))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=30.0, help="no round begins after these")
    parser.add_argument("--without", nargs="+", default=[], metavar="TEXT", help="leaves out cases")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--commit", help="where there is no git to ask")
    return parser.parse_args()


def tables(options: argparse.Namespace, on_gpu: bool) -> list[tuple]:
    """Name, shape and cases of each table; what is less urgent comes last."""
    shapes = GPU_SHAPES if on_gpu else [CPU_SHAPE]
    if options.quick:
        shapes = [QUICK_SHAPE]
    if options.shape:
        shapes = [tuple(options.shape)]
    once = [case for case in LOSSES if case.name != "plain compiled"]  # compiling takes its time
    found = [("loss", shapes[0], LOSSES)]
    found += [("loss", shape, once) for shape in shapes[1:]]
    return found + [("teacher", shape, TEACHER) for shape in shapes]


def measure_table(
    name: str,
    shape: tuple[int, int, int, int],
    cases: list[Case],
    rounds: int,
    deadline: float,
    device: torch.device,
) -> list[dict]:
    """The rows of a table, with what they are of."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = measure(Problem(*shape, dtype, device), cases, rounds, deadline)
    for row in rows:
        if name == "loss" and not on_gpu and not row["note"]:
            row["peak_mib"] = peak_memory(row["case"], shape)
        row["table"] = name
        row["dtype"] = str(dtype).removeprefix("torch.")
        row["clock"] = "CUDA events" if on_gpu else "cpu-seconds"
        row |= zip(("N", "D", "V", "K"), shape, strict=True)
    return rows


def main() -> None:
    options = parse()
    end = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    rounds = options.rounds or (12 if on_gpu else 7)
    if options.quick:
        rounds = 3
    about = facts(device, options.commit)
    print(" ".join(f"{key}={value}" for key, value in about.items()), flush=True)
    plan = tables(options, on_gpu)
    measured = []
    for place, (name, shape, cases) in enumerate(plan):
        cases = [
            case
            for case in cases
            if case.group == "floor" or not any(text in case.name for text in options.without)
        ]
        now = time.monotonic()
        share = (end - now) / (len(plan) - place)
        # Losses come first and cost most: they may take twice their share of what is left.
        rows = measure_table(name, shape, cases, rounds, now + 2 * share, device)
        measured.append(rows)
        show(rows)
        print(f"[{end - time.monotonic():.0f} s left]", flush=True)
        if options.out:
            record(options.out, [row | about for row in rows])
        if on_gpu:
            torch.cuda.empty_cache()
    print("\n==== where we lose")
    lines = [line for rows in measured for line in shortfalls(rows)]
    print("\n".join(lines) or "nowhere")
    print("\n==== not measured")
    notes = [f"{row['case']}: {row['note']}" for rows in measured for row in rows if row["note"]]
    print("\n".join(dict.fromkeys(notes)) or "nothing")


if __name__ == "__main__":
    main()
