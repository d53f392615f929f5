"""Trains one model: by cross-entropy, or on a teacher's targets. One process, or many ranks by torchrun.

python train.py                                                # the demo: makes tokens and a teacher, distils a student
python train.py data=text data.path=my_texts/                  # your own text
python train.py teacher.path=runs/big loss.kl_weight=0.5       # your own teacher
python train.py -m loss=ce,topk_kl seed=0,1,2                  # a sweep
torchrun --standalone --nproc_per_node=2 train.py              # data parallel

B sequences a micro-batch, T positions each.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from conf.schema import Config
from data import Batches, Prefetch, Tokens, held_out, prepare
from data.batches import IGNORE
from engine import UserError, checkpoint
from engine import ranks as processes
from engine.cli import main
from engine.logger import MAKE_ROOM, RunLog
from engine.optim import Optimizers, learning_rate
from engine.progress import ProgressLine, print_closing
from engine.ranks import Ranks
from engine.run_dir import claim, identity
from kernels import LossOutput
from model import GPT
from model.gpt import attention_kernel
from model.loss import LossConfig, StudentWithLoss
from model.metrics import evaluate
from sample import sample_text
from teachers import toy
from teachers.generate import write_first
from teachers.online import (
    OnlineTeacher,
    Teacher,
    TeacherConfig,
    check_access,
    check_rows,
    make_student,
    open_teacher,
)

MOST_OVERFLOWS = (
    24  # float16 steps left out in a row: from 65,536 the loss's scale is then below 1e-2
)


class Stopped(Exception):
    """A signal asked this run to leave; its state is saved."""


class Trainer:
    """A student, its optimizer and its place in the data; `fit` runs it to max_steps."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        tokens: Tokens,
        teacher: Teacher | None = None,
        title: str = "student",
    ):
        self.config, self.ranks, self.tokens, self.title = config, ranks, tokens, title
        self.run_dir, self.device = Path(config.run_dir), ranks.device
        self.micro = config.micro_batch_size or max(1, config.batch_size // ranks.world)
        if config.batch_size % (self.micro * ranks.world):
            rule = f"must be a multiple of micro_batch_size x ranks = {self.micro} x {ranks.world}"
            raise UserError(f"batch_size={config.batch_size}: {rule}")
        self.autocast = processes.autocast(self.device, config.dtype)
        torch.manual_seed(config.seed)
        self.student = make_student(config.model, tokens).to(self.device)
        self.student.checkpointing = config.activation_checkpointing
        init = config.model.init and checkpoint.fingerprint(
            checkpoint.resolve(config.model.init, "model.init")
        )
        self.fingerprints = {
            "tokens": tokens.fingerprint,
            "tokenizer": tokens.tokenizer.fingerprint,
        }
        self.fingerprints |= {
            "teacher": teacher and teacher.fingerprint,
            "init": init,
        }  # what a continuation must share
        self.optimizer = Optimizers(self.student, config.optim, scaled=config.dtype == "float16")
        self.module = StudentWithLoss(self.student, config.loss)
        compiled = config.compile == "on" or (
            config.compile == "auto" and self.device.type == "cuda"
        )
        self.teacher, self.targets = teacher, lambda batch: batch.targets
        if teacher and teacher.model:
            teacher.model.to(self.device)
            check_rows(teacher.model, teacher.path, self.student)
            if config.loss.name != "ce":
                wrote, T = tokens.generated_by == teacher.fingerprint, config.loss.temperature
                self.targets = OnlineTeacher(
                    teacher.model, config.access, T, self.autocast, wrote
                ).targets
                self.targets = torch.compile(self.targets) if compiled else self.targets
        if compiled:
            # Hidden states, loss and both gradients in one graph. Under DDP torch splits it where the buckets
            # of gradients end, so that a bucket is reduced while the backward of earlier layers goes on.
            self.module.compile()
        if ranks.world > 1:
            self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        block_size = config.model.block_size
        cache, taught = teacher and teacher.cache, config.loss.name != "ce"
        read = (
            partial(cache.targets, own=ranks.local_rows(config.batch_size, self.micro))
            if cache and taught
            else None
        )
        blocks = tokens.blocks("train", block_size)
        self.batches = Batches(
            blocks, block_size, config.batch_size, config.seed, config.data.fraction, read
        )
        if read:
            cache.check_share(self.batches.blocks)
        if cache:
            cache.check_held_out(config.eval_tokens)
        self.step, self.seconds, self.val_loss, self.best = 0, 0.0, None, math.inf
        self.step_tokens = config.batch_size * config.model.block_size
        self.since: float | None = None  # when the step that is running began
        self.overflows = 0  # float16 steps left out, in a row

    def train_step(self, batch) -> Callable[[], dict] | None:
        """Queues one optimizer step on `batch`; the call that it returns waits for it and gives its metrics row.

        The gradient is the mean over the kept positions of the whole batch, however it is split into micro-batches. None
        where a signal came first (nothing has changed then).
        """
        self.since, world = self.since or time.perf_counter(), self.ranks.world
        kept = max(1, int((batch.labels != IGNORE).sum()))
        rounds = self.config.batch_size // (self.micro * world)
        sums = torch.zeros(len(LossOutput._fields), device=self.device)
        for turn in range(rounds):
            if self.ranks.any(self.ranks.stop is not None):
                self.optimizer.zero_grad()
                return None
            place = turn * world + self.ranks.rank
            rows = slice(place * self.micro, (place + 1) * self.micro)
            part = batch.part(rows, self.device, slice(turn * self.micro, (turn + 1) * self.micro))
            if (
                self.config.access.fresh
            ):  # a draw depends on the visit, not on the place in the text
                visit = self.step * self.config.batch_size + rows.start
                part = part._replace(
                    blocks=torch.arange(visit, visit + self.micro, device=self.device)
                )
            if self.student.config.dropout:  # a function of the place, not of history
                torch.manual_seed(hash((self.config.seed, self.step, place)))
            last = turn == rounds - 1 or world == 1
            with nullcontext() if last else self.module.no_sync():
                with self.autocast():
                    out = self.module(part.ids, part.labels, self.targets(part), part.documents)
                self.optimizer.backward(
                    out.loss * (world / kept)
                )  # DDP averages over ranks: times world makes it a sum
            sums += torch.stack([part.detach().float() for part in out])
        means = self.ranks.sum(sums) / kept
        rate = learning_rate(self.config.optim, self.step, self.config.max_steps)
        self.optimizer.set_learning_rate(rate)
        norm = self.optimizer.step(means[0])
        self.step += 1
        return partial(
            self.row, self.step, rate, processes.copy_to_host_async(torch.stack([*means, norm]))
        )

    def row(self, step: int, rate: float, read: Callable[[], tuple[list[float], float]]) -> dict:
        """The metrics row of `step`; UserError where its loss or gradient was not finite (it has changed nothing then)."""
        (*means, norm), now = read()
        seconds, self.since = now - self.since, now
        self.seconds += seconds
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if not math.isfinite(means[0]) or self.overflows > (
            MOST_OVERFLOWS if self.config.dtype == "float16" else 0
        ):
            self.step = (
                step - 1
            )  # neither `step` nor one queued since changed the weights; every rank sees the same sums
            self.save()
            raise UserError(
                f"step {step}: loss {means[0]:.4g}, gradient norm {norm:.4g}: stopped before the update, state saved in"
                f" {self.run_dir}; lower optim.lr={self.config.optim.lr} or optim.grad_clip={self.config.optim.grad_clip}"
            )
        self.val_loss = None
        row = {"step": step, "tokens": step * self.step_tokens, "seconds": round(self.seconds, 3)}
        row |= dict(zip(LossOutput._fields, means, strict=True))
        return row | {"lr": rate, "grad_norm": norm, "tokens_per_s": self.step_tokens / seconds}

    def evaluate(self) -> dict:
        """The student's held-out measures (rank 0 works, the others wait); empty where a signal came."""
        measures = self.measure(self.student, self.teacher and self.teacher.model)
        self.val_loss = measures.get("val_loss")
        return measures

    def measure(self, model: GPT, teacher: GPT | None = None) -> dict:
        measures = {}
        if self.ranks.main:
            with suppress(Stopped):
                measures = evaluate(model, self.held_out(), teacher=teacher, autocast=self.autocast)
        return self.ranks.share(measures)

    def held_out(self):
        block_size, cache = self.config.model.block_size, self.teacher and self.teacher.cache
        for batch in held_out(
            self.tokens.blocks("val", block_size), block_size, self.micro, self.config.eval_tokens
        ):
            if self.ranks.stop:
                raise Stopped
            yield batch._replace(targets=cache.teacher_topk(batch)) if cache else batch

    def due(self) -> bool:
        """Whether the step that was just made is evaluated."""
        return self.step % self.config.eval_every == 0 or self.step >= self.config.max_steps

    def fit(self) -> dict:
        """Trains to max_steps, from the newest good checkpoint if there is one; returns the summary."""
        self.restore()
        log = (
            RunLog(self.run_dir, self.config.wandb, asdict(self.config), self.step)
            if self.ranks.main
            else None
        )
        bound = self.config.teacher.kind == "cache" and self.config.access.kind != "full"
        progress = ProgressLine(
            self.title,
            self.config.max_steps,
            self.ranks.main and self.step < self.config.max_steps,
            bound,
        )
        if self.step < self.config.max_steps:
            self.ranks.say(self.plan())
            if self.device.type == "cuda":
                self.ranks.say(self.attention())
        batches = Prefetch(
            self.batches, self.step, self.config.max_steps, pin=self.device.type == "cuda"
        )
        waiting = None  # the step before: its row is read once the device has the next step to do
        try:
            if (
                self.step and self.due() and self.val_loss is None
            ):  # an evaluation that a signal cut short
                row = {"step": self.step} | self.evaluate()
                if log:
                    log.row(row)
                self.keep()
            for batch in batches:
                made = self.train_step(batch)
                if waiting:
                    self.tell(waiting(), log, progress)
                waiting = made
                if made is None:
                    self.save()
                    raise Stopped
                if self.due() or self.step % self.config.save_every == 0:
                    self.tell(waiting() | (self.evaluate() if self.due() else {}), log, progress)
                    self.keep()
                    waiting = self.since = None
        except RuntimeError as error:
            processes.explain_memory(
                error, self.step + 1, self.config, self.micro, self.ranks.world
            )
            raise
        finally:
            self.waited = batches.waited  # seconds that steps waited for data
            batches.close()
            progress.close()
            if log:
                log.close()
        if self.val_loss is None and self.step:  # the signal came in the last evaluation
            self.save()
            raise Stopped
        return self.summary()

    def tell(self, row: dict, log: RunLog | None, progress: ProgressLine) -> None:
        """Logs and shows one step's row."""
        if log:
            log.row(row)
        peak = processes.peak_flops(self.device) if self.autocast.keywords["enabled"] else None
        flops = row["tokens_per_s"] * self.student.flops_per_token(self.config.model.block_size)
        eta = (self.config.max_steps - row["step"]) * self.seconds / row["step"]
        progress.show(
            row,
            eta,
            flops / (peak * self.ranks.world) if peak else None,
            processes.memory_bytes(self.device),
        )

    def attention(self) -> str:
        """The attention kernel that PyTorch takes for this run; for the slow one, what to change."""
        model = self.config.model
        first_block = self.batches.source.read(self.batches.blocks[:1])
        masked = first_block.documents is not None
        kernel = attention_kernel(model, self.device, self.autocast.keywords["dtype"], masked)
        if kernel != "math":
            return f"attention: {kernel}"
        return (
            "attention: math, which holds the scores [B,H,T,T] of every layer; the fused kernels want"
            f" heads of a multiple of 8 dimensions (model.head_dim, here {model.resolved().head_dim}) and, on a"
            " GPU older than Ampere, dtype=float16 and no model.n_kv_head"
        )

    def plan(self) -> str:
        """What the keys add up to, in one line."""
        config, size, model = self.config, self.student.num_params(), self.student.config
        epochs = config.max_steps * config.batch_size / self.batches.n_blocks
        return (
            f"{self.title}: {size / 1e6:.2f}M parameters (n_layer={model.n_layer} n_embd={model.n_embd} n_head={model.n_head}),"
            f" {config.max_steps} steps of {config.batch_size} x {config.model.block_size} tokens, {epochs:.1f} epochs of"
            f" {self.batches.n_blocks * config.model.block_size:,}; optim.lr={config.optim.lr:g}, {self.device.type} x"
            f" {self.ranks.world}, {str(self.autocast.keywords['dtype']).removeprefix('torch.')}"
        )

    def keep(self) -> None:
        """Saves where it is time, or where the held-out loss is the best so far."""
        better = self.val_loss is not None and self.val_loss < self.best
        if better:
            self.best = self.val_loss
        if better or self.step % self.config.save_every == 0 or self.step >= self.config.max_steps:
            self.save()

    def save(self) -> None:
        if self.ranks.main:
            info = {"val_loss": self.val_loss, "fingerprints": self.fingerprints}
            checkpoint.save(self.run_dir, self.step, self.write, info)
            checkpoint.prune(self.run_dir, self.config.keep)
        self.ranks.share(None)

    def write(self, folder: Path) -> None:
        tokenizer = self.tokens.tokenizer
        self.student.save_pretrained(folder, tokenizer.bos, tokenizer.eot)
        tokenizer.save(folder)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
        }
        with open(
            folder / "trainer.pt", "wb"
        ) as stream:  # torch would keep the disk's own error to itself
            torch.save(state, stream)

    def restore(self) -> None:
        """Takes up the checkpoint that `resume` means, if any; refuses one of other tokens."""
        resume = self.config.resume
        named = None if resume in ("auto", "never") else checkpoint.resolve(resume, key="resume")
        folder = checkpoint.latest(self.run_dir, self.ranks.say) if resume == "auto" else named
        if folder is None:
            return
        if not (manifest := checkpoint.manifest(folder)):
            raise UserError(
                f"resume={resume}: a model without its trainer's state; start from it by model.init={resume}"
            )
        for name, ours in self.fingerprints.items():
            if manifest["fingerprints"].get(name) != ours:
                raise UserError(
                    f"run_dir={self.run_dir}: its run had another {name} (SHA-256 differs); give another run_dir"
                )
        self.student.load_state_dict(GPT.from_pretrained(folder).state_dict())
        state = torch.load(folder / "trainer.pt", map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.val_loss = manifest["val_loss"]
        if self.step < self.config.max_steps:
            self.ranks.say(f"{self.title}: going on from step {self.step} ({folder})")

    def summary(self) -> dict:
        """What report.py and the closing lines read; FLOPs count the teacher's forward passes on their own line."""
        tokens, block = self.step * self.step_tokens, self.config.model.block_size
        summary = {
            "parameters": self.student.num_params(),
            "tokens": tokens,
            "text_tokens": self.batches.n_blocks * block,
        }
        summary["flops"] = {"student": tokens * self.student.flops_per_token(block), "teacher": 0.0}
        summary |= {
            "best_val_loss": self.best,
            "val_loss": self.val_loss,
            "data_wait_seconds": self.waited,
            "teacher": None,
        }
        if self.teacher and (model := self.teacher.model):
            if self.config.loss.name != "ce":  # a forward pass is a third of a training step's
                summary["flops"]["teacher"] = tokens * model.flops_per_token(block) / 3
            if not (measures := self.measure(model)):
                raise Stopped
            summary["teacher"] = {
                "path": self.teacher.path,
                "parameters": model.num_params(),
                **measures,
            }
        return summary


def fit(
    config: Config,
    ranks: Ranks,
    tokens: Tokens,
    teacher: Teacher | None = None,
    title: str = "student",
) -> dict:
    """One run in its own directory: claimed, recorded, trained, summed up in summary.json."""
    run_dir = Path(config.run_dir)
    handle = claim(run_dir, asdict(config), wait=title != "student") if ranks.main else None
    ranks.share(None)
    trainer = Trainer(config, ranks, tokens, teacher, title)
    ranks.training = True
    try:
        summary = trainer.fit()
    except Stopped:
        how = (
            f"the same command with run_dir={run_dir}" if title == "student" else "the same command"
        )
        ranks.say(f"{ranks.stop}: {title} saved at step {trainer.step}; {how} goes on")
        raise
    if handle:
        with checkpoint.report_os_errors(f"run_dir={run_dir}", MAKE_ROOM, "summary.json"):
            checkpoint.write_atomic(run_dir / "summary.json", json.dumps(summary, indent=1))
        handle.close()
    return summary


def made_first(config: Config, name: str, tokens: Tokens, **changes) -> Config:
    """A cross-entropy run that this one needs; its directory is named by what determines it, so that it is found again."""
    plain = Config(teacher=TeacherConfig(kind="none"), loss=LossConfig(name="ce"))
    parts = {key: getattr(plain, key) for key in ("teacher", "loss", "access", "wandb")}
    made = replace(config, resume="auto", baseline="off", **parts, **changes)
    made.run_dir = f"runs/{name}-{identity(asdict(made), tokens.fingerprint)}"
    return made


def find_teacher(config: Config, ranks: Ranks, tokens: Tokens) -> str | None:
    """The teacher's path: the one given, or one trained now on all the training text."""
    if config.teacher.kind == "none" or config.teacher.path is not None or config.loss.name == "ce":
        return None if config.teacher.kind == "none" else config.teacher.path
    check_access(config.access, tokens.vocab_size)
    size = asdict(config.teacher.model) | {
        "n_kv_head": None,
        "head_dim": None,
        "n_inner": None,
        "init": None,
    }
    shape = {"model": replace(config.model, **size), "max_steps": config.teacher.max_steps}
    optim, data = replace(config.optim, lr=config.teacher.lr), replace(config.data, fraction=1.0)
    made = made_first(config, "teacher", tokens, **shape, optim=optim, data=data, seed=0)
    there = checkpoint.folders(Path(made.run_dir))
    ranks.say(
        f"teacher: {'reusing' if there else 'none given (teacher.path), so one is trained first in'} {made.run_dir}"
    )
    fit(made, ranks, tokens, title="teacher")
    return made.run_dir


def run(config: Config) -> None:
    """Everything that `python train.py` does: tokens, teacher, student, and what the student would be without the teacher."""
    if config.toy:
        return toy.show()
    ranks = processes.start(config.device)
    try:
        if config.data.name == "written" and config.data.path is None:
            path = config.teacher.path if config.teacher.kind != "cache" else None
            config.data.path = write_first(config.data, path, config.model.block_size + 1, ranks)
        if ranks.main:
            prepare(config.data, say=ranks.say)
        ranks.share(None)
        tokens = prepare(config.data, say=lambda line: None, progress=False)
        tokens.check_length(config.model.block_size, ranks.say)
        config.run_dir = config.run_dir or ranks.share(time.strftime("runs/%Y-%m-%d_%H-%M-%S"))
        path = find_teacher(config, ranks, tokens)
        teacher = open_teacher(path, tokens, config) if path else None
        student = fit(config, ranks, tokens, teacher)
        baseline = None
        if config.baseline == "on" or (
            config.baseline == "auto" and teacher and not config.teacher.path
        ):
            without = made_first(config, "baseline", tokens)
            ranks.say(f"baseline: the same student without the teacher, in {without.run_dir}")
            baseline = fit(without, ranks, tokens, title="baseline")
        if ranks.main:
            print_closing(
                config.run_dir,
                student,
                baseline,
                sample_text(config.run_dir, tokens.tokenizer),
                config.data.name,
            )
    except Stopped:
        raise SystemExit(0) from None  # a sweep ends here too, instead of going on to its next job
    finally:
        processes.finish()


if __name__ == "__main__":
    main("train", run, Config)
