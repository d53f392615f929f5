"""Which files of a folder are read, and what is told about the others."""

from collections import Counter
from pathlib import Path

import pytest

from data import files
from data.files import FileList, list_files, tracked


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")


def listed(root="in"):
    """(the files' names, {remark: names})."""
    found = list_files(Path(root))
    remarks = {remark: list(map(str, paths)) for remark, paths in found.remarks.items()}
    return list(map(str, found.files)), remarks


LINKED = "linked folder(s) read too"
OWN = "folder(s) of runs, models or tokens left out"


def test_linked_folders_are_read_once():
    write("in/a/1.txt", "in/.hidden/x.txt", "out/2.txt", "out/deep/3.txt", "other/4.txt")
    links = {
        "in/0": "out/deep",  # before out, which holds it
        "in/b": "out",
        "in/c": "out",  # again
        "in/d": "in/a",  # a folder that is read anyway
        "in/circle": "in",
        "out/back": "other",
        "other/back": "out",  # to each other
        "in/up": ".",
    }
    for link, target in links.items():
        Path(link).symlink_to(Path(target).resolve())
    Path("in/gone").symlink_to("nowhere")
    Path("in/loop").symlink_to("loop")
    Path("in/5.txt").symlink_to(Path("other/4.txt").resolve())
    names, remarks = listed()
    assert names == ["in/0/3.txt", "in/5.txt", "in/a/1.txt", "in/b/2.txt", "in/b/back/4.txt"]
    assert remarks == {
        LINKED: ["in/0", "in/b", "in/b/back"],
        "link(s) to a folder above left out": ["in/up"],
        "broken link(s) left out": ["in/gone", "in/loop"],
    }
    Path("link").symlink_to("in")
    assert listed("link")[0] == [name.replace("in/", "link/", 1) for name in names]


OWN_FOLDERS = [
    ["config.yaml", "metrics.jsonl", "checkpoints/step-1/x.txt"],
    ["config.yaml", ".lock"],
    ["multirun.yaml", "0/samples.txt"],
    ["config.json", "model.safetensors"],
    ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"],
    ["meta.json", "train.bin"],
    ["manifest.json", "train-00000.bin"],
    ["offline-run-1/run-x.wandb", "debug.log"],
]


@pytest.mark.parametrize("names", OWN_FOLDERS)
def test_what_nanodistill_writes_is_no_text(names):
    write("in/a.txt", "in/tokens/bin-0123456789ab.json", "in/multirun.yaml")
    write("in/results/table.csv", "in/results/table.md", "in/results/curves.png")
    write(*(f"in/runs/own/{name}" for name in names))
    assert listed() == (["in/a.txt"], {OWN: ["in/runs/own"]})


def test_a_run_in_the_folder_itself_is_left_out():
    write("in/a.txt", "in/config.yaml", "in/metrics.jsonl", "in/summary.json")
    write("in/table.csv", "in/table.md", "in/curves.png", "in/bars.png")
    assert listed()[0] == ["in/a.txt"]


def test_a_folder_of_code_keeps_its_configs():
    names = ["in/config.json", "in/config.yaml", "in/manifest.json", "in/meta.json"]
    write(*names)
    assert listed() == (names, {})


def test_the_line_counts_kinds():
    found = FileList()
    found.remarks["skipped that are not UTF-8 text"] += ["x.png", "y.png"]
    line = found.describe(Counter({".py": 1200, ".txt.gz": 2, "": 1}))
    assert line == (
        "1,203 files: 1,200 .py, 2 .txt.gz, 1 without a suffix; "
        "2 skipped that are not UTF-8 text (first: x.png)"
    )
    many = Counter({f".{number}": 9 - number for number in range(9)})
    assert FileList().describe(many).endswith(", 4 .5, 6 others")
    assert FileList().describe(Counter()) == "0 files"


def test_a_long_job_says_how_far_it_is(monkeypatch):
    lines = []
    assert list(tracked(range(4), "reading", lines.append)) == [0, 1, 2, 3]
    assert lines == []
    monkeypatch.setattr(files, "SECONDS_BETWEEN_LINES", -1)
    assert list(tracked(range(4), "reading", lines.append)) == [0, 1, 2, 3]
    assert lines[2] == "data: reading, 50%"
