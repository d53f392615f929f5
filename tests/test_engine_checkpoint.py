"""Checkpoints: whole or not there, damage found, the right one chosen."""

import errno
import io
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from engine import UserError, checkpoint

ROOT = Path(__file__).parent.parent


def make(run_dir, step, loss=None):
    def write(folder):
        (folder / "model.safetensors").write_text(f"weights {step}")
        (folder / "config.json").write_text("{}")

    return checkpoint.save(run_dir, step, write, {"val_loss": loss})


def steps(run_dir):
    return [int(folder.name[-8:]) for folder in checkpoint.folders(run_dir)]


def change_weights(folder):
    (folder / "model.safetensors").write_text("weightz 5")


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_manifest(folder):
    (folder / "manifest.json").write_text('{"step": 5, "sha')


@pytest.mark.parametrize(
    "damage, message",
    [
        (change_weights, "model.safetensors does not match its SHA-256 sum"),
        (remove_weights, "model.safetensors is missing"),
        (cut_manifest, "manifest.json is missing or unreadable"),
    ],
)
def test_damage_is_found_and_the_checkpoint_before_it_taken(tmp_path, damage, message):
    older = make(tmp_path, 5)
    newer = make(tmp_path, 10)
    assert checkpoint.fault(newer) is None and checkpoint.latest(tmp_path) == newer

    damage(newer)
    warnings = []
    assert checkpoint.latest(tmp_path, warnings.append) == older
    (warning,) = warnings
    assert f"{newer}: {message}" in warning
    corrupt = f"teacher.path=.*{newer.name} is corrupt, {message}; the newest good one is {older}"
    with pytest.raises(UserError, match=corrupt):
        checkpoint.resolve(newer, key="teacher.path")
    assert checkpoint.resolve(newer, verify=False) == newer


def test_a_run_stands_for_its_best_checkpoint(tmp_path):
    for step, loss in ((5, 2.0), (10, 1.5), (15, 1.5), (20, None), (25, math.nan)):
        make(tmp_path, step, loss)
    assert checkpoint.resolve(tmp_path).name == "step-00000015"
    with pytest.raises(UserError, match="path=.*none: no such folder"):
        checkpoint.resolve(tmp_path / "none")


def test_prune_keeps_the_newest_the_best_and_the_unreadable(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 0.5), (4, 2.5), (5, 2.7), (6, 2.6)):
        make(tmp_path, step, loss)
    (tmp_path / "checkpoints/step-00000003/manifest.json").write_text("null")
    checkpoint.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [2, 3, 5, 6]


def test_a_fingerprint_is_of_the_weights_with_or_without_a_manifest(tmp_path):
    folder = make(tmp_path, 1)
    fingerprint = checkpoint.fingerprint(folder)
    (folder / "config.json").write_text("[]")
    (folder / "manifest.json").unlink()
    assert (
        checkpoint.fingerprint(folder) == fingerprint != checkpoint.fingerprint(make(tmp_path, 2))
    )


class FullDisk(io.BytesIO):
    def write(self, content):
        raise OSError("disk quota")


@pytest.mark.parametrize(
    "error", [OSError("disk quota\nmore"), SafetensorError("disk quota"), None]
)
def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay(tmp_path, error):
    def write(folder):
        if error is None:
            torch.save(torch.zeros(3), FullDisk())  # raises an error of its own over the disk's
        raise error

    make(tmp_path, 1)
    with pytest.raises(UserError, match=r"^run_dir=.*: cannot save step 2 \(disk quota\); earlier"):
        checkpoint.save(tmp_path, 2, write, {})
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1  # the half gives its room back


def test_an_error_of_writing_names_the_file(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"disk full: '{tmp_path}/x.json'"):
        checkpoint.write_atomic(tmp_path / "x.json", "{}")


@pytest.mark.slow
def test_sigkill_while_saving_leaves_only_whole_checkpoints(tmp_path):
    script = f"""
import itertools
from pathlib import Path
from engine import checkpoint
def write(folder):
    for name in ("model.safetensors", "config.json", "trainer.pt"):
        (folder / name).write_bytes(bytes(3_000_000))
print("go", flush=True)
for step in itertools.count():
    checkpoint.save(Path({str(tmp_path)!r}), step % 7, write, {{"val_loss": None}})
"""
    for trial in range(12):
        command = [sys.executable, "-c", script]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(0.15 + 0.037 * trial)
        process.kill()
        process.wait()
        assert all(checkpoint.fault(folder) is None for folder in checkpoint.folders(tmp_path))
    assert checkpoint.folders(tmp_path)
