"""Runs to tables, intervals and plots.

python report.py RUN...                     # folders; a sweep's folder stands for its jobs
python report.py runs/worth --out results   # where the tables (csv, md) and plots (png) go (default: the first folder)

Runs that differ in the seed alone are one arm. Every run is taken at its best evaluation (its last one stands beside it);
arms are compared with a reference (--against; else the first cross-entropy arm), paired by seed, with 95% t intervals.
"""

import argparse
import csv
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Column, Table

from engine import UserError
from engine.cli import report_user_errors
from engine.logger import METRICS, read_metrics
from engine.run_dir import fixed

# 97.5% quantiles of Student's t for 1..30 degrees of freedom; 1.96 and a little beyond (error below .005 there).
T_975 = [
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
]
T_975 += [
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
]
MEASURES = {
    "val_kl": "KL",
    "val_acceptance": "acceptance",
    "val_agreement": "agreement",
    "val_ece": "ECE",
}
# What a row says behind the comparison: its key, heading and form.
LATER = {"final": ("at the end", ".3f")} | {key: (head, ".3f") for key, head in MEASURES.items()}
BOUNDS = {
    "val_kl": "≥ ",
    "val_acceptance": "≤ ",
}  # by the entries of a cache and one outcome for all the rest
BOUNDED = "≥, ≤: bounds, where teacher=cache holds some entries of each distribution and all the rest counts as one outcome."
LATER |= {"tokens": ("tokens", ",.0f"), "seconds": ("seconds", ",.1f")}
LATER |= {"student_flops": ("FLOPs", ".1e"), "teacher_flops": ("teacher's FLOPs", ".1e")}
MAKING = (
    "teacher.max_steps",
    "teacher.lr",
    "teacher.model.",
)  # keys of a teacher that is made first, where no path is given
TITLE = "Held-out loss, nats a token, at each run's best evaluation (95% intervals)"


@dataclass
class Run:
    """One finished or running run, as its directory tells it."""

    path: Path
    config: dict  # dotted keys
    seed: int
    evaluations: list[dict]  # rows of metrics.jsonl with val_loss
    summary: dict

    @property
    def bounded(self) -> bool:
        """Whether its measures against the teacher are bounds."""
        return (
            self.config.get("teacher.kind") == "cache" and self.config.get("access.kind") != "full"
        )

    @property
    def best(self) -> dict:
        return min(self.evaluations, key=lambda row: (math.isnan(row["val_loss"]), row["val_loss"]))


@dataclass
class Arm:
    """Runs that differ in the seed alone."""

    name: str
    config: dict
    runs: dict[int, Run] = field(default_factory=dict)  # by seed

    def best(self, key: str = "val_loss") -> dict:
        """That measure at each run's best evaluation, by seed; runs that did not record it are left out."""
        return {
            seed: run.best[key]
            for seed, run in sorted(self.runs.items())
            if run.best.get(key) is not None
        }


def mean_interval(values) -> tuple[float, float]:
    """Mean (nan of nothing) and the half-width of its 95% interval by Student's t (nan below two values)."""
    values = list(values)
    mean, degrees = statistics.fmean(values) if values else math.nan, len(values) - 1
    if degrees < 1:
        return mean, math.nan
    quantile = T_975[degrees - 1] if degrees <= 30 else 1.96 + 2.5 / degrees
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired(arm: dict[int, float], reference: dict[int, float]) -> list[float]:
    """arm - reference for every seed that both have."""
    return [arm[seed] - reference[seed] for seed in sorted(arm.keys() & reference.keys())]


def read_run(path: Path) -> Run:
    config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    steps: dict[int, dict] = {}
    for row in read_metrics(
        path
    ):  # an evaluation that a signal cut short comes later, in a row of its own
        steps.setdefault(row["step"], {}).update(row)
    rows = [row for row in steps.values() if row.get("val_loss") is not None]
    if not rows:
        raise UserError(
            f"{path}: no evaluation yet in metrics.jsonl; let it reach eval_every={config['eval_every']} steps"
        )
    summary = (
        json.loads((path / "summary.json").read_text()) if (path / "summary.json").is_file() else {}
    )
    known = fixed(config) | {
        "max_steps": config["max_steps"],
        "teacher.path": config.get("teacher", {}).get("path"),
    }
    unread = MAKING if known["teacher.path"] else ()
    known = {key: value for key, value in known.items() if not key.startswith(unread)}
    return Run(path, known, config["seed"], rows, summary)


def find_runs(paths: list[str]) -> list[Run]:
    """The runs at `paths`, or in the folders right below them."""
    found = []
    for name in paths:
        below = sorted(
            Path(name).glob("*/"), key=lambda job: (len(job.name), job.name)
        )  # job 2 before job 10
        here = [
            job
            for job in (Path(name), *below)
            if (job / "config.yaml").is_file() and (job / METRICS).is_file()
        ]
        if not here:
            raise UserError(
                f"{name}: no run there (a folder with config.yaml and metrics.jsonl) nor in its folders"
            )
        found += here
    return [read_run(path) for path in dict.fromkeys(found)]


def find_arms(runs: list[Run]) -> list[Arm]:
    """Groups runs that differ in the seed alone; an arm's name is what sets it apart from the others."""
    arms: dict[str, Arm] = {}
    for run in runs:
        # what only a teacher's targets read cannot set cross-entropy arms apart
        unread = (
            {"seed", "access", "teacher", "loss"} if run.config["loss.name"] == "ce" else {"seed"}
        )
        config = {
            key: value
            for key, value in run.config.items()
            if key.split(".")[0] not in unread or key == "loss.name"
        }
        arm = arms.setdefault(json.dumps(config, sort_keys=True), Arm("", config))
        if (
            arm.runs.setdefault(run.seed, run) is not run
        ):  # a sweep over loss and temperature trains cross-entropy for each
            print(f"{run.path}: left out, it trains what {arm.runs[run.seed].path} does")
    values: dict[str, set] = {}
    for arm in arms.values():
        for key, value in arm.config.items():
            values.setdefault(key, set()).add(json.dumps(value))
    apart = sorted(key for key, found in values.items() if len(found) > 1 and key != "loss.name")
    for arm in arms.values():
        arm.name = " ".join(
            [
                arm.config["loss.name"],
                *(f"{key}={arm.config[key]}" for key in apart if key in arm.config),
            ]
        )
    return list(arms.values())


def rows(arms: list[Arm], reference: Arm) -> list[dict]:
    """One row an arm, numbers unrounded: what table.csv holds and `cells` rounds."""
    table = []
    for arm in arms:
        last = [run.evaluations[-1] for run in arm.runs.values()]
        gaps = paired(arm.best(), reference.best()) if arm is not reference else []
        row = {"arm": arm.name, "seeds": len(arm.runs)}
        row["loss"], row["loss_half"] = mean_interval(arm.best().values())
        row["final"] = mean_interval(each["val_loss"] for each in last)[0]
        row["difference"], row["difference_half"] = mean_interval(gaps)
        row |= {"wins": sum(gap < 0 for gap in gaps), "pairs": len(gaps)}
        row |= {key: mean_interval(arm.best(key).values())[0] for key in MEASURES}
        bounded = any(run.bounded for run in arm.runs.values())
        row["against_teacher"] = (
            "" if math.isnan(row["val_kl"]) else "bound" if bounded else "exact"
        )  # KL and acceptance
        row["tokens"] = last[0]["tokens"]
        row["seconds"] = mean_interval(each.get("seconds", math.nan) for each in last)[0]
        flops = next(iter(arm.runs.values())).summary.get("flops", {})
        table.append(
            row | {f"{model}_flops": flops.get(model, math.nan) for model in ("student", "teacher")}
        )
    return table


def cells(row: dict, reference: Arm) -> dict[str, str]:
    """A row of `rows` as every table prints it, by heading: six about its worth, then what it is like and costs."""

    def number(key: str, form: str) -> str:
        half = row.get(f"{key}_half", math.nan)
        spread = "" if math.isnan(half) else f" ± {half:.3f}"
        bound = BOUNDS.get(key, "") if row["against_teacher"] == "bound" else ""
        return "" if math.isnan(row[key]) else bound + format(row[key], form) + spread

    gap = number("difference", "+.3f")
    found = {
        "arm": row["arm"],
        "seeds": str(row["seeds"]),
        "loss": number("loss", ".3f"),
        f"minus {reference.name}": gap,
    }
    found |= {"better on": f"{row['wins']} of {row['pairs']}" if gap else ""}
    return found | {head: number(key, form) for key, (head, form) in LATER.items()}


def teachers(arms: list[Arm]) -> list[dict]:
    """What the runs' summaries say of their teachers, each teacher and loss once."""
    facts = [
        run.summary["teacher"]
        for arm in arms
        for run in arm.runs.values()
        if run.summary.get("teacher")
    ]
    return list({(each["path"], f"{each['val_loss']:.3f}"): each for each in facts}.values())


def show(lines: list[dict[str, str]], console: Console) -> None:
    """Two tables: what each arm reaches against the reference, and what it costs and how close it is to its teacher."""
    heads = list(lines[0])
    for title, part in (
        (TITLE, heads[:6]),
        ("At that evaluation, and in all", [heads[0], *heads[6:]]),
    ):
        columns = [Column(head, justify="left" if head == "arm" else "right") for head in part]
        drawn = Table(*columns, title=title, title_justify="left")
        for line in lines:
            drawn.add_row(*[line[head] for head in part])
        console.print(drawn)


def markdown(lines: list[dict[str, str]], below: list[str]) -> str:
    """All columns as one GitHub table, to paste."""
    body = [
        list(lines[0]),
        ["---", *["---:"] * (len(lines[0]) - 1)],
        *[line.values() for line in lines],
    ]
    table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in body]
    return "\n".join([TITLE, "", *table, *[text for line in below for text in ("", line)], ""])


def draw_curves(figure, arms: list[Arm]) -> None:
    """Held-out loss, a line a seed, against tokens (and steps, where one step is as many tokens in all) and seconds."""
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key in ((left, "tokens"), (right, "seconds")):
        for place, arm in enumerate(arms):
            for count, run in enumerate(arm.runs.values()):
                x, y = zip(
                    *[(row.get(key, math.nan), row["val_loss"]) for row in run.evaluations],
                    strict=True,
                )
                axes.plot(
                    x,
                    y,
                    color=f"C{place % 10}",
                    label=arm.name if count == 0 else None,
                    linewidth=1.5,
                )
        for teacher in teachers(arms):
            axes.axhline(
                teacher["val_loss"],
                color="black",
                linestyle=":",
                label=f"teacher {teacher['val_loss']:.3f}",
            )
    sizes = {
        row["tokens"] / row["step"]
        for arm in arms
        for run in arm.runs.values()
        for row in run.evaluations
    }
    if len(sizes) == 1:
        size = sizes.pop()
        left.secondary_xaxis("top", functions=(lambda x: x / size, lambda x: x * size)).set_xlabel(
            "steps"
        )
    left.set(xlabel="tokens trained on", ylabel="held-out loss (nats a token)")
    right.set_xlabel("training seconds (evaluations not counted)")
    right.legend(fontsize=8)
    figure.suptitle("Held-out loss, one line a seed")


def draw_bars(figure, arms: list[Arm]) -> None:
    """Best loss an arm, dots for the seeds."""
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        values = list(arm.best().values())
        mean, half = mean_interval(values)
        axes.barh(
            place,
            mean,
            xerr=None if math.isnan(half) else half,
            color=f"C{place % 10}",
            alpha=0.6,
            capsize=3,
        )
        axes.plot(values, [place] * len(values), "k.", markersize=5)
        axes.annotate(
            f" {mean:.3f}", (mean + (0 if math.isnan(half) else half), place), va="center"
        )
    for teacher in teachers(arms):
        axes.axvline(
            teacher["val_loss"],
            color="black",
            linestyle=":",
            label=f"teacher {teacher['val_loss']:.3f}",
        )
        axes.legend(fontsize=8)
    axes.set(
        yticks=range(len(arms)),
        yticklabels=[arm.name for arm in arms],
        xlabel="held-out loss (nats a token)",
    )
    axes.invert_yaxis()
    lowest = [
        *(loss for arm in arms for loss in arm.best().values()),
        *(each["val_loss"] for each in teachers(arms)),
    ]
    axes.set_xlim(0.8 * min(lowest), None)
    axes.set_title(
        "Best held-out loss: bar = mean, line = 95% interval, dots = seeds\n(the axis starts above 0)",
        fontsize=9,
    )


def draw_reliability(figure, arms: list[Arm]) -> None:
    """Accuracy against confidence at the best evaluations, a line an arm; faint bars: the bins' shares of the rows."""
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for place, arm in enumerate(arms):
        if recorded := list(arm.best("val_reliability").values()):
            runs = numpy.array(recorded)  # [seeds, bins, 3], pooled as if the seeds were one run
            share = runs[:, :, 0].mean(0)  # [bins]
            x, y = ((runs[:, :, 1:] * runs[:, :, :1]).mean(0)[share > 0] / share[share > 0, None]).T
            label = f"{arm.name}, ECE {statistics.fmean(arm.best('val_ece').values()):.3f}"
            axes.plot(x, y, "o-", color=f"C{place % 10}", markersize=4, label=label)
            axes.stairs(
                share,
                numpy.linspace(0, 1, len(share) + 1),
                fill=True,
                color=f"C{place % 10}",
                alpha=0.15,
            )
    axes.set(
        xlabel="confidence (of the top token)",
        ylabel="accuracy; bars: share of the rows",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axes.set_title("Reliability, mean over seeds (below the diagonal: overconfident)", fontsize=9)
    axes.legend(fontsize=8)


def plot(arms: list[Arm], out: Path) -> list[str]:
    """Draws every plot that the runs allow; the files' names."""
    plots = {
        "curves.png": (draw_curves, (13, 5)),
        "bars.png": (draw_bars, (9, 0.7 * len(arms) + 1.6)),
    }
    if any(arm.best("val_reliability") for arm in arms):
        plots["reliability.png"] = (draw_reliability, (6, 6))
    for name, (draw, size) in plots.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, arms)
        figure.savefig(out / name, dpi=120)
    return list(plots)


def report(paths: list[str], out: Path, against: str | None = None) -> list[dict]:
    """Prints and writes everything; the table's rows. UserError where `against` is no arm's name."""
    arms, console = find_arms(find_runs(paths)), Console(width=max(110, Console().width))
    named = [arm for arm in arms if arm.name == against]
    if against is not None and not named:
        raise UserError(
            f"--against {against}: no such arm; the arms are: {'; '.join(arm.name for arm in arms)}"
        )
    reference = (named or [arm for arm in arms if arm.config["loss.name"] == "ce"] or arms)[0]
    table = rows(arms, reference)
    lines, line = (
        [cells(row, reference) for row in table],
        "teacher {path}: {size:.2f}M parameters, held-out loss {val_loss:.3f}",
    )
    below = [line.format(size=each["parameters"] / 1e6, **each) for each in teachers(arms)]
    below += [BOUNDED] if any(row["against_teacher"] == "bound" for row in table) else []
    below += (
        ["Fewer than 5 seeds: a demonstration, not a claim."]
        if min(row["seeds"] for row in table) < 5
        else []
    )
    show(lines, console)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "table.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, table[0])
        writer.writeheader()
        writer.writerows(table)
    (out / "table.md").write_text(markdown(lines, below), encoding="utf-8")
    written = plot(arms, out)
    runs = [run for arm in arms for run in arm.runs.values()]
    if bare := sum(not run.best.get("val_reliability") for run in runs):
        below.append(
            f"reliability.png: {bare} of {len(runs)} runs left out, recorded without val_reliability"
        )
    console.print(*below, f"written: {out}/table.csv, table.md, {', '.join(written)}", sep="\n")
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
