"""Runs to tables, intervals and plots.

python report.py RUN...                     # folders; a sweep's folder stands for its jobs
python report.py runs/worth --out results   # where tables and plots go (default: the first folder)

Runs that differ in the seed alone are one arm. Its name is the experiment that it was started with
(`taught` of experiment=taught) or, without one, its loss; then the keys in which such arms differ.
Every run is taken at its best evaluation (its last one stands beside it). Arms are compared with a
reference (--against; else the first cross-entropy arm), paired by seed, with 95% t intervals.
"""

import argparse
import csv
import json
import math
import re
import statistics
import textwrap
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats

from conf.schema import Config
from engine import UserError
from engine.checkpoint import manifest, readable
from engine.cli import report_user_errors
from engine.logger import METRICS, read_metrics
from engine.run_dir import INPUTS, fixed

TITLE = "Held-out loss, nats a token, at each run's best evaluation (95% intervals)"
BOUND_NOTE = (
    "≥, ≤: bounds, where teacher=cache holds some entries of each distribution and all the rest"
    " counts as one outcome."
)
FEW_SEEDS_NOTE = "Fewer than 5 seeds: a demonstration, not a claim."
UNEQUAL_NOTE = "Not all arms were trained on as many tokens: see that column."
MEASURES = ("val_kl", "val_acceptance", "val_agreement", "val_ece")
LABEL_WIDTH = 48  # characters of a line of an arm's name in a plot
LINE_STYLES = ("-", "--", ":")
# How a teacher is trained first; not read where teacher.path is given.
TEACHER_TRAINING = ("teacher.max_steps", "teacher.lr", "teacher.model.")


@dataclass
class Run:
    """One finished or running run, as its directory records it."""

    path: Path
    seed: int
    experiment: str | None  # the NAME of experiment=NAME; None too in records of older versions
    config: dict  # what it learns from, as dotted keys, but for the seed
    evaluations: list[dict]  # rows of metrics.jsonl with val_loss
    best: dict  # the one of lowest loss
    summary: dict  # empty until the run has finished
    kl_is_bound: bool  # its teacher is a cache that holds less than whole distributions


@dataclass
class Arm:
    """Runs that differ in the seed alone."""

    config: dict  # of its first run
    experiment: str | None  # the first that one of its runs has
    name: str = ""  # see name_arms
    runs: dict[int, Run] = field(default_factory=dict)  # by seed

    @property
    def loss(self) -> str:
        return self.config["loss.name"]

    def best(self, key: str) -> dict:
        """That measure at each run's best evaluation, by seed; runs without it are left out."""
        return {
            seed: run.best[key]
            for seed, run in sorted(self.runs.items())
            if run.best.get(key) is not None
        }


# Reading


def find_runs(paths: list[str]) -> list[Run]:
    """The runs at `paths`, or in the folders right below them."""
    folders = []
    for path in paths:
        files = [*Path(path).glob(METRICS), *Path(path).glob(f"*/{METRICS}")]
        if not files:
            raise UserError(f"{path}: no run there (a folder with {METRICS}) nor in its folders")
        here = [file.parent for file in files]
        folders += sorted(here, key=lambda folder: (len(folder.name), folder.name))  # 2 < 10
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    name_inputs_alike(runs)
    return runs


def name_inputs_alike(runs: list[Run]) -> None:
    """One text at two paths, by its checkpoints' fingerprints, gets the path of the first run."""
    names = {}
    for run in runs:
        for folder in readable(run.path)[:1]:
            fingerprints = manifest(folder)["fingerprints"]
            for kind, keys in INPUTS.items():
                spelt = {key: run.config[key] for key in keys if key in run.config}
                if spelt and fingerprints.get(kind):
                    run.config |= names.setdefault((kind, fingerprints[kind]), spelt)


def read_run(path: Path) -> Run:
    config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))

    # one row a step: an evaluation that a signal cut short was logged later, in a row of its own
    steps = defaultdict(dict)
    for row in read_metrics(path):
        steps[row["step"]] |= row
    evaluations = [row for row in steps.values() if row.get("val_loss") is not None]
    if not evaluations:
        every = config["eval_every"]
        raise UserError(f"{path}: no evaluation yet; let it reach eval_every={every} steps")
    best = min(evaluations, key=lambda row: (math.isnan(row["val_loss"]), row["val_loss"]))

    summary = {}
    if (path / "summary.json").is_file():
        summary = json.loads((path / "summary.json").read_text())

    # what sets runs apart: what they learn from, how long, and from whom
    loss = config["loss"]["name"]
    teacher = config["teacher"]
    keys = fixed(asdict(Config())) | fixed(config)  # older versions recorded fewer keys
    keys |= {"max_steps": config["max_steps"], "teacher.path": teacher["path"]}
    ignored = ("seed",)
    if teacher["path"]:
        ignored += TEACHER_TRAINING
    if loss == "ce":  # reads none of the keys of a teacher's targets
        ignored += ("access", "teacher", "loss")
    learns_from = {key: value for key, value in keys.items() if not key.startswith(ignored)}
    learns_from["loss.name"] = loss
    bound = teacher["kind"] == "cache" and config["access"]["kind"] != "full"
    return Run(
        path,
        config["seed"],
        config.get("experiment"),
        learns_from,
        evaluations,
        best,
        summary,
        bound,
    )


def find_arms(runs: list[Run]) -> list[Arm]:
    """Groups runs that differ in the seed alone; says which are left out as repetitions."""
    arms = {}
    for run in runs:
        identity = json.dumps(run.config, sort_keys=True)
        arm = arms.setdefault(identity, Arm(run.config, run.experiment))
        arm.experiment = arm.experiment or run.experiment
        # the first run of a seed counts: a sweep over loss and temperature repeats cross-entropy
        first = arm.runs.setdefault(run.seed, run)
        if first is not run:
            print(f"{run.path}: left out, it trains what {first.path} does")

    experiments = defaultdict(list)
    for arm in arms.values():
        experiments[arm.experiment].append(arm)
    for siblings in experiments.values():
        name_arms(siblings)
    return list(arms.values())


def name_arms(arms: list[Arm]) -> None:
    """Names the arms of one experiment by it, or by their losses, and by the keys that differ."""
    values = defaultdict(set)
    for arm in arms:
        for key, value in arm.config.items():
            values[key].add(json.dumps(value))
    if arms[0].experiment is None:
        del values["loss.name"]  # always shown
    differing = [key for key in sorted(values) if len(values[key]) > 1]

    for arm in arms:
        settings = [f"{key}={arm.config[key]}" for key in differing if key in arm.config]
        arm.name = " ".join([arm.experiment or arm.loss, *settings])


def find_reference(arms: list[Arm], against: str | None) -> Arm:
    """The arm to compare the others with: the one named, else the first cross-entropy arm."""
    if against is None:
        return min(arms, key=lambda arm: arm.loss != "ce")  # of equals the first
    for arm in arms:
        if arm.name == against:
            return arm
    names = "; ".join(arm.name for arm in arms)
    raise UserError(f"--against {against}: no such arm; the arms are: {names}")


def teachers(arms: list[Arm]) -> dict[str, float]:
    """The held-out losses of the runs' teachers, each by what its run's summary says of it."""
    found = {}
    for arm in arms:
        for run in arm.runs.values():
            teacher = run.summary.get("teacher")
            if teacher:
                loss = teacher["val_loss"]
                size = f"{teacher['parameters'] / 1e6:.2f}M parameters"
                found[f"teacher {teacher['path']}: {size}, held-out loss {loss:.3f}"] = loss
    return found


# Numbers


def mean_interval(values) -> tuple[float, float]:
    """Mean and half-width of its 95% interval by Student's t (nan below one and two values).

    Both are nan where a value is.
    """
    values = list(values)
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2 or math.isnan(mean):
        return mean, math.nan
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def table_row(arm: Arm, reference: Arm) -> dict:
    """An arm's row of table.csv, numbers unrounded."""
    runs = list(arm.runs.values())
    last = [run.evaluations[-1] for run in runs]
    flops = runs[0].summary.get("flops", {"student": math.nan, "teacher": math.nan})

    # against the reference, paired by seed
    losses = arm.best("val_loss")
    theirs = reference.best("val_loss") if arm is not reference else {}
    differences = [losses[seed] - theirs[seed] for seed in losses if seed in theirs]
    loss, loss_half = mean_interval(losses.values())
    difference, difference_half = mean_interval(differences)

    # against the teacher
    measures = {key: mean_interval(arm.best(key).values())[0] for key in MEASURES}
    against_teacher = "bound" if any(run.kl_is_bound for run in runs) else "exact"
    if math.isnan(measures["val_kl"]):
        against_teacher = ""

    return {
        "arm": arm.name,
        "seeds": len(runs),
        "loss": loss,
        "loss_half": loss_half,
        "final": statistics.fmean(row["val_loss"] for row in last),
        "difference": difference,
        "difference_half": difference_half,
        "wins": sum(value < 0 for value in differences),
        "pairs": len(differences),
        **measures,
        "against_teacher": against_teacher,
        "tokens": last[0]["tokens"],
        "seconds": statistics.fmean(row["seconds"] for row in last),
        "student_flops": flops["student"],
        "teacher_flops": flops["teacher"],
    }


# Text

# How a row of table.csv is printed, by heading: six columns on the loss, then the others.
COLUMNS = {
    "arm": "{arm}",
    "seeds": "{seeds}",
    "loss": "{loss:.3f} ± {loss_half:.3f}",
    "minus {reference}": "{difference:+.3f} ± {difference_half:.3f}",
    "better on": "{wins} of {pairs}",
    "at the end": "{final:.3f}",
    "KL": "{at_least}{val_kl:.3f}",
    "acceptance": "{at_most}{val_acceptance:.3f}",
    "agreement": "{val_agreement:.3f}",
    "ECE": "{val_ece:.3f}",
    "tokens": "{tokens:,.0f}",
    "seconds": "{seconds:,.1f}",
    "FLOPs": "{student_flops:.1e}",
    "teacher's FLOPs": "{teacher_flops:.1e}",
}
# What Markdown would not show in a name: an underscore has a meaning at a word's edges alone.
MARKDOWN_SYNTAX = re.compile(r"[\\`*<\[|~]|\b_+|_+\b")
NO_NUMBER = ("nan", "+nan", "0 of 0")


def printed(row: dict) -> list[str]:
    """A row of table.csv as the tables show it, nothing where there is no number."""
    is_bound = row["against_teacher"] == "bound"
    at_least = "≥ " if is_bound else ""
    at_most = "≤ " if is_bound else ""
    cells = []
    for template in COLUMNS.values():
        cell = template.format(**row, at_least=at_least, at_most=at_most)
        cells.append(cell.removesuffix(" ± nan"))
    return ["" if cell in NO_NUMBER else cell for cell in cells]


def markdown(lines: list[list[str]]) -> str:
    """A GitHub table of lines of cells, the headings first."""
    headings, *rows = lines
    alignment = ["---", *["---:" for _ in headings[1:]]]
    text = ""
    for line in (headings, alignment, *rows):
        cells = line
        if line is not alignment:
            cells = [MARKDOWN_SYNTAX.sub(escape, cell) for cell in line]
        text += f"| {' | '.join(cells)} |\n"
    return text


def escape(match: re.Match) -> str:
    return "".join(f"\\{character}" for character in match[0])


def terminal_table(lines: list[list[str]]) -> Table:
    """The same on a terminal, every cell to the letter."""
    headings, *rows = lines
    table = Table(box=box.SIMPLE)
    table.add_column(Text(headings[0]), overflow="fold")
    for heading in headings[1:]:
        table.add_column(Text(heading), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def notes(arms: list[Arm], table: list[dict]) -> list[str]:
    """The lines below the tables."""
    lines = list(teachers(arms))
    if any(row["against_teacher"] == "bound" for row in table):
        lines.append(BOUND_NOTE)
    if min(row["seeds"] for row in table) < 5:
        lines.append(FEW_SEEDS_NOTE)
    if len({row["tokens"] for row in table}) > 1:
        lines.append(UNEQUAL_NOTE)
    return lines


# Plots


def line_style(place: int) -> dict:
    """Of the arm at that place: matplotlib has ten colours."""
    return {"color": f"C{place % 10}", "linestyle": LINE_STYLES[place // 10 % len(LINE_STYLES)]}


def add_legend(figure: Figure, axes) -> None:
    """Below the axes, where it covers nothing, with as many columns as the names leave room for."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    labels = [textwrap.fill(label, LABEL_WIDTH) for label in labels]
    longest = max(len(line) for label in labels for line in label.splitlines())
    columns = max(1, int(figure.get_figwidth() * 12 / (longest + 8)))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(columns, len(labels)),
        fontsize=8,
    )


def mark_teachers(line, arms: list[Arm]) -> None:
    """Draws a dotted line at each teacher's loss; `line` is axes.axhline or axes.axvline."""
    for loss in teachers(arms).values():
        line(loss, color="black", linestyle=":", label=f"teacher {loss:.3f}")


def draw_curves(figure: Figure, arms: list[Arm]) -> None:
    """Held-out loss against tokens and seconds, a line a seed."""
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(xlabel="tokens trained on", ylabel="held-out loss (nats a token)")
    right.set_xlabel("training seconds (evaluations not counted)")
    for axes, key in ((left, "tokens"), (right, "seconds")):
        for place, arm in enumerate(arms):
            label = arm.name
            for run in arm.runs.values():
                x = [row[key] for row in run.evaluations]
                losses = [row["val_loss"] for row in run.evaluations]
                axes.plot(x, losses, **line_style(place), label=label)
                label = None  # one entry of the legend an arm
        mark_teachers(axes.axhline, arms)
    add_legend(figure, right)
    figure.suptitle("Held-out loss, one line a seed (the loss axis does not start at 0)")


def draw_bars(figure: Figure, arms: list[Arm]) -> None:
    """Best loss of each arm, dots for the seeds."""
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        losses = list(arm.best("val_loss").values())
        mean, half = mean_interval(losses)
        axes.barh(place, mean, xerr=half, alpha=0.6, capsize=3)
        axes.plot(losses, [place] * len(losses), "k.", markersize=5)
        axes.annotate(f" {mean:.3f}", (numpy.nansum([mean, half]), place), va="center")

    mark_teachers(axes.axvline, arms)
    add_legend(figure, axes)
    names = [textwrap.fill(arm.name, LABEL_WIDTH) for arm in arms]
    axes.set_yticks(range(len(arms)), names)
    axes.set_xlabel("held-out loss (nats a token)")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_title("Best held-out loss: bar = mean, line = 95% interval, dots = seeds", fontsize=9)


def draw_reliability(figure: Figure, arms: list[Arm]) -> None:
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
        bins[:, :, 1:] *= bins[:, :, :1]
        share, confidence, accuracy = bins.mean(0).T  # [bins] each, the last two times share
        filled = share > 0
        confidence = confidence[filled] / share[filled]
        accuracy = accuracy[filled] / share[filled]

        error, _ = mean_interval(arm.best("val_ece").values())
        label = f"{arm.name}, ECE {error:.3f}"
        style = line_style(place)
        axes.plot(confidence, accuracy, marker="o", markersize=4, label=label, **style)
        edges = numpy.linspace(0, 1, len(share) + 1)
        axes.stairs(share, edges, fill=True, color=style["color"], alpha=0.15)
    axes.set(
        xlabel="confidence (of the top token)",
        ylabel="accuracy; bars: share of the rows",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axes.set_title("Reliability, mean over seeds (below the diagonal: overconfident)", fontsize=9)
    add_legend(figure, axes)


def report(paths: list[str], out: Path, against: str | None = None) -> list[dict]:
    """Prints and writes everything; returns the rows of table.csv.

    Raises UserError if `against` is not the name of an arm.
    """
    arms = find_arms(find_runs(paths))
    reference = find_reference(arms, against)
    table = [table_row(arm, reference) for arm in arms]
    headings = [heading.format(reference=reference.name) for heading in COLUMNS]
    lines = [headings, *[printed(row) for row in table]]
    below = notes(arms, table)

    # two tables: the losses; then costs, and how close each arm is to its teacher
    console = Console(width=max(110, Console().width))
    first = [line[:6] for line in lines]
    rest = [line[:1] + line[6:] for line in lines]
    console.print(TITLE, terminal_table(first), sep="\n")
    console.print("At that evaluation, and in all", terminal_table(rest), sep="\n")

    # table files
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "table.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, table[0])
        writer.writeheader()
        writer.writerows(table)
    page = f"{TITLE}\n\n{markdown(lines)}"
    for line in below:
        page += f"\n{line}\n"
    (out / "table.md").write_text(page, encoding="utf-8")

    # plots
    plots = {
        "curves.png": (draw_curves, 13, 5 + 0.1 * len(arms)),
        "bars.png": (draw_bars, 9, 0.7 * len(arms) + 1.6),
    }
    if any(arm.best("val_reliability") for arm in arms):  # older runs did not record it
        plots["reliability.png"] = (draw_reliability, 6, 6 + 0.2 * len(arms))
    for name, (draw, width, height) in plots.items():
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure, arms)
        figure.savefig(out / name, dpi=120)
    written = ", ".join(["table.csv", "table.md", *plots])
    console.print(*below, f"written: {out}/{written}", sep="\n", markup=False)
    return table


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
