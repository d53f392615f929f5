"""What a run leaves behind and shows while it runs: metrics.jsonl, W&B beside it, the progress line."""

import json
import netrc
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from engine import check_choice
from engine.checkpoint import write_atomic


@dataclass
class WandbConfig:
    """Weights & Biases, an extra beside metrics.jsonl that can neither stop nor stall training."""

    mode: str = "disabled"  # disabled | offline | online
    project: str = "nanodistill"  # the W&B project
    group: str | None = None  # runs that W&B shows together
    name: str | None = None  # unset: the run directory's name
    tags: list[str] = field(default_factory=list)  # labels to filter by

    def __post_init__(self):
        check_choice("wandb", self.mode, ("disabled", "offline", "online"))


def bounded(call, seconds: float):
    """`call()` in a thread that is waited for at most `seconds`; TimeoutError past that, its own error otherwise."""
    result, error = [], []

    def body():
        try:
            result.append(call())
        except BaseException as problem:  # handed to the caller below, whatever it is
            error.append(problem)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    if error:
        raise error[0]
    if not result:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return result[0]


class RunLog:
    """Appends rows to run_dir/metrics.jsonl, each flushed, and mirrors them to W&B where asked."""

    def __init__(self, run_dir: Path, wandb: WandbConfig, config: dict, resume_step: int, patience: float = 20.0):
        self.file = run_dir / "metrics.jsonl"
        self.patience = patience
        rows = read_metrics(run_dir) if self.file.exists() else []
        kept = [row for row in rows if row["step"] <= resume_step]
        if len(kept) < len(rows) or not rows:  # steps past the checkpoint will be taken, and logged, again
            write_atomic(self.file, "".join(json.dumps(row) + "\n" for row in kept))
        self.stream = open(self.file, "a", buffering=1)  # noqa: SIM115 (closed by close)
        self.wandb = None if wandb.mode == "disabled" else self.start_wandb(run_dir, wandb, config)

    def start_wandb(self, run_dir: Path, options: WandbConfig, config: dict):
        """A W&B run: online within `patience` seconds, else offline, else none; a line says which."""
        try:
            import wandb
        except ImportError:
            print("warning: wandb is not installed: metrics.jsonl alone records this run", flush=True)
            return None

        def init(mode: str):
            return wandb.init(
                project=options.project,
                group=options.group,
                name=options.name or run_dir.name,
                tags=options.tags,
                dir=run_dir,
                mode=mode,
                config=config,
                reinit="create_new",
                settings=wandb.Settings(init_timeout=self.patience, silent=True, console="off"),
            )

        for mode in ("online", "offline")[options.mode == "offline" :]:
            if mode == "online" and not has_key():  # asking W&B itself would prompt
                print("warning: wandb=online without a key (wandb login): going on offline", flush=True)
                continue
            try:
                return bounded(lambda mode=mode: init(mode), self.patience + 5)
            except Exception as error:  # anything W&B raises is a warning: metrics.jsonl is the record
                print(f"warning: wandb {mode} did not start ({first_line(error)}): training goes on", flush=True)
        return None

    def row(self, row: dict) -> None:
        self.stream.write(json.dumps(row) + "\n")
        if self.wandb is not None:
            scalars = {key: value for key, value in row.items() if not isinstance(value, list)}  # val_reliability stays here
            try:
                bounded(lambda: self.wandb.log(scalars, step=row["step"]) or True, self.patience)
            except Exception as error:
                print(f"warning: wandb stopped ({first_line(error)}): metrics.jsonl goes on", flush=True)
                self.wandb = None

    def close(self) -> None:
        self.stream.close()
        if self.wandb is not None:
            try:
                bounded(lambda: self.finish_wandb() or True, self.patience)
            except Exception as error:
                print(f"warning: wandb did not finish ({first_line(error)}): `wandb sync` can send it later", flush=True)
            self.wandb = None

    def finish_wandb(self) -> None:
        """Ends the W&B run with its best val_loss as the summary: a plain number (W&B's own summary="min" makes a dict)."""
        losses = [row["val_loss"] for row in read_metrics(self.file.parent) if row.get("val_loss") is not None]
        if losses:
            self.wandb.log({}, commit=True)  # the last row, still held back, would overwrite the summary
            self.wandb.summary["val_loss"] = min(losses)
        self.wandb.finish()


def has_key() -> bool:
    """Whether a W&B key is set, in the environment or by `wandb login` in ~/.netrc."""
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        hosts = {}
    server = os.environ.get("WANDB_BASE_URL", "wandb")
    return bool(os.environ.get("WANDB_API_KEY")) or any("wandb" in host or host in server for host in hosts)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_metrics(run_dir: Path) -> list[dict]:
    """The rows of run_dir/metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Progress:
    """One live line on a terminal; elsewhere a plain line at evaluations and at most every `every` seconds."""

    def __init__(self, title: str, max_steps: int, enabled: bool, every: float = 10.0):
        from rich.live import Live

        self.title, self.max_steps, self.enabled, self.every = title, max_steps, enabled, every
        self.shown = time.monotonic()
        self.held_out = ""
        terminal = enabled and sys.stdout.isatty()
        self.live = Live(refresh_per_second=8) if terminal else None
        if self.live:
            self.live.start()

    def show(self, row: dict, eta: float, mfu: float | None, memory: int) -> None:
        """`row` as logged; `eta` in seconds; `memory` in bytes."""
        if not self.enabled:
            return
        evaluated = "val_loss" in row
        if evaluated:
            parts = [f"held-out {row['val_loss']:.3f}"]
            parts += [f"kl to teacher {row['val_kl']:.3f}"] if row.get("val_kl") is not None else []
            self.held_out = " ".join(parts)
        parts = [f"{self.title} {row['step']}/{self.max_steps}", f"loss {row['loss']:.3f}"]
        parts += [f"ce {row['ce']:.3f} kl {row['kl']:.3f}"] if row["teacher_mass"] else []
        parts += [self.held_out] if self.held_out else []
        parts += [f"{row['tokens_per_s']:,.0f} tok/s", f"MFU {'n/a' if mfu is None else f'{mfu:.1%}'}"]
        parts += [f"ETA {clock(eta)}", f"{memory / 2**30:.1f} GiB"]
        line = " | ".join(parts)
        if self.live:
            self.live.update(line)
        elif evaluated or time.monotonic() - self.shown > self.every:
            print(line, flush=True)
            self.shown = time.monotonic()

    def close(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def closing(run_dir: str, student: dict, baseline: dict | None, sample: str) -> None:
    """The last lines, from summaries: what came out, against what would have come out without the teacher."""
    teacher = student["teacher"]
    shape = f"{student['parameters'] / 1e6:.2f}M parameters, {student['text_tokens']:,} tokens of text"
    print("\nheld-out loss in nats a token (lower is better), best of each run's evaluations\n")
    if teacher:
        print(f"  teacher   {teacher['val_loss']:.3f}   {teacher['parameters'] / 1e6:.2f}M parameters")
    print(f"  student   {student['best_val_loss']:.3f}   {shape}{', taught by the teacher' if teacher else ''}")
    if baseline:
        print(f"  without   {baseline['best_val_loss']:.3f}   the same student on the same text, without the teacher")
        gained = baseline["best_val_loss"] - student["best_val_loss"]
        print(f"\nThe teacher was worth {gained:.3f} nats a token.")
    print(f"\nA sample of the student:\n{sample}\n\nNext: python sample.py path={run_dir} prompt='def '")
    print(f"      python eval.py path={run_dir}" + (f" teacher.path={teacher['path']}" if teacher else ""))
    print("      python train.py data=text data.path=FILE_OR_FOLDER      # your own text")
