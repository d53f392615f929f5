"""What a run leaves behind and shows while it runs: metrics.jsonl, W&B beside it, the progress line."""

import json
import os
import threading
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from engine import check_choice, first_line
from engine.checkpoint import report_os_errors, write_atomic

METRICS = "metrics.jsonl"
MAKE_ROOM = "make room and run again with this run_dir, which goes on from its last checkpoint"


@dataclass
class WandbConfig:
    """Weights & Biases, an extra beside metrics.jsonl that can neither stop nor stall training."""

    mode: str = "disabled"  # disabled | offline | online
    project: str = "nanodistill"  # the W&B project
    group: str | None = None  # runs that W&B shows together
    name: str | None = None  # unset: the run directory's name
    tags: list[str] = field(default_factory=list)  # labels to filter by

    def __post_init__(self):
        check_choice("wandb", self.mode, ("disabled", "offline", "online"))


def bounded(call, seconds: float):
    """`call()` in a thread that is waited for at most `seconds`; TimeoutError past that, its own error otherwise."""
    answer = Future()

    def body():
        try:
            answer.set_result(call())
        except BaseException as problem:  # handed to the caller, whatever it is
            answer.set_exception(problem)

    threading.Thread(target=body, daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return answer.result()


class RunLog:
    """Appends rows to run_dir/metrics.jsonl, each flushed, and mirrors them to W&B where asked."""

    def __init__(
        self,
        run_dir: Path,
        wandb: WandbConfig,
        config: dict,
        resume_step: int,
        patience: float = 20.0,
    ):
        self.run_dir, self.patience, self.wandb = run_dir, patience, None
        kept = [
            row for row in read_metrics(run_dir) if row["step"] <= resume_step
        ]  # later steps are taken, and logged, again
        with self.writing():
            write_atomic(run_dir / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
            self.stream = open(run_dir / METRICS, "a", buffering=1)  # noqa: SIM115 (closed by close)
        modes = {"online": ["online", "offline"], "offline": ["offline"], "disabled": []}[
            wandb.mode
        ]
        if wandb.mode == "online" and not has_key():  # asking W&B itself would prompt
            print("warning: wandb=online without a key (wandb login): going on offline", flush=True)
            modes.remove("online")
        for mode in modes:
            start = partial(self.start_wandb, mode, wandb, config)
            self.wandb = self.wandb or self.ask(
                start, f"{mode} did not start ({{}}): training goes on", 5.0
            )

    def writing(self):
        return report_os_errors(f"run_dir={self.run_dir}", MAKE_ROOM, METRICS)

    def ask(self, call, trouble: str, more: float = 0.0):
        """What W&B answers to `call`; where it raises anything, or takes longer than patience and `more` seconds, a warning."""
        try:
            return bounded(call, self.patience + more)
        except Exception as error:  # metrics.jsonl is the record
            print(f"warning: wandb {trouble.format(first_line(error))}", flush=True)
            self.wandb = None

    def start_wandb(self, mode: str, options: WandbConfig, config: dict):
        import wandb

        settings = wandb.Settings(init_timeout=self.patience, silent=True, console="off")
        name, where = (
            options.name or self.run_dir.name,
            {"dir": self.run_dir, "reinit": "create_new", "settings": settings},
        )
        shown = {
            "project": options.project,
            "group": options.group,
            "name": name,
            "tags": options.tags,
        }
        return wandb.init(mode=mode, config=config, **shown, **where)

    def row(self, row: dict) -> None:
        with self.writing():
            self.stream.write(json.dumps(row) + "\n")
        if self.wandb is not None:
            scalars = {
                key: value for key, value in row.items() if not isinstance(value, list)
            }  # val_reliability stays here
            self.ask(
                lambda: self.wandb.log(scalars, step=row["step"]),
                "stopped ({}): metrics.jsonl goes on",
            )

    def close(self) -> None:
        with self.writing():
            self.stream.close()
        if self.wandb is not None:
            self.ask(self.finish_wandb, "did not finish ({}): `wandb sync` can send it later")

    def finish_wandb(self) -> None:
        """Ends the W&B run with its best val_loss as the summary: a plain number (W&B's own summary="min" makes a dict)."""
        losses = [
            row["val_loss"] for row in read_metrics(self.run_dir) if row.get("val_loss") is not None
        ]
        if losses:
            self.wandb.log(
                {}, commit=True
            )  # the last row, still held back, would overwrite the summary
            self.wandb.summary["val_loss"] = min(losses)
        self.wandb.finish()


def has_key() -> bool:
    """Whether a W&B key is set, in the environment or by `wandb login` in ~/.netrc."""
    from requests.utils import get_netrc_auth

    return bool(
        os.environ.get("WANDB_API_KEY")
        or get_netrc_auth(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    )


def read_metrics(run_dir: Path) -> list[dict]:
    """The rows of run_dir/metrics.jsonl, if there; a last line cut short by a kill is left out."""
    rows, file = [], run_dir / METRICS
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
