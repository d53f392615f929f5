"""Runs that a run needs first: a teacher where none is given, and the student without its teacher.

Both are plain cross-entropy runs under runs/, named by what determines them, so that the next run
that needs the same one finds it. `train_model` is train.py's function of that name.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from engine.checkpoint import folders
from engine.ranks import Ranks
from engine.run_dir import identity


def cross_entropy_config(config, name: str, fingerprint: str):
    """`config` without its teacher, in a directory named by what it then learns from."""
    config = replace(
        config,
        loss=type(config.loss)(name="ce"),
        teacher=type(config.teacher)(kind="none"),
        access=type(config.access)(),
        wandb=type(config.wandb)(),
        experiment=None,
        resume="auto",
        baseline="off",
    )
    config.run_dir = f"runs/{name}-{identity(asdict(config), fingerprint)}"
    return config


def train_missing_teacher(config, ranks: Ranks, tokens, train_model: Callable) -> str:
    """Trains the teacher that `config.teacher` describes on all the text, if it is not there yet.

    It is of the student's kind in all but its size. Returns its run directory.
    """
    size = asdict(config.teacher.model)
    size |= {"n_kv_head": None, "head_dim": None, "n_inner": None, "init": None}
    teacher = replace(
        config,
        model=replace(config.model, **size),
        optim=replace(config.optim, lr=config.teacher.lr),
        data=replace(config.data, fraction=1.0),
        max_steps=config.teacher.max_steps,
        seed=0,
    )
    teacher = cross_entropy_config(teacher, "teacher", tokens.fingerprint)
    action = "none given (teacher.path), so one is trained first in"
    if folders(Path(teacher.run_dir)):
        action = "reusing"
    ranks.say(f"teacher: {action} {teacher.run_dir}")
    train_model(teacher, ranks, tokens, title="teacher")
    return teacher.run_dir


def train_baseline(config, ranks: Ranks, tokens, train_model: Callable) -> dict:
    """Trains the same student without the teacher, if that is not done yet; returns its summary."""
    baseline = cross_entropy_config(config, "baseline", tokens.fingerprint)
    ranks.say(f"baseline: the same student without the teacher, in {baseline.run_dir}")
    return train_model(baseline, ranks, tokens, title="baseline")
