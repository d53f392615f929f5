"""Runs to arms, paired differences and intervals."""

import json
import math

import pytest
from omegaconf import OmegaConf

import report
from engine import UserError

CONFIG = {
    "loss": {"name": "ce", "tail": "ghost"},
    "access": {"k": 8},
    "max_steps": 10,
    "eval_every": 5,
    "seed": 0,
    "run_dir": "x",
}


def write(folder, losses, seed=0, loss="ce", **changes):
    folder.mkdir(parents=True)
    config = CONFIG | {"loss": {"name": loss, "tail": "ghost"}, "seed": seed} | changes
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    rows = [
        {"step": place + 1, "tokens": 10 * (place + 1), "val_loss": value, "val_ece": 0.1} for place, value in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"step": 0, "loss": 9.0}, *rows]))
    summary = {"flops": {"student": 1e9, "teacher": 2e9}, "teacher": {"path": "t", "parameters": 5e5, "val_loss": 1.5}}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path):
    for seed, (plain, taught) in enumerate(((3.0, 2.5), (3.2, 2.6), (3.1, 2.3))):
        write(tmp_path / f"sweep/{seed}", [4.0, plain, plain + 0.4], seed)
        write(tmp_path / f"sweep/{seed + 3}", [4.0, taught], seed, loss="topk_kl")
    return tmp_path / "sweep"


def test_each_arm_is_taken_at_its_best_and_paired_by_seed(sweep, capsys):
    taught, plain = sorted(report.report([str(sweep)], sweep), key=lambda row: row["arm"], reverse=True)
    assert plain["arm"].startswith("ce") and plain["loss"] == pytest.approx(3.1) and plain["final"] == pytest.approx(3.5)
    assert taught["loss"] == pytest.approx((2.5 + 2.6 + 2.3) / 3)
    differences = [-0.5, -0.6, -0.8]
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in differences) / 2)
    assert taught["difference"] == pytest.approx(mean)
    assert taught["difference_half"] == pytest.approx(4.303 * deviation / math.sqrt(3))  # t at 2 degrees of freedom
    assert taught["wins"] == 3 and taught["pairs"] == 3
    out = capsys.readouterr().out
    assert "3 of 3" in out and "teacher t: 0.50M parameters, held-out loss 1.500" in out and "Fewer than 5 seeds" in out
    assert all((sweep / name).stat().st_size > 0 for name in ("table.csv", "curves.png", "bars.png"))


def test_the_unpaired_mean_would_be_another_number():
    arm, reference = {0: 1.0, 1: 2.0, 5: 9.0}, {0: 2.0, 1: 3.0, 7: 0.0}
    assert report.paired(arm, reference) == [-1.0, -1.0]


def test_intervals():
    mean, half = report.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert math.isnan(report.mean_interval([1.0])[1])


def test_what_cross_entropy_does_not_read_does_not_make_an_arm(tmp_path):
    write(tmp_path / "a", [3.0], 0, access={"k": 8})
    write(tmp_path / "b", [3.1], 1, access={"k": 64})
    write(tmp_path / "c", [3.1], 1, max_steps=20)
    arms = report.find_arms(report.find_runs([str(tmp_path / name) for name in "abc"]))
    assert [sorted(arm.runs) for arm in arms] == [[0, 1], [1]] and [arm.name for arm in arms] == [
        "ce max_steps=10",
        "ce max_steps=20",
    ]


def test_a_run_that_trains_the_same_is_left_out_and_said(tmp_path, sweep, capsys):
    """`-m loss=ce,topk_kl loss.temperature=1,2` trains plain cross-entropy twice over."""
    write(tmp_path / "again", [9.0], 0)
    table = report.report([str(sweep), str(tmp_path / "again")], tmp_path)
    assert f"{tmp_path}/again: left out, it trains what {sweep}/0 does" in capsys.readouterr().out
    assert {row["arm"]: row["loss"] for row in table}["ce"] == pytest.approx(3.1)


def test_mistakes(tmp_path, sweep):
    with pytest.raises(UserError, match="--against nobody: no such arm; the arms are: ce; topk_kl"):
        report.report([str(sweep)], tmp_path, against="nobody")
    write(tmp_path / "young", [], 0)
    with pytest.raises(UserError, match="no evaluation yet"):
        report.report([str(tmp_path / "young")], tmp_path)
