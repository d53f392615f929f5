"""tests/gpu.sh and its parts: what they refuse, and the rehearsal on a CPU."""

import csv
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conf.schema import Config
from engine.ranks import Ranks
from model.loss import LossConfig
from teachers.online import TeacherConfig
from tests import bench_train, gpu_training
from tests.gpu_training import Failed

ROOT = Path(__file__).parent.parent

# What stands in for python3 and nvidia-smi: pytest fails, the benchmark leaves five plots.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *"-m pytest"*) echo "FAILED tests/test_kernels_loss.py::test_a - 1 != 2"; exit 1 ;;
    *kernels.bench*) touch "$OUT"/{kernels.csv,a.png,b.png,c.png,d.png,e.png} ;;
esac
"""


def run_script(out, *options, search_path):
    search_path = os.pathsep.join([str(search_path), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "tests/gpu.sh", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OUT": str(out), "COMMIT": "abc1234", "PATH": search_path},
    )


@pytest.mark.parametrize("options", [["--rehearse"], []])
def test_a_failed_step_does_not_stop_the_next_and_shows_in_the_table(options, tmp_path):
    stubs = {"python3": PYTHON, "nvidia-smi": "#!/bin/sh\n"}
    for name, text in stubs.items():
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    done = run_script(out, *options, search_path=tmp_path)

    assert done.returncode == 1, done.stderr
    *_, table = done.stdout.partition("==== where we lose, abc1234")
    assert "\ntests: exit status 1, " in table
    assert "\n    FAILED tests/test_kernels_loss.py::test_a - 1 != 2\n" in table
    for name in ("training", "kernels", "bench_train"):
        assert f"\n{name}: exit status 0, " in table
    assert len(list(out.iterdir())) <= 8
    assert len(list(out.glob("*.png"))) == 1


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("val_loss", 5.2, None),
        ("val_loss", None, "val_loss=None"),
        ("val_kl", math.nan, "val_kl=nan"),
        ("step", 61, "not steps 1 to 60 once each"),
        ("loss", 90.0, "the loss of ten steps"),
    ],
)
def test_broken_metrics_are_refused(key, value, message):
    """A healthy run of 60 steps with an evaluation that a signal cut short, but for its end."""
    rows = [{"step": step, "loss": 8 - step / 20, "tokens_per_s": 1} for step in range(1, 61)]
    rows.insert(30, {"step": 30, "val_loss": 6.0})
    rows[-1] |= {"val_loss": 5.2, "val_kl": 0.3}
    rows[-1][key] = value
    if value is None:
        del rows[-1][key]
    if message is None:
        gpu_training.check_metrics(rows, 60, taught=True)
        return
    with pytest.raises(Failed, match=message):
        gpu_training.check_metrics(rows, 60, taught=True)


class Loop:
    """A side of bench_train that takes that long, and its loss."""

    def __init__(self, loss, seconds):
        self.loss = loss
        self.seconds = seconds

    def step(self):
        time.sleep(self.seconds)
        return torch.tensor(self.loss)


def measure(monkeypatch, loss):
    """The rows of plain PyTorch, of loss 2, and of ours, measured without time left."""
    config = Config(teacher=TeacherConfig(kind="none"), loss=LossConfig(name="ce"))
    batch = bench_train.make_batch(2, 4, with_targets=False)
    task = bench_train.Task("ce", config, Ranks(), batch, teacher=None)
    monkeypatch.setattr(bench_train, "Plain", lambda task: Loop(2.0, 5e-3))
    monkeypatch.setattr(bench_train, "Ours", lambda task: Loop(loss, 1e-4))
    return bench_train.measure_task(task, deadline=0)


def test_two_sides_that_agree_are_timed_in_turn(monkeypatch):
    plain, ours = measure(monkeypatch, 2.01)
    assert plain["rounds"] == ours["rounds"] == 2
    assert ours["ratio"] > 2
    assert ours["tokens_per_s"] == pytest.approx(8 / (ours["ms"] / 1e3))
    slower = ours | {"ratio": 0.95, "peak_mib": 200.0}
    first, second = bench_train.find_losses(plain | {"peak_mib": 100.0}, slower)
    assert first.startswith("ce: ratio 0.950 (")
    assert second == "ce: peak 200 MiB, plain PyTorch 100"


@pytest.mark.parametrize("loss", [2.1, math.nan])
def test_sides_that_disagree_are_not_timed(monkeypatch, loss):
    with pytest.raises(ValueError, match="ce: the first losses differ"):
        measure(monkeypatch, loss)


def test_the_plain_ghost_kl_is_the_kl_of_the_grouped_outcomes():
    logits = torch.randn(5, 20)
    teacher = torch.randn(5, 20).log_softmax(1)
    log_probs, ids = teacher.topk(4)

    def grouped(probs):
        top = probs.gather(1, ids)
        rest = 1 - top.sum(1, keepdim=True)
        return torch.cat([top, rest], 1)

    t = grouped(teacher.exp())
    p = grouped(logits.softmax(1))
    expected = F.kl_div(p.log(), t, reduction="batchmean")
    actual = bench_train.ghost_kl(logits, ids, log_probs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_the_rehearsal_runs_every_step(tmp_path):
    done = run_script(tmp_path, "--rehearse", search_path=Path(sys.executable).parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout) < 12_000
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"tests.log", "training.log", "kernels.log", "bench_train.log", "train.csv"}
    assert len(names) <= 8
    with open(tmp_path / "train.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["task"] for row in rows] == ["ce", "ce", "online", "online", "offline", "offline"]
    for row in rows:
        assert float(row["ms"]) > 0
        assert row["commit"] == "abc1234"
