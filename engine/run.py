"""The record of one training run: its directory, metrics, progress line and checkpoints.

train.py decides what happens in a step and when; how it is written down and taken up again is here.
"""

import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from engine import UserError, checkpoint
from engine.logger import RunLog
from engine.optim import learning_rate
from engine.progress import ProgressLine
from engine.ranks import Ranks, autocast, copy_to_host_async, memory_bytes, peak_flops
from engine.run_dir import claim, input_difference

# float16 steps left out in a row before the run gives up: from 65,536 the loss's scale is then
# below 1e-2.
MAX_SKIPPED_STEPS = 24


class Stopped(Exception):
    """A signal asked this run to leave; its state is saved."""


class Run:
    """One run on all its ranks; rank 0 writes.

    Call order: `open`, then for each step `start_step` and `log`, at evaluations `finish_step` and
    `log_evaluation`, and `save` where `should_save` says so.
    """

    def __init__(
        self,
        config,
        ranks: Ranks,
        fingerprints: dict[str, str | None],
        title: str = "student",
    ):
        """Claims the run directory; UserError where another run or configuration lives there.

        fingerprints: of what the run reads (engine/run_dir.find_fingerprints).
        """
        self.config = config
        self.fingerprints = fingerprints
        self.ranks = ranks
        self.title = title
        self.run_dir = Path(config.run_dir)
        self.lock = None
        if ranks.main:
            wait = title != "student"
            self.lock = claim(self.run_dir, asdict(config), fingerprints, wait)
        ranks.share(None)

        self.step = 0  # steps taken
        self.seconds = 0.0  # spent on them
        self.val_loss: float | None = None  # after the last step, where it was evaluated
        self.best_val_loss = math.inf
        self.improved = False  # whether the last step's val_loss is the best so far

        self.pending: Callable[[], dict] | None = None  # reads the metrics of the step just queued
        self.row: dict | None = None  # the last step's row, not written yet
        self.clock: float | None = None  # when the running step began; None while the clock stands
        self.evaluation_started = 0.0
        self.eval_seconds = 0.0  # that this process spent on evaluations, and on checkpoints
        self.save_seconds = 0.0
        self.skipped_steps = 0  # float16 steps left out, in a row
        self.metrics_log: RunLog | None = None
        self.progress: ProgressLine | None = None

    # --- starting ---

    def open(self, student, optimizer, tokenizer) -> None:
        """Takes up the checkpoint that `resume` means, if any; opens the log and the progress line.

        The state of student, optimizer and tokenizer is loaded here and saved by `save`.
        """
        self.student = student
        self.optimizer = optimizer
        self.tokenizer = tokenizer
        folder = self.find_checkpoint()
        if folder is not None:
            self.restore(folder)
        if self.step >= self.config.max_steps and self.config.resume != "auto":
            self.save()  # what resume=PATH named needs no step: it is the end of this run too

        self.opened = time.perf_counter()
        self.first_step = self.step  # where this process took the run up
        config = self.config
        if self.ranks.main:
            finished = self.step >= config.max_steps and self.val_loss is not None
            self.metrics_log = RunLog(
                self.run_dir, config.wandb, asdict(config), self.step, finished
            )
        shown = self.ranks.main and self.step < config.max_steps
        kl_is_bound = config.teacher.kind == "cache" and config.access.kind != "full"
        self.progress = ProgressLine(self.title, config.max_steps, shown, kl_is_bound)

    def restore(self, folder: Path) -> None:
        manifest = checkpoint.manifest(folder)
        resume = self.config.resume
        if not manifest:
            raise UserError(
                f"resume={resume}: a model without its trainer's state; start from its weights by"
                f" model.init={resume}, without resume"
            )
        difference = input_difference(folder, asdict(self.config), self.fingerprints)
        if difference is not None:
            raise UserError(
                f"resume={resume}: {difference}, or start from its weights by model.init={resume},"
                " without resume"
            )

        saved = type(self.student).from_pretrained(folder)
        if resume != "auto":
            self.check_shape(saved)
        self.student.load_state_dict(saved.state_dict())
        path = folder / "trainer.pt"
        state = torch.load(path, map_location=self.ranks.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.best_val_loss = state["best"]
        self.val_loss = manifest["val_loss"]
        if self.step < self.config.max_steps:
            self.ranks.say(f"{self.title}: going on from step {self.step} ({folder})")
        elif self.title == "student":
            self.ranks.say(f"student: finished at step {self.step}; a larger max_steps goes on")

    def check_shape(self, saved) -> None:
        """UserError where the model of a checkpoint that `resume` names has another shape."""
        ours = vars(self.student.config) | {"vocab_size": self.student.vocab_size}
        theirs = vars(saved.config) | {"vocab_size": saved.vocab_size}
        free = ("init", "dropout", "zero_init")
        changed = [key for key in ours if ours[key] != theirs[key] and key not in free]
        if changed:
            here = " ".join(f"model.{key}={ours[key]}" for key in changed)
            settings = " ".join(f"model.{key}={theirs[key]}" for key in changed)
            resume = self.config.resume
            raise UserError(f"resume={resume}: its model is not one of {here}; set {settings}")

    def find_checkpoint(self) -> Path | None:
        if self.config.resume == "auto":
            return checkpoint.latest(self.run_dir, self.ranks.say)
        if self.config.resume == "never":
            return None
        return checkpoint.resolve(self.config.resume, key="resume")

    def close(self) -> None:
        if self.progress:
            self.progress.close()
        if self.metrics_log:
            self.metrics_log.close()

    # --- metrics ---

    def start_step(self) -> None:
        """Starts the clock where it stands: evaluations and checkpoints are not training time."""
        if self.clock is None:
            self.clock = time.perf_counter()

    def log(self, step: int, metrics: dict[str, torch.Tensor], lr: float) -> None:
        """Takes the metrics of the step just queued, and writes those of the step before it.

        On CUDA a step's metrics exist only when the device gets there. By now it has reached those
        of the step before, so that neither waits for the other.

        Raises UserError where the loss or gradient of the step before was not finite. Neither that
        step nor this one changed the weights then; the state before them is saved.
        """
        self.write_row()
        self.step = step
        self.improved = False
        names = list(metrics)
        read_values = copy_to_host_async(torch.stack(list(metrics.values())))

        def read() -> dict:
            values, now = read_values()
            return self.make_row(step, dict(zip(names, values, strict=True)), lr, now)

        self.pending = read

    def make_row(self, step: int, metrics: dict[str, float], lr: float, now: float) -> dict:
        step_seconds = now - self.clock
        self.clock = now
        self.seconds += step_seconds
        self.check_finite(step, metrics)
        self.val_loss = None

        grad_norm = metrics.pop("grad_norm")
        tokens = self.config.batch_size * self.config.model.block_size
        row = {"step": step, "tokens": step * tokens, "seconds": round(self.seconds, 3)}
        row |= metrics
        return row | {"lr": lr, "grad_norm": grad_norm, "tokens_per_s": tokens / step_seconds}

    def check_finite(self, step: int, metrics: dict[str, float]) -> None:
        loss = metrics["loss"]
        grad_norm = metrics["grad_norm"]
        self.skipped_steps = 0 if math.isfinite(grad_norm) else self.skipped_steps + 1
        allowed = MAX_SKIPPED_STEPS if self.config.dtype == "float16" else 0
        if math.isfinite(loss) and self.skipped_steps <= allowed:
            return
        self.step = step - 1
        self.save()
        raise UserError(
            f"step {step}: loss {loss:.4g}, gradient norm {grad_norm:.4g}: stopped before the"
            f" update, state saved in {self.run_dir}; {self.advice_after_divergence()}"
        )

    def advice_after_divergence(self) -> str:
        """What to set. A teacher and a baseline get another directory by themselves."""
        optim = self.config.optim
        lr_key = "teacher.lr" if self.title == "teacher" else "optim.lr"
        advice = f"lower {lr_key}={optim.lr}, or optim.grad_clip={optim.grad_clip}"
        if optim.grad_clip == 0:
            advice = f"set optim.grad_clip=1 (0 is no clipping), or lower {lr_key}={optim.lr}"
        if self.title == "student":
            advice += ", and give another run_dir"
        return advice

    def read_pending(self) -> None:
        if self.pending is not None:
            read = self.pending
            self.pending = None
            self.row = read()

    def finish_step(self) -> None:
        """Waits for the queued step and stops the clock; its row is written later."""
        self.read_pending()
        self.clock = None
        self.evaluation_started = time.perf_counter()

    def log_evaluation(self, measures: dict) -> None:
        """Adds the last step's held-out measures to its row; empty where a signal came first."""
        self.eval_seconds += time.perf_counter() - self.evaluation_started
        self.val_loss = measures.get("val_loss")
        self.improved = self.val_loss is not None and self.val_loss < self.best_val_loss
        if self.improved:
            self.best_val_loss = self.val_loss
        if self.row is None and self.metrics_log:  # a signal cut this evaluation short before
            self.row = self.metrics_log.take_back(self.step)
        self.row = (self.row or {"step": self.step}) | measures
        self.write_row()

    def write_row(self) -> None:
        """Writes the last step's row, if it is not written yet."""
        self.read_pending()
        if self.row is None:
            return
        row = self.row
        self.row = None
        if self.metrics_log:
            self.metrics_log.row(row)
        if "loss" in row:
            self.show_progress(row)

    def show_progress(self, row: dict) -> None:
        # The wall clock, evaluations and checkpoints too.
        elapsed = time.perf_counter() - self.opened
        remaining_steps = self.config.max_steps - row["step"]
        eta = remaining_steps * elapsed / max(1, row["step"] - self.first_step)
        device = self.ranks.device
        mfu = None
        peak = peak_flops(device)
        if peak is not None and self.config.dtype != "float32":
            flops_per_token = self.student.flops_per_token(self.config.model.block_size)
            mfu = row["tokens_per_s"] * flops_per_token / (peak * self.ranks.world)
        self.progress.show(row, eta, mfu, memory_bytes(device))

    # --- checkpoints ---

    def should_save(self) -> bool:
        """At the interval, at the end, and where the held-out loss is the best so far."""
        at_end = self.step >= self.config.max_steps
        return self.step % self.config.save_every == 0 or at_end or self.improved

    def save(self) -> None:
        """Writes a checkpoint of the state after the last step, and deletes older ones."""
        self.write_row()
        self.clock = None
        started = time.perf_counter()
        if self.ranks.main:
            info = {"val_loss": self.val_loss, "fingerprints": self.fingerprints}
            checkpoint.save(self.run_dir, self.step, self.write_checkpoint, info)
            checkpoint.prune(self.run_dir, self.config.keep)
        self.ranks.share(None)
        self.save_seconds += time.perf_counter() - started

    def write_checkpoint(self, folder: Path) -> None:
        ends = self.tokenizer.end_tokens(self.student.eos)
        self.student.save_pretrained(folder, self.tokenizer.bos, ends)
        self.tokenizer.save(folder)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best_val_loss,
        }
        # Opened here: of a file that it opens itself torch.save hides the disk's own error.
        with open(folder / "trainer.pt", "wb") as stream:
            torch.save(state, stream)

    def stop(self) -> None:
        """Saves and raises Stopped, after a signal."""
        self.save()
        command = "the same command"
        if self.title == "student":
            command = "the same command with " + shlex.quote(f"run_dir={self.run_dir}")
        signal = self.ranks.stop
        self.ranks.say(f"{signal}: {self.title} saved at step {self.step}; {command} goes on")
        raise Stopped

    # --- the first line and the last word ---

    def describe(self, num_blocks: int) -> None:
        """Says what the keys add up to, in one line; num_blocks: of the training text."""
        config = self.config
        shape = self.student.config
        block_size = config.model.block_size
        epochs = config.max_steps * config.batch_size / num_blocks
        dtype = autocast(self.ranks.device, config.dtype).keywords["dtype"]
        optim = config.optim
        lr = f"optim.lr={optim.lr:g}"
        if optim.warmup_steps > config.max_steps:
            reached = learning_rate(optim, config.max_steps - 1, config.max_steps)
            lr += f" (reaches {reached:.3g}: optim.warmup_steps={optim.warmup_steps})"
        self.ranks.say(
            f"{self.title}: {self.student.num_params() / 1e6:.2f}M parameters"
            f" (n_layer={shape.n_layer} n_embd={shape.n_embd} n_head={shape.n_head}),"
            f" {config.max_steps} steps of {config.batch_size} x {block_size} tokens,"
            f" {epochs:.1f} epochs of {num_blocks * block_size:,}; {lr},"
            f" {self.ranks.device.type} x {self.ranks.world}, {str(dtype).removeprefix('torch.')}"
        )

    def finish(
        self,
        num_blocks: int,
        data_wait_seconds: float,
        teacher=None,
        teacher_measures: dict | None = None,
    ) -> dict:
        """Writes summary.json, frees the directory, and returns the summary.

        Args:
            num_blocks: blocks of the training text.
            teacher, teacher_measures: the teacher and what was held-out measured of its model.
        """
        block_size = self.config.model.block_size
        tokens = self.step * self.config.batch_size * block_size
        flops = {"student": tokens * self.student.flops_per_token(block_size), "teacher": 0.0}
        teacher_summary = None
        if teacher_measures is not None:
            parameters = teacher.model.num_params()
            teacher_summary = {"path": teacher.path, "parameters": parameters, **teacher_measures}
            if self.config.loss.name != "ce":
                # A forward pass is a third of a training step's.
                flops["teacher"] = tokens * teacher.model.flops_per_token(block_size) / 3
        summary = {
            "parameters": self.student.num_params(),
            "tokens": tokens,
            "text_tokens": num_blocks * block_size,
            "flops": flops,
            "best_val_loss": self.best_val_loss,
            "val_loss": self.val_loss,
            "step_seconds": self.seconds,  # of the whole run; what follows is of this process
            "eval_seconds": self.eval_seconds,
            "save_seconds": self.save_seconds,
            "data_wait_seconds": data_wait_seconds,
            "teacher": teacher_summary,
        }
        if self.lock is not None:
            checkpoint.write_atomic(self.run_dir / "summary.json", json.dumps(summary, indent=1))
            self.lock.close()
        return summary
