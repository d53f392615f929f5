"""A run's directory: used by one process at a time, and never by runs of two configurations."""

import fcntl
import hashlib
import json
from pathlib import Path

from omegaconf import OmegaConf

from engine import UserError
from engine.checkpoint import folders, write_atomic

# Keys that may differ between a run and its continuation, alone or with all below them.
KEYS_ALLOWED_TO_CHANGE = {
    # where and how long it runs
    "max_steps",
    "eval_every",
    "eval_tokens",
    "save_every",
    "keep",
    "micro_batch_size",
    "run_dir",
    "resume",
    "compile",
    "device",
    "baseline",
    "wandb",
    "activation_checkpointing",
    # a name
    "experiment",
    # compared by their fingerprints instead
    "teacher.path",
    "model.init",
}


def flatten(config: dict, prefix: str = "") -> dict:
    """Nested keys as dotted ones."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def fixed(config: dict) -> dict:
    """What a run learns from: the configuration as dotted keys, without KEYS_ALLOWED_TO_CHANGE."""
    return {
        key: value
        for key, value in flatten(config).items()
        if not {key, key.split(".")[0]} & KEYS_ALLOWED_TO_CHANGE
    }


def identity(config: dict, *fingerprints) -> str:
    """Ten hex digits that stand for what a run learns from and for its length."""
    content = json.dumps([fixed(config), config["max_steps"], *fingerprints], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def claim(run_dir: Path, config: dict, wait: bool = False):
    """Locks the directory for this process and records `config` in it.

    Closing the file that it returns unlocks the directory.

    wait: for the process that uses it, instead of raising.
    Raises UserError: in use, a run of another configuration, or checkpoints that `resume` excludes.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = open(run_dir / ".lock", "a")  # noqa: SIM115 (held for the run)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"run_dir={run_dir}: another process is training there; give another run_dir"
        ) from None

    record = run_dir / "config.yaml"
    if folders(run_dir):
        check_continuation(run_dir, record, config)
    write_atomic(record, OmegaConf.to_yaml(OmegaConf.create(config)))
    return lock


def check_continuation(run_dir: Path, record: Path, config: dict) -> None:
    """UserError unless a run of `config` may go on from the checkpoints in run_dir."""
    resume = config["resume"]
    own = run_dir.resolve() / "checkpoints"
    if resume != "auto" and own not in Path(resume).resolve().parents:
        raise UserError(
            f"resume={resume}: run_dir={run_dir} holds checkpoints of its own;"
            " resume=auto goes on with them, or give another run_dir"
        )
    recorded = fixed(OmegaConf.to_container(OmegaConf.load(record)))
    for key, value in fixed(config).items():
        if recorded.get(key, value) != value:
            raise UserError(
                f"run_dir={run_dir}: holds a run with {key}={recorded[key]},"
                f" this one has {key}={value}; give another run_dir"
            )
