"""Files to documents, and which of them are held out."""

import gzip

import numpy as np
import pytest

from data import DataConfig
from data.corpora import find_files, read_corpus, split_documents
from data.documents import FineTuningRow
from engine import UserError


def read(path, say=print):
    config = DataConfig(name="text", path=str(path))
    return read_corpus(config, find_files(config), say)


def test_a_folder_of_several_kinds_is_one_corpus(tmp_path):
    files = {
        "b.txt": "\ufeffplain é".encode(),
        "a/c.txt.gz": gzip.compress(b"packed"),
        "d.JSONL": b'{"text": "one\xe2\x80\xa8two"}\n\n{"text": ""}',  # U+2028 ends no line
        "e.json": b'[{"text": "four"}]',
        "f.md": b" \n",
        "g.py": b"code",
        "image.png": b"\x89PNG\0\0",
        "package.json": b"{}",
        ".hidden/x.txt": b"hidden",
    }
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    lines = []
    documents = read(tmp_path, lines.append)
    assert documents == ["packed", "plain é", "one\u2028two", "four", "code", "{}"]
    assert lines == [
        "data: 7 files: 2 .json, 1 .txt.gz, 1 .txt, 1 .jsonl, 1 .md, 1 .py; 1 skipped that are not"
        f" UTF-8 text (first: {tmp_path}/image.png); 1 JSON file(s) without rows read as text"
        f" (first: {tmp_path}/package.json); 6 documents"
    ]

    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "completion": "y"}')
    first = f"the first in {tmp_path}/a/c.txt.gz and {tmp_path}/rows.jsonl"
    with pytest.raises(
        UserError, match=f"^data.path={tmp_path}: 6 texts and 1 fine-tuning rows, {first}"
    ):
        read(tmp_path)


GIVEN = [
    ("x.csv", b"text", "0 texts .* 1 table.s. skipped: write them as .jsonl"),
    ("x.png", b"\0", "0 texts .* 1 skipped that are not UTF-8 .*data=bin"),
    ("x.txt", b"\n", "0 texts and 0 fine-tuning rows in 1 file: 1 .txt"),
]


@pytest.mark.parametrize("name, content, rule", GIVEN)
def test_a_file_without_text_is_refused(tmp_path, name, content, rule):
    file = tmp_path / name
    file.write_bytes(content)
    for path in (file, tmp_path):
        with pytest.raises(UserError, match=f"^data.path={path}: {rule}"):
            read(path)
    file.with_name("package.json").write_text("{}")
    with pytest.raises(UserError, match="package.json.0.: neither"):
        read(tmp_path / "package.json")


def test_the_standard_library_without_its_tests():
    files = find_files(DataConfig()).files
    assert len(files) > 300
    for file in files:
        assert not {"test", "tests", "site-packages"} & set(file.parts[-3:])


BAD_SETTINGS = [
    ("prompts", "x", "data.prompts=x: data=stdlib does not read it"),
    ("fraction", float("nan"), "data.fraction=nan"),
    ("val_fraction", 1.5, "data.val_fraction=1.5"),
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
    ([BOOK] * 2, [130, 130]),  # copies stay, all cut at the same place
    (["a" * 60_000, BOOK, "b" * 60_000, BOOK], [6000, 130, 6000, 130]),
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
    assert whole == documents


@pytest.mark.parametrize("documents", [["a"], [BOOK] * 2, list("abcdefghijkl")])
def test_all_of_a_text_can_be_held_out(documents):
    assert split_documents(documents, 1.0) == ([], documents)


def test_no_fine_tuning_row_is_cut():
    answers = ("a" * 900, "b" * 900, "c")
    rows = [FineTuningRow((("completion", answer),), "x:1") for answer in answers]
    assert split_documents(rows, 0.1)[1] == rows[2:]
    assert split_documents(rows[:2], 0.1)[1] == []
