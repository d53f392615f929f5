"""Whole training steps of GPT-2 small, ours against plain PyTorch, taking turns in one process.

python -m tests.bench_train                                         # a GPU: two minutes
python -m tests.bench_train --minutes 5 --out results/train_gpu.csv # appends the rows
python -m tests.bench_train --minutes 0                             # fills the compiler's cache
python -m tests.bench_train --minutes 0.2 model.n_layer=2 model.n_embd=64 model.n_head=2 ...

Three tasks:
  ce        cross-entropy with the text's next token
  online    ghost KL to the 64 likeliest tokens of a frozen teacher of the same size, run beside
  offline   the same loss with the teacher's entries from memory, as a recording gives them

Plain PyTorch is nanoGPT's loop: the same transformer with whole logits, the loss in fp32, one
compiled forward pass, autocast, fused AdamW, no loss read on the way. Nothing is timed unless both
sides agree on the first loss. Compiled plain PyTorch is a strong rival: at a vocabulary of 50,304
the head is a third of the work, so expect a ratio of 1.00 to 1.05 and a fraction of the memory.

B sequences a step, b a micro-batch, T positions, N = b*T rows, V vocabulary, K teacher entries.
"""

import argparse
import gc
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import hydra
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore
from torch import Tensor

import train
from conf.schema import Config
from data import Batch
from engine import cli
from engine import ranks as processes
from kernels.bench import facts, record
from kernels.bench.cases import Problem
from model import GPT
from model.loss import SparseTargets
from teachers.online import OnlineTeacher

TASKS = ("ce", "online", "offline")
K = 64
VOCAB = 50257  # GPT-2's tokens; the model has 50,304 rows
STEPS = 3  # of one side, before it is the other's turn


@dataclass
class Task:
    """One of TASKS and what both sides share."""

    name: str
    config: Config
    ranks: processes.Ranks  # this process alone
    batch: Batch  # on the host, every step's
    teacher: GPT | None  # of the task `online`


def make_task(name: str, overrides: list[str]) -> Task:
    words = ["experiment=gpt2_124m", "batch_size=60", "micro_batch_size=12", "data=stdlib"]
    if name != "ce":
        words += ["loss=topk_kl", "teacher=online", "access=topk", f"access.k={K}"]
    config = cli.compose("train", [*words, *overrides])
    device = processes.open_device(config.device)

    batch = make_batch(config.batch_size, config.model.block_size, name == "offline")
    if device.type == "cuda":
        batch = batch.map(torch.Tensor.pin_memory)
    teacher = None
    if name == "online":
        # Its logits spread as those of a trained model.
        torch.manual_seed(config.seed + 1)
        teacher = GPT(config.model, config.model.vocab_size).to(device)
        teacher.eval().requires_grad_(False).ln_f.weight.mul_(4)
    return Task(name, config, processes.Ranks(device=device), batch, teacher)


def make_batch(B: int, T: int, with_targets: bool) -> Batch:
    """Random tokens with Zipf's frequencies, and the top K of a teacher that is as sure as that."""
    problem = Problem(B * T, 1, VOCAB, K, torch.float32, torch.device("cpu"))
    labels = problem.labels.view(B, T)
    targets = None
    if with_targets:
        ids = problem.ids.view(B, T, K)
        targets = SparseTargets(ids, problem.log_probs.view(B, T, K), log_norm=None)
    return Batch(labels.roll(1), labels, torch.arange(B), targets=targets, num_kept=B * T)


def flatten_targets(batch: Batch) -> SparseTargets:
    """The entries [N,K] that a micro-batch brings along."""
    ids, log_probs, _ = batch.targets  # [b,T,K]
    return SparseTargets(ids.flatten(0, 1), log_probs.flatten(0, 1), log_norm=None)


def ghost_kl(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """Mean KL over the K entries and one outcome for all others.

    Args: logits [N,V] of the student; ids, log_probs [N,K] of the teacher.
    """
    student = logits.float().log_softmax(-1).gather(1, ids)  # [N,K]
    tail = (1 - log_probs.exp().sum(1)).clamp(min=1e-7)  # [N]
    student_tail = (1 - student.exp().sum(1)).clamp(min=1e-7)  # [N]
    kl = (log_probs.exp() * (log_probs - student)).sum(1)
    kl = kl + tail * (tail.log() - student_tail.log())
    return kl.mean()


class Plain:
    """nanoGPT's loop, but that vectors decay too, which takes the same time."""

    def __init__(self, task: Task):
        config = task.config
        self.task = task
        torch.manual_seed(config.seed)
        self.model = GPT(config.model, config.model.vocab_size).to(task.ranks.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optim.lr,
            betas=(config.optim.beta1, config.optim.beta2),
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        self.compute_loss = self.forward
        if train.compiles(config, task.ranks):
            self.compute_loss = torch.compile(self.forward, fullgraph=True)

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of a micro-batch."""
        logits = self.model(batch.ids).flatten(0, 1)  # [N,V]
        if self.task.name == "ce":
            return F.cross_entropy(logits.float(), batch.labels.flatten())

        if self.task.name == "offline":
            ids, log_probs, _ = flatten_targets(batch)  # [N,K]
            return ghost_kl(logits, ids.long(), log_probs)

        with torch.no_grad():
            teacher_logits = self.task.teacher(batch.ids).flatten(0, 1).float()  # [N,V]
            values, ids = teacher_logits.topk(K)  # [N,K]
            log_probs = values - teacher_logits.logsumexp(-1, keepdim=True)
        return ghost_kl(logits, ids, log_probs)

    def step(self) -> Tensor:
        """One optimizer step; returns its loss, on the device."""
        config = self.task.config
        device = self.task.ranks.device
        size = config.micro_batch_size
        total = torch.zeros((), device=device)
        for start in range(0, config.batch_size, size):
            batch = self.task.batch.select(slice(start, start + size)).to(device)
            with processes.autocast(device, config.dtype)():
                loss = self.compute_loss(batch) * (size / config.batch_size)
            loss.backward()
            total += loss.detach()

        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class Ours:
    """train.py's own step."""

    def __init__(self, task: Task):
        config = task.config
        self.task = task
        # All that is asked of the tokens. Every row is a possible token, as on the other side.
        tokens = SimpleNamespace(vocab_size=config.model.vocab_size)
        _, self.module, self.optimizer = train.set_up_student(config, task.ranks, tokens)
        self.optimizer.set_learning_rate(config.optim.lr)
        self.read_metrics = None  # of the step before

        self.teacher = None
        if task.name == "offline":
            self.teacher = SimpleNamespace(targets=flatten_targets)
        if task.name == "online":
            autocast = processes.autocast(task.ranks.device, config.dtype)
            temperature = config.loss.temperature
            self.teacher = OnlineTeacher(task.teacher, config.access, temperature, autocast)
            if train.compiles(config, task.ranks):
                self.teacher.compile()

    def step(self) -> Tensor:
        """Queues one step, then reads the metrics of the one before, as train_model does."""
        task = self.task
        metrics = train.train_step(
            self.module, self.optimizer, task.batch, self.teacher, task.config, task.ranks, step=0
        )
        if self.read_metrics is not None:
            self.read_metrics()
        self.read_metrics = processes.copy_to_host_async(torch.stack(list(metrics.values())))
        return metrics["loss"]


def time_steps(loop: Plain | Ours, device: torch.device) -> tuple[float, float]:
    """Milliseconds a step, and the peak in MiB above what was held before (nan on a CPU)."""
    cuda = device.type == "cuda"
    peak_mib = math.nan
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(STEPS):
        loop.step()
    if cuda:
        torch.cuda.synchronize()
        peak_mib = (torch.cuda.max_memory_allocated() - held) / 2**20
    seconds = time.perf_counter() - start
    return 1e3 * seconds / STEPS, peak_mib


def measure_task(task: Task, deadline: float) -> list[dict]:
    """Rounds of both sides in turn up to `deadline`, at least two; a row for each side.

    Raises ValueError, before anything is timed, where the two have different first losses.
    """
    torch.compiler.reset()
    sides = {"plain PyTorch": Plain(task), "ours": Ours(task)}
    losses = {name: side.step().item() for name, side in sides.items()}
    plain_loss = losses["plain PyTorch"]
    if not abs(losses["ours"] - plain_loss) <= 0.02 * abs(plain_loss):
        raise ValueError(f"{task.name}: the first losses differ: {losses}")

    rounds = {name: [] for name in sides}
    while len(rounds["ours"]) <= 2 or time.monotonic() < deadline:
        for name, side in sides.items():
            rounds[name].append(time_steps(side, task.ranks.device))
    return [
        make_row(task, name, losses[name], rounds[name][1:], rounds["plain PyTorch"][1:])
        for name in sides  # the first round warms up
    ]


def make_row(task: Task, name: str, loss: float, rounds: list, plain_rounds: list) -> dict:
    """A CSV row. `ratio` is the time of plain PyTorch over this side's, paired by round."""
    times = [ms for ms, _ in rounds]
    ratios = [plain[0] / mine[0] for plain, mine in zip(plain_rounds, rounds, strict=True)]
    ms = statistics.median(times)
    return {
        "task": task.name,
        "case": name,
        "tokens_per_step": task.batch.num_kept,
        "micro_batch_size": task.config.micro_batch_size,
        "rounds": len(rounds),
        "loss": loss,
        "ms": ms,
        "ms_low": min(times),
        "ms_high": max(times),
        "tokens_per_s": 1e3 * task.batch.num_kept / ms,
        "peak_mib": max(peak_mib for _, peak_mib in rounds),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "note": "",  # a column of the records under results/
    }


def show(row: dict) -> None:
    line = (
        "{task:8} {case:14} {ms:8.1f} ms ({ms_low:.1f}-{ms_high:.1f})"
        " {tokens_per_s:11,.0f} tokens/s  peak {peak_mib:,.0f} MiB"
        "  {ratio:.3f} ({ratio_low:.3f}-{ratio_high:.3f}) x plain  first loss {loss:.5f}"
    )
    print(line.format(**row), flush=True)


def find_losses(plain: dict, ours: dict) -> list[str]:
    """Where we lose in a task: a line where ours is slower or needs more memory."""
    lines = []
    if ours["ratio"] < 1:
        ratio = "{task}: ratio {ratio:.3f} ({ratio_low:.3f}-{ratio_high:.3f}), less than 1"
        lines.append(ratio.format(**ours))
    if ours["peak_mib"] > plain["peak_mib"]:
        sizes = f"{ours['peak_mib']:.0f} MiB, plain PyTorch {plain['peak_mib']:.0f}"
        lines.append(f"{ours['task']}: peak {sizes}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="of train.py's experiment=gpt2_124m")
    parser.add_argument("--minutes", type=float, default=2.0, help="each task has a third")
    parser.add_argument("--out", type=Path, help="a CSV file that the rows are appended to")
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args()

    # With --minutes 0 the GPU may be busy with other work, so what Inductor's autotuning finds then
    # must not be remembered; the compiled code itself is.
    inductor_config.autotune_local_cache = False
    ConfigStore.instance().store(name="train_schema", node=Config)
    started = time.monotonic()
    lines = []
    with hydra.initialize_config_dir(str(cli.FOLDER), version_base="1.3"):
        for position, name in enumerate(TASKS, start=1):
            task = make_task(name, options.overrides)
            gc.collect()  # what the task before left
            torch.cuda.empty_cache()
            deadline = started + 60 * options.minutes * position / len(TASKS)
            plain, ours = measure_task(task, deadline)
            show(plain)
            show(ours)
            if options.out:
                about = facts(task.ranks.device, options.commit)
                record(options.out, [plain | about, ours | about])
            lines += find_losses(plain, ours)

    print("\n==== where we lose", *(lines or ["nowhere"]), sep="\n")


if __name__ == "__main__":
    main()
