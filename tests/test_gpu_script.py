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

from conf.schema import Config
from engine import ranks as processes
from model import GPT, ModelConfig
from model.loss import LossConfig
from teachers.online import TeacherConfig
from tests import bench_train, gpu_table, gpu_training
from tests.gpu_training import Failed

ROOT = Path(__file__).parent.parent
SCRIPTS = ["gpu.sh", "gpu_wheels.sh"]

# What stands in for python3 and nvidia-smi: pytest fails, the benchmark leaves five plots.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *gpu_table*) exec {python} "$@" ;;
    *"-m pytest"*) echo "FAILED tests/test_kernels_loss.py::test_a - 1 != 2"; exit 1 ;;
    *kernels.bench*) touch "$OUT"/{{kernels.csv,a.png,b.png,c.png,d.png,e.png}} ;;
    *) echo "$PYTHONPATH" ;;
esac
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_valid_bash(name):
    subprocess.run(["bash", "-n", str(ROOT / "tests" / name)], check=True)


def run_script(out, *options, seconds, **environment):
    command = ["bash", str(ROOT / "tests/gpu.sh"), *options]
    search_path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"OUT": str(out), "COMMIT": "abc1234", "PATH": search_path}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | variables | environment,
    )


def read_table(done):
    return done.stdout.split("==== where we lose, abc1234\n")[1]


@pytest.mark.parametrize("options", [["--rehearse"], []])
def test_a_failed_step_does_not_stop_the_next_and_shows_in_the_table(options, tmp_path):
    stubs = {"python3": PYTHON.format(python=sys.executable), "nvidia-smi": "#!/bin/sh\n"}
    for name, text in stubs.items():
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    search_path = f"{tmp_path}:{os.environ['PATH']}"
    done = run_script(out, *options, seconds=60, PATH=search_path)

    assert done.returncode == 1, done.stdout + done.stderr
    table = read_table(done).splitlines()
    assert table[0] == "tests        FAILED, exit status 1, 0 s"
    assert table[2].endswith("test_kernels_loss.py::test_a - 1 != 2")
    for name in ("training", "kernels", "bench_train"):
        assert any(line.startswith(f"{name:12} ok, ") for line in table), table
    assert len(list(out.iterdir())) <= 8
    assert len(list(out.glob("*.png"))) == 1


def healthy_rows(count=60):
    rows = []
    for step in range(1, count + 1):
        row = {"step": step, "loss": 8.0 - step / 20, "grad_norm": 1.0, "tokens_per_s": 100.0}
        rows.append(row)
    rows[-1] |= {"val_loss": 5.2, "val_kl": 0.3}
    return rows


def test_a_healthy_run_is_accepted_with_a_gradient_that_float16_could_not_hold():
    rows = healthy_rows()
    rows[3]["grad_norm"] = math.inf
    rows.insert(30, {"step": 30, "val_loss": 6.0})  # an evaluation that a signal cut short
    assert "60 steps" in gpu_training.check_metrics(rows, 60, taught=True)
    gpu_training.check_resumed(rows, stopped_at=30)


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        (20, "loss", math.nan, "not finite"),
        (-1, "grad_norm", math.inf, "not finite"),
        (20, "tokens_per_s", 0.0, "tokens_per_s=0.0"),
        (-1, "val_loss", None, "val_loss=None"),
        (-1, "val_kl", math.nan, "val_kl=nan"),
        (20, "step", 20, "not steps 1 to 60 once each"),
        (-1, "loss", 90.0, "the loss of ten steps"),
    ],
)
def test_broken_metrics_are_refused(place, key, value, message):
    rows = healthy_rows()
    rows[place][key] = value
    with pytest.raises(Failed, match=message):
        gpu_training.check_metrics(rows, 60, taught=True)


@pytest.mark.parametrize("count", [0, 59, 61])
def test_a_run_of_another_length_is_refused(count):
    rows = healthy_rows(60) + healthy_rows(1)
    with pytest.raises(Failed, match=f"{count} rows"):
        gpu_training.check_metrics(rows[:count], 60, taught=True)


def test_a_resume_that_begins_anew_is_refused():
    rows = healthy_rows()
    for row in rows[30:]:
        row["loss"] += 1.5
    with pytest.raises(Failed, match="before the stop at step 30"):
        gpu_training.check_resumed(rows, stopped_at=30)


def test_a_part_that_fails_does_not_stop_the_next(tmp_path, capsys):
    def breaks(setting, log):
        raise Failed("exit status 1\n    the end of its output")

    def works(setting, log):
        return "fine"

    setting = gpu_training.make_setting(tmp_path, tiny=True)
    assert gpu_training.run_chain([breaks, works], setting) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "FAILED  breaks: exit status 1 [0 s]"
    assert printed[1:] == ["    the end of its output", "ok      works: fine [0 s]"]


def write_logs(folder, **logs):
    for name in gpu_table.LIMITS:
        (folder / f"{name}.log").write_text(logs.get(name, ""))


def steps_with(**statuses):
    names = gpu_table.LIMITS
    return [gpu_table.Step(name, statuses.get(name, 0), 100, 130) for name in names]


def test_the_table_tells_what_failed_and_where_we_lose(tmp_path):
    write_logs(
        tmp_path,
        tests="[gw0] [ 50%] PASSED tests/a.py::b\n[gw1] [ 99%] FAILED tests/a.py::c",
        training="ok      interrupt: fine\nFAILED  float16: exit status 1\n    Error: x",
        kernels="times\n==== where we lose\nLiger is faster\n\n==== not measured\nnothing",
        bench_train="Traceback\nValueError: no",
    )
    steps = steps_with(tests=124, training=1, bench_train=1)
    assert gpu_table.make_table(tmp_path, steps, "abc") == [
        "==== where we lose, abc",
        "tests        STOPPED at its limit of 130 s",
        "tests        1 passed until it was stopped",
        "tests        [gw1] [ 99%] FAILED tests/a.py::c",
        "training     FAILED, exit status 1, 100 s",
        "training     FAILED  float16: exit status 1",
        "training         Error: x",
        "kernels      ok, 100 s",
        "kernels      Liger is faster",
        "bench_train  FAILED, exit status 1, 100 s",
        "bench_train  Traceback",
        "bench_train  ValueError: no",
    ]


def test_a_step_that_never_ran_is_a_line(tmp_path):
    write_logs(tmp_path)
    table = gpu_table.make_table(tmp_path, steps_with()[:3], "abc")
    assert table[-1] == "bench_train  FAILED: it never ran"


def test_the_table_keeps_to_its_length(tmp_path):
    many = "\n".join(f"FAILED tests/a.py::t{place} - {'x' * 200}" for place in range(300))
    lose = "==== where we lose\n" + "\n".join(["slower " * 40] * 300)
    write_logs(tmp_path, tests=many, training=many, kernels=lose, bench_train=lose)
    table = gpu_table.make_table(tmp_path, steps_with(), "abc")
    assert len("\n".join(table)) < 10_000
    assert sum("lines more in" in line for line in table) == 4


class Loop:
    """A side of bench_train that takes no time, or fails."""

    def __init__(self, loss=2.0, error=None):
        self.loss = loss
        self.error = error

    def first_loss(self):
        return self.loss

    def step(self, number):
        time.sleep(1e-4)
        if self.error:
            raise self.error


@pytest.fixture
def task():
    config = Config(
        model=ModelConfig(n_layer=1, n_embd=8, n_head=1, block_size=4, vocab_size=64),
        teacher=TeacherConfig(kind="none"),
        loss=LossConfig(name="ce"),
        batch_size=2,
    )
    return bench_train.Task("ce", config, None, torch.device("cpu"), samples=[], teacher=None)


def measure(task, monkeypatch, plain, ours):
    monkeypatch.setattr(bench_train, "Plain", lambda task: plain)
    monkeypatch.setattr(bench_train, "Ours", lambda task: ours)
    return bench_train.measure_task(task, seconds=0, compile_only=False)


def test_two_sides_that_agree_are_timed_in_turn(task, monkeypatch):
    plain, ours = measure(task, monkeypatch, Loop(2.0), Loop(2.01))
    assert plain["rounds"] == ours["rounds"] == 2  # though no time was left
    assert plain["ratio"] == 1 and ours["ratio"] > 0
    assert ours["tokens_per_s"] == pytest.approx(8 / (ours["ms"] / 1e3))


def test_a_side_without_memory_is_a_row_and_the_other_is_measured(task, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
    plain, ours = measure(task, monkeypatch, Loop(error=error), Loop())
    assert plain["note"] == "OutOfMemoryError: CUDA out of memory. Tried"
    assert math.isnan(plain["ms"]) and math.isnan(ours["ratio"])
    assert ours["rounds"] == 2 and not ours["note"]
    assert bench_train.find_losses([plain, ours]) == [f"ce: plain PyTorch: {plain['note']}"]


@pytest.mark.parametrize("loss", [2.1, math.nan])
def test_sides_that_disagree_are_not_timed(task, monkeypatch, loss):
    plain, ours = measure(task, monkeypatch, Loop(2.0), Loop(loss))
    assert "plain PyTorch has 2.00000: not timed" in ours["note"]
    assert ours["rounds"] == 0 and plain["rounds"] == 2


def test_where_we_lose_is_a_line_each():
    row = {"task": "ce", "ratio_low": 0.9, "ratio_high": 1.1, "note": ""}
    plain = row | {"case": "plain PyTorch", "ratio": 1.0, "peak_mib": 100.0}
    slow = row | {"case": "ours", "ratio": 0.95, "peak_mib": 50.0}
    large = row | {"case": "ours", "ratio": 1.05, "peak_mib": 200.0}
    found = bench_train.find_losses([plain, slow])
    assert found == ["ce: ratio 0.950 (0.900-1.100), less than 1"]
    found = bench_train.find_losses([plain, large])
    assert found == ["ce: peak 200 MiB, plain PyTorch 100"]


def test_the_plain_ghost_kl_is_the_kl_of_the_grouped_outcomes():
    logits = torch.randn(5, 20)
    teacher = torch.randn(5, 20).log_softmax(1)
    log_probs, ids = teacher.topk(4)

    def grouped(log_p):
        top = log_p.gather(1, ids)
        rest = (1 - top.exp().sum(1, keepdim=True)).log()
        return torch.cat([top, rest], 1)

    t, p = grouped(teacher), grouped(logits.log_softmax(1))
    expected = (t.exp() * (t - p)).sum(1).mean()
    torch.testing.assert_close(bench_train.ghost_kl(logits, ids, log_probs), expected)


def test_utilisation_counts_a_teachers_forward_pass(task, monkeypatch):
    monkeypatch.setattr(processes, "peak_flops", lambda device: 1e12)
    model = GPT(task.config.model, 64)
    alone = bench_train.utilisation(task, tokens_per_s=1000)
    assert alone == pytest.approx(1000 * model.flops_per_token(4) / 1e12)
    task.teacher = model
    assert bench_train.utilisation(task, tokens_per_s=1000) == pytest.approx(alone * 4 / 3)


@pytest.mark.slow
def test_the_rehearsal_runs_every_step(tmp_path):
    done = run_script(tmp_path, "--rehearse", seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    table = read_table(done)
    for name in gpu_table.LIMITS:
        assert f"{name:12} ok, " in table
    assert len(done.stdout) < 12_000
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"tests.log", "training.log", "kernels.log", "bench_train.log", "train.csv"}
    assert len(names) <= 8
    with open(tmp_path / "train.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["task"] for row in rows] == ["ce", "ce", "online", "online", "offline", "offline"]
    assert all(float(row["ms"]) > 0 and row["commit"] == "abc1234" for row in rows)
