"""Checkpoints: folders that are renamed into place only when whole, with a manifest of SHA-256 sums written last.

run_dir/checkpoints/step-00000200/  a Hugging Face folder, the tokenizer, trainer.pt, manifest.json
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

from engine import UserError

MANIFEST = "manifest.json"


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Forces a file's or a folder's bytes to disk, so that a power cut after a rename leaves the new content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(file: Path, content: str | bytes) -> None:
    """Writes `content` beside `file`, then renames it into place: a reader sees the old content or the new, never half."""
    scratch = file.with_name(f".{file.name}.tmp")
    scratch.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync(scratch)
    os.replace(scratch, file)


@contextmanager
def report_os_errors(place: str, rule: str = "give another", name: str = "there"):
    """An OSError as one line that names `place`, KEY=FOLDER, and `name`, the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: cannot write {name} ({error.strerror}); {rule}") from None


def save(run_dir: Path, step: int, write: Callable[[Path], None], info: dict) -> Path:
    """Writes one checkpoint atomically: `write(folder)` fills it, the manifest follows, then one rename.

    `info` (val_loss, fingerprints: plain JSON) stands in the manifest. A checkpoint of the same step is replaced.
    Raises UserError with the disk's own words where it cannot be written.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    scratch = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        write(scratch)
        sums = {}
        for file in sorted(scratch.iterdir()):
            fsync(file)
            sums[file.name] = sha256(file)
        write_atomic(
            scratch / MANIFEST, json.dumps({"step": step, **info, "sha256": sums}, indent=1)
        )
        fsync(scratch)
    except (OSError, RuntimeError, SafetensorError) as error:
        if (said := disk_error(error)) is None:
            raise
        shutil.rmtree(scratch, ignore_errors=True)
        rule = "earlier checkpoints are kept; make room (or set a smaller keep) and run again with this run_dir"
        raise UserError(f"run_dir={run_dir}: cannot save step {step} ({said}); {rule}") from None
    if final.exists():  # a rename cannot replace a folder with content: the old one steps aside under a name nobody lists
        aside = final.with_name(f".old-{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(scratch, final)
    fsync(final.parent)
    for stale in final.parent.glob(".old-*"):
        shutil.rmtree(stale)
    return final


def disk_error(error: BaseException) -> str | None:
    """What the disk said, where `error` is of writing a file; torch's own error then hides the disk's behind it."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    found = [each.strerror or str(each) for each in chain if isinstance(each, OSError)]
    ours = isinstance(error, SafetensorError) or "inline_container" in str(
        error
    )  # torch.save's writer
    return found[0] if found else str(error).splitlines()[0] if ours else None


def folders(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first, good or not."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def manifest(folder: Path) -> dict:
    """What `save` recorded of a checkpoint; empty where its file is missing or unreadable."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint (missing or changed file), or None when every sum agrees."""
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
    """The newest checkpoint that verifies, with one warning for each newer one that does not; None without any."""
    for folder in reversed(folders(run_dir)):
        wrong = fault(folder)
        if wrong is None:
            return folder
        warn(f"warning: {folder}: {wrong}; falling back to the one before")
    return None


def fingerprint(folder: Path) -> str:
    """SHA-256 over the sums of a model folder's weight files (from its manifest if it has one)."""
    sums = manifest(folder).get("sha256", {})
    content = [sums.get(file.name) or sha256(file) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(" ".join(content).encode()).hexdigest()


def best(run_dir: Path) -> Path | None:
    """The checkpoint of lowest held-out loss by the manifests, of equals the newest; None without any that can be read."""
    losses = {}
    for folder in reversed(folders(run_dir)):
        if found := manifest(folder):
            loss = found.get("val_loss")
            losses[folder] = math.inf if loss is None or math.isnan(loss) else loss
    return min(losses, key=losses.get, default=None)


def prune(run_dir: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints and the one of lowest held-out loss."""
    whole, lowest = [folder for folder in folders(run_dir) if manifest(folder)], best(run_dir)
    for folder in whole[:-keep]:
        if folder != lowest:
            shutil.rmtree(folder)


def resolve(path: str | Path, key: str = "path", verify: bool = True) -> Path:
    """The folder with config.json and weights that a RUN, a CHECKPOINT or a Hugging Face folder stands for.

    A run gives its checkpoint of lowest held-out loss. Where a manifest lies beside the weights every sum is checked, if asked.
    Raises UserError naming `key`: nothing there, no checkpoint, or a corrupt one (with the newest good one's name).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{key}={path}: no such folder; give a run, a checkpoint or a Hugging Face folder"
        )
    if not (folder / "config.json").is_file():
        if (found := best(folder)) is None:
            raise UserError(
                f"{key}={path}: neither a model (config.json, model.safetensors) nor a run with checkpoints"
            )
        folder = found
    ours = (folder / MANIFEST).is_file() or folder.parent.name == "checkpoints"
    if verify and ours and (wrong := fault(folder)):
        good = latest(folder.parent.parent, warn=lambda line: None)
        hint = f"the newest good one is {good}" if good else "its run holds no good one"
        raise UserError(f"{key}={path}: checkpoint {folder.name} is corrupt, {wrong}; {hint}")
    return folder
