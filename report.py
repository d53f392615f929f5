"""Runs to tables, intervals and plots.

python report.py RUN...                     # folders; a sweep's folder stands for its jobs
python report.py runs/worth --out results   # where tables and plots go (default: the first folder)

Runs that differ in the seed alone are one arm. Every run is taken at its best evaluation (its last
one stands beside it). Arms are compared with a reference (--against; else the first cross-entropy
arm), paired by seed, with 95% t intervals.
"""

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from scipy import stats

from engine import UserError
from engine.cli import report_user_errors
from engine.logger import METRICS, read_metrics
from engine.run_dir import fixed

TITLE = "Held-out loss, nats a token, at each run's best evaluation (95% intervals)"
BOUND_NOTE = (
    "≥, ≤: bounds, where teacher=cache holds some entries of each distribution and all the rest"
    " counts as one outcome."
)
FEW_SEEDS_NOTE = "Fewer than 5 seeds: a demonstration, not a claim."
MEASURES = ("val_kl", "val_acceptance", "val_agreement", "val_ece")
# How a teacher is trained first; not read where teacher.path is given.
TEACHER_TRAINING = ("teacher.max_steps", "teacher.lr", "teacher.model.")


@dataclass
class Run:
    """One finished or running run, as its directory records it."""

    path: Path
    config: dict  # dotted keys
    evaluations: list[dict]  # rows of metrics.jsonl with val_loss
    summary: dict  # empty until the run has finished

    @property
    def best(self) -> dict:
        """The evaluation of lowest loss."""
        finite = [row for row in self.evaluations if not math.isnan(row["val_loss"])]
        return min(finite or self.evaluations, key=lambda row: row["val_loss"])

    @property
    def kl_is_bound(self) -> bool:
        """Whether its teacher is a cache that holds less than whole distributions."""
        cached = self.config.get("teacher.kind") == "cache"
        return cached and self.config.get("access.kind") != "full"


@dataclass
class Arm:
    """Runs that differ in the seed alone."""

    config: dict  # dotted keys, without the seed
    runs: dict[int, Run] = field(default_factory=dict)  # by seed
    name: str = ""  # what sets it apart from the other arms

    def best(self, key: str = "val_loss") -> dict:
        """That measure at each run's best evaluation, by seed; runs without it are left out."""
        values = {}
        for seed in sorted(self.runs):
            value = self.runs[seed].best.get(key)
            if value is not None:
                values[seed] = value
        return values


# Reading


def find_runs(paths: list[str]) -> list[Run]:
    """The runs at `paths`, or in the folders right below them."""
    folders = []
    for path in paths:
        jobs = sorted(Path(path).glob("*/"), key=lambda job: (len(job.name), job.name))  # 2 < 10
        here = [
            folder
            for folder in (Path(path), *jobs)
            if (folder / "config.yaml").is_file() and (folder / METRICS).is_file()
        ]
        if not here:
            wanted = "a folder with config.yaml and metrics.jsonl"
            raise UserError(f"{path}: no run there ({wanted}) nor in its folders")
        folders += here
    return [read_run(folder) for folder in dict.fromkeys(folders)]


def read_run(path: Path) -> Run:
    config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))

    # one row a step: an evaluation that a signal cut short was logged later, in a row of its own
    steps = defaultdict(dict)
    for row in read_metrics(path):
        steps[row["step"]] |= row
    evaluations = [row for row in steps.values() if row.get("val_loss") is not None]
    if not evaluations:
        advice = f"let it reach eval_every={config['eval_every']} steps"
        raise UserError(f"{path}: no evaluation yet in metrics.jsonl; {advice}")

    summary = {}
    if (path / "summary.json").is_file():
        summary = json.loads((path / "summary.json").read_text())

    # what sets runs apart: what they learn from, how long, and from whom
    teacher_path = config.get("teacher", {}).get("path")
    keys = fixed(config) | {"max_steps": config["max_steps"], "teacher.path": teacher_path}
    if teacher_path:
        keys = {key: keys[key] for key in keys if not key.startswith(TEACHER_TRAINING)}
    return Run(path, keys, evaluations, summary)


def find_arms(runs: list[Run]) -> list[Arm]:
    """Groups runs that differ in the seed alone; says which are left out as repetitions."""
    arms = {}
    for run in runs:
        ignored = {"seed"}
        if run.config["loss.name"] == "ce":  # reads none of the keys of a teacher's targets
            ignored |= {"access", "teacher", "loss"}
        config = {"loss.name": run.config["loss.name"]}
        for key, value in run.config.items():
            if key.split(".")[0] not in ignored:
                config[key] = value

        arm = arms.setdefault(json.dumps(config, sort_keys=True), Arm(config))
        # the first run of a seed counts: a sweep over loss and temperature repeats cross-entropy
        first = arm.runs.setdefault(run.config["seed"], run)
        if first is not run:
            print(f"{run.path}: left out, it trains what {first.path} does")
    name_arms(list(arms.values()))
    return list(arms.values())


def name_arms(arms: list[Arm]) -> None:
    """Names each arm by its loss and by the keys in which arms differ."""
    values = defaultdict(set)
    for arm in arms:
        for key, value in arm.config.items():
            values[key].add(json.dumps(value))
    del values["loss.name"]  # always shown
    differing = [key for key in sorted(values) if len(values[key]) > 1]
    for arm in arms:
        arm.name = arm.config["loss.name"]
        for key in differing:
            if key in arm.config:
                arm.name += f" {key}={arm.config[key]}"


def teachers(arms: list[Arm]) -> list[dict]:
    """What the runs' summaries say of their teachers, each teacher and loss once."""
    found = {}
    for arm in arms:
        for run in arm.runs.values():
            teacher = run.summary.get("teacher")
            if teacher:
                found[teacher["path"], f"{teacher['val_loss']:.3f}"] = teacher
    return list(found.values())


# Numbers


def mean(values) -> float:
    """The mean; nan of nothing."""
    values = list(values)
    return statistics.fmean(values) if values else math.nan


def mean_interval(values) -> tuple[float, float]:
    """Mean and half-width of its 95% interval by Student's t (nan below two values)."""
    values = list(values)
    count = len(values)
    if count < 2:
        return mean(values), math.nan
    quantile = float(stats.t.ppf(0.975, count - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(count)
    return mean(values), half


def paired(arm: dict[int, float], reference: dict[int, float]) -> list[float]:
    """arm - reference for every seed that both have."""
    seeds = sorted(arm.keys() & reference.keys())
    return [arm[seed] - reference[seed] for seed in seeds]


def table_row(arm: Arm, reference: Arm) -> dict:
    """An arm's row of table.csv, numbers unrounded."""
    runs = list(arm.runs.values())
    last = [run.evaluations[-1] for run in runs]
    flops = runs[0].summary.get("flops", {})

    # against the reference
    loss, loss_half = mean_interval(arm.best().values())
    differences = []
    if arm is not reference:
        differences = paired(arm.best(), reference.best())
    difference, difference_half = mean_interval(differences)

    # against the teacher
    measures = {key: mean(arm.best(key).values()) for key in MEASURES}
    against_teacher = "exact"
    if math.isnan(measures["val_kl"]):
        against_teacher = ""
    elif any(run.kl_is_bound for run in runs):
        against_teacher = "bound"

    return {
        "arm": arm.name,
        "seeds": len(runs),
        "loss": loss,
        "loss_half": loss_half,
        "final": mean(evaluation["val_loss"] for evaluation in last),
        "difference": difference,
        "difference_half": difference_half,
        "wins": sum(value < 0 for value in differences),
        "pairs": len(differences),
        **measures,
        "against_teacher": against_teacher,
        "tokens": last[0]["tokens"],
        "seconds": mean(evaluation.get("seconds", math.nan) for evaluation in last),
        "student_flops": flops.get("student", math.nan),
        "teacher_flops": flops.get("teacher", math.nan),
    }


# Text


def number(value: float, spec: str, half: float = math.nan) -> str:
    """A rounded number with its interval; empty for nan."""
    if math.isnan(value):
        return ""
    interval = "" if math.isnan(half) else f" ± {half:.3f}"
    return format(value, spec) + interval


def table_cells(row: dict, reference: Arm) -> dict[str, str]:
    """A row as the printed tables show it, by heading: six cells on the loss, then the others."""
    difference = number(row["difference"], "+.3f", row["difference_half"])
    is_bound = row["against_teacher"] == "bound"
    at_least = "≥ " if is_bound else ""
    at_most = "≤ " if is_bound else ""
    return {
        "arm": row["arm"],
        "seeds": str(row["seeds"]),
        "loss": number(row["loss"], ".3f", row["loss_half"]),
        f"minus {reference.name}": difference,
        "better on": f"{row['wins']} of {row['pairs']}" if difference else "",
        "at the end": number(row["final"], ".3f"),
        "KL": at_least + number(row["val_kl"], ".3f"),
        "acceptance": at_most + number(row["val_acceptance"], ".3f"),
        "agreement": number(row["val_agreement"], ".3f"),
        "ECE": number(row["val_ece"], ".3f"),
        "tokens": number(row["tokens"], ",.0f"),
        "seconds": number(row["seconds"], ",.1f"),
        "FLOPs": number(row["student_flops"], ".1e"),
        "teacher's FLOPs": number(row["teacher_flops"], ".1e"),
    }


def notes(arms: list[Arm], table: list[dict]) -> list[str]:
    """The lines below the tables."""
    lines = []
    for teacher in teachers(arms):
        size = f"{teacher['parameters'] / 1e6:.2f}M parameters"
        loss = f"held-out loss {teacher['val_loss']:.3f}"
        lines.append(f"teacher {teacher['path']}: {size}, {loss}")
    if any(row["against_teacher"] == "bound" for row in table):
        lines.append(BOUND_NOTE)
    if min(row["seeds"] for row in table) < 5:
        lines.append(FEW_SEEDS_NOTE)
    return lines


def text_table(title: str, headings: list[str], rows: list[dict[str, str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for row in rows:
        table.add_row(*[row[heading] for heading in headings])
    return table


def markdown(rows: list[dict[str, str]], notes: list[str]) -> str:
    """All columns as one GitHub table, to paste."""
    headings = list(rows[0])
    alignment = ["---:" for _ in headings]
    alignment[0] = "---"
    lines = [TITLE, ""]
    for cells in (headings, alignment, *[row.values() for row in rows]):
        escaped = [cell.replace("|", r"\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    for note in notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


# Plots


def mark_teachers(line, arms: list[Arm]) -> None:
    """Draws a dotted line at each teacher's loss; `line` is axes.axhline or axes.axvline."""
    for teacher in teachers(arms):
        loss = teacher["val_loss"]
        line(loss, color="black", linestyle=":", label=f"teacher {loss:.3f}")


def draw_curves(figure, arms: list[Arm]) -> None:
    """Held-out loss against tokens and seconds, a line a seed."""
    left, right = figure.subplots(1, 2, sharey=True)
    for place, arm in enumerate(arms):
        label = arm.name
        for run in arm.runs.values():
            style = {"color": f"C{place % 10}", "linewidth": 1.5, "label": label}
            losses = [row["val_loss"] for row in run.evaluations]
            tokens = [row["tokens"] for row in run.evaluations]
            seconds = [row.get("seconds", math.nan) for row in run.evaluations]
            left.plot(tokens, losses, **style)
            right.plot(seconds, losses, **style)
            label = None  # one entry of the legend an arm
    mark_teachers(left.axhline, arms)
    mark_teachers(right.axhline, arms)

    left.set(xlabel="tokens trained on", ylabel="held-out loss (nats a token)")
    right.set_xlabel("training seconds (evaluations not counted)")
    right.legend(fontsize=8)
    figure.suptitle("Held-out loss, one line a seed")


def draw_bars(figure, arms: list[Arm]) -> None:
    """Best loss of each arm, dots for the seeds."""
    axes = figure.subplots()
    losses = []
    for place, arm in enumerate(arms):
        values = list(arm.best().values())
        losses += values
        average, half = mean_interval(values)
        half = 0 if math.isnan(half) else half
        color = f"C{place % 10}"
        axes.barh(place, average, xerr=half or None, color=color, alpha=0.6, capsize=3)
        axes.plot(values, [place] * len(values), "k.", markersize=5)
        axes.annotate(f" {average:.3f}", (average + half, place), va="center")

    losses += [teacher["val_loss"] for teacher in teachers(arms)]
    mark_teachers(axes.axvline, arms)
    if teachers(arms):
        axes.legend(fontsize=8)
    axes.set(
        yticks=range(len(arms)),
        yticklabels=[arm.name for arm in arms],
        xlabel="held-out loss (nats a token)",
    )
    axes.invert_yaxis()
    axes.set_xlim(0.8 * min(losses), None)
    axes.set_title(
        "Best held-out loss: bar = mean, line = 95% interval, dots = seeds\n"
        "(the axis starts above 0)",
        fontsize=9,
    )


def draw_reliability(figure, arms: list[Arm]) -> None:
    """Accuracy against confidence at the best evaluations, a line an arm.

    Faint bars: the bins' shares of the rows.
    """
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for place, arm in enumerate(arms):
        recorded = list(arm.best("val_reliability").values())
        if not recorded:
            continue
        # [seeds, bins, 3]: share of the rows, confidence, accuracy; pooled as if one run
        bins = numpy.array(recorded)
        share = bins[:, :, 0].mean(0)  # [bins]
        pooled = (bins[:, :, 1:] * bins[:, :, :1]).mean(0)  # [bins, 2]
        filled = share > 0
        confidence, accuracy = (pooled[filled] / share[filled, None]).T

        color = f"C{place % 10}"
        label = f"{arm.name}, ECE {mean(arm.best('val_ece').values()):.3f}"
        axes.plot(confidence, accuracy, "o-", color=color, markersize=4, label=label)
        edges = numpy.linspace(0, 1, len(share) + 1)
        axes.stairs(share, edges, fill=True, color=color, alpha=0.15)
    axes.set(
        xlabel="confidence (of the top token)",
        ylabel="accuracy; bars: share of the rows",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axes.set_title("Reliability, mean over seeds (below the diagonal: overconfident)", fontsize=9)
    axes.legend(fontsize=8)


def plot(draw, arms: list[Arm], file: Path, width: float, height: float) -> None:
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure, arms)
    figure.savefig(file, dpi=120)


def report(paths: list[str], out: Path, against: str | None = None) -> list[dict]:
    """Prints and writes everything; returns the rows of table.csv.

    Raises UserError if `against` is not the name of an arm.
    """
    arms = find_arms(find_runs(paths))
    reference = find_reference(arms, against)
    table = [table_row(arm, reference) for arm in arms]
    rows = [table_cells(row, reference) for row in table]
    lines = notes(arms, table)

    # two tables: the losses; then costs, and how close each arm is to its teacher
    console = Console(width=max(110, Console().width))
    headings = list(rows[0])
    console.print(text_table(TITLE, headings[:6], rows))
    console.print(text_table("At that evaluation, and in all", ["arm", *headings[6:]], rows))

    # table files
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "table.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, table[0])
        writer.writeheader()
        writer.writerows(table)
    (out / "table.md").write_text(markdown(rows, lines), encoding="utf-8")

    # plots
    plot(draw_curves, arms, out / "curves.png", 13, 5)
    plot(draw_bars, arms, out / "bars.png", 9, 0.7 * len(arms) + 1.6)
    written = "table.csv, table.md, curves.png, bars.png"
    if any(arm.best("val_reliability") for arm in arms):  # older runs did not record it
        plot(draw_reliability, arms, out / "reliability.png", 6, 6)
        written += ", reliability.png"
    console.print(*lines, f"written: {out}/{written}", sep="\n")
    return table


def find_reference(arms: list[Arm], against: str | None) -> Arm:
    """The arm to compare the others with: the one named, else the first cross-entropy arm."""
    for arm in arms:
        if against is None and arm.config["loss.name"] == "ce":
            return arm
        if arm.name == against:
            return arm
    if against is None:
        return arms[0]
    names = "; ".join(arm.name for arm in arms)
    raise UserError(f"--against {against}: no such arm; the arms are: {names}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", help="name of the reference arm, as the table prints it")
    options = parser.parse_args()
    with report_user_errors():
        report(options.runs, options.out or Path(options.runs[0]), options.against)
