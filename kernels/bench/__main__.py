"""Times the ops against bare matrix products, plain PyTorch and the peers, interleaved in one run.

python -m kernels.bench                                   # a GPU: bf16, three shapes; a CPU: fp32, one shape
python -m kernels.bench --quick                           # the same tables in small
python -m kernels.bench --shape 512 64 5000 8 --rounds 3  # at a shape N D V K of one's own
python -m kernels.bench --out results/kernels_cpu.csv     # appends the rows

Every op of ours is checked against the fp64 reference in this very process first; one that is wrong is not
timed, and its row says so. The last lines say where we lose.
"""

import argparse
import time
from pathlib import Path

import torch

from .cases import LOSSES, TEACHER, Case, Problem, chunk_cases
from .measure import measure, peak_memory
from .report import facts, record, shortfalls, show

GPU_SHAPES = ((16384, 768, 50304, 64), (8192, 2048, 128256, 64), (8192, 4096, 151936, 128))
CPU_SHAPE = (2048, 384, 50304, 32)
QUICK_SHAPE = (256, 64, 1031, 8)
GPU_CHUNKS = [1024, 2048, 3072, 4096, 8192]
CPU_CHUNKS = [256, 1024]


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--shape", nargs=4, type=int, metavar=("N", "D", "V", "K"))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=30.0, help="nothing is begun after these")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="TEXT", help="cases to leave out"
    )
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--commit", help="where there is no git to ask")
    return parser.parse_args()


def plan(options: argparse.Namespace, on_gpu: bool):
    """The tables in order: name, shape, cases. The chunk sizes come before what is less urgent."""
    shapes = GPU_SHAPES if on_gpu else (CPU_SHAPE,)
    if options.quick:
        shapes = (QUICK_SHAPE,)
    if options.shape:
        shapes = (tuple(options.shape),)
    chunks = GPU_CHUNKS if on_gpu else CPU_CHUNKS
    for place, shape in enumerate(shapes):
        cases = dict(LOSSES)
        if place:  # compiling takes its time
            del cases["plain compiled"]
        if not on_gpu:
            del cases["linear_topk_kl exp"]
        yield "loss", shape, cases
        if place == 0:
            rows = [count for count in chunks if count <= shape[0]]
            yield "chunk", shape, chunk_cases(rows)
            yield "teacher", shape, TEACHER
    for shape in shapes[1:]:
        yield "teacher", shape, TEACHER
        yield "chunk", shape, chunk_cases([count for count in chunks if count <= shape[0]])


def keep(cases: dict[str, Case], without: list[str]) -> dict[str, Case]:
    """The cases whose name holds none of these texts; floors stay."""
    return {
        name: case
        for name, case in cases.items()
        if case.group == "floor" or not any(text in name for text in without)
    }


def main() -> None:
    options = parse()
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rounds = options.rounds or (3 if options.quick else 12 if on_gpu else 7)
    about = facts(device, options.commit)
    print(" ".join(f"{key}={value}" for key, value in about.items()), flush=True)
    tables = []
    for name, shape, cases in plan(options, on_gpu):
        cases = keep(cases, options.without)
        problem = Problem(*shape, dtype, device)
        rows = measure(problem, cases, rounds, deadline)
        for row in rows:
            if not on_gpu and row["case"] in LOSSES and name == "loss" and not row["note"]:
                row["peak_mib"] = peak_memory(row["case"], shape)
            clock = "CUDA events" if on_gpu else "cpu-seconds"
            sizes = dict(zip(("N", "D", "V", "K"), shape, strict=True))
            row |= {"table": name, **sizes, "dtype": str(dtype), "clock": clock}
        del problem
        tables.append(rows)
        show(rows)
        if options.out:
            record(options.out, [row | about for row in rows])
        print(f"[{deadline - time.monotonic():.0f} s left]", flush=True)
        if on_gpu:
            torch.cuda.empty_cache()
    print("\n==== where we lose")
    lines = [line for rows in tables for line in shortfalls(rows)]
    print("\n".join(lines) or "nowhere")
    notes = [f"{row['case']}: {row['note']}" for rows in tables for row in rows if row["note"]]
    print("\n==== not measured")
    print("\n".join(dict.fromkeys(notes)) or "nothing")


if __name__ == "__main__":
    main()
