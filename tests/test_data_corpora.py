"""Files to documents, and which of them are held out."""

import gzip
import json

import numpy as np
import pytest

from data import DataConfig
from data.corpora import FineTuningRow, find_files, read_corpus, split_documents
from engine import UserError


def read(path, say=print):
    config = DataConfig(name="text", path=str(path))
    return read_corpus(config, find_files(config), say)


def test_every_kind_of_file(tmp_path):
    files = {
        "b.txt": "\ufeffplain é".encode(),
        "a/c.txt.gz": gzip.compress(b"packed"),
        "d.jsonl": '{"text": "one\u2028two"}\n\n{"id": 2, "text": "3"}\r\n{"text": ""}'.encode(),
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
    lines = []
    documents = read(tmp_path, lines.append)
    assert documents == ["packed", "plain é", "one\u2028two", "3", "four"]
    assert len(lines) == 1
    assert "2 files skipped" in lines[0]
    assert read(tmp_path / "b.txt") == ["plain é"]


def test_the_standard_library_without_its_tests():
    files = find_files(DataConfig())
    assert len(files) > 300
    assert not any({"test", "tests", "site-packages"} & set(file.parts[-3:]) for file in files)


GOOD = {"prompt": "x", "completion": "good"}
BAD_LINES = {
    "{oops": 'not a JSON object with a "text" string',
    "[1]": "not a JSON object",
    '"text"': "not a JSON object",
    '{"tex": "a"}': "not a JSON object",
    '{"text": 3}': "not a JSON object",
    '{"text": "\\ud800"}': "not a JSON object",
    '{"prompt": 3, "completion": "x"}': '"prompt" and "completion", or',
    '{"completion": "x"}': "not a JSON object",
    '{"messages": ["x"]}': '"messages" of "role" and "content"',
    '{"messages": []}': "no assistant turn to learn from",
    '{"messages": [{"role": "user", "content": "x"}]}': "no assistant turn",
    '{"messages": [{"role": "user", "content": ["x"]}]}': "not a JSON object",
    '{"messages": [{"role": "tool", "content": "x"}]}': "role 'tool' is none of system, user",
    '{"messages": [{"role": "assistant", "content": ""}]}': "an empty completion or assistant",
    '{"prompt": "x", "completion": " "}': "an empty completion or assistant turn",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(line, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        read(file)
    assert str(caught.value).startswith(f"data.path={file}:3: ")
    assert BAD_LINES[line] in str(caught.value)


BAD_FILES = {
    "missing": ({}, "no such file or folder"),
    "empty folder": ({".hidden": b"x"}, "holds no files"),
    "blank": ({"x.txt": b" \n\n"}, "no text in 1 file"),
    "binary": ({"x.txt": b"MZ\0\1"}, "binary.*data=bin"),
    "latin-1": ({"x.txt": "é".encode("latin-1")}, "UTF-8"),
    "not packed": ({"x.txt.gz": b"not packed"}, "cannot be read"),
    "cut short": ({"x.txt.gz": gzip.compress(b"x" * 99)[:-12]}, "cannot be read"),
    "broken inside": ({"x.gz": gzip.compress(b"xyz" * 9)[:12] + b"\xff" * 30}, "cannot be read"),
    "two kinds": (
        {"a.txt": b"x", "b.jsonl": json.dumps(GOOD).encode()},
        "b.jsonl:1: plain text and",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_corpus_is_one_line(case, tmp_path):
    files, rule = BAD_FILES[case]
    for name, content in files.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^data.path=.*{rule}"):
        read(tmp_path / "in")


BAD_SETTINGS = [
    ({"name": "txt"}, "data=txt.*did you mean text?"),
    ({"name": "text"}, "data.path=null: data=text"),
    ({"name": "bin"}, "data.path=null.*train.bin"),
    ({"path": "x"}, "data.path=x: only data=text or data=bin or data=written reads it"),
    ({"fraction": 0.0}, "data.fraction=0.0"),
    ({"fraction": float("nan")}, "data.fraction=nan"),
    ({"val_fraction": 1.0}, "data.val_fraction=1.0"),
    ({"vocab_size": 256}, "data.vocab_size=256.*257"),
    ({"vocab_size": 0, "tokenizer": "ids"}, "data.vocab_size=0"),
]


@pytest.mark.parametrize("changes, rule", BAD_SETTINGS)
def test_a_bad_setting_is_one_line(changes, rule):
    with pytest.raises(UserError, match=f"^{rule}"):
        DataConfig(**changes)


def test_whole_documents_are_held_out_whatever_the_order_of_files():
    sizes = np.exp(np.random.default_rng(0).normal(5, 1, 300)).astype(int)
    documents = [f"{number} " + "é" * size for number, size in enumerate(sizes)]
    documents += ["twice " * 30] * 2
    train, val = split_documents(documents, 0.1)
    assert (train, val) == split_documents(documents[::-1], 0.1)
    assert sorted(train + val) == sorted(documents)
    assert not set(train) & set(val)
    num_bytes = len("".join(documents).encode())
    num_held_out = len("".join(val).encode())
    assert 0.09 < num_held_out / num_bytes <= 0.1
    numbers = [int(text.split()[0]) for text in train if not text.startswith("twice")]
    assert abs(np.corrcoef(numbers, range(len(numbers)))[0, 1]) < 0.2  # no trace of that order


BOOK = "chapter äöü🙂 " * 100
CUT = {
    "one": ([BOOK], [130]),
    "two copies": ([BOOK] * 2, [130]),
    "two": (["a" * 1000, "b" * 1000], [100, 100]),
    # a small document that fits is not all that is held out
    "a licence": (["a" * 60_000, "b" * 60_000, "copied " * 140], [6000, 6000, 98]),
    # nanoGPT's Shakespeare: 1,003,854 characters to train on
    "nanogpt": (["s" * 1_115_394], [111_540]),
    "a letter": (["a"], [1]),
}


@pytest.mark.parametrize("case", CUT)
def test_of_few_texts_the_last_part_of_each_is_held_out(case):
    documents, sizes = CUT[case]
    train, val = split_documents(documents, 0.1)
    assert [len(text) for text in val] == sizes
    whole = [first + last for first, last in zip(train, val, strict=False)]
    assert whole == list(dict.fromkeys(documents)) or case == "a letter"


def test_no_fine_tuning_row_is_cut():
    rows = []
    for letter, size in (("a", 900), ("b", 900), ("c", 20)):
        rows.append(FineTuningRow((("prompt", "p"), ("completion", letter * size)), "x:1"))
    assert split_documents(rows, 0.1)[1] == rows[2:]
    with pytest.raises(UserError, match="data.val_fraction=0.1: none of 2 fine-tuning row"):
        split_documents(rows[:2], 0.1)
