"""Times every op against plain PyTorch, its peers and bare matrix products, interleaved in one run. One command:

python -m kernels.bench                                   # a GPU: bf16, every table; a CPU: fp32, N=2048 D=384 V=50304 K=32
python -m kernels.bench --quick                           # the same tables in small
python -m kernels.bench --shape 512 64 5000 8 --rounds 3  # the losses and the teacher's side at one shape
python -m kernels.bench --out results/kernels_cpu.csv     # append the rows, plots beside it (a GPU has a file by default)

Nothing is timed before the ops agree with the fp64 reference in this very process. On a GPU times are CUDA events, each
case behind a filler so that the host is ahead as it is in training; memory is the allocator's peak above what was held.
On a CPU times are cpu-seconds and memory is what a fresh process's peak grows by. Gradients count in both. What is timed
stands in bench_cases.py. N rows, D width, V vocabulary, K teacher entries a row.
"""

import argparse
import csv
import datetime
import functools
import math
import multiprocessing
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from itertools import groupby, product
from pathlib import Path

import torch
from torch import Tensor

from .bench_cases import CASES, GIVEN, GRAD_ERROR, TEACHER, Case, Plan, Problem, check

TARGETS = {  # N, D, V -> the loss over three bare products, linear_topk over one
    (16384, 768, 50304): (1.25, 1.60),
    (8192, 2048, 128256): (1.15, 1.25),
    (8192, 4096, 151936): (1.10, 1.12),
    (2048, 384, 50304): (1.10, math.inf),  # a CPU's
}
MEMORY_SHARE, COPY_SHARE, STEP_RATIO = (
    1 / 5,
    0.85,
    1.03,
)  # of plain PyTorch's peak; of a copy's speed; of a plain step
KEYS = (
    "table",
    "N",
    "D",
    "V",
    "K",
    "dtype",
)  # rows that agree in these were timed in the same rounds


def step(case: Case, p: Problem) -> None:
    out = case.call(p)
    if isinstance(out, Tensor) and out.requires_grad:
        out.backward()
    for leaf in p.leaves:
        leaf.grad = None


@functools.cache
def filler() -> tuple[Tensor, Tensor]:
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return square, torch.empty_like(square)


def timed(case: Case, p: Problem, device: torch.device) -> tuple[float, float, float]:
    """One step's milliseconds, its wall seconds (on a CPU), its MiB above what was held (on a GPU)."""
    if device.type == "cpu":
        wall, cpu = time.perf_counter(), time.process_time()
        step(case, p)
        return (time.process_time() - cpu) * 1e3, time.perf_counter() - wall, math.nan
    square, out = filler()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for _ in range(2):  # some milliseconds, in which the host launches what follows
        torch.mm(square, square, out=out)
    start.record()
    step(case, p)
    end.record()
    end.synchronize()
    return start.elapsed_time(end), math.nan, (torch.cuda.max_memory_allocated() - held) / 2**20


def recover(name: str, why: str, device: torch.device) -> None:
    """Says what failed, frees what it held, and ends the run where it took the CUDA context with it."""
    print(f"{name}: {why}", flush=True)
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise SystemExit(
                f"{name} broke the CUDA context; run again --without {name!r}: {why}"
            ) from error


def measure(p: Problem, cases: dict[str, Case], rounds: int, device: torch.device) -> list[dict]:
    """Interleaved rounds of every case; a row each, its ratio that to its floor in the same round (median and range)."""
    spent, failed = {name: [] for name in cases}, {}
    for turn in range(
        -2 if device.type == "cuda" else -1, rounds
    ):  # first without record: compilation, autotuning
        for name in [name for name in cases if name not in failed]:
            try:
                took = timed(cases[name], p, device)
            except (
                Exception
            ) as error:  # not passed over: it is the row's note, and the last table's
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:150]
            if name in failed:
                recover(name, failed[name], device)
            elif turn >= 0:
                spent[name].append(took)
    rows = []
    for name, case in cases.items():
        times = [] if name in failed else spent[name]
        ratios = sorted(
            mine[0] / its[0] for mine, its in zip(times, spent[case.floor], strict=False)
        ) or [math.nan]
        ms, wall, peak = zip(*times, strict=True) if times else [[math.nan]] * 3
        row = {
            "case": name,
            "ratio": statistics.median(ratios),
            "low": ratios[0],
            "high": ratios[-1],
        }
        row |= {
            "cpu_s": statistics.median(ms) / 1e3 if device.type == "cpu" else math.nan,
            "wall_s": statistics.median(wall),
        }
        row |= {
            "peak_mib": max(peak),
            "ms": statistics.median(ms),
            "ms_low": min(ms),
            "ms_high": max(ms),
        }
        rows.append(
            row | {"loss": case.loss, "group": case.group, "note": failed.get(name, case.note)}
        )
    return rows


def grown(pipe, name: str, shape: tuple[int, ...]) -> None:
    """In a process of its own: sends the MiB by which one step's peak resident set grows."""

    def peak() -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    step(CASES[name], Problem(64, 16, 300, 4))
    p = Problem(*shape)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
    held = peak()
    step(CASES[name], p)
    pipe.send(max(0, peak() - held) / 1024)


def peak_memory(name: str, shape: tuple[int, ...]) -> float:
    """`grown`, forked from a server that has imported this and run nothing (nan but on Linux, and where the process died)."""
    if platform.system() != "Linux":
        return math.nan
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Problem.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=grown, args=(sender, name, shape))
    process.start()
    process.join()
    return receiver.recv() if process.exitcode == 0 else math.nan


class Bench:
    """The tables, in order; each is a list of rows."""

    def __init__(
        self, device: torch.device, plan: Plan, cases: dict[str, Case], worst: dict[str, float]
    ):
        self.device, self.plan, self.cases, self.worst, self.rows = device, plan, cases, worst, []

    def table(
        self,
        name: str,
        shape: tuple,
        cases: dict[str, Case],
        rounds: int,
        p: Problem | None = None,
        dtype=None,
    ):
        dtype = dtype or self.plan.dtype
        p, cpu = p or Problem(*shape, dtype, self.device), self.device.type == "cpu"
        if "plain PyTorch compiled" in cases:
            torch.compiler.reset()  # every shape compiles anew, and no limit on recompilations sends it back to eager
        rows = measure(p, cases, rounds, self.device)
        for row in rows:
            case = row["case"]
            if cpu and cases[case] is CASES.get(case) and row["ms"] > 0 and "compiled" not in case:
                row["peak_mib"] = peak_memory(case, shape)
            if case == "Liger KL" and row["ms"] > 0:
                row["peak_mib"] += p.teacher_probs.nbytes / 2**20
            row |= {
                "grad_error": self.worst.get(case, math.nan),
                "clock": "cpu-seconds" if cpu else "CUDA events",
            }
            row |= dict(zip(KEYS, (name, *shape, str(dtype).removeprefix("torch.")), strict=True))
        return rows

    def training_step(self) -> list[dict]:
        """A whole step of our GPT, the same but for its loss."""
        from model import (
            GPT,
            ModelConfig,
        )  # not in the installed package, which is the kernels alone

        L, H, D, block, B, V, K = self.plan.step
        shape, cuda = (B * block, D, V, K), self.device.type == "cuda"
        p, model = (
            Problem(*shape, device=self.device),
            GPT(ModelConfig(L, H, D, block), V).to(self.device),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        trunk, ids = torch.compile(model.hidden) if cuda else model.hidden, p.labels.view(B, block)

        def one(case: Case, p: Problem) -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=cuda):
                p.inputs = p.hidden, p.weight, _ = (
                    trunk(ids).flatten(0, 1),
                    model.head_weight,
                    p.labels,
                )
                out = case.call(p)
            out.backward()
            optimizer.step()
            optimizer.zero_grad()

        floor, names = (
            "step, linear_cross_entropy",
            ("linear_cross_entropy", "linear_topk_kl", "plain PyTorch CE"),
        )
        cases = {
            f"step, {name}": Case(partial(one, CASES[name]), "step", CASES[name].group, floor)
            for name in names
        }
        cases[floor] = cases[floor]._replace(group="floor")
        return self.table("step", shape, cases, self.plan.rounds, p)

    def chunk_rows(self, shape: tuple[int, ...]) -> list[dict]:
        """Rows of a chunk around the default, which stands first."""
        cases = {name: CASES[name] for name in ("three GEMMs", "linear_topk_kl")}
        paths = [
            {"_path": path} for path in (1, 2) if f"linear_topk_kl _path={path}" in self.cases
        ] or [{}]
        for options in [
            {"_rows": rows} | path
            for path in paths
            for rows in self.plan.chunks
            if rows <= shape[0]
        ]:
            call = partial(CASES["linear_topk_kl"].call, **options)
            cases[
                "linear_topk_kl " + " ".join(f"{key}={value}" for key, value in options.items())
            ] = Case(call)
        return self.table("chunk", shape, cases, self.plan.sweep_rounds)

    def sweep(self, axis: str, shape: tuple[int, ...]) -> list[dict]:
        names = ["three GEMMs", "linear_topk_kl", "plain PyTorch"]
        names += {"K": ["linear_log_probs + torch"], "V": ["plain PyTorch compiled"]}.get(axis, [])
        peers = [
            row
            for row in self.rows
            if row["table"] == "loss" and row["group"] == "peer" and row["ms"] > 0
        ]
        names += [min(peers, key=lambda row: row["ratio"])["case"]] if peers and axis == "V" else []
        return self.table(
            axis,
            shape,
            {name: self.cases[name] for name in names if name in self.cases},
            self.plan.sweep_rounds,
        )

    def sections(self, everything: bool) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
        plan = self.plan
        for name, cases in (("loss", self.cases), ("teacher", TEACHER)):
            yield from (
                (f"{name} {shape}", partial(self.table, name, shape, cases, plan.rounds))
                for shape in plan.shapes
            )
        if everything:
            for shape, dtype in product(plan.logits, GRAD_ERROR):
                yield (
                    f"row kernel {shape} {dtype}",
                    partial(self.table, "row kernel", shape, GIVEN, plan.rounds, dtype=dtype),
                )
            yield "step", self.training_step
            for axis, shapes in plan.sweeps.items():
                yield from (
                    (f"{axis} {shape}", partial(self.sweep, axis, shape)) for shape in shapes
                )
            yield from (
                (f"chunk {shape}", partial(self.chunk_rows, shape)) for shape in plan.shapes
            )


def shortfalls(rows: list[dict]) -> list[str]:
    """Where we lose: every target missed and everything of others that is faster or leaner than ours, a line each."""
    found = []
    for key, members in groupby(rows, lambda row: tuple(row[part] for part in KEYS)):
        named, where = {row["case"]: row for row in members}, f"{key[0]} {key[1:5]}: "
        loss, topk = TARGETS.get(key[1:4], (math.inf, math.inf))
        goals = {"linear_topk": topk} | ({"linear_topk_kl": loss} if key[0] == "loss" else {})
        mine = {
            row["loss"]: row for row in reversed(named.values()) if row["group"] == "ours"
        }  # the first of each loss
        for case, row in named.items():
            if row["clock"] != "cpu-seconds":  # these two are a GPU's
                goals |= {"topk_kl": 1 / COPY_SHARE, "step, linear_topk_kl": STEP_RATIO}
            own, ours = (
                mine.get("both" if row["loss"] == "dense" else row["loss"]),
                row["group"] == "ours",
            )
            if ours and math.isnan(row["ms"]):
                found.append(f"{where}{case} failed: {row['note']}")
            if row["ratio"] > goals.get(case, math.inf):
                found.append(
                    f"{where}{case}: {row['ratio']:.3f} of its floor, target {goals[case]:.3f}"
                )
            if ours and row["grad_error"] > GRAD_ERROR[getattr(torch, key[5])]:
                found.append(f"{where}{case}: gradient error {row['grad_error']:.1e}")
            if (
                own
                and case == "plain PyTorch"
                and key[0] == "loss"
                and own["peak_mib"] > MEMORY_SHARE * row["peak_mib"]
            ):
                share = f"{own['peak_mib'] / row['peak_mib']:.3f} of plain PyTorch's peak"
                found.append(f"{where}{own['case']}: {share}, target {MEMORY_SHARE:.3f}")
            if own is None or row is own or row["group"] == "floor":
                continue
            if row["ms"] < own["ms"] * (
                0.98 if ours else 1
            ):  # a way of our own that the default should have taken
                wrong = (
                    f" (its gradient is {row['grad_error']:.1%} off)"
                    if row["grad_error"] > 5e-3
                    else ""
                )
                found.append(
                    f"{where}{case} is faster than {own['case']}: {row['ms']:.4g} ms, not {own['ms']:.4g}{wrong}"
                )
            if row["peak_mib"] < own["peak_mib"] and row["ms"] <= 1.5 * own["ms"] and not ours:
                sizes = f"{row['peak_mib']:.0f} MiB, not {own['peak_mib']:.0f}"
                found.append(f"{where}{case} is leaner than {own['case']}: {sizes}")
    return found


def show(rows: list[dict]) -> None:
    def text(form: str, *values: float) -> str:
        return "-" if math.isnan(values[0]) else form.format(*values)

    for key, members in groupby(rows, lambda row: [row[part] for part in KEYS]):
        print(
            f"\n{key[0]} "
            + " ".join(f"{name}={value}" for name, value in zip(KEYS[1:], key[1:], strict=True))
        )
        print(f"{'case':36} {'ms':>25} {'ratio to floor':>18} {'MiB':>7} {'grad err':>8}")
        for row in members:
            ms = text("{:.3f} ({:.3f}-{:.3f})", row["ms"], row["ms_low"], row["ms_high"])
            ratio = text("{:.3f} ({:.2f}-{:.2f})", row["ratio"], row["low"], row["high"])
            peak, error = text("{:.0f}", row["peak_mib"]), text("{:.1e}", row["grad_error"])
            print(f"{row['case']:36} {ms:>25} {ratio:>18} {peak:>7} {error:>8} {row['note']}")


def plot(rows: list[dict], axis: str, path: Path) -> None:
    """Time and memory of every case against `axis` (V or K)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = dict(zip(("ms", "peak_mib"), figure.subplots(1, 2), strict=True))
    for (column, panel), label in zip(
        panels.items(), ("forward + backward, ms", "extra memory, MiB"), strict=True
    ):
        for case in dict.fromkeys(row["case"] for row in rows):
            points = sorted((row[axis], row[column]) for row in rows if row["case"] == case)
            panel.plot(*zip(*points, strict=True), marker="o", label=case)
        panel.set_xscale("log", base=2)
        panel.set(xlabel=axis, ylabel=label, ylim=(0, None))
    panels["ms"].legend(fontsize=8)
    figure.suptitle(
        ", ".join(str(rows[0][key]) for key in ("device", "dtype", "commit")), fontsize=9
    )
    figure.savefig(path, dpi=120)


def record(path: Path, rows: list[dict]) -> None:
    """Appends rows; a file with other columns keeps its own, and new ones come after them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="") as stream:
        stream.seek(0)
        rows = [*csv.DictReader(stream), *rows]
    fresh = path.with_suffix(".partial")
    with open(fresh, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    fresh.replace(path)


def output(command: str) -> str:
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def facts(device: torch.device, commit: str | None) -> dict:
    """Machine, versions, commit and time: what stands beside every figure."""
    installed = {part.metadata["Name"]: part.version for part in metadata.distributions()}
    wanted = ("liger_kernel", "cut-cross-entropy", "orda-kernel", "quack-kernels")
    cpu = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names, cuda = (
        [line.split(":")[1].strip() for line in cpu if "model name" in line],
        device.type == "cuda",
    )
    return {
        "device": torch.cuda.get_device_name() if cuda else (names or [platform.processor()])[0],
        "driver": output("nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0")
        if cuda
        else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": installed.get("triton", "none"),
        "peers": " ".join(f"{name}-{installed[name]}" for name in wanted if name in installed),
        "python": platform.python_version(),
        "commit": commit or output("git describe --always --dirty"),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        nargs=4,
        type=int,
        metavar=("N", "D", "V", "K"),
        help="the main tables at this shape alone",
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    minutes = 8.0 if torch.cuda.is_available() else 30.0
    parser.add_argument(
        "--minutes",
        type=float,
        default=minutes,
        help="after these, tables to come are skipped by name",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="leave out cases whose name holds TEXT",
    )
    parser.add_argument(
        "--out", type=Path, help="CSV to append to (on a GPU results/kernels_<device>.csv)"
    )
    parser.add_argument("--commit", help="where there is no git to ask")
    options, start = parser.parse_args(), time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about, plan, path = facts(device, options.commit), Plan(device, options.quick), options.out
    plan.shapes = (tuple(options.shape),) if options.shape else plan.shapes
    plan.rounds = options.rounds or plan.rounds
    if path is None and device.type == "cuda":
        short = next(
            (word for word in about["device"].split() if any(map(str.isdigit, word))), "gpu"
        )
        path = Path("results") / f"kernels_{short.lower()}.csv"
    print(" ".join(f"{key}={value}" for key, value in about.items()), flush=True)
    out = [*options.without, *(["_path="] if device.type == "cpu" else [])]
    cases = {
        name: case
        for name, case in CASES.items()
        if case.group == "floor" or not any(text in name for text in out)
    }
    bench = Bench(device, plan, cases, check(device, plan.dtype, cases))
    print(f"[{time.monotonic() - start:.0f} s] the ops agree with fp64")
    missing = []
    for name, section in bench.sections(everything=not options.shape):
        if time.monotonic() - start > 60 * options.minutes:
            missing.append(f"{name}: skipped, {options.minutes:g} minutes are over")
            continue
        try:
            rows = [row | about for row in section()]
        except (
            ImportError,
            torch.OutOfMemoryError,
        ) as error:  # not passed over: it is named in the end
            missing.append(f"{name}: {error!r:.150}")
            continue
        bench.rows += rows
        show(rows)
        print(f"[{time.monotonic() - start:.0f} s]", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if path:
            record(path, rows)
    rows = bench.rows
    for axis in ("V", "K") if path else ():
        if chosen := [row for row in rows if row["table"] == axis]:
            plot(chosen, axis, path.with_name(f"{path.stem}_{axis}.png"))
    print("\n==== the main tables again")
    show([row for row in rows if row["table"] == "loss"])
    print("\n==== where we lose", *(shortfalls(rows) or ["nowhere"]), sep="\n")
    missing += dict.fromkeys(
        f"{row['case']}: {row['note']}" for row in rows if math.isnan(row["ms"])
    )
    print("\n==== not measured", *(missing or ["nothing"]), sep="\n")


if __name__ == "__main__":
    main()
