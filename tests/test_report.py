"""Runs to arms, paired differences and intervals."""

import csv
import json
import math
import re

import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf

import report
from data.batches import Batch
from engine import UserError
from engine.logger import RunLog, WandbConfig, read_metrics
from model import GPT, ModelConfig
from model.metrics import BINS, evaluate, expected_calibration_error, reliability

CONFIG = {
    "loss": {"name": "ce", "tail": "ghost"},
    "access": {"k": 8},
    "max_steps": 10,
    "eval_every": 5,
    "seed": 0,
    "run_dir": "x",
}


def write(folder, losses, seed=0, loss="ce", reliability=None, **changes):
    """A run whose evaluations took 2 s each to come to; with `reliability`, as recorded since evaluate returns it."""
    folder.mkdir(parents=True)
    config = CONFIG | {"loss": {"name": loss, "tail": "ghost"}, "seed": seed} | changes
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    extra = {"val_ece": 0.1} | ({"val_reliability": reliability} if reliability else {})
    rows = [
        {
            "step": place + 1,
            "tokens": 10 * (place + 1),
            "seconds": 2.0 * (place + 1) + seed,
            "val_loss": value,
        }
        | extra
        for place, value in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [{"step": 0, "loss": 9.0}, *rows])
    )
    summary = {
        "flops": {"student": 1e9, "teacher": 2e9},
        "teacher": {"path": "t", "parameters": 5e5, "val_loss": 1.5},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path):
    for seed, (plain, taught) in enumerate(((3.0, 2.5), (3.2, 2.6), (3.1, 2.3))):
        write(tmp_path / f"sweep/{seed}", [4.0, plain, plain + 0.4], seed)
        write(tmp_path / f"sweep/{seed + 3}", [4.0, taught], seed, loss="topk_kl")
    return tmp_path / "sweep"


def test_each_arm_is_taken_at_its_best_and_paired_by_seed(sweep, capsys):
    taught, plain = sorted(
        report.report([str(sweep)], sweep), key=lambda row: row["arm"], reverse=True
    )
    assert (
        plain["arm"].startswith("ce")
        and plain["loss"] == pytest.approx(3.1)
        and plain["final"] == pytest.approx(3.5)
    )
    assert taught["loss"] == pytest.approx((2.5 + 2.6 + 2.3) / 3)
    differences = [-0.5, -0.6, -0.8]
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in differences) / 2)
    assert taught["difference"] == pytest.approx(mean)
    assert taught["difference_half"] == pytest.approx(
        4.303 * deviation / math.sqrt(3)
    )  # t at 2 degrees of freedom
    assert taught["wins"] == 3 and taught["pairs"] == 3
    out = capsys.readouterr().out
    assert (
        "3 of 3" in out
        and "teacher t: 0.50M parameters, held-out loss 1.500" in out
        and "Fewer than 5 seeds" in out
    )
    assert all(
        (sweep / name).stat().st_size > 0 for name in ("table.csv", "curves.png", "bars.png")
    )


def test_the_unpaired_mean_would_be_another_number():
    arm, reference = {0: 1.0, 1: 2.0, 5: 9.0}, {0: 2.0, 1: 3.0, 7: 0.0}
    assert report.paired(arm, reference) == [-1.0, -1.0]


def test_an_evaluation_that_is_not_a_number_is_no_runs_best(tmp_path):
    write(tmp_path / "run", [math.nan, 3.0, 3.5])
    (run,) = report.find_runs([str(tmp_path / "run")])
    assert run.best["val_loss"] == 3.0


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


def test_bounds_from_a_cache_are_marked_and_explained(tmp_path, capsys):
    online, cache = {"kind": "online", "path": None}, {"kind": "cache", "path": "c"}
    made = {"max_steps": 9, "lr": 0.1, "model": {"n_layer": 2}}
    write(
        tmp_path / "online", [3.0], loss="topk_kl", access={"kind": "topk"}, teacher=online | made
    )
    write(tmp_path / "cache", [3.0], loss="topk_kl", access={"kind": "topk"}, teacher=cache | made)
    write(tmp_path / "whole", [3.0], loss="topk_kl", access={"kind": "full"}, teacher=cache | made)
    write(
        tmp_path / "greedy", [3.0], loss="topk_kl", access={"kind": "greedy"}, teacher=cache | made
    )
    for name in ("online", "cache", "whole"):
        rows = [
            row | {"val_kl": 0.0504, "val_acceptance": 0.886}
            for row in read_metrics(tmp_path / name)
        ]
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    names = ("online", "cache", "whole", "greedy")
    table = report.report([str(tmp_path / name) for name in names], tmp_path)
    assert [row["against_teacher"] for row in table] == ["exact", "bound", "exact", ""]
    assert [row["val_kl"] for row in table[:3]] == [0.0504] * 3  # numbers stay numbers
    lines = [
        line.split(" | ")
        for line in (tmp_path / "table.md").read_text().splitlines()
        if line.startswith("| topk_kl")
    ]
    assert [line[6:8] for line in lines] == [
        ["0.050", "0.886"],
        ["≥ 0.050", "≤ 0.886"],
        ["0.050", "0.886"],
        ["", ""],
    ]
    for text in (capsys.readouterr().out, (tmp_path / "table.md").read_text()):
        assert text.count("≥, ≤: bounds, where teacher=cache holds") == 1 and "≥ 0.050" in text
    assert next(csv.DictReader((tmp_path / "table.csv").open()))["against_teacher"] == "exact"
    report.report([str(tmp_path / "online")], tmp_path / "exact")
    assert "≥" not in capsys.readouterr().out + (tmp_path / "exact/table.md").read_text()


def test_arms_are_not_named_by_how_a_teacher_would_have_been_made(tmp_path):
    for place, teacher in enumerate(
        ({"kind": "cache", "path": "c"}, {"kind": "online", "path": "t"}, {"kind": "online"})
    ):
        made = {"max_steps": 9 + place, "lr": 0.1 * place, "model": {"n_layer": 2 + place}}
        write(tmp_path / f"{place}", [3.0], loss="topk_kl", teacher={"path": None} | teacher | made)
    names = [arm.name for arm in report.find_arms(report.find_runs([str(tmp_path)]))]
    assert names == [
        "topk_kl teacher.kind=cache teacher.path=c",
        "topk_kl teacher.kind=online teacher.path=t",
        "topk_kl teacher.kind=online teacher.path=None",
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


def two_bins(share, low, high):
    """Bins of which the first holds `share` of the rows at accuracy `low`, the last the rest at `high`."""
    return [[share, 0.05, low], *[[0.0, 0.0, 0.0]] * (BINS - 2), [1 - share, 0.95, high]]


def test_the_calibration_error_follows_from_the_recorded_bins():
    student, batch = (
        GPT(ModelConfig(1, 2, 16, 8), 31),
        Batch(torch.randint(31, (9, 8)), torch.randint(31, (9, 8)), None),
    )
    with torch.no_grad():
        student.head_weight.mul_(40)  # confidences in many bins
    found = json.loads(json.dumps(evaluate(student, [batch])))
    bins = found["val_reliability"]
    assert len(bins) == BINS == 15 and sum(share > 0 for share, *_ in bins) > 3
    assert (
        sum(share * abs(accuracy - confidence) for share, confidence, accuracy in bins)
        == found["val_ece"]
        > 0.01
    )
    log_p = torch.log_softmax(student.eval()(batch.ids).detach().flatten(0, 1).double(), dim=-1)
    confidence, top = log_p.exp().max(dim=-1)
    for place, (share, mean, accuracy) in enumerate(bins):  # by the definition, a bin at a time
        inside = (confidence > place / 15) & (confidence <= (place + 1) / 15)
        assert share == pytest.approx(inside.double().mean().item())
        right = (top == batch.labels.flatten()).double()
        wanted = (
            [confidence[inside].mean().item(), right[inside].mean().item()]
            if inside.any()
            else [0, 0]
        )
        assert [mean, accuracy] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bin_holds_its_upper_edge_and_not_its_lower(dtype):
    edges = torch.arange(1, BINS + 1, dtype=dtype) / BINS
    for place, edge in enumerate(edges):
        full = [share for share, *_ in reliability(edge[None], torch.ones(1, dtype=dtype))]
        assert full == [float(other == place) for other in range(BINS)]
    bins = reliability(
        torch.tensor([0.0, 1 / BINS, 1 / BINS + 1e-6, 1.0], dtype=dtype),
        torch.tensor([1, 0, 1, 1], dtype=dtype),
    )
    assert [share for share, *_ in bins] == [0.5, 0.25, *[0] * 12, 0.25]
    assert (
        bins[0][2] == 0.5 and bins[1][2] == 1 and bins[5] == [0, 0, 0] and bins[14] == [0.25, 1, 1]
    )
    assert expected_calibration_error(torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)) == 1


def test_the_markdown_table_holds_the_numbers_of_the_csv(tmp_path):
    for seed, (plain, taught) in enumerate(((3.0, 2.5), (3.25, 2.625))):
        write(tmp_path / f"sweep/{seed}", [4.0, plain, plain + 0.4], seed, data="a|b")
        write(tmp_path / f"sweep/{seed + 3}", [4.0, taught], seed, loss="topk_kl", data="c")
    report.report([str(tmp_path / "sweep")], tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "\n".join(lines).endswith(
        "teacher t: 0.50M parameters, held-out loss 1.500\n\nFewer than 5 seeds: a demonstration, not a claim."
    )
    heads, _, *body = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    heads = [head.strip() for head in heads]
    exact = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert (
        len(body) == len(exact) == 2
        and heads[3] == r"minus ce data=a\|b"
        and all(len(line) == len(heads) for line in body)
    )
    plain = [
        "seeds",
        "final",
        *report.MEASURES,
        "tokens",
        "seconds",
        "student_flops",
        "teacher_flops",
    ]
    for line, row in zip(body, exact, strict=True):
        arm, seeds, loss, gap, wins, *rest = [cell.strip() for cell in line]
        assert arm.replace(r"\|", "|") == row["arm"]
        numbers = [
            *loss.split(" ± "),
            *(gap.split(" ± ") if gap else ["nan", "nan"]),
            *(wins.split(" of ") if wins else "00"),
        ]
        keys = ["loss", "loss_half", "difference", "difference_half", "wins", "pairs"]
        for key, text in zip([*keys, *plain], [*numbers, seeds, *rest], strict=True):
            value = float(text.replace(",", "") or "nan")
            assert value == pytest.approx(float(row[key]), abs=5.1e-4, rel=1e-12, nan_ok=True), key
    assert [float(row["seconds"]) for row in exact] == [
        6.5,
        4.5,
    ]  # 2 s an evaluation and the seed, over two seeds


def test_curves_stand_against_tokens_steps_and_seconds(sweep):
    arms = report.find_arms(report.find_runs([str(sweep)]))
    report.draw_curves(figure := Figure(), arms)
    left, right = figure.axes
    assert left.get_xlabel() == "tokens trained on" and "training seconds" in right.get_xlabel()
    drawn = [
        [axes.lines[1].get_xdata(), axes.lines[1].get_ydata()] for axes in (left, right)
    ]  # the second seed of ce
    assert [[list(part) for part in line] for line in drawn] == [
        [[10, 20, 30], [4.0, 3.2, 3.6]],
        [[3.0, 5.0, 7.0], [4.0, 3.2, 3.6]],
    ]
    (steps,) = left.child_axes
    figure.draw_without_rendering()
    assert [10 * edge for edge in steps.get_xlim()] == pytest.approx(left.get_xlim())
    write(sweep / "wide", [3.0], 0, max_steps=20)
    (row,) = [row for row in read_metrics(sweep / "wide") if "val_loss" in row]
    (sweep / "wide/metrics.jsonl").write_text(json.dumps(row | {"tokens": 20}))
    report.draw_curves(figure := Figure(), report.find_arms(report.find_runs([str(sweep)])))
    assert not figure.axes[0].child_axes  # a step is not as many tokens in all


def test_the_bars_show_a_teacher_far_below_its_students(sweep):
    report.draw_bars(figure := Figure(), report.find_arms(report.find_runs([str(sweep)])))
    (axes,) = figure.axes
    assert 0 < axes.get_xlim()[0] < 1.5  # the teacher's 1.5, the best student's 2.3


def test_an_evaluation_logged_in_a_row_of_its_own_keeps_its_tokens_and_seconds(tmp_path):
    write(tmp_path / "cut", [3.0, 2.5])
    *rows, last = read_metrics(tmp_path / "cut")
    parts = [
        {key: last[key] for key in keys}
        for keys in (("step", "tokens", "seconds"), ("step", "val_loss", "val_ece"))
    ]
    (tmp_path / "cut/metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, *parts])
    )
    (row,) = report.report([str(tmp_path / "cut")], tmp_path)
    assert row["final"] == 2.5 and row["tokens"] == 20 and row["seconds"] == 4


def test_the_reliability_diagram_pools_the_seeds_and_leaves_out_older_runs(tmp_path, sweep, capsys):
    report.report([str(sweep)], tmp_path / "old")
    assert not (tmp_path / "old/reliability.png").exists()
    out = capsys.readouterr().out
    assert (
        "reliability.png: 6 of 6 runs left out, recorded without val_reliability" in out
        and "bars.png\n" in out
    )
    for seed, bins in enumerate((two_bins(0.5, 0.0, 0.5), two_bins(1.0, 0.3, 0.0))):
        write(tmp_path / f"new/{seed}", [3.0], seed, loss="tvd", reliability=bins)
    report.report([str(sweep), str(tmp_path / "new")], tmp_path)
    assert (tmp_path / "reliability.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "reliability.png: 6 of 8 runs left out" in out and "bars.png, reliability.png" in out
    report.draw_reliability(
        figure := Figure(), report.find_arms(report.find_runs([str(tmp_path / "new"), str(sweep)]))
    )
    diagonal, line = figure.axes[0].lines  # one arm alone, bins without rows not drawn
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    assert list(line.get_xdata()) == pytest.approx([0.05, 0.95]) and list(
        line.get_ydata()
    ) == pytest.approx([0.2, 0.5])
    assert line.get_label() == "tvd, ECE 0.100"
    (bars,) = figure.axes[0].patches
    assert (
        list(bars.get_data().values) == pytest.approx([0.75, *[0] * 13, 0.25])
        and bars.get_data().edges[-1] == 1
    )


def test_wandb_is_sent_scalars_only(tmp_path):
    class Sent:
        def log(self, row, step):
            self.row = row

    log = RunLog(tmp_path, WandbConfig(), {}, 0)
    log.wandb = Sent()
    row = {"step": 1, "val_loss": 3.0, "val_kl": None, "val_reliability": two_bins(0.5, 0, 1)}
    log.row(row)
    assert log.wandb.row == {"step": 1, "val_loss": 3.0, "val_kl": None} and read_metrics(
        tmp_path
    ) == [row]
