"""Token files: made, found again, killed, and read."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import DataConfig, Tokenizer, prepare, tokens
from data.corpora import split_documents
from data.tokenizer import make_tokenizer
from data.tokens import write_ids
from engine import UserError, checkpoint

ROOT = Path(__file__).parent.parent
END = "<|endoftext|>"
WORDS = "".join(f"word{number} and another, " for number in range(400))
ROW = '{"prompt": "%d", "completion": "b%d"}\n'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A text, fine-tuning rows, and nanoGPT's token files in a folder."""
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text(WORDS)
    rows = [ROW % (number, number) for number in range(9)]
    Path("rows.jsonl").write_text("".join(rows))
    Path("bins").mkdir()
    ids = np.arange(50, dtype=np.uint16)
    ids.tofile("bins/train.bin")
    ids[:40].tofile("bins/val.bin")


def make(path="x.txt", say=print, **changes):
    settings = {"name": "text", "tokenizer": "bytes", "cache_dir": "cache"}
    return prepare(DataConfig(path=path, **settings | changes), say)


def make_bins(say=print, **changes):
    settings = {"name": "bin", "tokenizer": "ids", "vocab_size": 50}
    return make(**{"path": "bins", "say": say} | settings | changes)


def make_rows():
    return make("rows.jsonl", val_fraction=0.5)


@pytest.mark.parametrize("tokenizer", ["bytes", "char", "bpe"])
def test_each_document_follows_one_end_of_text(tokenizer):
    Path("in").mkdir()
    documents = []
    for number in range(60):
        text = f"document {number} é " * (number + 20)
        documents.append(text)
        Path(f"in/{number}.txt").write_text(text)
    found = make("in", tokenizer=tokenizer, vocab_size=300)
    end = "" if tokenizer == "char" else END
    train, val = split_documents(documents, 0.1)
    for ids, side in ((found.train, train), (found.val, val)):
        text = found.tokenizer.decode(ids)
        assert text == "".join(end + document for document in side)
    content = "".join(val).encode()
    assert found.val_bytes == len(content)


def test_bpe_sees_the_training_side_alone_and_char_both():
    Path("x.txt").write_text("ab " * 900 + "zq" * 150)
    bpe = make(tokenizer="bpe", vocab_size=300).tokenizer
    tokens = range(bpe.vocab_size)
    words = [bpe.token_bytes(token) for token in tokens]
    assert b"ab" in words
    assert b"zq" not in words
    char = make(tokenizer="char").tokenizer
    assert char.chars == [" ", "a", "b", "q", "z"]


@pytest.mark.parametrize(
    "size, dtype",
    [(65536, np.uint16), (65537, np.uint32)],
)
def test_ids_are_uint16_up_to_65536_entries(size, dtype, monkeypatch):
    tokenizer = make_tokenizer("bytes")
    tokenizer.vocab_size = size
    tokenizer.eot = size - 1
    tokenizer.bos = 7
    opening = [size - 1, 7]

    def check():
        write_ids([WORDS, "é"], tokenizer, Path("x.bin"))
        ids = np.fromfile("x.bin", dtype)
        assert ids.tolist() == [*opening, *WORDS.encode(), *opening, 0xC3, 0xA9]

    monkeypatch.setattr("data.encodings.MIN_PIECE", 7)
    check()
    tokenizer.prefixed = True  # each piece would begin with a space
    monkeypatch.setattr(tokens, "cut_into_pieces", None)
    check()


def test_a_second_run_reuses_and_a_change_is_noticed(monkeypatch):
    first = make()
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "read_corpus", lambda *a: pytest.fail("the corpus was read again"))
        again = make(fraction=0.5, vocab_size=999, document_mask=True)
    assert again.fingerprint == first.fingerprint
    assert again.identity != first.identity

    others = [
        make(val_fraction=0.2),
        make(tokenizer="bpe", vocab_size=300),
        make(tokenizer="bpe", vocab_size=301),
    ]
    Path("x.txt").write_text(WORDS.replace("word7", "w0rd7"))  # of the same length
    os.utime("x.txt", ns=(1, 1))
    others.append(make())
    folders = {found.folder for found in others}
    assert len(folders | {first.folder}) == 5
    assert others[-1].fingerprint != first.fingerprint


def test_the_same_text_elsewhere_is_the_same_tokens():
    bpe = {"tokenizer": "bpe", "vocab_size": 300}
    first = make(**bpe)
    absolute = Path("x.txt").resolve()
    assert make("./x.txt", **bpe).folder == first.folder
    assert make(absolute, **bpe).folder == first.folder
    Path("away").mkdir()
    Path("away/other.txt").write_text(WORDS)
    for path in ("away/other.txt", "away"):
        copy = make(path, cache_dir="elsewhere", **bpe)
        assert copy.folder != first.folder
        assert copy.fingerprint == first.fingerprint


def test_a_corpus_never_holds_what_was_written_into_it(monkeypatch):
    Path("in").mkdir()
    monkeypatch.chdir("in")
    Path("x.txt").write_text(WORDS)
    first = make(".")
    make_bins(path="../bins")
    tokenizer = make_tokenizer("bytes")
    checkpoint.save(Path("runs/a"), 1, tokenizer.save, {})
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/step-00000001/config.json"):
        Path("runs/a", name).write_text("{}")
    again = make(".")
    assert again.folder == first.folder


def test_all_of_a_text_is_held_out_to_measure_on():
    for path in ("x.txt", "rows.jsonl"):
        found = make(path, val_fraction=1.0)
        assert len(found.train) == 0
        found.check_length(8, splits=("val",))
        with pytest.raises(UserError, match="^data.val_fraction=1: holds out all .*; set data.val"):
            found.check_length(8)
        with pytest.raises(UserError, match="^data.val_fraction=1: leaves no text that .*=bpe"):
            make(path, tokenizer="bpe", vocab_size=300, val_fraction=1.0)
    assert len(np.flatnonzero(found.val_mask == 2)) == 9

    found = make(val_fraction=1.0)
    content = WORDS.encode()
    assert found.val.tolist() == [256, *content]
    assert found.val_bytes == len(content)
    assert found.blocks("val", 16).to_the_end
    assert not make().blocks("val", 16).to_the_end

    Path("x.txt").write_text("a")
    blocks = make(val_fraction=1.0).blocks("val", 16)
    assert len(blocks) == 1


KILLED = """
import os
from data import DataConfig, prepare, tokens
plain = tokens.sha256
def kill(file):
    if file.name == "val.bin":
        os.kill(os.getpid(), 9)
    return plain(file)
tokens.sha256 = kill
prepare(DataConfig(name="text", path="x.txt", tokenizer="bytes", cache_dir="cache"))
"""


def test_a_killed_build_leaves_nothing_half_valid():
    command = [sys.executable, "-c", KILLED]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True)
    assert result.returncode == -signal.SIGKILL
    assert not list(Path("cache").glob("*/meta.json"))
    found = make()
    num_tokens = len(found.train) + len(found.val)
    assert num_tokens == len(WORDS) + 2


def test_a_failed_build_cleans_up_and_a_short_file_is_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "write_atomic", lambda *args: os.stat("nowhere"))
        with pytest.raises(OSError, match="nowhere"):
            make()
    assert os.listdir("cache") == []

    val_file = make().folder / "val.bin"
    val_file.write_bytes(b"12")
    with pytest.raises(ValueError, match="length is greater than file size"):
        make()


def test_another_process_that_made_the_same_meanwhile_wins(monkeypatch):
    made = make(cache_dir="other").folder

    def slow(*args):
        if made.exists():
            made.rename(Path("cache", made.name))
        return write_ids(*args)

    monkeypatch.setattr(tokens, "write_ids", slow)
    assert len(make().train) > 0
    assert os.listdir("cache") == [made.name]


def test_bins_are_mapped_and_read_once(monkeypatch):
    found = make_bins()
    assert found.train.tolist() == list(range(50))
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "sha256", lambda file: pytest.fail("read again"))
        assert make_bins().fingerprint == found.fingerprint
    Path("bins/val.bin").write_bytes(bytes(78))
    assert make_bins().fingerprint != found.fingerprint


BAD_BINS = [
    ("ids", "val.bin", b"\62\0", "data.path=.*val.bin: holds token 50, ids has 50"),
    ("ids", "val.bin", b"", "data.path=.*val.bin: cannot mmap an empty file; write it with"),
    ("ids", "train.bin", b"123", "data.path=.*train.bin: Size of .*; write it with"),
    ("bpe", "val.bin", b"1234", "data.tokenizer=bpe: .*data.tokenizer=gpt2"),
    ("gpt2", "meta.pkl", b"", "data.tokenizer=gpt2: .*data=text .*data.tokenizer=char"),
]


@pytest.mark.parametrize("tokenizer, name, content, rule", BAD_BINS)
def test_bad_bins_are_one_line(tokenizer, name, content, rule):
    Path("bins", name).write_bytes(content)
    with pytest.raises(UserError, match=f"^{rule}"):
        make_bins(tokenizer=tokenizer)


def test_documents_of_text_are_told_apart_on_demand():
    plain = make()
    found = make(document_mask=True)
    assert found.folder == plain.folder
    assert plain.blocks("train", 16).bos is None
    assert found.blocks("train", 16).bos == 256
    Path("x.txt").write_text("a")
    with pytest.raises(UserError, match="^data.path=x.txt: too little to train on"):
        make()
    with pytest.raises(UserError, match="^data.document_mask=true: tokenizer ids has no token"):
        make_bins(document_mask=True).check_length(8)


def test_rows_have_masks_that_are_in_the_fingerprint():
    found = make_rows()
    assert found.val_bytes is None
    starts = found.train[found.train_mask == 2]
    assert (starts == 256).all()
    trained = found.train[found.train_mask == 1]
    assert set(trained) <= {*b"b012345678", 256}
    meta = (found.folder / "meta.json").read_text()
    assert "train.mask.bin" in json.loads(meta)["sha256"]

    lines = []
    found.check_length(2, lines.append)
    assert "train documents are longer than model.block_size=2 and cut" in lines[0]
    with pytest.raises(UserError, match="^model.block_size=1: .* train tokens do not fill a block"):
        found.check_length(1)
    with pytest.raises(UserError, match="^block_size=1: .* val tokens .*set another block_size"):
        found.check_length(1, splits=("val",), key="block_size")


def test_a_document_without_a_label_is_left_out(monkeypatch):
    documents = [
        ([1, 2, 3], [0, 0, 1]),
        ([4, 5], [1, 0]),
    ]
    monkeypatch.setattr(Tokenizer, "encode_row", lambda tokenizer, turns: documents)
    found = make_rows()
    assert set(found.train) == {1, 2, 3}
    assert found.train_mask[:4].tolist() == [2, 0, 1, 2]


def test_a_row_that_a_template_refuses_is_named(monkeypatch):
    def refuse(tokenizer, turns):
        raise UserError("roles must alternate")

    monkeypatch.setattr(Tokenizer, "encode_row", refuse)
    with pytest.raises(UserError, match="^data.path=rows.jsonl:[0-9]: roles must alternate; mend"):
        make_rows()


@pytest.mark.parametrize("tokenizer, vocab_size", [(None, 200), ("bpe", 300)])
def test_a_model_that_reads_other_tokens_is_refused(tokenizer, vocab_size):
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    if tokenizer:
        make_tokenizer(tokenizer, 300, [WORDS]).save("run")
    make_bins().check_model("run", vocab_size, "teacher.path")  # bare ids are anybody's
    rule = f"run: its vocabulary .{vocab_size} .* bytes .257.; give another teacher.path, or"
    with pytest.raises(UserError, match=f"^teacher.path={rule}"):
        make().check_model("run", vocab_size, "teacher.path")
