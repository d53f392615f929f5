"""A run's directory: used by one process at a time, and never by runs of two configurations."""

import fcntl
import hashlib
import json
from pathlib import Path

from omegaconf import OmegaConf

from engine import UserError
from engine.checkpoint import fingerprint, folders, manifest, readable, resolve, write_atomic

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
    "data.cache_dir",
}
# What a run reads, and the keys that say where it lies. A continuation may spell them otherwise as
# long as what lies there has the same fingerprint.
INPUTS = {
    "tokens": (
        "data.path",
        "data.tokenizer",
        "data.vocab_size",
        "data.val_fraction",
        "data.prompts",
        "data.documents",
        "data.max_tokens",
    ),
    "teacher": ("teacher.path",),
    "init": ("model.init",),
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


def without_inputs(config: dict) -> dict:
    """`fixed`, but for the keys that fingerprints stand for."""
    spelt = {key for keys in INPUTS.values() for key in keys}
    return {key: value for key, value in fixed(config).items() if key not in spelt}


def find_fingerprints(config, tokens, teacher=None) -> dict[str, str | None]:
    """What a run and its continuation must share, by SHA-256; `config` is train.py's Config."""
    init = config.model.init
    return {
        "tokens": tokens.fingerprint,
        "tokenizer": tokens.tokenizer.fingerprint,
        "teacher": teacher.fingerprint if teacher else None,
        "init": fingerprint(resolve(init, "model.init")) if init else None,
    }


def identity(config: dict, fingerprints: dict) -> str:
    """Ten hex digits that stand for what a run learns from and for its length."""
    parts = [without_inputs(config), config["max_steps"], fingerprints]
    content = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def claim(run_dir: Path, config: dict, fingerprints: dict, wait: bool = False):
    """Locks the directory for this process and records `config` in it.

    Closing the file that it returns unlocks the directory.

    fingerprints: of what this run reads, as checkpoints record them.
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

    if folders(run_dir):
        check_continuation(run_dir, config, fingerprints)
    record = OmegaConf.to_yaml(OmegaConf.create(config))
    write_atomic(run_dir / "config.yaml", record)
    return lock


def recorded_config(run_dir: Path) -> dict:
    """What `claim` recorded, as dotted keys."""
    return flatten(OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml")))


def check_continuation(run_dir: Path, config: dict, fingerprints: dict) -> None:
    """UserError unless a run of `config` may go on from the checkpoints in run_dir."""
    resume = config["resume"]
    own = run_dir.resolve() / "checkpoints"
    if resume != "auto" and own not in Path(resume).resolve().parents:
        raise UserError(
            f"resume={resume}: run_dir={run_dir} holds checkpoints of its own;"
            " resume=auto goes on with them, or give another run_dir"
        )
    recorded = recorded_config(run_dir)
    for key, value in without_inputs(config).items():
        if recorded.get(key, value) != value:
            raise UserError(
                f"run_dir={run_dir}: holds a run with {key}={recorded[key]},"
                f" this one has {key}={value}; give another run_dir"
            )
    for folder in readable(run_dir)[:1]:
        difference = input_difference(folder, config, fingerprints)
        if difference is not None:
            raise UserError(f"run_dir={run_dir}: {difference}, or give another run_dir")


def input_difference(folder: Path, config: dict, fingerprints: dict) -> str | None:
    """Which input the run of the checkpoint `folder` had otherwise, and what to do; None if none.

    A text of another tokenizer is another text.
    """
    there = manifest(folder)["fingerprints"]
    flat = flatten(config)
    for name, keys in INPUTS.items():
        if there.get(name) == fingerprints[name]:
            continue
        recorded = recorded_config(folder.parent.parent)
        changed = [key for key in keys if recorded.get(key) != flat[key]]
        if not changed:
            return (
                f"the {name} of {keys[0]}={flat[keys[0]]} changed since its checkpoints were made"
                " (SHA-256 differs); bring the old content back"
            )
        here = " ".join(f"{key}={flat[key]}" for key in changed)
        settings = " ".join(f"{key}={recorded.get(key)}" for key in changed)
        return f"its run did not have the {name} of {here} (SHA-256 differs); set {settings}"
    return None
