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
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from conf.cli import main
from conf.schema import Config
from data import Batches, Prefetch, Tokens, held_out, prepare
from data.teacher import AccessConfig, OnlineTeacher, Teacher, TeacherConfig, check_access, load_teacher
from engine import UserError, checkpoint
from engine import ranks as processes
from engine.logger import Progress, RunLog, WandbConfig
from engine.optim import learning_rate, make_optimizer
from engine.ranks import Ranks
from engine.run_dir import claim, identity
from model import GPT
from model.metrics import evaluate
from model.objective import LossConfig, Objective

IGNORE = -100


class Stopped(Exception):
    """A signal asked this run to leave; its state is saved."""


class Trainer:
    """A student, its optimizer and its place in the data; `fit` runs it to max_steps."""

    def __init__(self, config: Config, ranks: Ranks, tokens: Tokens, teacher: Teacher | None = None, title: str = "student"):
        self.config, self.ranks, self.tokens, self.title = config, ranks, tokens, title
        self.run_dir, self.device = Path(config.run_dir), ranks.device
        self.micro = config.micro_batch_size or max(1, config.batch_size // ranks.world)
        if config.batch_size % (self.micro * ranks.world):
            raise UserError(
                f"batch_size={config.batch_size}: must be a multiple of micro_batch_size x ranks = {self.micro} x {ranks.world}"
            )
        half = config.dtype == "bfloat16" or (config.dtype == "auto" and self.device.type == "cuda")
        self.autocast = partial(torch.autocast, self.device.type, dtype=torch.bfloat16, enabled=half)
        torch.manual_seed(config.seed)
        self.student = GPT(config.model, tokens.vocab_size).to(self.device)
        self.optimizer = make_optimizer(self.student, config.optim)
        self.module = Objective(self.student, config.loss)
        if config.compile == "on" or (config.compile == "auto" and self.device.type == "cuda"):
            self.student.hidden = torch.compile(self.student.hidden)
        if ranks.world > 1:
            self.module = DistributedDataParallel(self.module)
        self.teacher = teacher and teacher._replace(model=teacher.model.to(self.device))
        self.targets = lambda ids: None
        if config.loss.name != "ce":
            online = OnlineTeacher(teacher.model, config.access, config.loss.temperature, self.autocast)
            self.targets = online.targets
        block_size = config.model.block_size
        self.batches = Batches(tokens.train, block_size, config.batch_size, config.seed, config.data.fraction)
        self.step, self.seconds, self.val_loss, self.best = 0, 0.0, None, math.inf

    def update(self, batch) -> dict | None:
        """One optimizer step on `batch`; its metrics row, or None where a signal came first (nothing has changed then).

        The gradient is the mean over the kept positions of the whole batch, however it is split into micro-batches.
        """
        started, world = time.perf_counter(), self.ranks.world
        kept = max(1, int((batch.labels != IGNORE).sum()))
        rounds = self.config.batch_size // (self.micro * world)
        sums = torch.zeros(5, device=self.device)  # loss, kl, ce, teacher_mass, student_mass
        for turn in range(rounds):
            if self.ranks.any(self.ranks.stop is not None):
                self.optimizer.zero_grad()
                return None
            place = turn * world + self.ranks.rank
            rows = slice(place * self.micro, (place + 1) * self.micro)
            ids, labels = (part[rows].to(self.device, non_blocking=True) for part in (batch.ids, batch.labels))  # [B,T]
            torch.manual_seed(hash((self.config.seed, self.step, place)))  # dropout: a function of the place, not of history
            last = turn == rounds - 1 or world == 1
            with nullcontext() if last else self.module.no_sync():
                with self.autocast():
                    out = self.module(ids, labels, self.targets(ids))
                (out.loss * (world / kept)).backward()  # DDP averages over ranks: times world makes it a sum
            sums += torch.stack([part.detach().float() for part in out])
        means = (self.ranks.sum(sums) / kept).tolist()
        clip = self.config.optim.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), clip).item()
        if not math.isfinite(means[0] + norm):
            self.diverged(means[0], norm)
        rate = learning_rate(self.config.optim, self.step, self.config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.val_loss = self.step + 1, None
        seconds = time.perf_counter() - started
        self.seconds += seconds
        names = ("loss", "kl", "ce", "teacher_mass", "student_mass")
        row = {"step": self.step, "tokens": self.step * self.step_tokens, "seconds": round(self.seconds, 3)}
        row |= dict(zip(names, means, strict=True))
        return row | {"lr": rate, "grad_norm": norm, "tokens_per_s": self.step_tokens / seconds}

    @property
    def step_tokens(self) -> int:
        return self.config.batch_size * self.config.model.block_size

    def diverged(self, loss: float, norm: float) -> None:
        """Every rank sees the same sums, so every rank stops here, before the update."""
        self.optimizer.zero_grad()
        self.save()
        raise UserError(
            f"step {self.step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}: stopped before the update, state saved in"
            f" {self.run_dir}; lower optim.lr={self.config.optim.lr} or optim.grad_clip={self.config.optim.grad_clip}"
        )

    def evaluate(self) -> dict:
        """Held-out measures (rank 0 works, the others wait); empty where a signal came."""
        measures = {}
        if self.ranks.main:
            self.student.eval()
            try:
                measures = self.measure(self.student, self.teacher and self.teacher.model)
            except Stopped:
                measures = {}
            self.student.train()
        measures = self.ranks.share(measures)
        self.val_loss = measures.get("val_loss")
        return measures

    def measure(self, model: GPT, teacher: GPT | None = None) -> dict:
        return evaluate(model, self.held_out(), teacher=teacher, autocast=self.autocast)

    def held_out(self):
        for batch in held_out(self.tokens.val, self.config.model.block_size, self.micro, self.config.eval_tokens):
            if self.ranks.stop:
                raise Stopped
            yield batch

    def due(self) -> bool:
        """Whether the step that was just made is evaluated."""
        return self.step % self.config.eval_every == 0 or self.step == self.config.max_steps

    def fit(self) -> dict:
        """Trains to max_steps, from the newest good checkpoint if there is one; returns the summary."""
        self.restore()
        log = RunLog(self.run_dir, self.config.wandb, asdict(self.config), self.step) if self.ranks.main else None
        progress = Progress(self.title, self.config.max_steps, self.ranks.main and self.step < self.config.max_steps)
        peak = processes.peak_flops(self.device) if self.autocast.keywords["enabled"] else None
        flops = self.student.flops_per_token(self.config.model.block_size)
        if self.step < self.config.max_steps:
            self.ranks.say(self.plan())
        batches = Prefetch(self.batches, self.step, self.config.max_steps, pin=self.device.type == "cuda")
        try:
            if self.step and self.due() and self.val_loss is None:  # an evaluation that a signal cut short
                self.finish_step({"step": self.step} | self.evaluate(), log)
            for batch in batches:
                row = self.update(batch)
                if row is None:
                    self.save()
                    raise Stopped
                row |= self.evaluate() if self.due() else {}
                self.finish_step(row, log)
                mfu = row["tokens_per_s"] * flops / (peak * self.ranks.world) if peak else None
                eta = (self.config.max_steps - self.step) * self.seconds / self.step
                progress.show(row, eta, mfu, processes.memory_bytes(self.device))
        finally:
            batches.close()
            progress.close()
            if log:
                log.close()
        if self.val_loss is None and self.step:  # the signal came in the last evaluation
            self.save()
            raise Stopped
        return self.summary()

    def plan(self) -> str:
        """What the keys add up to, in one line."""
        config, size = self.config, self.student.num_params()
        epochs = config.max_steps * config.batch_size / self.batches.n_blocks
        dtype = "bfloat16" if self.autocast.keywords["enabled"] else "float32"
        return (
            f"{self.title}: {size / 1e6:.2f}M parameters, {config.max_steps} steps of {self.step_tokens:,} tokens,"
            f" {epochs:.1f} epochs of {self.batches.n_blocks * config.model.block_size:,} tokens;"
            f" {self.device.type} x {self.ranks.world}, {dtype}"
        )

    def finish_step(self, row: dict, log: RunLog | None) -> None:
        """Logs the row and saves where it is time, or where the held-out loss is the best so far."""
        if log:
            log.row(row)
        better = self.val_loss is not None and self.val_loss < self.best
        if better:
            self.best = self.val_loss
        if better or self.step % self.config.save_every == 0 or self.step == self.config.max_steps:
            self.save()

    def fingerprints(self) -> dict:
        """What a continuation must share with this run, and a later reader can check."""
        teacher = self.teacher.fingerprint if self.teacher else None
        return {"tokens": self.tokens.fingerprint, "tokenizer": self.tokens.tokenizer.fingerprint, "teacher": teacher}

    def save(self) -> None:
        if self.ranks.main:
            info = {"val_loss": self.val_loss, "fingerprints": self.fingerprints()}
            checkpoint.save(self.run_dir, self.step, self.write, info)
            checkpoint.prune(self.run_dir, self.config.keep)
        self.ranks.share(None)

    def write(self, folder: Path) -> None:
        self.student.save_pretrained(folder)
        self.tokens.tokenizer.save(folder)
        state = {"optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds, "best": self.best}
        torch.save(state, folder / "trainer.pt")

    def restore(self) -> None:
        """Takes up the checkpoint that `resume` means, if any; refuses one of other tokens."""
        resume = self.config.resume
        if resume not in ("auto", "never"):
            folder = checkpoint.resolve(resume, key="resume")
        else:
            folder = checkpoint.latest(self.run_dir, self.ranks.say) if resume == "auto" else None
        if folder is None:
            return
        manifest = checkpoint.manifest(folder)
        for name, ours in self.fingerprints().items():
            if manifest["fingerprints"][name] != ours:
                raise UserError(f"run_dir={self.run_dir}: its run had another {name} (SHA-256 differs); give another run_dir")
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
            "flops": {"student": tokens * self.student.flops_per_token(block), "teacher": 0.0},
            "best_val_loss": self.best,
            "val_loss": self.val_loss,
            "teacher": None,
        }
        if self.teacher and self.ranks.main:
            model = self.teacher.model
            if self.config.loss.name != "ce":  # a forward pass is a third of a training step's
                summary["flops"]["teacher"] = tokens * model.flops_per_token(block) / 3
            measures = self.measure(model)
            summary["teacher"] = {"path": self.teacher.path, "parameters": model.num_params(), **measures}
        return summary


def fit(config: Config, ranks: Ranks, tokens: Tokens, teacher: Teacher | None = None, title: str = "student") -> dict:
    """One run in its own directory: claimed, recorded, trained, summed up in summary.json."""
    run_dir = Path(config.run_dir)
    handle = claim(run_dir, asdict(config), wait=title != "student") if ranks.main else None
    ranks.share(None)
    trainer = Trainer(config, ranks, tokens, teacher, title)
    ranks.training = True
    try:
        summary = trainer.fit()
    except Stopped:
        how = f"the same command with run_dir={run_dir}" if title == "student" else "the same command"
        ranks.say(f"{ranks.stop}: {title} saved at step {trainer.step}; {how} goes on")
        raise
    if handle:
        checkpoint.write_atomic(run_dir / "summary.json", json.dumps(summary, indent=1))
        handle.close()
    return summary


def made_first(config: Config, name: str, tokens: Tokens, **changes) -> Config:
    """A cross-entropy run that this one needs; its directory is named by what determines it, so that it is found again."""
    plain = {"teacher": TeacherConfig(kind="none"), "loss": LossConfig(name="ce"), "access": AccessConfig()}
    made = replace(config, wandb=WandbConfig(), resume="auto", baseline="off", **plain, **changes)
    made.run_dir = f"runs/{name}-{identity(asdict(made), tokens.fingerprint)}"
    return made


def find_teacher(config: Config, ranks: Ranks, tokens: Tokens) -> str | None:
    """The teacher's path: the one given, or one trained now on all the training text."""
    if config.teacher.path is not None or config.teacher.kind == "none" or config.loss.name == "ce":
        return config.teacher.path if config.teacher.kind != "none" else None
    check_access(config.access, tokens.vocab_size)
    shape = {"model": config.teacher.model, "max_steps": config.teacher.max_steps}
    optim, data = replace(config.optim, lr=config.teacher.lr), replace(config.data, fraction=1.0)
    made = made_first(config, "teacher", tokens, **shape, optim=optim, data=data, seed=0)
    there = checkpoint.folders(Path(made.run_dir))
    ranks.say(f"teacher: {'reusing' if there else 'none given (teacher.path), so one is trained first in'} {made.run_dir}")
    fit(made, ranks, tokens, title="teacher")
    return made.run_dir


def closing(config: Config, tokens: Tokens, student: dict, baseline: dict | None, teacher: dict | None) -> None:
    """The last lines: what came out, against what would have come out without the teacher."""
    shape = f"{student['parameters'] / 1e6:.2f}M parameters, {student['text_tokens']:,} tokens of text"
    print("\nheld-out loss in nats a token (lower is better), best of each run's evaluations\n")
    if teacher:
        print(f"  teacher   {teacher['val_loss']:.3f}   {teacher['parameters'] / 1e6:.2f}M parameters")
    print(f"  student   {student['best_val_loss']:.3f}   {shape}{', taught by the teacher' if teacher else ''}")
    if baseline:
        print(f"  without   {baseline['best_val_loss']:.3f}   the same student on the same text, without the teacher")
        gained = baseline["best_val_loss"] - student["best_val_loss"]
        print(f"\nThe teacher was worth {gained:.3f} nats a token.")
    model = GPT.from_pretrained(config.run_dir)
    start = torch.tensor([[tokens.tokenizer.eot or 0]])
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(start, 100, temperature=0.8, top_k=50, generator=generator)
    print(f"\nA sample of the student:\n{tokens.tokenizer.decode([int(token) for token in drawn])}\n")
    print(f"Next: python sample.py path={config.run_dir} prompt='def '")
    print(f"      python eval.py path={config.run_dir}" + (f" teacher.path={teacher['path']}" if teacher else ""))
    print("      python train.py data=text data.path=FILE_OR_FOLDER      # your own text")


def run(config: Config) -> None:
    """Everything that `python train.py` does: tokens, teacher, student, and what the student would be without the teacher."""
    ranks = processes.start(config.device)
    try:
        if ranks.main:
            prepare(config.data, say=ranks.say)
        ranks.share(None)
        tokens = prepare(config.data, say=lambda line: None, progress=False)
        tokens.check_length(config.model.block_size)
        config.run_dir = config.run_dir or ranks.share(time.strftime("runs/%Y-%m-%d_%H-%M-%S"))
        made = config.teacher.path is None and config.loss.name != "ce"
        path = find_teacher(config, ranks, tokens)
        teacher = load_teacher(path, tokens, config.model.block_size, config.access) if path else None
        student = fit(config, ranks, tokens, teacher)
        baseline = None
        if config.baseline == "on" or (config.baseline == "auto" and made):
            without = made_first(config, "baseline", tokens)
            ranks.say(f"baseline: the same student without the teacher, in {without.run_dir}")
            baseline = fit(without, ranks, tokens, title="baseline")
        if ranks.main:
            closing(config, tokens, student, baseline, student.get("teacher"))
    except Stopped:
        raise SystemExit(0) from None  # a sweep ends here too, instead of going on to its next job
    finally:
        processes.finish()


if __name__ == "__main__":
    main("train", run, Config)
