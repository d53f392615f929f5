"""The W&B sweep files: well formed, and every run of theirs is one that train.py takes, as W&B's own agent would start it.

wandb 0.31 holds no schema of sweep files: it is in the package `sweeps` (wandb[sweeps], not a dependency), else on the server,
which only warns. `problems` is the part of it that these files use, stricter where a misspelling would pass.
"""

import itertools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from wandb import wandb_agent
from wandb.apis.public.sweeps import _validate_config_and_fill_distribution
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.launch.sweeps.utils import load_sweep_config

from conf.schema import Config
from engine import cli
from engine.logger import RunLog, WandbConfig

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "conf/sweep").glob("*.yaml"))
SWEEPS = {file.stem: load_sweep_config(str(file)) for file in FILES}
TOP = {"program", "project", "name", "method", "metric", "parameters", "early_terminate", "command"}
MACROS = {"${env}", "${interpreter}", "${program}", "${args_no_hyphens}"}
DATA = ["data=text", "data.path=corpus", "data.tokenizer=bytes", "data.cache_dir=tokens"]
SHAPE = ["model.n_layer=1", "model.n_head=2", "model.n_embd=16"]
SMALL = [
    *DATA,
    *SHAPE,
    "model.block_size=16",
    "batch_size=4",
    "max_steps=4",
    "eval_every=1",
    "eval_tokens=64",
]
TINY = [*SMALL, *(f"teacher.{word}" for word in SHAPE), "teacher.max_steps=2", "access.k=4"]


def problems(sweep: dict) -> list[str]:
    """What W&B would warn of in a sweep file (and go on), and what would be no sweep of this project."""
    found = [f"{key}: no such key" for key in sweep.keys() - TOP]
    found += [f"{key}: is missing" for key in TOP - {"early_terminate"} - sweep.keys()]
    if sweep.get("method") not in ("grid", "random", "bayes"):
        found.append(f"method={sweep.get('method')}")
    metric, stop = sweep.get("metric") or {}, sweep.get("early_terminate")
    if metric.keys() != {"name", "goal"} or metric["goal"] not in ("minimize", "maximize"):
        found.append(f"metric={metric}")
    if stop is not None and not (
        stop.get("type") == "hyperband"
        and stop.keys() <= {"type", "min_iter", "eta"}
        and type(stop.get("min_iter")) is int
        and stop["min_iter"] >= 1
        and stop.get("eta", 3) > 1
    ):
        found.append(f"early_terminate={stop}")
    for name, parameter in (sweep.get("parameters") or {}).items():
        values = parameter.get("values")
        if parameter.keys() != {"values"} or not isinstance(values, list) or not values:
            found.append(f"{name}={parameter}")
        elif len({type(value) for value in values}) > 1 or len(set(values)) < len(values):
            found.append(f"{name}={values}: mixed or repeated")
    words = sweep.get("command") or []
    found += [
        f"{word}: no such macro"
        for word in words
        if word[:2] == "${" and word[-1] == "}" and word not in MACROS
    ]
    found += [f"{word}: is missing" for word in MACROS - set(words)]
    return found


def points(sweep: dict) -> list[dict]:
    """The grid, in W&B's order."""
    names = list(sweep["parameters"])
    return [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(sweep["parameters"][name]["values"] for name in names))
    ]


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """start(sweep, run_id, point): the command line and environment of one run, from W&B's agent; one agent for all of them."""
    started, agents = [], {}

    class Recorder:
        def __init__(self, command, env, forward_signals):
            started.append((command, env))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_agent, "AgentProcess", Recorder)
    for name in (
        "WANDB_RUN_ID",
        "WANDB_SWEEP_PARAM_PATH",
        "WANDB_DIR",
    ):  # the agent sets them in os.environ
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SWEEP_ID", "swept")

    def start(sweep: dict, run_id: str, point: dict) -> tuple[list[str], dict]:
        if id(sweep) not in agents:
            agents[id(sweep)] = wandb_agent.Agent(api=None, queue=None, sweep_id="swept")
            agents[id(sweep)]._sweep_command = list(sweep["command"])
        args = {name: {"value": value} for name, value in point.items()}
        agents[id(sweep)]._command_run(
            {"type": "run", "run_id": run_id, "program": sweep["program"], "args": args}
        )
        return started[-1]

    return start


def configured(command: list[str], env: dict, monkeypatch) -> Config:
    """What train.py would run with, through its own door."""
    assert command[:3] == ["/usr/bin/env", "python", "train.py"]
    seen = []
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.setenv(name, env[name])
    monkeypatch.setattr(sys, "argv", command[2:])
    cli.main("train", seen.append, Config)
    return seen[0]


def value_of(config, key: str):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def as_json(point: dict) -> dict:
    """As W&B's server sends a point: it makes 2.0 a 2."""
    return {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in point.items()
    }


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_file_is_what_wandb_takes(name):
    assert problems(SWEEPS[name]) == []
    assert _validate_config_and_fill_distribution(SWEEPS[name]) == SWEEPS[name]
    assert SWEEPS[name]["metric"] == {"name": "val_loss", "goal": "minimize"}
    text = (ROOT / f"conf/sweep/{name}.yaml").read_text()
    assert (
        f"wandb sweep conf/sweep/{name}.yaml" in text
        and f"wandb.group={name}" in SWEEPS[name]["command"]
    )


def test_the_grids_are_the_ones_promised():
    tails = {"ghost", "truncate", "renormalize", "renormalize_both", "smooth"}
    assert {
        (point["loss.temperature"], point["loss.tail"])
        for point in points(SWEEPS["temperature_tail"])
    } == set(itertools.product((1.0, 2.0, 4.0), tails))
    assert (
        len(points(SWEEPS["temperature_tail"])) == 15 and len(points(SWEEPS["lr_kl_weight"])) == 20
    )
    rates = SWEEPS["lr_kl_weight"]["parameters"]["optim.lr"]["values"]
    assert all(3 <= high / low < 3.4 for low, high in itertools.pairwise(rates))


@pytest.mark.parametrize("name", SWEEPS)
def test_every_point_is_a_run_that_train_takes(name, agent, monkeypatch):
    sweep, places, names = SWEEPS[name], set(), set()
    for place, point in enumerate(points(sweep)):
        command, env = agent(sweep, f"run{place}", as_json(point) if place % 2 else point)
        config = configured(command, env, monkeypatch)
        for key, value in point.items():
            assert value_of(config, key) == value and type(value_of(config, key)) is type(value), (
                key
            )
        assert (config.wandb.mode, config.wandb.group, config.baseline) == ("online", name, "off")
        assert config.run_dir == f"runs/sweep-swept/run{place}"
        places.add(config.run_dir)
        names.add(config.wandb.name)
    assert len(places) == len(names) == len(points(sweep)), "two runs share a run_dir or a name"


def test_hyperband_counts_evaluations(agent, monkeypatch):
    sweep = SWEEPS["lr_kl_weight"]
    config = configured(*agent(sweep, "run", points(sweep)[0]), monkeypatch)
    assert 2 * sweep["early_terminate"]["min_iter"] == config.max_steps // config.eval_every


def test_values_as_python_writes_them(agent, monkeypatch):
    sweep = SWEEPS["lr_kl_weight"]
    command, env = agent(
        sweep, "run", {"optim.lr": 0.00001, "micro_batch_size": None, "max_steps": 7}
    )
    assert "optim.lr=1e-05" in command and "micro_batch_size=None" in command
    command.append(
        "max_steps=7"
    )  # a later word wins: the file's own max_steps stands behind the parameters
    config = configured(command, env, monkeypatch)
    assert (config.optim.lr, config.micro_batch_size, config.max_steps) == (1e-5, None, 7)


BROKEN = {
    "metod": ("method: grid", "metod: grid"),
    "method=gird": ("method: grid", "method: gird"),
    "metric=": ("goal: minimize", "goal: minimise"),
    "early_terminate=": ("min_iter", "min_iters"),
    "optim.lr=": ("optim.lr: {values:", "optim.lr: {value:"),
    "${args_no_hyphen}: no such macro": ("${args_no_hyphens}", "${args_no_hyphen}"),
    "mixed or repeated": ("3.0e-4,", "3e-4,"),  # a string to YAML
}


@pytest.mark.parametrize("problem", BROKEN)
def test_broken_sweep_files_are_found(problem):
    text = (ROOT / "conf/sweep/lr_kl_weight.yaml").read_text()
    good, bad = BROKEN[problem]
    lines = [
        line if line.startswith("#") else line.replace(good, bad) for line in text.splitlines()
    ]
    assert any(problem in each for each in problems(yaml.safe_load("\n".join(lines))))


@pytest.mark.parametrize(
    "point, words, line",
    [
        ({"optim.lrr": 0.1}, [], "optim.lrr=0.1: no such key; did you mean optim.lr?"),
        ({"loss.tail": "gost"}, [], "loss.tail is one of ghost"),
        ({"loss.kl_weight": "high"}, [], "loss.kl_weight takes a number"),
        ({"seed": 1}, ["-m"], "under wandb agent"),
    ],
)
def test_broken_points_are_one_line(point, words, line, agent, monkeypatch, capsys):
    command, env = agent(SWEEPS["temperature_tail"], "run", point)
    with pytest.raises(SystemExit) as caught:
        configured(command + words, env, monkeypatch)
    assert caught.value.code == 2 and line in capsys.readouterr().err


def records(run_dir: Path) -> list[Record]:
    """What W&B's offline file of a run holds. The file: 7 bytes, then blocks of 32 KiB of records [crc, length, kind]."""
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    data, at, part, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(part))
            part = b""
    return found


def last_update(record_list, kind: str) -> dict:
    """The last value of every key that `summary` or `run.config` records set."""
    merged = {}
    for record in record_list:
        message = getattr(record, kind) if record.HasField(kind) else None
        for item in (
            getattr(message.config if kind == "run" else message, "update", ()) if message else ()
        ):
            merged[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return merged


@pytest.fixture
def train(tmp_path):
    """train((command, env), ...): runs all commands at once in tmp_path, beside a small corpus; what they said."""
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    (tmp_path / "corpus").mkdir()
    for place in range(3):
        (tmp_path / f"corpus/{place}.txt").write_text((ROOT / "engine/ranks.py").read_text()[:1500])

    def run(*jobs: tuple[list[str], dict]) -> list[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ours = {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": path}
        pipes = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "cwd": tmp_path,
        }
        started = []
        try:
            for command, env in jobs:  # without a key W&B goes on offline
                env = {
                    key: value
                    for key, value in env.items()
                    if key not in ("WANDB_API_KEY", "WANDB_MODE")
                } | ours
                started.append(subprocess.Popen(command, env=env, **pipes))
            said = [process.communicate(timeout=90)[0] for process in started]
            assert [process.returncode for process in started] == [0] * len(jobs), "\n".join(said)
        finally:
            for process in started:
                process.kill()
        return said

    return run


def test_two_agents_train_a_point_of_each_file(agent, train, tmp_path):
    """Real processes with an agent's environment, started in the same second; one teacher serves both."""
    runs = {
        "aaa": (
            "temperature_tail",
            {"loss.temperature": 2.0, "loss.tail": "smooth"},
            "smooth_T2.0",
        ),
        "bbb": ("lr_kl_weight", {"optim.lr": 3e-4, "loss.kl_weight": 0.5}, "lr0.0003_kl0.5"),
    }
    assert all(point in points(SWEEPS[name]) for name, point, _ in runs.values())
    jobs = [
        agent(SWEEPS[name], run_id, as_json(point)) for run_id, (name, point, _) in runs.items()
    ]
    said = train(*((command + TINY + ["baseline=on"], env) for command, env in jobs))
    assert all("going on offline" in each for each in said)
    for run_id, (name, point, shown) in runs.items():
        run_dir = tmp_path / f"runs/sweep-swept/{run_id}"
        kept = records(run_dir)
        run = next(record.run for record in kept if record.HasField("run"))
        assert (run.run_id, run.sweep_id, run.run_group, run.display_name) == (
            run_id,
            "swept",
            name,
            shown,
        )
        config = last_update(kept, "run")
        for (
            key,
            value,
        ) in (
            point.items()
        ):  # the sweep's own keys, by which a grid knows its points, beside the nested ones
            group, leaf = key.split(".")
            assert config[key] == value == config[group][leaf]
        logged = [record.history.item for record in kept if record.HasField("history")]
        logged = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            for items in logged
        ]
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses = [row["val_loss"] for row in rows]
        assert [row["val_loss"] for row in logged] == losses and len(losses) == 4
        assert last_update(kept, "summary")["val_loss"] == min(losses)
    assert (
        len(list(tmp_path.glob("runs/teacher-*"))) == 1
        and len(list(tmp_path.glob("runs/baseline-*"))) == 2
    )
    assert len(list(tmp_path.rglob("run-*.wandb"))) == 2, "a teacher or a baseline logged to W&B"


def test_jobs_of_a_multirun_are_runs_of_their_own(train, tmp_path):
    words = [
        "-m",
        "seed=0,1,2",
        "run_dir=runs/many",
        "loss=ce",
        "wandb=offline",
        "wandb.group=g",
        "wandb.tags=[t]",
    ]
    train((["python", "train.py", *words, *SMALL], {}))
    runs = []
    for job in range(3):
        runs += [
            record.run
            for record in records(tmp_path / f"runs/many/{job}")
            if record.HasField("run")
        ]
    assert [run.display_name for run in runs] == ["many/0", "many/1", "many/2"] and len(
        {run.run_id for run in runs}
    ) == 3
    assert all((run.run_group, list(run.tags), run.sweep_id) == ("g", ["t"], "") for run in runs)
    assert len(list(tmp_path.rglob("run-*.wandb"))) == 3


def test_summary_is_the_best_even_where_the_end_is_worse(tmp_path):
    log = RunLog(tmp_path, WandbConfig(mode="offline", name="n"), {}, 0)
    for step, loss in enumerate((3.0, 1.0, 2.0), start=1):
        log.row({"step": step, "val_loss": loss})
    log.close()
    assert last_update(records(tmp_path), "summary")["val_loss"] == 1.0
