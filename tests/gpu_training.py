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
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, str(ROOT / "train.py")]
CAPTURE = [sys.executable, "-m", "teachers.capture"]
SECONDS = 120  # a program that takes longer has failed

MODEL = ["model.n_layer=2", "model.n_embd=256", "model.block_size=256"]
TINY_MODEL = ["model.n_layer=1", "model.n_embd=32", "model.block_size=32"]


class Failed(Exception):
    """A part that did not do what it should."""


@dataclass
class Setting:
    """How large everything is, and where."""

    folder: Path
    max_steps: int
    corpus_bytes: int
    dtype: str
    teacher: list[str]  # what train.py and teachers.capture must agree on
    student: list[str]


def make_setting(folder: Path, tiny: bool) -> Setting:
    common = ["data=text", "data.path=corpus", "baseline=off", "eval_every=50", "save_every=50"]
    if tiny:
        sizes = ["batch_size=4", "micro_batch_size=2"]
        return Setting(
            folder,
            max_steps=120,
            corpus_bytes=200_000,
            dtype="float32",
            teacher=["access.k=8", "eval_tokens=1024"],
            student=[*common, *TINY_MODEL, *sizes, "data.vocab_size=300", "compile=off"],
        )
    sizes = ["batch_size=32", "micro_batch_size=16"]
    return Setting(
        folder,
        max_steps=300,
        corpus_bytes=4_000_000,
        dtype="bfloat16",
        teacher=["access.k=64", "eval_tokens=32768"],
        student=[*common, *MODEL, *sizes, "data.vocab_size=4096", "compile=on"],
    )


def make_corpus(folder: Path, size: int) -> None:
    """Copies modules of Python's standard library, about `size` bytes together."""
    folder.mkdir()
    copied = 0
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if copied >= size:
            break
        shutil.copy(source, folder / f"{source.stem}.txt")
        copied += source.stat().st_size


def train_command(setting: Setting, max_steps: int, *words: str) -> list[str]:
    return [*TRAIN, *setting.student, *setting.teacher, f"max_steps={max_steps}", *words]


def start(command: list[str], setting: Setting, log: Path) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    with open(log, "a") as stream:
        return subprocess.Popen(
            command,
            cwd=setting.folder,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def finish(process: subprocess.Popen, log: Path) -> None:
    """Waits for a program, and raises Failed unless it ends well."""
    try:
        status = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise Failed(f"not ready after {SECONDS} s\n{tail(log)}") from None
    if status != 0:
        raise Failed(f"exit status {status}\n{tail(log)}")


def tail(log: Path) -> str:
    lines = log.read_text().splitlines()[-12:]
    return "\n".join(f"    {line[:160]}" for line in lines)


def read_metrics(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl; a last line that is still being written is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    """Returns once metrics.jsonl has that step, or the program ended, or SECONDS are over."""
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        rows = read_metrics(run_dir)
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)


def check_metrics(rows: list[dict], max_steps: int, taught: bool) -> str:
    """Raises Failed unless the rows of metrics.jsonl are a healthy, finished run's; sums it up."""
    steps = [row for row in rows if "loss" in row]
    numbers = [row["step"] for row in steps]
    if numbers != list(range(1, max_steps + 1)):
        raise Failed(f"{len(numbers)} rows, not steps 1 to {max_steps} once each")

    # Under float16 a gradient may be infinite (that step is left out), but not the last.
    losses = [row["loss"] for row in steps]
    if not all(map(math.isfinite, [*losses, steps[-1]["grad_norm"]])):
        raise Failed("a loss, or the last gradient's norm, is not finite")
    first = statistics.fmean(losses[:10])
    last = statistics.fmean(losses[-10:])
    if not last < 0.95 * first:
        raise Failed(f"the loss of ten steps was {first:.4f} at first, {last:.4f} at last")

    measures = ["val_loss", "val_kl"] if taught else ["val_loss"]
    for name in measures:
        value = rows[-1].get(name)
        if value is None or not math.isfinite(value):
            raise Failed(f"{name}={value} at the last step")

    speeds = [row["tokens_per_s"] for row in steps]
    if not min(speeds) > 0:
        raise Failed(f"tokens_per_s={min(speeds)}")
    speed = statistics.median(speeds)
    return f"{max_steps} steps, loss {first:.3f} -> {last:.3f}, {speed:,.0f} tokens/s"


def check_resumed(rows: list[dict], stopped_at: int) -> None:
    """Raises Failed where the loss after a resume is back nearer to an untrained model's."""
    losses = [row["loss"] for row in rows if "loss" in row]
    untrained = statistics.fmean(losses[:5])
    before = statistics.fmean(losses[stopped_at - 5 : stopped_at])
    after = statistics.fmean(losses[stopped_at : stopped_at + 5])
    if after - before > 0.25 * abs(untrained - before):
        raise Failed(f"loss {before:.4f} before the stop at step {stopped_at}, {after:.4f} after")


def interrupt(setting: Setting, log: Path) -> str:
    run_dir = setting.folder / "first"
    words = ["loss=ce", "teacher=none", f"dtype={setting.dtype}", "run_dir=first"]
    command = train_command(setting, setting.max_steps, *words)

    process = start(command, setting, log)
    wait_for_step(process, run_dir, setting.max_steps // 4)
    process.send_signal(signal.SIGTERM)
    finish(process, log)
    rows = read_metrics(run_dir)
    stopped_at = rows[-1]["step"] if rows else 0
    if not 0 < stopped_at < setting.max_steps:
        raise Failed(f"SIGTERM left it at step {stopped_at} of {setting.max_steps}\n{tail(log)}")

    finish(start(command, setting, log), log)
    rows = read_metrics(run_dir)
    outcome = check_metrics(rows, setting.max_steps, taught=False)
    check_resumed(rows, stopped_at)
    return f"{outcome}, stopped at {stopped_at} and resumed"


def capture(setting: Setting, log: Path) -> str:
    command = [*CAPTURE, *setting.teacher, "teacher.path=first", "access=topk", "out=cache"]
    finish(start(command, setting, log), log)
    size = sum(file.stat().st_size for file in (setting.folder / "cache").iterdir())
    return f"{size / 1e6:.1f} MB"


def offline(setting: Setting, log: Path) -> str:
    words = ["teacher=cache", "teacher.path=cache", f"dtype={setting.dtype}", "seed=1"]
    command = train_command(setting, setting.max_steps, *words, "run_dir=offline")
    finish(start(command, setting, log), log)
    rows = read_metrics(setting.folder / "offline")
    return check_metrics(rows, setting.max_steps, taught=True)


def float16(setting: Setting, log: Path) -> str:
    max_steps = setting.max_steps // 2
    words = ["optim=muon", "dtype=float16", f"teacher.max_steps={max_steps}"]
    command = train_command(setting, max_steps, *words, "run_dir=float16")
    finish(start(command, setting, log), log)
    return check_metrics(read_metrics(setting.folder / "float16"), max_steps, taught=True)


def run_chain(parts: list, setting: Setting) -> int:
    """Runs all parts, whatever becomes of the ones before; returns how many failed."""
    failures = 0
    for part in parts:
        started = time.monotonic()
        log = setting.folder / f"{part.__name__}.log"
        try:
            outcome = f"ok      {part.__name__}: {part(setting, log)}"
        except Failed as error:
            outcome = f"FAILED  {part.__name__}: {error}"
            failures += 1
        first, *rest = outcome.split("\n")
        seconds = time.monotonic() - started
        print("\n".join([f"{first} [{seconds:.0f} s]", *rest]), flush=True)
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
        setting = make_setting(Path(scratch), options.tiny)
        make_corpus(setting.folder / "corpus", setting.corpus_bytes)
        failures = sum(pool.map(lambda parts: run_chain(parts, setting), chains))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
