"""tests/gpu.sh and its parts: what they refuse, what they report, and the rehearsal on a CPU."""

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
from tests import bench_train, gpu_table, gpu_training
from tests.gpu_training import Failed, Program, Setting

ROOT = Path(__file__).parent.parent

# What stands in for python3 and nvidia-smi: pytest fails, the benchmark leaves five plots.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *gpu_table*) exec {python} "$@" ;;
    *"-m pytest"*) echo "FAILED tests/test_kernels_loss.py::test_a - 1 != 2"; exit 1 ;;
    *kernels.bench*) touch "$OUT"/{{kernels.csv,a.png,b.png,c.png,d.png,e.png}} ;;
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
    stubs = {"python3": PYTHON.format(python=sys.executable), "nvidia-smi": "#!/bin/sh\n"}
    for name, text in stubs.items():
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    done = run_script(out, *options, search_path=tmp_path)

    assert done.returncode == 1, done.stderr
    table = done.stdout.splitlines()[-6:]
    assert table[0].startswith("tests        FAILED, exit status 1, ")
    assert table[1].endswith("test_kernels_loss.py::test_a - 1 != 2")
    assert [line[:16] for line in table[3:]] == [
        "training     ok,",
        "kernels      ok,",
        "bench_train  ok,",
    ]
    assert len(list(out.iterdir())) <= 8
    assert len(list(out.glob("*.png"))) == 1


ROWS = {"middle": slice(20, 21), "last": slice(59, 60), "resumed": slice(30, 60)}


def check_rows(where, key, value):
    """Checks a healthy run of 60 steps, stopped after 30, in which some of ROWS are changed."""
    rows = []
    for step in range(1, 61):
        row = {"step": step, "loss": 8.0 - step / 20, "grad_norm": 1.0, "tokens_per_s": 100.0}
        rows.append(row)
    rows[-1] |= {"val_loss": 5.2, "val_kl": 0.3}
    for row in rows[ROWS[where]]:
        row[key] = value
    rows.insert(30, {"step": 30, "val_loss": 6.0})  # an evaluation that the signal cut short
    outcome = gpu_training.check_metrics(rows, 60, taught=True)
    gpu_training.check_resumed(rows, stopped_at=30)
    return outcome


def test_a_healthy_run_is_accepted_with_a_gradient_that_float16_could_not_hold():
    assert "60 steps" in check_rows("middle", "grad_norm", math.inf)


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        ("middle", "loss", math.nan, "not finite"),
        ("last", "grad_norm", math.inf, "not finite"),
        ("last", "val_loss", None, "val_loss=None"),
        ("last", "val_kl", math.nan, "val_kl=nan"),
        ("middle", "step", 20, "not steps 1 to 60 once each"),
        ("last", "step", 61, "not steps 1 to 60 once each"),
        ("last", "loss", 90.0, "the loss of ten steps"),
        ("resumed", "loss", 7.3, "before the stop at step 30"),  # training began anew
    ],
)
def test_broken_metrics_are_refused(where, key, value, message):
    with pytest.raises(Failed, match=message):
        check_rows(where, key, value)


def test_a_part_that_fails_does_not_stop_the_next(tmp_path, capsys):
    def breaks(setting):
        Program(setting.folder, "breaks", "-c", "exit('the end')").finish()

    def works(setting):
        return "fine"

    assert gpu_training.run_chain([breaks, works], Setting(tmp_path, 1, [])) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("FAILED  breaks: exit status 1 ")
    assert rest == ["    the end", "ok      works: fine"]


@pytest.mark.parametrize(
    ("name", "log", "lines"),
    [
        ("tests", "FAILED a.py::b\n== 1 failed", "    == 1 failed\n    FAILED a.py::b"),
        ("tests", "[9%] FAILED a.py::b\n[9%] PASSED", "    [9%] PASSED\n    [9%] FAILED a.py::b"),
        ("training", "ok  a: x\nFAILED  b: y\n    Error", "    FAILED  b: y\n        Error"),
        ("kernels", "1 ms\n==== where we lose\nLiger\n\n==== not measured", "    Liger"),
        ("bench_train", "Traceback\nValueError: no", "    Traceback\n    ValueError: no"),
    ],
)
def test_the_table_tells_what_failed_and_where_we_lose(name, log, lines, tmp_path):
    (tmp_path / f"{name}.log").write_text(log)
    table = gpu_table.make_table(tmp_path, {name: ["124", "130", "130"]}, "abc")
    assert f"{name:12} STOPPED at its limit of 130 s\n{lines}" in table
    assert table.count("FAILED: it never ran") == 3
    assert len(table.splitlines()) == 5 + len(lines.splitlines())


def test_the_table_keeps_to_its_length(tmp_path):
    steps = {}
    for name in gpu_table.NAMES:
        (tmp_path / f"{name}.log").write_text("FAILED\n==== where we lose\n" + 300 * "FAILED x\n")
        steps[name] = ["1", "130", "130"]
    table = gpu_table.make_table(tmp_path, steps, "abc")
    assert len(table) < 10_000
    assert table.count("... more in") == 4


class Loop:
    """A side of bench_train that takes no time, or fails."""

    def __init__(self, loss=2.0, error=None, seconds=1e-4):
        self.loss = loss
        self.error = error
        self.seconds = seconds

    def step(self):
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        return torch.tensor(self.loss)


def measure(monkeypatch, plain, ours):
    """The rows of both sides, measured without time left."""
    config = Config(teacher=TeacherConfig(kind="none"), loss=LossConfig(name="ce"))
    batch = bench_train.make_batch(2, 4, with_targets=False)
    task = bench_train.Task("ce", config, Ranks(), batch, teacher=None)
    monkeypatch.setattr(bench_train, "Plain", lambda task: plain)
    monkeypatch.setattr(bench_train, "Ours", lambda task: ours)
    return bench_train.measure_task(task, deadline=0)


def test_two_sides_that_agree_are_timed_in_turn(monkeypatch):
    plain, ours = measure(monkeypatch, Loop(2.0, seconds=5e-3), Loop(2.01))
    assert plain["rounds"] == 2
    assert ours["rounds"] == 2
    assert ours["ratio"] > 2
    assert ours["tokens_per_s"] == pytest.approx(8 / (ours["ms"] / 1e3))


@pytest.mark.parametrize("loss", [2.1, math.nan])
def test_sides_that_disagree_are_not_timed(monkeypatch, loss):
    plain, ours = measure(monkeypatch, Loop(2.0), Loop(loss))
    assert "plain PyTorch has 2.00000: not timed" in ours["note"]
    assert ours["rounds"] == 0
    assert plain["rounds"] == 2


def test_a_side_without_memory_is_a_row_and_the_other_is_measured(monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
    plain, ours = measure(monkeypatch, Loop(error=error), Loop())
    assert plain["note"] == "OutOfMemoryError: CUDA out of memory. Tried"
    assert math.isnan(plain["ms"])
    assert math.isnan(ours["ratio"])
    assert ours["rounds"] == 2
    assert bench_train.find_losses(plain, ours) == [f"ce: plain PyTorch: {plain['note']}"]


def test_where_we_lose_is_a_line_each():
    plain = {"peak_mib": 100.0, "note": ""}
    ours = {"task": "ce", "peak_mib": 200.0, "note": ""}
    ours |= {"ratio": 0.95, "ratio_low": 0.9, "ratio_high": 1.1}
    assert bench_train.find_losses(plain, ours) == [
        "ce: ratio 0.950 (0.900-1.100), less than 1",
        "ce: peak 200 MiB, plain PyTorch 100",
    ]


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
