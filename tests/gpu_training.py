"""Real training on one machine, by the real programs: what needs a GPU and no unit test covers.

python -m tests.gpu_training           # a GPU, compiled
python -m tests.gpu_training --tiny    # a CPU in small, to try this script

Two chains run side by side:
  interrupt   cross-entropy in bfloat16: SIGTERM stops it midway, and the same command goes on
  capture     what that model says of its text is recorded
  offline     a student learns from the recording
and
  float16     a teacher is trained first and then runs beside its student, both in float16 with Muon

All of them compile, read batches ahead (on a GPU into pinned memory), evaluate and save. Each part
prints a line; one that failed begins with FAILED, the end of its program's output follows, and the
exit status is 1.
"""

import argparse
import importlib
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.logger import read_metrics

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120  # a program that takes longer has failed

TEACHER = ["access.k=64", "eval_tokens=2048"]  # what train.py and teachers.capture agree on
STUDENT = ["data=text", "data.path=corpus", "baseline=off", "eval_every=40", "save_every=40"]
FULL = [
    "model.n_layer=2",
    "model.n_embd=256",
    "model.block_size=256",
    "batch_size=32",
    "micro_batch_size=16",
    "data.vocab_size=4096",
    "compile=on",
]
TINY = [
    "model.n_layer=1",
    "model.n_embd=32",
    "model.block_size=32",
    "teacher.model.n_embd=32",
    "batch_size=4",
    "micro_batch_size=2",
    "data.vocab_size=300",
    "compile=off",
]


class Failed(Exception):
    """A part that did not do what it should."""


@dataclass
class Setting:
    """Where everything is, and how large."""

    folder: Path
    max_steps: int
    sizes: list[str]  # more of train.py's words

    def train(self, name: str, *words: str) -> "Program":
        """Starts train.py with that run_dir."""
        words = [*STUDENT, *TEACHER, *self.sizes, *words]
        words += [f"run_dir={name}", f"max_steps={self.max_steps}"]
        return Program(self.folder, name, str(ROOT / "train.py"), *words)

    def read_metrics(self, name: str) -> list[dict]:
        return read_metrics(self.folder / name)


class Program:
    """A Python program that runs in `folder`; its output goes to NAME.log there."""

    def __init__(self, folder: Path, name: str, *words: str):
        self.log = folder / f"{name}.log"
        search_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with open(self.log, "a") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": search_path},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        killer = threading.Timer(SECONDS, self.process.kill)
        killer.daemon = True
        killer.start()

    def finish(self) -> None:
        """Raises Failed unless the program ends well."""
        status = self.process.wait()
        if status != 0:
            lines = [f"    {line[:160]}" for line in self.log.read_text().splitlines()]
            message = f"exit status {status} (-9: not ready after {SECONDS} s)"
            raise Failed("\n".join([message, *lines[-12:]]))


def check_metrics(rows: list[dict], max_steps: int, taught: bool) -> str:
    """Raises Failed unless the rows of metrics.jsonl are a healthy, finished run's; sums it up."""
    steps = [row for row in rows if "loss" in row]
    if [row["step"] for row in steps] != list(range(1, max_steps + 1)):
        raise Failed(f"{len(steps)} rows, not steps 1 to {max_steps} once each")

    losses = [row["loss"] for row in steps]
    first = statistics.fmean(losses[:10])
    last = statistics.fmean(losses[-10:])
    if not last < 0.95 * first:
        raise Failed(f"the loss of ten steps was {first:.4f} at first, {last:.4f} at last")
    for name in ["val_loss", "val_kl"] if taught else ["val_loss"]:
        if not rows[-1].get(name, math.nan) < math.inf:
            raise Failed(f"{name}={rows[-1].get(name)} at the last step")

    speed = statistics.median(row["tokens_per_s"] for row in steps)
    return f"{max_steps} steps, loss {first:.3f} -> {last:.3f}, {speed:,.0f} tokens/s"


def interrupt(setting: Setting) -> str:
    words = ["first", "loss=ce", "teacher=none", "dtype=bfloat16"]
    program = setting.train(*words)
    quarter = setting.max_steps // 4
    while program.process.poll() is None and len(setting.read_metrics("first")) < quarter:
        time.sleep(0.02)
    program.process.send_signal(signal.SIGTERM)
    program.finish()
    stopped_at = len(setting.read_metrics("first"))
    again = setting.train(*words)
    again.finish()
    if f"going on from step {stopped_at} " not in again.log.read_text():
        raise Failed(f"SIGTERM left it at step {stopped_at}, and it did not go on from there")
    rows = setting.read_metrics("first")
    outcome = check_metrics(rows, setting.max_steps, taught=False)
    return f"{outcome}, stopped at {stopped_at} and resumed"


def capture(setting: Setting) -> str:
    words = ["-m", "teachers.capture", *TEACHER, "teacher.path=first", "access=topk", "out=cache"]
    Program(setting.folder, "capture", *words).finish()
    return "recorded"


def offline(setting: Setting) -> str:
    words = ["teacher=cache", "teacher.path=cache", "dtype=bfloat16", "seed=1"]
    setting.train("offline", *words).finish()
    return check_metrics(setting.read_metrics("offline"), setting.max_steps, taught=True)


def float16(setting: Setting) -> str:
    words = ["optim=muon", "dtype=float16", f"teacher.max_steps={setting.max_steps}"]
    setting.train("float16", *words).finish()
    return check_metrics(setting.read_metrics("float16"), setting.max_steps, taught=True)


def run_chain(parts: list, setting: Setting) -> int:
    """Runs all parts, whatever becomes of the ones before; returns how many failed."""
    failures = 0
    for part in parts:
        try:
            print(f"ok      {part.__name__}: {part(setting)}", flush=True)
        except Failed as error:
            print(f"FAILED  {part.__name__}: {error}", flush=True)
            failures += 1
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    chains = [[interrupt, capture, offline], [float16]]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:
        setting = Setting(Path(scratch), max_steps=300, sizes=FULL)
        if options.tiny:
            setting = Setting(Path(scratch), max_steps=60, sizes=TINY)
        sources = Path(importlib.__file__).parent
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(sources, setting.folder / "corpus", ignore=ignore)
        failures = sum(pool.map(lambda parts: run_chain(parts, setting), chains))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
