"""The benchmark: its problem, checks, table of where we lose, file, and the whole in small."""

import csv
import math
import subprocess
import sys
import time

import pytest
import torch

from kernels.bench import measure, record, report
from kernels.bench.cases import LOSSES, Case, Problem, gemms, ours, plain
from kernels.bench.measure import peak_memory

CPU = torch.device("cpu")
SHAPE = {"table": "loss", "N": 16384, "D": 768, "V": 50304, "K": 64, "dtype": "bfloat16"}


def run_script(*options):
    command = [sys.executable, "-m", "kernels.bench", "--quick", *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done.stdout


def row(case, ms, group="torch", work="CE+KL", **changes):
    figures = {"ratio": 1.0, "peak_mib": 100.0, "grad_error": math.nan, "note": ""}
    return SHAPE | figures | {"case": case, "ms": ms, "group": group, "work": work} | changes


MET = [
    row("three GEMMs", 4.0, "floor", ""),
    row("linear_topk_kl", 5.0, "ours", ratio=1.25),
    row("plain", 12.0, ratio=3.0, peak_mib=500.0),
    row("linear_full_kl", 11.0, "ours", "full KL"),
    row("linear_topk", 2.0, "ours", "top-k", ratio=1.6),
    row("slower and as large", 5.1, "peer"),
]
MISSED = [
    row("linear_topk_kl", 5.0, "ours", ratio=1.26),
    row("plain", 12.0, peak_mib=400.0),
    row("linear_full_kl", 11.1, "ours", "full KL"),
    row("linear_topk", 2.0, "ours", "top-k", ratio=1.61),
    row(
        "broken",
        math.nan,
        "ours",
        "CE",
        ratio=math.nan,
        note="OutOfMemoryError: no",
    ),
    row("fast and wrong", 4.0, "peer", grad_error=0.012),
    row("lean", 9.0, "peer", peak_mib=90.0),
    row(
        "absent",
        math.nan,
        "peer",
        peak_mib=math.nan,
        note="ModuleNotFoundError",
    ),
]
LINES = [
    "linear_topk_kl: 1.260 of its floor, target 1.25",
    "linear_topk: 1.610 of its floor, target 1.6",
    "broken failed: OutOfMemoryError: no",
    "fast and wrong is faster than linear_topk_kl: 4 ms, not 5 (its gradient is 1.2% off)",
    "lean is leaner than linear_topk_kl: 90 MiB, not 100",
    "linear_topk_kl: 0.250 of plain's peak memory, target 0.2",
    "linear_full_kl: 2.22 of linear_topk_kl, target 2.2",
]


def test_a_target_that_is_met_is_no_line_and_one_that_is_missed_is():
    assert report.shortfalls(MET) == []
    where = "loss N=16384 D=768 V=50304: "
    assert report.shortfalls(MISSED) == [where + line for line in LINES]


def test_a_case_that_fails_or_is_wrong_is_a_row_and_the_others_go_on():
    def fails(p):
        raise MemoryError("no room\nfor details")

    cases = [
        Case("three GEMMs", gemms, "", "floor"),
        Case("fails", fails, "CE+KL", "peer"),
        Case(
            "wrong",
            lambda p, **options: 1.001 * ours(p, **options),
            "CE+KL",
            "ours",
        ),
        Case("right", ours, "CE+KL", "ours"),
    ]
    p = Problem(
        8,
        4,
        40,
        2,
        torch.float32,
        CPU,
    )
    rows = measure.measure(
        p,
        cases,
        2,
        time.monotonic() + 60,
    )
    notes = [found["note"] for found in rows]
    assert notes[:2] == ["", "MemoryError: no room"]
    assert notes[2].startswith("gradient error 1.0e-03, at most 1e-05")
    assert notes[3] == "" and rows[3]["ms"] > 0 and rows[3]["grad_error"] < 1e-5
    assert rows[0]["ratio"] == 1 and math.isnan(rows[1]["ms"]) and math.isnan(rows[2]["ms"])
    assert p.hidden.grad is None and p.weight.grad is None


def test_nothing_begins_after_the_deadline():
    p = Problem(
        8,
        4,
        40,
        2,
        torch.float32,
        CPU,
    )
    cases = [
        Case(
            "three GEMMs",
            gemms,
            "",
            "floor",
        ),
        Case("plain", plain, "CE+KL", "torch"),
    ]
    rows = measure.measure(
        p,
        cases,
        2,
        time.monotonic() - 1,
    )
    assert [found["note"] for found in rows] == ["no time left"] * 2


def test_the_problem_is_zipfs():
    p = Problem(
        600,
        8,
        500,
        20,
        torch.float32,
        CPU,
    )
    assert all(len(set(ids)) == 20 for ids in p.ids.tolist())
    harmonic = sum(1 / rank for rank in range(1, 501))
    torch.testing.assert_close(p.log_probs[0, :2].exp(), torch.tensor([1, 1 / 2]) / harmonic)
    log_norm = math.log(sum(rank**-0.5 for rank in range(1, 501))) - math.log(harmonic) / 2
    torch.testing.assert_close(p.log_norm, torch.full((600,), log_norm))
    assert p.labels.bincount().max() > 600 / 500 * 20  # the likeliest token of 500 has .147


@pytest.mark.parametrize("case", [case for case in LOSSES if case.group == "torch"])
def test_the_rivals_make_the_same_gradients(case):
    """What plain PyTorch is timed at is the loss that ours is timed at."""
    if case.name != "plain compiled":
        assert measure.gradient_error(case, torch.float32, CPU) < 1e-5


def test_a_file_of_older_columns_keeps_its_rows(tmp_path):
    path = tmp_path / "new" / "out.csv"
    record(path, [{"case": "a", "ratio": 1.5}])
    record(path, [{"case": "b", "note": "x, y", "ratio": 2.0}])
    assert path.read_text().splitlines() == ["case,ratio,note", "a,1.5,", 'b,2.0,"x, y"']


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_a_second_temperature_needs_blocks_of_memory_alone():
    """A tile of 98 MiB, 12 MiB of gradients; a second softmax of the tile would be 98 more."""
    assert peak_memory("linear_topk_kl T=2", (1024, 64, 50304, 8)) < 150


@pytest.mark.slow
def test_the_script_checks_times_and_appends(tmp_path):
    path = tmp_path / "new" / "out.csv"
    for _ in range(2):
        output = run_script("--without", "compiled", "--out", str(path))
    assert "==== where we lose" in output and "==== not measured" in output
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {found["table"] for found in rows} == {"loss", "teacher"}
    for found in rows:
        assert found["commit"] and found["torch"] == torch.__version__
        assert float(found["ms"]) > 0 or found["note"]
    names = [found["case"] for found in rows if found["table"] == "loss"]
    assert {names.count(name) for name in names} == {2}
