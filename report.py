"""Runs to tables, intervals and plots.

python report.py RUN...                     # folders; a sweep's folder stands for its jobs
python report.py runs/worth --out results   # where table.csv, curves.png and bars.png go (default: the first folder)

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

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from conf.cli import one_line
from engine import UserError
from engine.logger import read_metrics
from engine.run_dir import fixed

# 97.5% quantiles of Student's t for 1..30 degrees of freedom; 1.96 and a little beyond (error below .005 there).
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T_975 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
MEASURES = {"val_kl": "KL", "val_acceptance": "acceptance", "val_agreement": "agreement", "val_ece": "ECE"}


@dataclass
class Run:
    """One finished or running run, as its directory tells it."""

    path: Path
    config: dict  # dotted keys
    seed: int
    evaluations: list[dict]  # rows of metrics.jsonl with val_loss
    summary: dict

    @property
    def best(self) -> dict:
        return min(self.evaluations, key=lambda row: row["val_loss"])


@dataclass
class Arm:
    """Runs that differ in the seed alone."""

    name: str
    config: dict
    runs: dict[int, Run] = field(default_factory=dict)  # by seed

    def best(self, key: str = "val_loss") -> dict[int, float]:
        return {seed: run.best[key] for seed, run in sorted(self.runs.items()) if run.best.get(key) is not None}


def mean_interval(values) -> tuple[float, float]:
    """Mean and the half-width of its 95% t interval (nan for a single value).

    Source: Student's t with n-1 degrees of freedom.
    """
    values = list(values)
    if len(values) < 2:
        return values[0], math.nan
    degrees = len(values) - 1
    quantile = T_975[degrees - 1] if degrees <= 30 else 1.96 + 2.5 / degrees
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired(arm: dict[int, float], reference: dict[int, float]) -> list[float]:
    """arm - reference for every seed that both have."""
    return [arm[seed] - reference[seed] for seed in sorted(arm.keys() & reference.keys())]


def read_run(path: Path) -> Run:
    config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    rows = [row for row in read_metrics(path) if row.get("val_loss") is not None]
    if not rows:
        raise UserError(f"{path}: no evaluation yet in metrics.jsonl; let it reach eval_every={config['eval_every']} steps")
    summary = json.loads((path / "summary.json").read_text()) if (path / "summary.json").is_file() else {}
    return Run(path, fixed(config) | {"max_steps": config["max_steps"]}, config["seed"], rows, summary)


def find_runs(paths: list[str]) -> list[Run]:
    """The runs at `paths`, or in the folders right below them."""
    found = []
    for name in paths:
        path = Path(name)
        below = [file.parent for file in path.glob("*/config.yaml") if (file.parent / "metrics.jsonl").is_file()]
        below.sort(key=lambda job: (len(job.name), job.name))  # job 2 before job 10
        here = [path] if (path / "metrics.jsonl").is_file() else below
        if not here:
            raise UserError(f"{name}: no run there (a folder with config.yaml and metrics.jsonl) nor in its folders")
        found += here
    return [read_run(path) for path in dict.fromkeys(found)]


def find_arms(runs: list[Run]) -> list[Arm]:
    """Groups runs that differ in the seed alone; an arm's name is what sets it apart from the others."""
    arms: dict[str, Arm] = {}
    for run in runs:
        config = {key: value for key, value in run.config.items() if key != "seed"}
        if config["loss.name"] == "ce":  # what only a teacher's targets read cannot set cross-entropy arms apart
            config = {key: value for key, value in config.items() if key.split(".")[0] not in ("access", "teacher")}
            config = {key: value for key, value in config.items() if not key.startswith("loss.") or key == "loss.name"}
        arm = arms.setdefault(json.dumps(config, sort_keys=True), Arm("", config))
        if run.seed in arm.runs:  # a sweep over loss and temperature trains cross-entropy once for each temperature
            print(f"{run.path}: left out, it trains what {arm.runs[run.seed].path} does")
            continue
        arm.runs[run.seed] = run
    found = list(arms.values())
    all_keys = sorted({key for arm in found for key in arm.config})
    apart = [key for key in all_keys if len({json.dumps(arm.config.get(key)) for arm in found if key in arm.config}) > 1]
    for arm in found:
        rest = [f"{key}={arm.config[key]}" for key in apart if key in arm.config and key != "loss.name"]
        arm.name = " ".join([arm.config["loss.name"], *rest])
    return found


def rows(arms: list[Arm], reference: Arm) -> list[dict]:
    """One row an arm, numbers unrounded: what table.csv holds and the printed table rounds."""
    table = []
    for arm in arms:
        mean, half = mean_interval(arm.best().values())
        gaps = paired(arm.best(), reference.best()) if arm is not reference else []
        gap, gap_half = mean_interval(gaps) if gaps else (math.nan, math.nan)
        final = statistics.fmean(run.evaluations[-1]["val_loss"] for run in arm.runs.values())
        first = next(iter(arm.runs.values()))
        flops = first.summary.get("flops", {})
        row = {"arm": arm.name, "seeds": len(arm.runs), "loss": mean, "loss_half": half, "final": final}
        row |= {"difference": gap, "difference_half": gap_half, "wins": sum(value < 0 for value in gaps), "pairs": len(gaps)}
        for key in MEASURES:
            values = arm.best(key).values()
            row[key] = statistics.fmean(values) if values else math.nan
        row |= {"tokens": first.evaluations[-1]["tokens"], "student_flops": flops.get("student", math.nan)}
        table.append(row | {"teacher_flops": flops.get("teacher", math.nan)})
    return table


def show(table: list[dict], arms: list[Arm], reference: Arm, console: Console) -> None:
    """Two tables: what each arm reaches against the reference, and what it costs and how close it is to its teacher."""

    def number(value: float, form: str, half: float = math.nan) -> str:
        spread = "" if math.isnan(half) else f" ± {half:.3f}"
        return "" if math.isnan(value) else format(value, form) + spread

    worth = Table(title="Held-out loss, nats a token, at each run's best evaluation (95% intervals)", title_justify="left")
    for head in ("arm", "seeds", "loss", f"minus {reference.name}", "better on", "at the end"):
        worth.add_column(head, justify="left" if head == "arm" else "right")
    cost = Table(title="At that evaluation, and in all", title_justify="left")
    for head in ("arm", *MEASURES.values(), "tokens", "FLOPs", "teacher's FLOPs"):
        cost.add_column(head, justify="left" if head == "arm" else "right")
    for row in table:
        gap = number(row["difference"], "+.3f", row["difference_half"])
        wins = f"{row['wins']} of {row['pairs']}" if gap else ""
        worth.add_row(
            row["arm"], str(row["seeds"]), number(row["loss"], ".3f", row["loss_half"]), gap, wins, f"{row['final']:.3f}"
        )
        flops = [number(row[key], ".1e") for key in ("student_flops", "teacher_flops")]
        cost.add_row(row["arm"], *[number(row[key], ".3f") for key in MEASURES], f"{row['tokens']:,}", *flops)
    console.print(worth, cost)
    for teacher in {
        json.dumps(run.summary["teacher"]) for arm in arms for run in arm.runs.values() if run.summary.get("teacher")
    }:
        facts = json.loads(teacher)
        console.print(
            f"teacher {facts['path']}: {facts['parameters'] / 1e6:.2f}M parameters, held-out loss {facts['val_loss']:.3f}"
        )
    if min(row["seeds"] for row in table) < 5:
        console.print("Fewer than 5 seeds: a demonstration, not a claim.")


def plot(arms: list[Arm], out: Path) -> None:
    """curves.png: held-out loss against tokens, a line a seed; bars.png: best loss an arm, dots for the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = plt.get_cmap("tab10").colors
    teachers = {run.summary["teacher"]["val_loss"] for arm in arms for run in arm.runs.values() if run.summary.get("teacher")}
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for place, arm in enumerate(arms):
        for count, run in enumerate(arm.runs.values()):
            x, y = zip(*[(row["tokens"], row["val_loss"]) for row in run.evaluations], strict=True)
            axes.plot(x, y, color=colours[place % 10], label=arm.name if count == 0 else None, linewidth=1.5)
    for loss in teachers:
        axes.axhline(loss, color="black", linestyle=":", label=f"teacher {loss:.3f}")
    axes.set(xlabel="tokens trained on", ylabel="held-out loss (nats a token)", title="Held-out loss, one line a seed")
    axes.legend(fontsize=8)
    figure.savefig(out / "curves.png", dpi=120)
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(9, 0.7 * len(arms) + 1.6), layout="constrained")
    for place, arm in enumerate(arms):
        values = list(arm.best().values())
        mean, half = mean_interval(values)
        axes.barh(place, mean, xerr=None if math.isnan(half) else half, color=colours[place % 10], alpha=0.6, capsize=3)
        axes.plot(values, [place] * len(values), "k.", markersize=5)
        axes.annotate(f" {mean:.3f}", (mean + (0 if math.isnan(half) else half), place), va="center")
    for loss in teachers:
        axes.axvline(loss, color="black", linestyle=":", label=f"teacher {loss:.3f}")
    axes.set(yticks=range(len(arms)), yticklabels=[arm.name for arm in arms], xlabel="held-out loss (nats a token)")
    axes.invert_yaxis()
    axes.set_xlim(0.8 * min(min(arm.best().values()) for arm in arms), None)
    axes.set_title(
        "Best held-out loss: bar = mean, line = 95% interval, dots = seeds\n(the axis does not start at 0)", fontsize=9
    )
    if teachers:
        axes.legend(fontsize=8)
    figure.savefig(out / "bars.png", dpi=120)
    plt.close(figure)


def report(paths: list[str], out: Path, against: str | None = None, console: Console | None = None) -> list[dict]:
    console = console or Console(width=max(110, Console().width))
    arms = find_arms(find_runs(paths))
    names = [arm.name for arm in arms]
    if against is not None and against not in names:
        raise UserError(f"--against {against}: no such arm; the arms are: {'; '.join(names)}")
    plain = [arm for arm in arms if arm.config["loss.name"] == "ce"]
    reference = next((arm for arm in arms if arm.name == against), (plain or arms)[0])
    table = rows(arms, reference)
    show(table, arms, reference, console)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "table.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, table[0])
        writer.writeheader()
        writer.writerows(table)
    plot(arms, out)
    console.print(f"written: {out}/table.csv, curves.png, bars.png")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", help="name of the reference arm, as the table prints it")
    options = parser.parse_args()
    with one_line():
        report(options.runs, options.out or Path(options.runs[0]), options.against)
