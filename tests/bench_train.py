"""Whole training steps of GPT-2 small, ours against plain PyTorch, taking turns in one process.

python -m tests.bench_train                                         # a GPU: two minutes
python -m tests.bench_train --minutes 5 --out results/train_gpu.csv # appends the rows
python -m tests.bench_train --compile-only                          # fills the compiler's cache
python -m tests.bench_train --minutes 0.2 model.n_layer=2 model.n_embd=64 model.n_head=2 ...

Three tasks:
  ce        cross-entropy with the text's next token
  online    ghost KL to the 64 likeliest tokens of a frozen teacher of the same size, run beside
  offline   the same loss with the teacher's entries from memory, as a recording gives them

Plain PyTorch is nanoGPT's loop: the same transformer with whole logits, the loss in fp32, one
compiled forward pass, autocast, fused AdamW, a loss that is read every tenth step. Nothing is timed
before both sides agree on the first loss. A side that fails (out of memory, say) becomes a row that
says so. Compiled plain PyTorch is a strong rival: at a vocabulary of 50,304 the head is a third of
the work, so expect a ratio of 1.00 to 1.05 and a fraction of the memory.

B sequences a step, b a micro-batch, T positions, N = b*T rows, V vocabulary, K teacher entries.
"""

import argparse
import functools
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import hydra
import numpy as np
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore
from torch import Tensor

import train
from conf.schema import Config
from data import Batch, Tokens, prepare
from engine import cli
from engine import ranks as processes
from kernels.bench import facts, record
from model import GPT
from model.loss import SparseTargets
from teachers.online import OnlineTeacher

TASKS = ("ce", "online", "offline")
K = 64
VOCAB = 50257  # GPT-2's tokens; the model has 50,304 rows
BATCHES = 3  # different ones; a round is one step on each


@dataclass
class Sample:
    """A batch on the host, in pinned memory where there is a GPU."""

    ids: Tensor  # [B,T]
    labels: Tensor  # [B,T]
    target_ids: Tensor | None = None  # [B,T,K], of the task `offline`
    target_log_probs: Tensor | None = None  # [B,T,K]


@dataclass
class Task:
    """One of TASKS and what both sides share."""

    name: str
    config: Config
    tokens: Tokens
    device: torch.device
    samples: list[Sample]
    teacher: GPT | None  # of the task `online`

    @property
    def micro_batch_size(self) -> int:
        return self.config.micro_batch_size or self.config.batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.model.block_size


def zipf(size: int) -> np.ndarray:
    """Probabilities of `size` tokens, the most frequent first, about as in real text."""
    weights = 1 / np.arange(1, size + 1)
    return weights / weights.sum()


def make_samples(config: Config, device: torch.device, with_targets: bool) -> list[Sample]:
    """Random tokens with Zipf's frequencies, and the top K of a teacher that is as sure as that."""
    random = np.random.default_rng(0)
    B, T = config.batch_size, config.model.block_size
    samples = []
    for _ in range(BATCHES):
        tokens = torch.from_numpy(random.choice(VOCAB, size=(B, T + 1), p=zipf(VOCAB)))
        sample = Sample(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        if with_targets:
            first = torch.from_numpy(random.integers(VOCAB, size=(B, T, 1)))
            sample.target_ids = (first + 769 * torch.arange(K)) % VOCAB
            log_probs = torch.from_numpy(np.log(zipf(VOCAB)[:K])).float()
            sample.target_log_probs = log_probs.expand(B, T, K).contiguous()
        if device.type == "cuda":
            for name, tensor in vars(sample).items():
                setattr(sample, name, None if tensor is None else tensor.pin_memory())
        samples.append(sample)
    return samples


def make_teacher(config: Config, device: torch.device) -> GPT:
    """Another random model of the student's size; its logits spread as a trained model's do."""
    torch.manual_seed(config.seed + 1)
    teacher = GPT(config.model, config.model.vocab_size).to(device)
    with torch.no_grad():
        teacher.ln_f.weight.mul_(4)
    return teacher.eval().requires_grad_(False)


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
    """nanoGPT's loop."""

    def __init__(self, task: Task):
        config = task.config
        self.task = task
        self.autocast = processes.autocast(task.device, config.dtype)
        torch.manual_seed(config.seed)
        self.model = GPT(config.model, config.model.vocab_size).to(task.device)
        self.optimizer = self.make_optimizer()
        self.compute_loss = self.forward
        if config.compile == "on" or (config.compile == "auto" and task.device.type == "cuda"):
            self.compute_loss = torch.compile(self.forward, fullgraph=True)
        self.steps = 0

    def make_optimizer(self) -> torch.optim.Optimizer:
        config = self.task.config.optim
        matrices = [param for param in self.model.parameters() if param.dim() >= 2]
        vectors = [param for param in self.model.parameters() if param.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)

    def forward(self, ids: Tensor, labels: Tensor, *targets: Tensor) -> Tensor:
        """The mean loss of a micro-batch: ids, labels [b,T]; of `offline` two targets [b,T,K]."""
        logits = self.model(ids).flatten(0, 1)  # [N,V]
        if self.task.name == "ce":
            return F.cross_entropy(logits.float(), labels.flatten())

        if self.task.name == "online":
            with torch.no_grad():
                teacher_logits = self.task.teacher(ids).flatten(0, 1).float()  # [N,V]
                values, target_ids = teacher_logits.topk(K)  # [N,K]
                target_log_probs = values - teacher_logits.logsumexp(-1, keepdim=True)
        else:
            target_ids, target_log_probs = [part.flatten(0, 1) for part in targets]  # [N,K]
        return ghost_kl(logits, target_ids, target_log_probs)

    def step(self, number: int) -> Tensor:
        """One optimizer step on sample `number`; returns its loss, on the device."""
        sample = self.task.samples[number]
        config = self.task.config
        size = self.task.micro_batch_size
        accumulation = config.batch_size // size
        total = torch.zeros((), device=self.task.device)
        for start in range(0, config.batch_size, size):
            micro_batch = []
            for tensor in vars(sample).values():
                if tensor is not None:
                    rows = tensor[start : start + size]
                    micro_batch.append(rows.to(self.task.device, non_blocking=True))
            with self.autocast():
                loss = self.compute_loss(*micro_batch) / accumulation
            loss.backward()
            total += loss.detach()

        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.steps % 10 == 0:
            total.item()
        return total

    def first_loss(self) -> float:
        return self.step(0).item()


class FromMemory:
    """A teacher whose targets the batches bring along, as those of a cache do."""

    def targets(self, batch: Batch) -> SparseTargets:
        return batch.map(lambda tensor: tensor.flatten(0, 1)).targets


class Ours:
    """train.py's own step. All that this benchmark knows of train.py stands in this class."""

    def __init__(self, task: Task):
        self.ranks = processes.Ranks(device=task.device)
        size = train.find_micro_batch_size(task.config, self.ranks)
        self.config = replace(task.config, micro_batch_size=size)
        parts = train.set_up_student(self.config, self.ranks, task.tokens)
        _, self.module, self.optimizer = parts
        self.teacher = self.make_teacher(task)
        self.batches = [make_batch(sample) for sample in task.samples]
        self.read_metrics = None  # of the step before

    def make_teacher(self, task: Task) -> OnlineTeacher | FromMemory | None:
        if task.name == "ce":
            return None
        if task.name == "offline":
            return FromMemory()
        config = self.config
        autocast = processes.autocast(task.device, config.dtype)
        teacher = OnlineTeacher(task.teacher, config.access, config.loss.temperature, autocast)
        if train.compiles(config, self.ranks):
            teacher.compile()
        return teacher

    def queue_step(self, number: int) -> dict[str, Tensor]:
        """One step on sample `number`; returns its metrics, on the device."""
        self.optimizer.set_learning_rate(self.config.optim.lr)
        batch = self.batches[number]
        return train.train_step(
            self.module, self.optimizer, batch, self.teacher, self.config, self.ranks, step=number
        )

    def step(self, number: int) -> None:
        """Queues one step, then reads the metrics of the one before, as train_model does."""
        metrics = self.queue_step(number)
        if self.read_metrics is not None:
            self.read_metrics()
        self.read_metrics = processes.copy_to_host_async(torch.stack(list(metrics.values())))

    def first_loss(self) -> float:
        return self.queue_step(0)["loss"].item()


def make_batch(sample: Sample) -> Batch:
    targets = None
    if sample.target_ids is not None:
        targets = SparseTargets(sample.target_ids, sample.target_log_probs, log_norm=None)
    blocks = torch.arange(len(sample.ids))
    num_kept = sample.labels.numel()
    return Batch(sample.ids, sample.labels, blocks, targets=targets, num_kept=num_kept)


@dataclass
class Side:
    """One of the two that are compared, and what was measured of it."""

    name: str
    build: Callable[[Task], Plain | Ours]
    loop: Plain | Ours | None = None
    loss: float = math.nan
    seconds: list[float] = field(default_factory=list)  # a step, of each round
    peak_mib: float = math.nan
    note: str = ""  # why it was not measured

    def attempt(self, call: Callable[[], object]) -> object:
        """What `call` returns. Where it fails this side is left out, and its row says why."""
        if self.note:
            return None
        try:
            return call()
        except Exception as error:  # not passed over: the row and the exit status tell
            message = str(error).strip() or "no message"
            self.fail(f"{type(error).__name__}: {message.splitlines()[0]:.120}")
        free_memory()
        return None

    def fail(self, note: str) -> None:
        print(f"{self.name}: {note}", flush=True)
        self.note = note
        self.loop = None

    def prepare(self, task: Task) -> None:
        """Builds the model, compiles, and takes a first step."""
        self.loop = self.attempt(functools.partial(self.build, task))
        loss = self.attempt(lambda: self.loop.first_loss())
        self.loss = math.nan if loss is None else loss

    def run_round(self, device: torch.device, keep: bool) -> None:
        """One step on each sample; the time of a step and its peak memory are kept."""
        measured = self.attempt(lambda: time_steps(self.loop, device))
        if measured and keep:
            seconds, peak_mib = measured
            self.seconds.append(seconds)
            self.peak_mib = max(peak_mib, 0.0 if math.isnan(self.peak_mib) else self.peak_mib)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_steps(loop: Plain | Ours, device: torch.device) -> tuple[float, float]:
    """Seconds a step, and the peak in MiB above what was held before (nan on a CPU)."""
    cuda = device.type == "cuda"
    held = peak = math.nan
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for number in range(BATCHES):
        loop.step(number)
    if cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    seconds = (time.perf_counter() - start) / BATCHES
    return seconds, (peak - held) / 2**20


def check_losses(plain: Side, ours: Side) -> None:
    """The same model on the same batch has the same loss, else neither is timed."""
    if plain.note or ours.note:
        return
    if not abs(plain.loss - ours.loss) <= 0.02 * abs(plain.loss):
        ours.fail(f"first loss {ours.loss:.5f}, plain PyTorch has {plain.loss:.5f}: not timed")


def measure_task(task: Task, seconds: float, compile_only: bool) -> list[dict]:
    """Rounds of both sides in turn for so many seconds, at least two; a row for each side."""
    deadline = time.monotonic() + seconds
    torch.compiler.reset()
    plain = Side("plain PyTorch", Plain)
    ours = Side("ours", Ours)
    sides = [plain, ours]
    for side in sides:
        side.prepare(task)
    check_losses(plain, ours)
    if compile_only:
        return [make_row(task, side, sides) for side in sides]

    rounds = 0
    while rounds <= 2 or time.monotonic() < deadline:
        for side in sides:
            side.run_round(task.device, keep=rounds > 0)  # the first one warms up
        rounds += 1
    return [make_row(task, side, sides) for side in sides]


def make_row(task: Task, side: Side, sides: list[Side]) -> dict:
    """A CSV row. `ratio` is the time of plain PyTorch over this side's, paired by round."""
    plain = sides[0]
    ratios = [theirs / mine for theirs, mine in zip(plain.seconds, side.seconds, strict=False)]
    times = side.seconds or [math.nan]
    ratios = ratios or [math.nan]
    median = statistics.median(times)
    tokens_per_s = task.tokens_per_step / median
    return {
        "task": task.name,
        "case": side.name,
        "tokens_per_step": task.tokens_per_step,
        "micro_batch_size": task.micro_batch_size,
        "rounds": len(side.seconds),
        "loss": side.loss,
        "ms": median * 1e3,
        "ms_low": min(times) * 1e3,
        "ms_high": max(times) * 1e3,
        "tokens_per_s": tokens_per_s,
        "mfu": utilisation(task, tokens_per_s),
        "peak_mib": side.peak_mib,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "note": side.note,
    }


def utilisation(task: Task, tokens_per_s: float) -> float:
    """Model FLOPs over the device's peak: a training step's, and a teacher's forward pass."""
    peak = processes.peak_flops(task.device)
    if peak is None:
        return math.nan
    with torch.device("meta"):
        model = GPT(task.config.model, task.config.model.vocab_size)
    flops = model.flops_per_token(task.config.model.block_size)
    if task.teacher is not None:
        flops += flops / 3
    return tokens_per_s * flops / peak


def show(rows: list[dict]) -> None:
    for row in rows:
        start = f"{row['task']:8} {row['case']:14}"
        if math.isnan(row["ms"]):
            print(f"{start} {row['note'] or 'compiled'}, first loss {row['loss']:.5f}", flush=True)
            continue
        times = f"{row['ms']:.1f} ms ({row['ms_low']:.1f}-{row['ms_high']:.1f})"
        ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})"
        print(f"{start} {times:>28} {row['tokens_per_s']:11,.0f} tokens/s", end="  ")
        if not math.isnan(row["mfu"]):
            print(f"MFU {row['mfu']:.1%}", end="  ")
        if not math.isnan(row["peak_mib"]):
            print(f"peak {row['peak_mib']:,.0f} MiB", end="  ")
        print(f"{ratio} x plain  {row['note']}", flush=True)


def find_losses(rows: list[dict]) -> list[str]:
    """Where we lose: a line for each task where ours failed, is slower or needs more memory."""
    lines = []
    plain = {row["task"]: row for row in rows if row["case"] != "ours"}
    for row in rows:
        theirs = plain[row["task"]]
        if row["note"]:
            lines.append(f"{row['task']}: {row['case']}: {row['note']}")
        if row["case"] != "ours":
            continue
        if row["ratio"] < 1:
            spread = f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}"
            lines.append(f"{row['task']}: ratio {row['ratio']:.3f} ({spread}), less than 1")
        if row["peak_mib"] > theirs["peak_mib"]:
            sizes = f"{row['peak_mib']:.0f} MiB, plain PyTorch {theirs['peak_mib']:.0f}"
            lines.append(f"{row['task']}: peak {sizes}")
    return lines


def write_tokens(folder: Path) -> None:
    """nanoGPT's files, which the Trainer is given though this benchmark has its own batches."""
    random = np.random.default_rng(0)
    for name in ("train", "val"):
        random.integers(VOCAB, size=2**20, dtype=np.uint16).tofile(folder / f"{name}.bin")


def compose(folder: Path, task: str, overrides: list[str]) -> Config:
    words = ["experiment=gpt2_124m", "batch_size=60", "micro_batch_size=12"]
    words += [f"data.path={folder}", "data.tokenizer=ids", f"data.vocab_size={VOCAB}"]
    words += [f"data.cache_dir={folder}", f"run_dir={folder}/run"]
    if task != "ce":
        words += ["loss=topk_kl", "teacher=online", "access=topk", f"access.k={K}"]
    return cli.compose("train", [*words, *overrides])


def make_task(name: str, folder: Path, overrides: list[str]) -> Task:
    config = compose(folder, name, overrides)
    device = processes.pick_device(config.device, 0)
    return Task(
        name,
        config,
        tokens=prepare(config.data, say=lambda line: None),
        device=device,
        samples=make_samples(config, device, with_targets=name == "offline"),
        teacher=make_teacher(config, device) if name == "online" else None,
    )


def run_tasks(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Each task has an equal share of the time that is left; rows are recorded as they come."""
    deadline = time.monotonic() + 60 * options.minutes
    rows = []
    for position, name in enumerate(TASKS):
        left = deadline - time.monotonic()
        if left < 0 and position > 0 and not options.compile_only:
            print(f"{name}: skipped, {options.minutes:g} minutes are over")
            continue
        task = make_task(name, folder, options.overrides)
        share = left / (len(TASKS) - position)
        measured = measure_task(task, share, options.compile_only)
        show(measured)
        if options.out:
            about = facts(task.device, options.commit)
            record(options.out, [row | about for row in measured])
        rows += measured
        del task
        free_memory()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="of train.py's experiment=gpt2_124m")
    parser.add_argument("--minutes", type=float, default=2.0, help="no round begins after these")
    parser.add_argument("--compile-only", action="store_true", help="time nothing")
    parser.add_argument("--out", type=Path, help="a CSV file that the rows are appended to")
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args()

    # With --compile-only the GPU may be busy with other work, so what Inductor's autotuning finds
    # then must not be remembered; the compiled code itself is.
    inductor_config.autotune_local_cache = False
    torch.set_float32_matmul_precision("high")
    ConfigStore.instance().store(name="train_schema", node=Config)
    with (
        tempfile.TemporaryDirectory() as scratch,
        hydra.initialize_config_dir(str(cli.FOLDER), version_base="1.3"),
    ):
        write_tokens(Path(scratch))
        rows = run_tasks(options, Path(scratch))

    lines = find_losses(rows)
    print("\n==== where we lose", *(lines or ["nowhere"]), sep="\n")
    sys.exit(any(row["note"] for row in rows if row["case"] == "ours"))


if __name__ == "__main__":
    main()
