"""The files of a corpus: which of a folder's are read, and what is told about them."""

import os
import re
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import track

from engine.progress import SECONDS_BETWEEN_LINES

# What nanodistill writes is no text to learn from. A folder is known by what it contains.
OWN_FOLDERS = (
    ("config.yaml", "metrics.jsonl"),  # a run
    ("config.yaml", ".lock"),  # a run that was killed early
    ("multirun.yaml",),  # the runs of a sweep
    ("config.json", "model*.safetensors"),  # a checkpoint, or another model's folder
    ("meta.json", "train.bin"),  # tokens
    ("manifest.json", "train-*.bin"),  # a cache of targets
    ("*run-*/run-*.wandb",),  # what W&B writes
)
OWN_FILES = re.compile(r"bin-[0-9a-f]{12}\.json")  # of data.cache_dir
REPORT_FILES = {"table.csv", "table.md", "bars.png", "curves.png", "reliability.png"}
# Where the corpus folder is a run or a sweep itself
RUN_FILES = {"config.yaml", "metrics.jsonl", "summary.json", "multirun.yaml"}

Say = Callable[[str], object]


@dataclass
class FileList:
    """The files of a corpus, sorted, and what to tell about them: a remark and its files."""

    files: list[Path] = field(default_factory=list)
    remarks: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def describe(self, kinds: Counter) -> str:
        """One line: how many files of each kind, and the remarks; kinds: suffix -> files."""
        parts = [f"{count:,} {kind or 'without a suffix'}" for kind, count in kinds.most_common(6)]
        rest = kinds.total() - sum(count for _, count in kinds.most_common(6))
        if rest:
            parts.append(f"{rest:,} others")
        noun = "file" if kinds.total() == 1 else "files"
        line = f"{kinds.total():,} {noun}"
        if parts:
            line += f": {', '.join(parts)}"
        for remark, paths in self.remarks.items():
            line += f"; {len(paths):,} {remark} (first: {paths[0]})"
        return line


def list_files(root: Path) -> FileList:
    """All files under `root` but hidden ones and those in OWN_FOLDERS.

    Linked folders are read too, after all others, and each real folder once: there are no circles.
    """
    result = FileList()
    above = set(root.resolve().parents)
    visited = set()
    folders = deque([root])
    links = deque()
    while folders or links:
        is_link = not folders
        folder = (folders or links).popleft()
        real = folder.resolve()
        if real in visited:
            continue
        visited.add(real)
        if real in above:
            result.remarks["link(s) to a folder above left out"].append(folder)
            continue
        if folder != root and is_own_folder(folder):
            result.remarks["folder(s) of runs, models or tokens left out"].append(folder)
            continue
        if is_link:
            result.remarks["linked folder(s) read too"].append(folder)
        list_folder(folder, result, folders, links)
    if is_own_folder(root):
        result.files = [file for file in result.files if file.name not in RUN_FILES]
    result.files.sort()
    return result


def list_folder(folder: Path, result: FileList, folders: deque, links: deque) -> None:
    """Adds what one folder holds to the files of `result`, to `folders` and to `links`."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        result.remarks["folder(s) without permission left out"].append(folder)
        return
    names = {entry.name for entry in entries}
    own = REPORT_FILES if {"table.csv", "table.md", "curves.png"} <= names else set()
    for entry in entries:
        if entry.name.startswith(".") or entry.name in own:
            continue
        path = folder / entry.name
        is_link = entry.is_symlink()
        target = path if is_link else entry  # of a link to itself an entry's is_dir raises OSError
        if target.is_dir():
            side = links if is_link else folders
            side.append(path)
        elif target.is_file():
            if not OWN_FILES.fullmatch(entry.name):
                result.files.append(path)
        elif is_link:
            result.remarks["broken link(s) left out"].append(path)


def is_own_folder(folder: Path) -> bool:
    """Whether it is the folder of a run, a model, token files, targets or W&B."""

    def has_all(patterns):
        return all(any(folder.glob(pattern)) for pattern in patterns)

    return any(has_all(patterns) for patterns in OWN_FOLDERS)


def tracked(items: Sequence, action: str, say: Say) -> Iterator:
    """`items` behind a progress bar on a terminal; elsewhere a line now and then."""
    if sys.stdout.isatty():
        yield from track(items, action, transient=True)
        return
    shown = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if now - shown > SECONDS_BETWEEN_LINES:
            say(f"data: {action}, {number / len(items):.0%}")
            shown = now
        yield item
