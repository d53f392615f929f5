"""Times the losses against plain PyTorch and against the floor of three bare matrix products, interleaved in one run.

python -m kernels.bench                                   # N=2048 D=384 V=50304 K=32, fp32 on the CPU
python -m kernels.bench --shape 512 64 5000 8 --rounds 3  # another shape
python -m kernels.bench --out results/kernels_cpu.csv     # append the medians

Nothing is timed before the chunked losses agree with the fp64 reference in this very process. Times are cpu-seconds of
the process (wall seconds beside them); memory is what a fresh process's peak grows by, the gradients included.
"""

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from . import linear_cross_entropy, linear_log_probs, linear_topk, linear_topk_kl


def problem(N: int, D: int, V: int, K: int, T: float = 1.0) -> dict:
    """A student's hidden states and head, and a Zipf teacher over a random order of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * D**-0.5
    zipf = (1 / torch.arange(1, V + 1)).log()
    log_p = zipf.log_softmax(0)
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(min(N, 64))]).repeat(-(-N // 64), 1)[:N]
    log_norm = ((log_p / T).logsumexp(0) - log_p.logsumexp(0) / T).expand(N)
    labels = torch.randint(V, (N,), generator=generator)
    targets = {"ids": ids, "log_probs": log_p[:K].expand(N, K), "labels": labels}
    return {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), **targets, "log_norm": log_norm}


BUFFERS: list[torch.Tensor] = []  # the floor's outputs, made once: no page of it is faulted in while it is timed


@torch.no_grad()
def gemms(hidden, weight, **_):
    """The floor: logits, d_hidden, d_weight, and nothing else."""
    if not BUFFERS:
        BUFFERS.extend([hidden.new_empty(len(hidden), len(weight)), torch.empty_like(hidden), torch.empty_like(weight)])
    z, d_hidden, d_weight = BUFFERS
    torch.mm(hidden, weight.t(), out=z)
    torch.mm(z, weight, out=d_hidden)
    torch.mm(z.t(), hidden, out=d_weight)


def plain(hidden, weight, ids, log_probs, labels, log_norm, T=1.0, twice=False):
    """CE + ghost KL as one writes it in PyTorch: whole logits, log_softmax once (twice as most code has it)."""
    logits = hidden @ weight.t()
    log_p = (logits / T).log_softmax(1)
    ls, lt = log_p.gather(1, ids), log_probs / T - log_norm[:, None]
    tail, student_tail = (1 - lt.exp().sum(1)).clamp(min=1e-7), (1 - ls.exp().sum(1)).clamp(min=1e-7)
    kl = (lt.exp() * (lt - ls)).sum(1) + tail * (tail.log() - student_tail.log())
    ce = F.cross_entropy(logits, labels) if twice or T != 1 else F.nll_loss(log_p, labels)
    return 0.5 * ce + 0.5 * T * T * kl.mean()


def composed(hidden, weight, ids, log_probs, labels, log_norm):
    """The same on `linear_log_probs`: what an op that returns log-probabilities leaves its user to write."""
    ls, _ = linear_log_probs(hidden, weight, torch.cat([ids, labels[:, None]], 1))
    ce, ls = -ls[:, -1].mean(), ls[:, :-1]
    tail, student_tail = (1 - log_probs.exp().sum(1)).clamp(min=1e-7), (1 - ls.exp().sum(1)).clamp(min=1e-7)
    kl = (log_probs.exp() * (log_probs - ls)).sum(1) + tail * (tail.log() - student_tail.log())
    return 0.5 * ce + 0.5 * kl.mean()


def ours(hidden, weight, ids, log_probs, labels, log_norm, T=1.0, **options):
    extra = {"temperature": T, "log_norm": log_norm} if T != 1 else {}
    return linear_topk_kl(hidden, weight, ids, log_probs, labels=labels, kl_weight=0.5, **extra, **options).loss.mean()


def cross_entropy(hidden, weight, ids, log_probs, labels, log_norm):
    return linear_cross_entropy(hidden, weight, labels).loss


# name -> (function, its temperature); all but the first return a loss to go backward from
CASES = {
    "three GEMMs": (gemms, 1.0),
    "linear_topk_kl": (ours, 1.0),
    "linear_topk_kl T=2": (lambda **p: ours(**p, T=2.0), 2.0),
    "linear_topk_kl none": (lambda **p: ours(**p, reduction="none"), 1.0),
    "linear_cross_entropy": (cross_entropy, 1.0),
    "linear_log_probs + torch": (composed, 1.0),
    "plain PyTorch": (plain, 1.0),
    "plain PyTorch, log_softmax twice": (lambda **p: plain(**p, twice=True), 1.0),
    "plain PyTorch T=2": (lambda **p: plain(**p, T=2.0), 2.0),
}
TEACHER = {
    "one GEMM": lambda hidden, weight, k: torch.mm(hidden, weight.t(), out=BUFFERS[0]),
    "linear_topk": linear_topk,
}


def step(name: str, inputs: dict) -> None:
    inputs["hidden"].grad = inputs["weight"].grad = None
    out = CASES[name][0](**inputs)
    if out is not None:
        out.backward()


def check() -> None:
    """Chunked fp32 against the fp64 reference, loss and gradients, at every temperature that is timed."""
    for T in sorted({T for _, T in CASES.values()}):
        found = []
        for dtype, backend, rows in ((torch.float32, "torch", 10), (torch.float64, "reference", None)):
            inputs = {
                name: part.to(dtype) if part.is_floating_point() else part for name, part in problem(64, 32, 1031, 8, T).items()
            }
            hidden, weight = (inputs[name].detach().requires_grad_() for name in ("hidden", "weight"))
            rest = {name: inputs[name] for name in ("ids", "log_probs", "labels", "log_norm")}
            options = {"kl_weight": 0.5, "temperature": T, "backend": backend, "_rows": rows}
            loss = linear_topk_kl(hidden, weight, **rest, **options).loss
            found.append([part.double() for part in (loss, *torch.autograd.grad(loss, (hidden, weight)))])
        for mine, exact in zip(*found, strict=True):
            error = ((mine - exact).norm() / exact.norm()).item()
            if error > 1e-5:
                raise SystemExit(f"T={T}: relative error {error:.1e} against the fp64 reference: nothing is timed")


def peak_memory(name: str, shape: tuple[int, ...]) -> float:
    """MiB by which a fresh process's peak resident set grows in one step (nan but on Linux)."""
    if sys.platform != "linux":
        return float("nan")
    code = (
        f"import torch; from kernels import bench; inputs = bench.problem(*{shape}, T={CASES[name][1]});"
        "peak = lambda: int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]);"
        f"bench.step({name!r}, bench.problem(64, 16, 300, 4, T={CASES[name][1]})); bench.BUFFERS.clear();"
        "open('/proc/self/clear_refs', 'w').write('5'); before = peak();"
        f"bench.step({name!r}, inputs); print((peak() - before) / 1024)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def timed(call) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(shape: tuple[int, ...], rounds: int) -> list[dict]:
    """Interleaved rounds of every case; one row each, with the ratio to the floor of the same round (its median)."""
    inputs = {T: problem(*shape, T) for T in {T for _, T in CASES.values()}}
    runs: dict[str, list] = {name: [] for name in (*CASES, *TEACHER)}
    for turn in range(rounds + 1):
        for name, (_, T) in CASES.items():
            runs[name].append(timed(lambda name=name, T=T: step(name, inputs[T])))
        for name, call in TEACHER.items():
            with torch.no_grad():
                given = inputs[1.0]["hidden"], inputs[1.0]["weight"]
                runs[name].append(timed(lambda call=call, given=given: call(*given, k=shape[3])))
        if turn == 0:
            runs = {name: [] for name in runs}  # the first round warms up
    rows = []
    for name, times in runs.items():
        floor = runs["one GEMM" if name in TEACHER else "three GEMMs"]
        ratios = sorted(mine[0] / its[0] for mine, its in zip(times, floor, strict=True))
        row = {"case": name, "ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
        row |= {"cpu_s": statistics.median(t[0] for t in times), "wall_s": statistics.median(t[1] for t in times)}
        rows.append(row | {"peak_mib": peak_memory(name, shape) if name in CASES else float("nan")})
    return rows


def facts() -> dict:
    """Machine, versions, commit and time: what stands beside every figure."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    cpu = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in cpu if "model name" in line]
    return {
        "device": (names or [platform.processor()])[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=4, type=int, default=(2048, 384, 50304, 32), metavar=("N", "D", "V", "K"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    check()
    about, shape = facts(), tuple(options.shape)
    print(" ".join(f"{key}={value}" for key, value in about.items()), f"N,D,V,K={shape} rounds={options.rounds}")
    rows = measure(shape, options.rounds)
    print(f"{'case':34} {'ratio to GEMMs':>22} {'cpu s':>8} {'wall s':>8} {'peak MiB':>9}")
    for row in rows:
        spread = f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})"
        print(f"{row['case']:34} {spread:>22} {row['cpu_s']:8.3f} {row['wall_s']:8.3f} {row['peak_mib']:9.0f}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        new = not options.out.exists()
        with open(options.out, "a", newline="") as stream:
            writer = csv.DictWriter(stream, [*rows[0], "N", "D", "V", "K", *about])
            if new:
                writer.writeheader()
            writer.writerows(row | dict(zip("NDVK", shape, strict=True)) | about for row in rows)


if __name__ == "__main__":
    main()
