"""Checkpoints: folders that appear under their name only when they are whole.

run_dir/checkpoints/step-00000200/: a Hugging Face folder, the tokenizer, trainer.pt, and
manifest.json, which is written last and holds the SHA-256 sum of every other file.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from engine import UserError, first_line

MANIFEST = "manifest.json"


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Forces a file or folder to disk: a power cut after a rename then leaves the new content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(file: Path, content: str | bytes) -> None:
    """Replaces a file's content: a reader sees the old content or the new, never half of it."""
    scratch = file.with_name(f".{file.name}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with name_in_errors(file):
        scratch.write_bytes(data)
        fsync(scratch)
    os.replace(scratch, file)


@contextmanager
def name_in_errors(file: Path):
    """Puts `file` into an OSError that names none, as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def save(run_dir: Path, step: int, write: Callable[[Path], None], info: dict) -> Path:
    """Writes one checkpoint atomically and returns its folder; replaces one of the same step.

    write: fills the folder that it is given.
    info: JSON that goes into the manifest (val_loss, fingerprints).
    Raises UserError with the disk's own message if it cannot be written.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    scratch = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)

    # write everything under a name that no reader looks at, the manifest last
    try:
        scratch.mkdir(parents=True)
        write(scratch)
        sums = {}
        for file in sorted(scratch.iterdir()):
            fsync(file)
            sums[file.name] = sha256(file)
        content = {"step": step, **info, "sha256": sums}
        write_atomic(scratch / MANIFEST, json.dumps(content, indent=1))
        fsync(scratch)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, RuntimeError):  # torch.save's own, raised over the disk's error
            error = error.__context__
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise UserError(
            f"run_dir={run_dir}: cannot save step {step} ({first_line(error)}); earlier checkpoints"
            " are kept; make room and run again with this run_dir"
        ) from None

    # give it its name; a rename cannot replace a folder that has content, so an old one steps aside
    if folder.exists():
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(scratch, folder)
    fsync(folder.parent)
    for old in folder.parent.glob(".old-*"):
        shutil.rmtree(old)
    return folder


def folders(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first, good or not."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def manifest(folder: Path) -> dict:
    """What `save` recorded about a checkpoint; empty if the file is missing or unreadable."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint (a missing or changed file), or None."""
    sums = manifest(folder).get("sha256")
    if not sums:
        return f"{MANIFEST} is missing or unreadable"
    for name, digest in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"{name} does not match its SHA-256 sum"
    return None


def latest(run_dir: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint without a fault, or None; warns of each newer one that has a fault."""
    for folder in reversed(folders(run_dir)):
        message = fault(folder)
        if message is None:
            return folder
        warn(f"warning: {folder}: {message}; falling back to the one before")
    return None


def fingerprint(folder: Path) -> str:
    """SHA-256 over the sums of a model's weight files (taken from its manifest if it has one)."""
    recorded = manifest(folder).get("sha256", {})
    files = sorted(folder.glob("*.safetensors"))
    sums = [recorded.get(file.name) or sha256(file) for file in files]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def held_out_loss(folder: Path) -> float:
    """What the manifest says; infinite if the checkpoint was not evaluated, or its loss is NaN."""
    loss = manifest(folder).get("val_loss")
    return math.inf if loss is None or math.isnan(loss) else loss


def readable(run_dir: Path) -> list[Path]:
    """The run's checkpoints whose manifests can be read, newest first."""
    return [folder for folder in reversed(folders(run_dir)) if manifest(folder)]


def best(run_dir: Path) -> Path | None:
    """The readable checkpoint of lowest held-out loss, of equals the newest; None without any."""
    return min(readable(run_dir), key=held_out_loss, default=None)


def prune(run_dir: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints and the one of lowest held-out loss."""
    lowest = best(run_dir)
    for folder in readable(run_dir)[keep:]:
        if folder != lowest:
            shutil.rmtree(folder)


def resolve(path: str | Path, key: str = "path", verify: bool = True) -> Path:
    """The folder with config.json and weights that `path` stands for.

    path: a run (its checkpoint of lowest held-out loss), a checkpoint or a Hugging Face folder.
    verify: check every sum of a checkpoint's manifest.
    Raises UserError naming `key`: no model there, or a corrupt checkpoint.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        folder = best(folder)
    if folder is None:
        problem = "neither a model's folder (config.json, model.safetensors) nor a run's"
        if not Path(path).exists():
            problem = "no such folder"
        raise UserError(f"{key}={path}: {problem}")

    is_checkpoint = (folder / MANIFEST).is_file() or folder.parent.name == "checkpoints"
    message = fault(folder) if verify and is_checkpoint else None
    if message is not None:
        good = latest(folder.parent.parent, warn=lambda line: None)
        advice = f"the newest good one is {good}" if good else "its run has no good one"
        raise UserError(f"{key}={path}: {folder.name} is corrupt, {message}; {advice}")
    return folder
