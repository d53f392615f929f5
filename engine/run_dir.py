"""A run's directory: claimed by one process at a time, and never mixed with a run of another configuration."""

import fcntl
import hashlib
import json
from pathlib import Path

from omegaconf import OmegaConf

from engine import UserError
from engine.checkpoint import folders, report_os_errors, write_atomic

# Keys that may differ between a run and its continuation: they change where and how long it runs, not what it learns from.
KEYS_ALLOWED_TO_CHANGE = {
    "max_steps",
    "eval_every",
    "eval_tokens",
    "save_every",
    "keep",
    "micro_batch_size",
    "run_dir",
    "resume",
    "compile",
}
KEYS_ALLOWED_TO_CHANGE |= {"device", "baseline", "wandb", "activation_checkpointing"}
KEYS_ALLOWED_TO_CHANGE |= {"teacher.path", "model.init"}  # known by their fingerprints instead


def flatten(node: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in node.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def fixed(config: dict) -> dict:
    """What a run learns from, as dotted keys: the configuration without the KEYS_ALLOWED_TO_CHANGE ones."""
    return {
        key: value
        for key, value in flatten(config).items()
        if not {key, key.split(".")[0]} & KEYS_ALLOWED_TO_CHANGE
    }


def identity(config: dict, *more) -> str:
    """Ten hex digits that stand for what a run learns from, its length, and `more` (fingerprints)."""
    content = json.dumps([fixed(config), config["max_steps"], *more], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def claim(run_dir: Path, config: dict, wait: bool = False):
    """Makes the directory this process's own and records `config` in it; returns a handle that holds the claim.

    Raises UserError: not writable, in use by another process (unless `wait`), a run of another configuration, or
    resume=never where checkpoints lie.
    """
    with report_os_errors(f"run_dir={run_dir}", "give another run_dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = open(run_dir / ".lock", "a")  # noqa: SIM115 (held for the run)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        raise UserError(
            f"run_dir={run_dir}: another process is training there; give another run_dir"
        ) from None
    record = run_dir / "config.yaml"
    if folders(run_dir):
        resume, other = config["resume"], "give another run_dir"
        if resume == "never":
            raise UserError(
                f"run_dir={run_dir}: holds checkpoints, which resume=never would mix up; {other}"
            )
        if resume != "auto" and run_dir.resolve() not in Path(resume).resolve().parents:
            rule = f"run_dir={run_dir} holds checkpoints of its own; resume=auto goes on with them, or {other}"
            raise UserError(f"resume={resume}: {rule}")
        theirs = fixed(OmegaConf.to_container(OmegaConf.load(record))) if record.is_file() else {}
        for key, value in fixed(config).items():
            if key in theirs and theirs[key] != value:
                raise UserError(
                    f"run_dir={run_dir}: holds a run with {key}={theirs[key]}, this one has {key}={value}; {other}"
                )
    with report_os_errors(f"run_dir={run_dir}", "make room", record.name):
        write_atomic(record, OmegaConf.to_yaml(OmegaConf.create(config)))
    return handle
