"""One file to its documents, whatever it is called and however it is packed."""

import builtins
import gzip
import json
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data.documents import FineTuningRow, read_file
from data.files import FileList
from engine import UserError

ROWS = [{"text": "one"}, {"text": "two", "id": 7}]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": None}]
LINES = '{"text": "one"}\r\n\r\n{"text": "two", "id": 7}\r\n'
LIST = json.dumps(ROWS, indent=2)
DOCUMENTS = ["one", "two"]  # of LINES and of LIST
MARKED = "one\n<|endoftext|>\ntwo\n"
MARKED_DOCUMENTS = ["one\n", "two\n"]
IN_CODE = 'END = "<|endoftext|>"\n# <|endoftext|> ends it\n'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(name, content, given=False):
    """(documents, remarks) of a file of that content."""
    if isinstance(content, str):
        content = content.encode()
    Path(name).write_bytes(content)
    found = FileList()
    return read_file(Path(name), found, given), list(found.remarks)


def zst(*texts):
    return b"".join(zstandard.compress(text.encode()) for text in texts)


# (name, content, documents)
READ = [
    ("x.jsonl", LINES, DOCUMENTS),
    ("x.JSONL", LINES, DOCUMENTS),
    ("x.NdJson", LINES, DOCUMENTS),
    ("x.jsonl.1", LINES, DOCUMENTS),
    ("x.json", LIST, DOCUMENTS),
    ("x.JSON", LIST, DOCUMENTS),
    ("x.jsonl", LIST, DOCUMENTS),
    ("x.json", LINES, DOCUMENTS),
    ("x.json", LIST.encode("utf-8-sig"), DOCUMENTS),
    ("x.json", '{\n"text": "one"\n}', ["one"]),
    ("x.json.GZ", gzip.compress(LIST.encode()), DOCUMENTS),
    ("x.jsonl.zst", zst(LINES), DOCUMENTS),
    ("x.jsonl.zst", zst(LINES, '{"text": "three"}\n'), ["one", "two", "three"]),
    ("x.jsonl", "", []),
    ("x.jsonl", '{"text": null}', [""]),
    ("x.json", "[]", []),
    ("x.txt", "one ü".encode("utf-16"), ["one ü"]),
    ("x.txt", "", [""]),
    ("x", "no suffix", ["no suffix"]),
    ("x.txt", MARKED, MARKED_DOCUMENTS),
    ("x.txt", "one\r\n \t<|endoftext|> \r\ntwo", ["one\r\n", "two"]),
    ("x.txt", "one\n<|endoftext|>", ["one\n", ""]),
    ("x.txt.zst", zst(MARKED), MARKED_DOCUMENTS),
    ("x.txt.gz", gzip.compress(MARKED.encode()), MARKED_DOCUMENTS),
    ("x.py", IN_CODE, [IN_CODE]),
    ("x.md", "so <|endoftext|>\n", ["so <|endoftext|>\n"]),
]


@pytest.mark.parametrize("name, content, documents", READ)
def test_a_file_is_read_as_what_it_is(name, content, documents):
    assert read(name, content)[0] == documents
    assert read(name, content, given=True)[0] == documents


PACKAGE = '{"name": "x", "messages": {"hello": "Hello"}}'
SETTINGS = '{\n  // a comment\n  "strict": true\n}'
ALPACA = [{"instruction": "i", "output": "o"}] * 2
TEXT = "JSON file(s) without rows read as text"
LISTS = "JSON list(s) without rows skipped"
TABLES = "table(s) skipped: write them as .jsonl or .parquet"
BINARY = "skipped that are not UTF-8 text"
MARKS = "cut into documents at lines of <|endoftext|>"
# In a folder: (name, content, documents, remarks)
REMARKS = [
    ("package.json", PACKAGE, [PACKAGE], [TEXT]),
    ("tsconfig.json", SETTINGS, [SETTINGS], [TEXT]),
    ("x.json", json.dumps(ALPACA), None, [LISTS]),
    ("x.json", "\n".join(map(json.dumps, ALPACA)), None, [LISTS]),
    ("x.json", json.dumps([ROWS]), None, [LISTS]),
    ("x.json", '[{"text": "cut sho', None, [LISTS]),
    ("x.csv", "text\none\n", None, [TABLES]),
    ("x.TSV.gz", b"", None, [TABLES]),
    ("x.png", b"\x89PNG\0", None, [BINARY]),
    ("x.txt", "é".encode("latin-1"), None, [BINARY]),
    ("x.txt", "a".encode("utf-32"), None, [BINARY]),
    ("x.txt", MARKED, MARKED_DOCUMENTS, [MARKS]),
    ("x.jsonl", LINES, DOCUMENTS, []),
]


@pytest.mark.parametrize("name, content, documents, remarks", REMARKS)
def test_what_else_a_folder_holds_is_told(name, content, documents, remarks):
    assert read(name, content) == (documents, remarks)
    if name.endswith(".json"):
        with pytest.raises(UserError, match=rf"^data.path={name}[\[:]\d\]?: neither"):
            read(name, content, given=True)


BROKEN = [
    ("x.gz", b"not packed"),
    ("x.GZ", gzip.compress(b"cut short" * 99)[:-12]),
    ("x.gz", gzip.compress(b"xyz" * 9)[:12] + b"\xff" * 30),
    ("x.zst", b"not packed"),
    ("x.zst", zst("cut short")[:-3]),
    ("x.zst", zst("whole") + b"and more"),
    ("x.parquet", b"not packed"),
    ("x.parquet", b"PAR1" * 9),
]


@pytest.mark.parametrize("name, content", BROKEN)
def test_a_broken_file_is_refused_and_named(name, content):
    with pytest.raises(UserError, match=f"^data.path={name}: cannot be unpacked .*; fetch it"):
        read(name, content)


GOOD = '{"prompt": "x", "completion": "good"}'
BAD_ENTRIES = [
    "{oops",
    "[1]",
    '"text"',
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


@pytest.mark.parametrize("entry", BAD_ENTRIES)
def test_a_bad_row_is_named(entry):
    for name in ("x.jsonl", "x.json"):
        with pytest.raises(UserError, match=f"^data.path={name}:3: neither"):
            read(name, f"{GOOD}\n\n{entry}")
    if entry != "{oops":
        with pytest.raises(UserError, match=r"^data.path=x.json\[1\]: neither"):
            read("x.json", f"[{GOOD}, {entry}]")


def write_parquet(columns, name="x.parquet"):
    parquet.write_table(pyarrow.table(columns), name, row_group_size=2)
    return read_file(Path(name), FileList())


def test_a_parquet_file_is_rows():
    texts = ["one", None, "three"]
    documents = ["one", "", "three"]
    for kind in (pyarrow.string(), pyarrow.large_string()):
        assert write_parquet({"id": [1, 2, 3], "text": pyarrow.array(texts, kind)}) == documents
    coded = pyarrow.array(texts).dictionary_encode()
    assert write_parquet({"text": coded}, "x.PARQUET") == documents
    assert write_parquet({"text": pyarrow.array([], pyarrow.string())}) == []

    (chat,) = write_parquet({"messages": [CHAT], "prompt": ["q"]})
    assert chat == FineTuningRow((("user", "q"), ("assistant", "a")), "")
    (pair,) = write_parquet({"completion": ["a"], "prompt": ["q"]})
    assert pair == FineTuningRow((("prompt", "q"), ("completion", "a")), "")


def test_a_parquet_file_without_rows_is_refused():
    with pytest.raises(UserError, match="x.parquet: has the columns id, body; rename one to text"):
        write_parquet({"id": [1], "body": ["one"]})
    with pytest.raises(UserError, match=r"^data.path=x.parquet\[2\]: neither"):
        write_parquet({"prompt": ["q"] * 3, "completion": ["a", "b", None]})
    with pytest.raises(UserError, match=r"^data.path=x.parquet\[0\]: neither"):
        write_parquet({"text": [1]})


@pytest.mark.parametrize("name, library", [("x.parquet", "pyarrow"), ("x.txt.zst", "zstandard")])
def test_a_missing_library_is_one_line(name, library, monkeypatch):
    plain = builtins.__import__

    def absent(module, *args):
        if module == library:
            raise ImportError
        return plain(module, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=f"{name}: reading it takes {library}; pip install -e '"):
        read(name, b"")
