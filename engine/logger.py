"""What a run records: a line of metrics.jsonl a step, and the same in Weights & Biases if asked."""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from engine import check_choice, first_line
from engine.checkpoint import name_in_errors, write_atomic

METRICS = "metrics.jsonl"
WANDB_ID = "wandb-id.txt"  # beside it: the W&B run that a continuation goes on with
WANDB_TIMEOUT = 20.0  # seconds that W&B may take to start, and to send the rest at the end


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


class RunLog:
    """Appends rows to run_dir/metrics.jsonl, each flushed, and sends them to W&B if asked.

    config: what W&B shows as the run's configuration.
    resume_step: rows of later steps are dropped, because those steps are taken again.
    finished: there is nothing left to log, so W&B is left alone.
    """

    def __init__(
        self,
        run_dir: Path,
        wandb: WandbConfig,
        config: dict,
        resume_step: int,
        finished: bool = False,
    ):
        self.run_dir = run_dir
        self.resume_step = resume_step
        rows = [row for row in read_metrics(run_dir) if row["step"] <= resume_step]
        self.start_file(rows)

        self.wandb = None
        mode = "disabled" if finished else wandb.mode
        if mode == "online" and not has_wandb_key():  # wandb.init would ask for one and wait
            print("warning: wandb=online without a key (wandb login): going on offline", flush=True)
            mode = "offline"
        if mode == "online":
            self.start_wandb("online", wandb, config)
        if mode != "disabled" and self.wandb is None:
            self.start_wandb("offline", wandb, config)

    def start_file(self, rows: list[dict]) -> None:
        """Replaces what metrics.jsonl holds by `rows`, and opens it for more."""
        file = self.run_dir / METRICS
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
        self.stream = open(file, "a", buffering=1)  # noqa: SIM115

    def take_back(self, step: int) -> dict:
        """Removes the last row, where it is that of `step`, and returns it, to be logged anew."""
        rows = read_metrics(self.run_dir)
        if not rows or rows[-1]["step"] != step:
            return {"step": step}
        self.stream.close()
        self.start_file(rows[:-1])
        return rows[-1]

    def start_wandb(self, mode: str, options: WandbConfig, config: dict) -> None:
        with self.warn_of_wandb_errors(f"{mode} did not start", "training goes on"):
            import wandb

            settings = wandb.Settings(
                init_timeout=WANDB_TIMEOUT,
                finish_timeout=WANDB_TIMEOUT,
                silent=True,
                console="off",
            )
            self.wandb = wandb.init(
                mode=mode,
                id=self.recorded_wandb_id(),
                resume="allow",
                project=options.project,
                group=options.group,
                name=options.name or self.run_dir.name,
                tags=options.tags,
                config=config,
                dir=self.run_dir,
                reinit="create_new",
                settings=settings,
            )
            write_atomic(self.run_dir / WANDB_ID, self.wandb.id)

    def recorded_wandb_id(self) -> str | None:
        """The W&B run of the run that is continued; None: a new one, or what an agent has set."""
        file = self.run_dir / WANDB_ID
        if self.resume_step == 0 or "WANDB_RUN_ID" in os.environ or not file.is_file():
            return None
        return file.read_text()

    @contextmanager
    def warn_of_wandb_errors(self, trouble: str, consequence: str):
        """Any error of W&B becomes a warning and ends its use: metrics.jsonl is the record."""
        try:
            yield
        except Exception as error:
            print(f"warning: wandb {trouble} ({first_line(error)}): {consequence}", flush=True)
            self.wandb = None

    def row(self, row: dict) -> None:
        """Logs one step's metrics; W&B gets the scalars (not val_reliability)."""
        with name_in_errors(self.run_dir / METRICS):
            self.stream.write(json.dumps(row) + "\n")
        if self.wandb is None:
            return
        scalars = {key: value for key, value in row.items() if not isinstance(value, list)}
        with self.warn_of_wandb_errors("stopped", "metrics.jsonl goes on"):
            # W&B takes no step twice. It has the rows of the steps that are taken again, which are
            # the same; but not the evaluation of the step that this run was taken up at.
            next_step = self.wandb.starting_step
            if row["step"] >= next_step or row["step"] == self.resume_step:
                self.wandb.log(scalars, step=max(row["step"], next_step))

    def close(self) -> None:
        """Closes both; W&B's summary shows the run's lowest val_loss."""
        with name_in_errors(self.run_dir / METRICS):
            self.stream.close()
        if self.wandb is None:
            return
        rows = read_metrics(self.run_dir)
        losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
        with self.warn_of_wandb_errors("did not finish", "`wandb sync` can send it later"):
            if losses:
                # W&B holds the last row back, and sent after the summary it would overwrite it
                self.wandb.log({}, commit=True)
                self.wandb.summary["val_loss"] = min(losses)
            self.wandb.finish()


def has_wandb_key() -> bool:
    """Whether a W&B key is set, in the environment or by `wandb login` in ~/.netrc."""
    from requests.utils import get_netrc_auth

    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(server))


def read_metrics(run_dir: Path) -> list[dict]:
    """The rows of run_dir/metrics.jsonl, if there; a last line cut short by a kill is left out."""
    file = run_dir / METRICS
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
