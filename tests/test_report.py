"""Runs to arms, paired differences, intervals, tables and plots."""

import csv
import json
import math
import shutil

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import OmegaConf

import report
from engine import UserError
from engine.checkpoint import save
from engine.logger import METRICS

CONFIG = {
    "access": {"kind": "topk", "k": 8},
    "teacher": {"kind": "online", "path": None},
    "max_steps": 10,
    "eval_every": 5,
}
SUMMARY = {
    "flops": {"student": 1e9, "teacher": 2e9},
    "teacher": {"path": "t", "parameters": 5e5, "val_loss": 1.5},
}


def write(folder, losses, seed=0, loss="ce", measures=None, **changes):
    """A run with an evaluation a step, 10 tokens and 2 s each."""
    folder.mkdir(parents=True)
    config = CONFIG | {"loss": {"name": loss}, "seed": seed} | changes
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    rows = [{"step": 0, "loss": 9.0}]
    for step, value in enumerate(losses, start=1):
        row = {
            "step": step,
            "tokens": 10 * step,
            "seconds": 2.0 * step + seed,
            "val_loss": value,
            "val_ece": 0.1,
        }
        rows.append(row | (measures or {}))
    (folder / METRICS).write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture
def sweep(tmp_path):
    """Two arms, topk_kl first; seeds 0, 1 and 2 are common to both, seed 5 is not."""
    folder = tmp_path / "sweep"
    for seed, loss in ((0, 3.0), (1, 3.2), (2, 3.1)):
        write(folder / f"ce{seed}", [math.nan, 4.0, loss, loss + 0.4], seed)
    for seed, loss in ((0, 2.5), (1, 2.6), (2, 2.3), (5, 9.0)):
        write(folder / f"a{seed}", [4.0, loss], seed, "topk_kl")
    return folder


def find_arms(*folders):
    return report.find_arms(report.find_runs(folders))


def draw(function, arms, width=9, height=5):
    """The figure that `function` draws, laid out, and its legend's box in pixels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    function(figure, arms)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    return figure, legend.get_window_extent()


def test_each_arm_is_taken_at_its_best_and_paired_by_seed(sweep):
    taught, plain = report.report([sweep], sweep)
    assert plain["loss"] == pytest.approx(3.1)
    assert plain["final"] == pytest.approx(3.5)
    assert taught["difference"] == pytest.approx(-1.9 / 3)  # of -0.5, -0.6, -0.8
    assert taught["difference_half"] == pytest.approx(0.3794583)  # t of 2 degrees: 4.30265
    with open(sweep / "table.csv") as stream:
        rows = list(csv.DictReader(stream))
    for row, numbers in zip(rows, (taught, plain), strict=True):
        assert row == {key: str(value) for key, value in numbers.items()}


def test_the_tables_as_text(sweep, capsys):
    write(sweep / "other", [3.0], 0, "t|v")
    report.report([sweep], sweep)
    lines = [
        report.TITLE,
        "",
        "| arm | seeds | loss | minus ce | better on | at the end | KL | acceptance | agreement"
        " | ECE | tokens | seconds | FLOPs | teacher's FLOPs |",
        f"| --- |{' ---: |' * 13}",
        "| topk_kl | 4 | 2.850 ± 1.236 | -0.633 ± 0.379 | 3 of 3 | 4.100 |  |  |  | 0.100 | 20"
        " | 6.0 | 1.0e+09 | 2.0e+09 |",
        "| ce | 3 | 3.100 ± 0.248 |  |  | 3.500 |  |  |  | 0.100 | 40 | 9.0 | 1.0e+09 | 2.0e+09 |",
        r"| t\|v | 1 | 3.000 | +0.000 | 0 of 1 | 3.000 |  |  |  | 0.100 | 10"
        " | 2.0 | 1.0e+09 | 2.0e+09 |",
        "",
        "teacher t: 0.50M parameters, held-out loss 1.500",
        "",
        report.FEW_SEEDS_NOTE,
        "",
        report.UNEQUAL_NOTE,
    ]
    assert (sweep / "table.md").read_text().splitlines() == lines
    out = capsys.readouterr().out
    for text in ("t|v", "-0.633 ± 0.379", "2.0e+09", lines[-5], lines[-1]):
        assert text in out

    report.report([sweep], sweep, against="topk_kl")
    assert "| minus topk_kl |" in (sweep / "table.md").read_text()


@pytest.mark.parametrize(
    "kind, access, word",
    [
        ("online", "topk", "exact"),
        ("cache", "topk", "bound"),
        ("cache", "full", "exact"),
    ],
)
def test_bounds_from_a_cache_are_marked_and_explained(tmp_path, kind, access, word):
    write(
        tmp_path / "run",
        [3.0],
        measures={"val_kl": 0.0504, "val_acceptance": 0.886},
        access={"kind": access},
        teacher={"kind": kind, "path": "c"},
    )
    (row,) = report.report([tmp_path], tmp_path)
    assert row["against_teacher"] == word
    text = (tmp_path / "table.md").read_text()
    assert ("| ≥ 0.050 | ≤ 0.886 |" in text) == (word == "bound")
    assert ("| 0.050 | 0.886 |" in text) == (word == "exact")
    assert (report.BOUND_NOTE in text) == (word == "bound")


def test_arms_differ_in_what_their_runs_read(tmp_path):
    """Not in keys of targets that the loss ce does not read, nor in a given teacher's training."""
    teacher = {"kind": "online", "path": "t"}
    write(tmp_path / "a", [3.0], 0)
    write(
        tmp_path / "b",
        [3.1],
        1,
        access={"kind": "topk", "k": 64},
        teacher=teacher,
    )
    write(tmp_path / "c", [3.1], 1, max_steps=20)
    for place, path in enumerate(("c", "t", "t", None, None)):
        given = teacher | {"path": path, "max_steps": place, "model": {"n_layer": 2}}
        write(
            tmp_path / f"d{place}",
            [3.0],
            place,
            "topk_kl",
            teacher=given,
        )
    assert {arm.name: list(arm.runs) for arm in find_arms(tmp_path)} == {
        "ce max_steps=10": [0, 1],
        "ce max_steps=20": [1],
        "topk_kl max_steps=10 teacher.path=c": [0],
        "topk_kl max_steps=10 teacher.path=t": [1, 2],
        "topk_kl max_steps=10 teacher.max_steps=3 teacher.path=None": [3],
        "topk_kl max_steps=10 teacher.max_steps=4 teacher.path=None": [4],
    }


def test_one_text_at_two_paths_is_one_arm(tmp_path):
    """By the checkpoints' fingerprints; without checkpoints paths are all there is."""
    texts = {"a": "of a text", "scratch/a": "of a text", "b": "of another"}
    for seed, (path, fingerprint) in enumerate(texts.items()):
        folder = tmp_path / str(seed)
        write(folder, [3.0], seed, data={"path": path})
        save(folder, 1, lambda scratch: None, {"fingerprints": {"tokens": fingerprint}})
    same, other = find_arms(tmp_path)
    assert list(same.runs) == [0, 1]
    assert same.config["data.path"] == "a"
    assert same.name == "ce data.path=a"
    assert list(other.runs) == [2]
    assert other.config["data.path"] == "b"
    shutil.rmtree(tmp_path / "1/checkpoints")
    assert len(find_arms(tmp_path)) == 3


def test_arms_are_named_by_their_experiment(tmp_path):
    """Beside each other: experiments, two arms of one, runs without one and of older versions."""
    for seed in (0, 1):
        write(
            tmp_path / f"a{seed}",
            [3.0],
            seed,
            "topk_kl",
            experiment="taught",
            max_steps=30,
        )
        write(
            tmp_path / f"b{seed}",
            [3.0],
            seed,
            experiment="plain",
            max_steps=20,
        )
    for k in (16, 64):
        write(
            tmp_path / f"k{k}",
            [3.0],
            0,
            "topk_kl",
            experiment="shared",
            access={"kind": "topk", "k": k},
        )
    write(tmp_path / "c2", [3.0], 0, "ce", experiment="shared")
    write(tmp_path / "d0", [3.0], 0, experiment=None, max_steps=5)  # without an experiment
    write(tmp_path / "d1", [3.0], 1, max_steps=5)  # an older version's record: no such key
    assert {arm.name: list(arm.runs) for arm in find_arms(tmp_path)} == {
        "taught": [0, 1],
        "plain": [0, 1],
        "shared access.k=16 loss.name=topk_kl": [0],
        "shared access.k=64 loss.name=topk_kl": [0],
        "shared loss.name=ce": [0],
        "ce": [0, 1],
    }
    assert report.find_reference(find_arms(tmp_path), None).name == "plain"
    assert report.find_reference(find_arms(tmp_path), "taught").name == "taught"


def test_an_arm_goes_on_after_a_run_of_an_older_version(tmp_path):
    """The record of a run has no experiment and no newer keys: those count as unset."""
    write(tmp_path / "0", [3.0], 0, max_steps=20)
    write(tmp_path / "1", [3.1], 1, max_steps=20, experiment="plain", model={"dropout": 0.0})
    (arm,) = find_arms(tmp_path)
    assert arm.name == "plain"
    assert list(arm.runs) == [0, 1]


def test_names_are_shown_to_the_letter(tmp_path, capsys):
    names = ("*b*", "__init__", "[red]x", "a|b", "topk_kl", "<i>", "`c`")
    for place, name in enumerate(names):
        write(tmp_path / f"{place}", [3.0], experiment=name, max_steps=place + 1)
    report.report([tmp_path], tmp_path)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    page = (tmp_path / "table.md").read_text()
    for cell in (r"\*b\*", r"\_\_init\_\_", r"\[red]x", r"a\|b", "topk_kl", r"\<i>", r"\`c\`"):
        assert f"\n| {cell} | 1 |" in page


@pytest.mark.parametrize("function", [report.draw_curves, report.draw_bars])
@pytest.mark.parametrize("count, name", [(2, "arm"), (12, "arm"), (3, "a_long.name=value " * 16)])
def test_the_legend_covers_no_axes(tmp_path, function, count, name):
    for place in range(count):
        losses = [3.0 + place, math.nan]
        write(tmp_path / f"{place}", losses, experiment=f"{name}{place}", max_steps=place + 1)
    figure, legend = draw(function, find_arms(tmp_path), 13, 6 + 0.1 * count)
    for axes in figure.axes:
        assert not axes.get_window_extent().overlaps(legend)
        assert axes.get_window_extent().height > 150
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    if function is report.draw_curves:
        lines = figure.axes[0].lines[:-1]  # but for the teacher's
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == count


def test_a_run_without_a_finite_loss_is_reported_too(tmp_path):
    write(tmp_path / "a", [math.nan])
    write(tmp_path / "b", [math.nan], 1)
    write(tmp_path / "c", [3.0], 0, "topk_kl")
    lost, good = report.report([tmp_path], tmp_path)
    assert math.isnan(lost["loss"])
    assert good["loss"] == 3.0
    assert (tmp_path / "bars.png").exists()


def test_a_run_that_trains_the_same_is_left_out_and_said(tmp_path, sweep, capsys):
    """`-m loss=ce,topk_kl loss.temperature=1,2` trains plain cross-entropy twice over."""
    again = tmp_path / "again"
    write(again, [9.0], 0)
    _, plain = find_arms(sweep, again)
    assert f"{again}: left out, it trains what {sweep}/ce0 does" in capsys.readouterr().out
    assert plain.best("val_loss")[0] == 3.0


def test_an_evaluation_logged_in_a_row_of_its_own_keeps_its_tokens_and_seconds(tmp_path):
    write(tmp_path / "cut", [3.0])
    with open(tmp_path / "cut" / METRICS, "a") as stream:
        print('{"step": 2, "tokens": 20, "seconds": 4.0}', file=stream)
        print('{"step": 2, "val_loss": 2.5}', file=stream)
    (row,) = report.report([tmp_path / "cut"], tmp_path)
    assert row["final"] == 2.5
    assert row["tokens"] == 20
    assert row["seconds"] == 4


def test_mistakes(tmp_path, sweep):
    write(tmp_path / "young", [])
    for path, message in (
        ("sweep", "--against nobody: no such arm; the arms are: topk_kl; ce"),
        ("young", "no evaluation yet; let it reach eval_every=5 steps"),
        ("none", "none: no run there"),
    ):
        with pytest.raises(UserError, match=message):
            report.report([tmp_path / path], tmp_path, against="nobody")


def test_curves_stand_against_tokens_and_seconds(sweep):
    figure = Figure()
    report.draw_curves(figure, find_arms(sweep))
    for axes, x in zip(figure.axes, ([10, 20, 30, 40], [3, 5, 7, 9]), strict=True):
        plain = axes.lines[5]
        assert list(plain.get_xdata()) == x
        assert list(plain.get_ydata()[1:]) == [4.0, 3.2, 3.6]
        assert list(axes.lines[-1].get_ydata()) == [1.5, 1.5]  # the teacher's


def test_bars_are_means_with_intervals_from_zero(sweep):
    figure = Figure()
    report.draw_bars(figure, find_arms(sweep))
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([2.85, 3.1])
    assert [text.get_text() for text in axes.texts] == [" 2.850", " 3.100"]
    assert axes.texts[1].xy[0] == pytest.approx(3.348, abs=1e-3)  # where the interval ends
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 4.0  # seed 5's


def test_the_reliability_diagram_pools_the_seeds_of_runs_that_recorded_it(tmp_path, sweep):
    # share of the rows, confidence, accuracy of three bins
    recorded = [
        [[0.5, 0.05, 0.0], [0.0, 0.0, 0.0], [0.5, 0.95, 0.5]],
        [[1.0, 0.05, 0.3], [0.0, 0.0, 0.0], [0.0, 0.95, 0.0]],
    ]
    new = tmp_path / "new"
    for seed, bins in enumerate(recorded):
        write(new / f"{seed}", [3.0], seed, "tvd", {"val_reliability": bins})
    for folders, has_picture in (([sweep], False), ([sweep, new], True)):
        report.report(folders, tmp_path)
        assert (tmp_path / "reliability.png").exists() == has_picture

    figure = Figure()
    report.draw_reliability(figure, find_arms(new, sweep))
    (axes,) = figure.axes
    _, line = axes.lines  # the diagonal and one arm; bins without rows are not drawn
    assert list(line.get_xdata()) == pytest.approx([0.05, 0.95])
    assert list(line.get_ydata()) == pytest.approx([0.2, 0.5])
    assert line.get_label() == "tvd, ECE 0.100"
    (bars,) = axes.patches
    assert list(bars.get_data().values) == pytest.approx([0.75, 0, 0.25])
