"""The benchmark: its problem, its table of where we lose, its file, and the whole script in small."""

import csv
import math
import subprocess
import sys

import pytest
import torch

from kernels import bench, bench_cases

KEYS = {"table": "loss", "N": 16384, "D": 768, "V": 50304, "K": 64, "dtype": "bfloat16"}


def run(*options):
    command = [sys.executable, "-m", "kernels.bench", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done.stdout


def row(case, ms, group="torch", loss="both", **rest):
    facts = {"ratio": 1.0, "low": 1.0, "high": 1.0, "ms_low": ms, "ms_high": ms, "peak_mib": 100.0, "grad_error": math.nan}
    return KEYS | facts | {"case": case, "ms": ms, "group": group, "loss": loss, "note": "", "clock": "CUDA events"} | rest


def test_every_target_is_met_in_silence():
    rows = [
        row("three GEMMs", 4.0, "floor", ""),
        row("linear_topk_kl", 5.0, "ours", ratio=1.25, grad_error=4e-3),
        row("plain PyTorch", 12.0, ratio=3.0, peak_mib=500.0),
        row("linear_topk", 2.0, "ours", "topk", ratio=1.6, table="teacher"),
        row("topk_kl", 2.0, "ours", "logits", ratio=1.17, table="row kernel"),
        row("step, linear_topk_kl", 2.0, "ours", "step", ratio=1.03, table="step"),
    ]
    assert bench.shortfalls(rows) == []


def test_each_target_that_is_missed_is_a_line():
    rows = [
        row("linear_topk_kl", 5.0, "ours", ratio=1.26, grad_error=6e-3),
        row("plain PyTorch", 12.0, ratio=3.0, peak_mib=400.0),
        row("linear_topk", 2.0, "ours", "topk", ratio=1.61, table="teacher"),
        row("topk_kl", 2.0, "ours", "logits", ratio=1.18, table="row kernel"),
        row("step, linear_topk_kl", 2.0, "ours", "step", ratio=1.04, table="step"),
    ]
    found = [line.split("): ", 1)[1] for line in bench.shortfalls(rows)]
    assert found == [
        "linear_topk_kl: 1.260 of its floor, target 1.250",
        "linear_topk_kl: gradient error 6.0e-03",
        "linear_topk_kl: 0.250 of plain PyTorch's peak, target 0.200",
        "linear_topk: 1.610 of its floor, target 1.600",
        "topk_kl: 1.180 of its floor, target 1.176",
        "step, linear_topk_kl: 1.040 of its floor, target 1.030",
    ]


def test_rivals_meet_the_op_of_ours_that_does_their_work():
    rows = [
        row("linear_topk_kl", 5.0, "ours"),
        row("linear_cross_entropy", 4.0, "ours", "ce"),
        row("linear_topk_kl _path=2", 4.0, "ours"),  # the default should have taken it
        row("linear_topk_kl _path=1", 4.95, "ours"),  # within noise
        row("fast", 3.0, "peer", "ce", grad_error=0.012),
        row("slower and leaner", 5.9, "peer", "ce", peak_mib=90.0),
        row("far slower and leaner", 6.1, "peer", "ce", peak_mib=90.0),
        row("dense", 4.5, "peer", "dense"),
        row("absent", math.nan, "peer", "ce", peak_mib=math.nan, ratio=math.nan),
        row("linear_topk_kl none", math.nan, "ours", ratio=math.nan, note="OutOfMemoryError: no"),
    ]
    found = [line.split("): ", 1)[1] for line in bench.shortfalls(rows)]
    assert found == [
        "linear_topk_kl _path=2 is faster than linear_topk_kl: 4 ms, not 5",
        "fast is faster than linear_cross_entropy: 3 ms, not 4 (its gradient is 1.2% off)",
        "slower and leaner is leaner than linear_cross_entropy: 90 MiB, not 100",
        "dense is faster than linear_topk_kl: 4.5 ms, not 5",
        "linear_topk_kl none failed: OutOfMemoryError: no",
    ]


def test_a_failed_case_is_a_row_and_the_others_go_on():
    def fails(p):
        raise MemoryError("no room\nfor details")

    p = bench_cases.Problem(8, 4, 40, 2)
    cases = {name: bench_cases.CASES[name] for name in ("three GEMMs", "plain PyTorch")}
    cases["fails"] = bench_cases.Case(fails, group="peer")
    rows = {found["case"]: found for found in bench.measure(p, cases, 2, torch.device("cpu"))}
    assert rows["fails"]["note"] == "MemoryError: no room" and math.isnan(rows["fails"]["ms"])
    assert rows["three GEMMs"]["ratio"] == 1 and rows["plain PyTorch"]["ms"] > 0
    assert p.hidden.grad is None and p.weight.grad is None


def test_the_check_refuses_a_wrong_gradient(monkeypatch):
    cases = {"wrong": bench_cases.Case(lambda p: bench_cases.plain(p, T=1.001))}
    with pytest.raises(SystemExit, match="wrong: relative errors .* nothing is timed"):
        bench_cases.check(torch.device("cpu"), torch.float32, cases)


def test_the_problem_is_zipfs():
    p = bench_cases.Problem(600, 8, 500, 20)
    assert all(len(set(ids)) == 20 for ids in p.ids.tolist())
    harmonic = sum(1 / rank for rank in range(1, 501))
    torch.testing.assert_close(p.log_probs[0, :2].exp(), torch.tensor([1, 1 / 2]) / harmonic)
    norm = math.log(sum(rank**-0.5 for rank in range(1, 501))) - math.log(harmonic) / 2
    torch.testing.assert_close(p.log_norm, torch.full((600,), norm))
    assert p.labels.bincount().max() > 600 / 500 * 20  # the likeliest token of 500 has .147


def test_a_file_of_older_columns_keeps_its_rows(tmp_path):
    path = tmp_path / "new" / "out.csv"
    bench.record(path, [{"case": "a", "ratio": 1.5}])
    bench.record(path, [{"case": "b", "note": "x, y", "ratio": 2.0}])
    assert path.read_text().splitlines() == ["case,ratio,note", "a,1.5,", 'b,2.0,"x, y"']


@pytest.mark.slow
def test_the_script_checks_times_plots_and_appends(tmp_path):
    path = tmp_path / "new" / "out.csv"
    for _ in range(2):
        output = run("--quick", "--out", str(path))
    assert "==== where we lose" in output and "the ops agree with fp64" in output
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {row["table"] for row in rows} == {"loss", "teacher", "row kernel", "step", "V", "K", "N", "chunk"}
    known = [line for line in rows if line["group"] != "peer"]
    assert all(float(line["cpu_s"]) > 0 and line["commit"] and line["torch"] == torch.__version__ for line in known)
    main = [line["case"] for line in rows if line["table"] == "loss"]
    assert {main.count(case) for case in main} == {2} and set(main) == {
        case for case in bench_cases.CASES if "_path" not in case
    }
    assert all(line["note"] for line in rows if line["ms"] == "nan")
    assert all(float(line["peak_mib"]) >= 0 for line in rows if line["case"] == "plain PyTorch")
    assert all((tmp_path / "new" / f"out_{axis}.png").stat().st_size > 10_000 for axis in "VK")


@pytest.mark.slow
def test_what_time_does_not_allow_is_named():
    output = run("--quick", "--minutes", "0", "--without", "compiled")
    assert "step: skipped, 0 minutes are over" in output and "chunk (256, 64, 1031, 8): skipped" in output
