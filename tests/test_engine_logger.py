"""metrics.jsonl survives kills and full disks, and W&B can neither stop nor stall a run."""

import time
from types import SimpleNamespace

import pytest
import wandb

from engine.logger import METRICS, WANDB_ID, RunLog, WandbConfig, read_metrics

ROW = {"step": 1, "loss": 1.0}


def open_log(run_dir, mode="disabled", resume_step=0):
    return RunLog(run_dir, WandbConfig(mode), {}, resume_step)


@pytest.mark.parametrize("resume_step", [1, 2, 3])
def test_rows_are_flushed_and_those_of_steps_taken_again_replaced(tmp_path, resume_step):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.row({"step": step, "try": 1})
    assert len(read_metrics(tmp_path)) == 3  # before the close that a kill prevents
    log.close()
    with open(tmp_path / METRICS, "a") as stream:
        stream.write('{"step": 4, "tr')

    log = open_log(tmp_path, resume_step=resume_step)
    log.row({"step": resume_step + 1, "try": 2})
    log.close()
    rows = [(row["step"], row["try"]) for row in read_metrics(tmp_path)]
    kept = [(step + 1, 1) for step in range(resume_step)]
    assert rows == [*kept, (resume_step + 1, 2)]


def test_wandb_that_does_not_start_is_tried_offline_and_then_left_out(
    tmp_path, monkeypatch, capsys
):
    modes = []

    def fail(mode, settings, **options):
        assert settings.init_timeout == settings.finish_timeout == 20
        modes.append(mode)
        raise TimeoutError(f"no {mode}")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "init", fail)
    log = open_log(tmp_path, "online")
    log.row(ROW)
    log.close()
    assert modes == ["online", "offline"]
    assert read_metrics(tmp_path) == [ROW]
    warnings = capsys.readouterr().out.splitlines()
    assert warnings[0] == "warning: wandb online did not start (no online): training goes on"
    assert len(warnings) == 2


def test_wandb_without_a_key_goes_offline_instead_of_asking_for_one(tmp_path, monkeypatch, capsys):
    modes = []
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(wandb, "init", lambda mode, **options: modes.append(mode))
    open_log(tmp_path, "online").close()
    assert modes == ["offline"]
    assert "wandb=online without a key (wandb login)" in capsys.readouterr().out


class FakeWandb:
    """Fails from its second call of `log` or at `finish`."""

    starting_step = 0

    def __init__(self):
        self.rows = []
        self.summary = {}

    def log(self, row, **options):
        self.rows.append(row)
        if len(self.rows) == 2:
            raise RuntimeError("boom\nmore")

    def finish(self):
        raise RuntimeError("no network")


def test_wandb_gets_scalars_until_it_breaks(tmp_path, capsys):
    log = open_log(tmp_path)
    log.wandb = FakeWandb()
    log.close()
    assert "wandb did not finish (no network): `wandb sync` can" in capsys.readouterr().out

    log = open_log(tmp_path)
    fake = FakeWandb()
    log.wandb = fake
    for step in (1, 2, 3):
        log.row({"step": step, "val_kl": None, "val_reliability": [[0.5, 0, 1]]})
    log.close()
    assert fake.rows == [{"step": step, "val_kl": None} for step in (1, 2)]
    warning = "warning: wandb stopped (boom): metrics.jsonl goes on\n"
    assert capsys.readouterr().out == warning
    assert len(read_metrics(tmp_path)) == 3


def wandb_ids(run_dir):
    folders = sorted(run_dir.glob("wandb/offline-run-*"))
    return [folder.name.split("-")[-1] for folder in folders]


def test_a_continued_run_is_the_same_wandb_run_and_a_finished_one_none(tmp_path, monkeypatch):
    open_log(tmp_path, "offline").close()
    (first,) = wandb_ids(tmp_path)
    RunLog(tmp_path, WandbConfig("offline"), {}, 5, finished=True).close()
    assert wandb_ids(tmp_path) == [first]
    time.sleep(1.1)  # W&B names its folders by the second
    open_log(tmp_path, "offline", resume_step=5).close()
    assert wandb_ids(tmp_path) == [first, first]
    assert (tmp_path / WANDB_ID).read_text() == first


@pytest.mark.parametrize(
    "resume_step, environment, given",
    [
        (5, {}, "kept"),
        (0, {}, None),
        (5, {"WANDB_RUN_ID": "an agent's"}, None),
    ],
)
def test_which_wandb_run_is_gone_on_with(tmp_path, monkeypatch, resume_step, environment, given):
    """None: W&B takes the id of the environment, or a new one."""
    starts = []

    def init(**options):
        starts.append((options["id"], options["resume"]))
        return SimpleNamespace(id="begun")

    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(wandb, "init", init)
    (tmp_path / WANDB_ID).write_text("kept")
    open_log(tmp_path, "offline", resume_step)
    assert starts == [(given, "allow")]
    assert (tmp_path / WANDB_ID).read_text() == "begun"


def test_wandb_gets_no_step_twice_but_an_evaluation_that_came_late(tmp_path):
    calls = []

    def record(row, step):
        calls.append((row, step))

    log = open_log(tmp_path, resume_step=5)
    log.wandb = SimpleNamespace(starting_step=8, log=record)
    log.row({"step": 5, "val_loss": 2.0})  # the signal that stopped the run cut it short
    for step in (6, 7, 8):
        log.row({"step": step, "loss": 1.0})
    assert calls == [
        ({"step": 5, "val_loss": 2.0}, 8),
        ({"step": 8, "loss": 1.0}, 8),
    ]
    assert len(read_metrics(tmp_path)) == 4


def test_a_late_evaluation_takes_its_row_back(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2):
        log.row({"step": step, "loss": 3.0})
    assert log.take_back(2) == {"step": 2, "loss": 3.0}
    assert log.take_back(2) == {"step": 2}
    log.row({"step": 2, "loss": 3.0, "val_loss": 2.0})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["val_loss"] == 2.0


def test_jobs_of_one_process_are_separate_runs_whose_summary_is_the_best(tmp_path):
    for job in ("0", "1"):
        (tmp_path / job).mkdir()
        log = open_log(tmp_path / job, "offline")
        assert log.wandb.name == job
        for step, loss in ((1, 3.0), (2, 1.5), (3, 2.5)):
            log.row({"step": step, "val_loss": loss})
        log.close()
    for job in ("0", "1"):
        (file,) = tmp_path.glob(f"{job}/wandb/offline-run-*/run-*.wandb")
        deadline = time.monotonic() + 20
        last_value = b""
        while b"1.5" not in last_value:  # W&B's own process writes it
            assert time.monotonic() < deadline
            *_, last_record = file.read_bytes().split(b"val_loss")
            last_value = last_record[:8]


def test_wandb_is_given_the_runs_name_group_tags_and_config(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options))
    options = {"group": "of runs", "name": "one", "tags": ["t"]}
    wandb_config = WandbConfig("offline", **options)
    RunLog(tmp_path, wandb_config, {"seed": 1}, 0).close()
    options["config"] = {"seed": 1}
    assert given.items() >= options.items()
