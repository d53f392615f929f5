"""What a user sees while a run works, and when it is done."""

import math
import shlex
import sys
import time
from collections.abc import Callable

from rich.live import Live

SECONDS_BETWEEN_LINES = 10.0


def format_duration(seconds: float) -> str:
    """Whole seconds as 0:59 or 1:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressPrinter:
    """Says how far a long job is, once in ten seconds at most."""

    def __init__(self, title: str, total: int, say: Callable[[str], object]):
        self.title = title
        self.total = total
        self.say = say
        self.done = 0
        self.tokens = 0
        self.started = time.monotonic()
        self.shown = self.started

    def add(self, done: int, tokens: int | None = None) -> None:
        """Counts `done` more of `total`, and the tokens in them (unset: `done` counts tokens)."""
        self.done += done
        self.tokens += done if tokens is None else tokens
        now = time.monotonic()
        if now - self.shown <= SECONDS_BETWEEN_LINES:
            return

        self.shown = now
        spent = now - self.started
        eta = format_duration(spent / self.done * (self.total - self.done))
        share = self.done / self.total
        self.say(f"{self.title}: {share:.0%} | {self.tokens / spent:,.0f} tok/s | ETA {eta}")


class ProgressLine:
    """The training run's line: live on a terminal, else printed at evaluations and in between.

    bound: the rows' val_kl is a lower bound (from a cache of less than whole distributions).
    """

    def __init__(self, title: str, max_steps: int, enabled: bool, bound: bool = False):
        self.title = title
        self.max_steps = max_steps
        self.enabled = enabled
        self.kl_label = "kl to teacher >=" if bound else "kl to teacher"
        self.shown = time.monotonic()
        self.steps = 0.0  # that the pace shown is a mean of, and their seconds
        self.seconds = 0.0
        self.held_out = ""  # the last evaluation, shown until the next
        self.live = None
        if enabled and sys.stdout.isatty():
            self.live = Live(refresh_per_second=8)
            self.live.start()

    def show(self, row: dict, eta: float, mfu: float | None, memory: int) -> None:
        """Shows a row of metrics.jsonl; eta in seconds, mfu as a fraction, memory in bytes.

        The row's pace and mfu are one step's; those shown are a mean.
        """
        if not self.enabled:
            return
        pace = self.mean_pace(row)

        evaluated = "val_loss" in row
        if evaluated:
            self.held_out = f"held-out {row['val_loss']:.3f}"
            if row.get("val_kl") is not None:
                self.held_out += f" {self.kl_label} {row['val_kl']:.3f}"

        parts = [f"{self.title} {row['step']}/{self.max_steps}", f"loss {row['loss']:.3f}"]
        if row["teacher_mass"]:
            parts.append(f"ce {row['ce']:.3f} kl {row['kl']:.3f}")
        if self.held_out:
            parts.append(self.held_out)
        parts.append(f"{pace:,.0f} tok/s")
        if mfu is None:
            parts.append("MFU n/a")
        else:
            parts.append(f"MFU {mfu * pace / row['tokens_per_s']:.1%}")
        parts.append(f"ETA {format_duration(eta)}")
        parts.append(f"{memory / 2**30:.1f} GiB")
        line = " | ".join(parts)

        if self.live:
            self.live.update(line)
        elif evaluated or time.monotonic() - self.shown > SECONDS_BETWEEN_LINES:
            print(line, flush=True)
            self.shown = time.monotonic()
            self.steps = 0.0
            self.seconds = 0.0

    def mean_pace(self, row: dict) -> float:
        """Tokens a second since the last printed line; on a terminal of the last seconds."""
        tokens = row["tokens"] / row["step"]  # of each step
        seconds = tokens / row["tokens_per_s"]
        if self.live:  # older steps fade out
            fade = math.exp(-seconds / SECONDS_BETWEEN_LINES)
            self.steps *= fade
            self.seconds *= fade
        self.steps += 1
        self.seconds += seconds
        return tokens * self.steps / self.seconds

    def close(self) -> None:
        if self.live:
            self.live.stop()


def print_closing(
    run_dir: str,
    student: dict,
    baseline: dict | None,
    sample: str,
    data: str,
    taught: bool,
) -> None:
    """Prints the last lines, from the runs' summaries.

    Args:
        data: name of the student's corpus.
        taught: whether it learnt from a teacher, running or recorded.
    """
    teacher = student["teacher"]
    size = f"{student['parameters'] / 1e6:.2f}M parameters"

    print("\nheld-out loss in nats a token (lower is better), best of each run's evaluations\n")
    if teacher:
        teacher_size = f"{teacher['parameters'] / 1e6:.2f}M parameters"
        print(f"  teacher   {teacher['val_loss']:.3f}   {teacher_size}")
    text = f"{student['text_tokens']:,} tokens of text"
    if taught:
        text += ", taught by the teacher"
    print(f"  student   {student['best_val_loss']:.3f}   {size}, {text}")
    if baseline:
        same = "the same student on the same text, without the teacher"
        print(f"  without   {baseline['best_val_loss']:.3f}   {same}")
        gained = baseline["best_val_loss"] - student["best_val_loss"]
        print(f"\nThe teacher was worth {gained:.3f} nats a token.")
    elif taught:
        print("\nbaseline=on trains the same student without the teacher too.")

    print(f"\nA sample of the student:\n{sample}\n")
    prompt = " prompt='def '" if data == "stdlib" else ""
    path = shlex.quote(f"path={run_dir}")
    print(f"Next: python sample.py {path}{prompt}")
    against = " " + shlex.quote(f"teacher.path={teacher['path']}") if teacher else ""
    print(f"      python eval.py {path}{against}")
    if data == "stdlib":
        print("      python train.py data=text data.path=FILE_OR_FOLDER      # your own text")
