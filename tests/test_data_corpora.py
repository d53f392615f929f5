"""Files to documents, and which of them are held out."""

import gzip

import numpy as np
import pytest

from data import DataConfig
from data.corpora import FineTuningRow, find_files, read_corpus, split_documents
from engine import UserError


def read(path, say=print):
    config = DataConfig(name="text", path=str(path))
    return read_corpus(config, find_files(config), say)


GOOD = '{"prompt": "x", "completion": "good"}'
JSONL = """{"text": "one\u2028two"}

{"id": 2, "text": "three"}\r
{"text": ""}"""


def test_every_kind_of_file(tmp_path):
    files = {
        "b.txt": "\ufeffplain é".encode(),
        "a/c.txt.gz": gzip.compress(b"packed"),
        "d.jsonl": JSONL.encode(),
        "e.jsonl.gz": gzip.compress(b'{"text": "four"}'),
        "f.md": b" \n",
        "image.png": b"\x89PNG\0\0",
        "latin.txt": "é".encode("latin-1"),
        ".hidden/x.txt": b"hidden",
        ".secret": b"hidden",
    }
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "circle").symlink_to(tmp_path)
    lines = []
    documents = read(tmp_path, lines.append)
    assert documents == ["packed", "plain é", "one\u2028two", "three", "four"]
    (line,) = lines
    assert "2 files skipped" in line
    assert read(tmp_path / "b.txt") == ["plain é"]
    (tmp_path / "rows.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match=f"^data.path={tmp_path}: 5 texts and 1 fine-tuning rows"):
        read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"not packed",
        gzip.compress(b"cut short" * 99)[:-12],
        gzip.compress(b"xyz" * 9)[:12] + b"\xff" * 30,
    ],
)
def test_a_broken_gz_is_refused_and_named(tmp_path, content):
    (tmp_path / "whole.txt").write_text("text")
    file = tmp_path / "broken.txt.gz"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^data.path={file}: cannot be unpacked"):
        read(tmp_path)


def test_the_standard_library_without_its_tests():
    files = find_files(DataConfig())
    assert len(files) > 300
    for file in files:
        assert not {"test", "tests", "site-packages"} & set(file.parts[-3:])


BAD_LINES = [
    "{oops",
    "[1]",
    '{"text": 3}',
    '{"text": "\\ud800"}',
    '{"completion": "x"}',
    '{"messages": ["x"]}',
    '{"messages": [{"role": "user", "content": "x"}]}',
    '{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}',
    '{"messages": [{"role": "user", "content": "x"}, {"role": "completion", "content": "y"}]}',
    '{"messages": [{"role": "prompt", "content": "x"}, {"role": "assistant", "content": "y"}]}',
    '{"prompt": "x", "completion": " "}',
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(line, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(f"{GOOD}\n\n{line}")
    with pytest.raises(UserError, match=f"^data.path={file}:3: neither"):
        read(file)


BAD_SETTINGS = [
    ("prompts", "x", "data.prompts=x: data=stdlib does not read it"),
    ("fraction", float("nan"), "data.fraction=nan"),
    ("val_fraction", 1.0, "data.val_fraction=1.0"),
    ("vocab_size", 256, "data.vocab_size=256"),
]


@pytest.mark.parametrize("key, value, rule", BAD_SETTINGS)
def test_a_bad_setting_is_one_line(key, value, rule):
    with pytest.raises(UserError, match=f"^{rule}"):
        DataConfig(**{key: value})


def test_whole_documents_are_held_out_whatever_the_order_of_files():
    sizes = np.random.default_rng(0).integers(20, 900, 300)
    documents = [f"{number} " + "é" * size for number, size in enumerate(sizes)]
    documents += ["999 twice " * 30] * 2
    train, val = split_documents(documents, 0.1)
    assert (train, val) == split_documents(documents[::-1], 0.1)
    assert sorted(train + val) == sorted(documents)
    assert not set(train) & set(val)
    share = len("".join(val).encode()) / len("".join(documents).encode())
    assert 0.09 < share <= 0.1


BOOK = "chapter äöü🙂 " * 100
FEW_TEXTS = [
    ([BOOK] * 2, [130]),
    # a small document that fits is not all that is held out
    (["a" * 60_000, "b" * 60_000, "copied " * 140], [6000, 6000, 98]),
    # nanoGPT's Shakespeare: 1,003,854 characters to train on
    (["s" * 1_115_394], [111_540]),
    (["a"], [1]),
]


@pytest.mark.parametrize("documents, sizes", FEW_TEXTS)
def test_of_few_texts_the_last_part_of_each_is_held_out(documents, sizes):
    train, val = split_documents(documents, 0.1)
    assert [len(text) for text in val] == sizes
    whole = [first + last for first, last in zip(train or [""], val, strict=True)]
    assert whole == list(dict.fromkeys(documents))


def test_no_fine_tuning_row_is_cut():
    answers = ("a" * 900, "b" * 900, "c")
    rows = [FineTuningRow((("completion", answer),), "x:1") for answer in answers]
    assert split_documents(rows, 0.1)[1] == rows[2:]
    assert split_documents(rows[:2], 0.1)[1] == []
