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
from data.corpora import find_files, read_corpus, split_documents
from data.tokenizer import make_tokenizer
from data.tokens import write_ids
from engine import UserError
from engine.checkpoint import sha256

ROOT = Path(__file__).parent.parent
END = "<|endoftext|>"
WORDS = "".join(f"word{number} and another, " for number in range(400))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A text, fine-tuning rows, and nanoGPT's token files in a folder."""
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text(WORDS)
    with open("rows.jsonl", "w") as file:
        for number in range(9):
            row = {"prompt": f"{number}", "completion": f"b{number}"}
            print(json.dumps(row), file=file)
    Path("bins").mkdir()
    ids = np.arange(50, dtype=np.uint16)
    ids.tofile("bins/train.bin")
    ids[:40].tofile("bins/val.bin")


def make(path="x.txt", say=print, **changes):
    settings = {"name": "text", "tokenizer": "bytes", "cache_dir": "cache"}
    config = DataConfig(path=path, **settings | changes)
    return prepare(config, say)


def make_bins(say=print, **changes):
    settings = {"name": "bin", "tokenizer": "ids", "vocab_size": 50}
    return make("bins", say, **settings | changes)


def make_rows():
    return make("rows.jsonl", val_fraction=0.5)


@pytest.mark.parametrize("tokenizer", ["bytes", "char", "bpe"])
def test_each_document_follows_one_end_of_text(tokenizer):
    Path("in").mkdir()
    for number in range(60):
        text = f"document {number} é " * (number + 20)
        Path(f"in/{number}.txt").write_text(text)
    found = make("in", tokenizer=tokenizer, vocab_size=300)
    config = DataConfig(name="text", path="in")
    documents = read_corpus(config, find_files(config))
    train, val = split_documents(documents, 0.1)
    end = "" if tokenizer == "char" else END
    for ids, side in ((found.train, train), (found.val, val)):
        assert isinstance(ids, np.memmap)
        text = found.tokenizer.decode(ids)
        assert text == "".join(end + document for document in side)
    content = "".join(val).encode()
    assert found.val_bytes == len(content)


def test_bpe_sees_the_training_side_alone_and_char_both():
    Path("x.txt").write_text("ab " * 900 + "zq" * 150)
    tokenizer = make(tokenizer="bpe", vocab_size=300).tokenizer
    for token in range(tokenizer.vocab_size):
        assert tokenizer.token_bytes(token) != b"zq"
    chars = make(tokenizer="char").tokenizer.content["chars"]
    assert chars == [" ", "a", "b", "q", "z"]


@pytest.mark.parametrize(
    "size, dtype",
    [(65536, np.uint16), (65537, np.uint32)],
)
def test_ids_are_uint16_up_to_65536_entries(size, dtype):
    tokenizer = make_tokenizer("bytes", 257, [])
    tokenizer.vocab_size = size
    tokenizer.eot = size - 1
    tokenizer.bos = 7
    assert tokenizer.dtype == dtype
    texts = ["h", "é"]
    write_ids(texts, tokenizer, Path("x.bin"))
    ids = np.fromfile("x.bin", dtype)
    opening = [size - 1, 7]
    assert ids.tolist() == [*opening, *b"h", *opening, 0xC3, 0xA9]


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_text_is_cut_into_pieces_unless_each_would_begin_with_a_space(prefixed, monkeypatch):
    tokenizer = make_tokenizer("bytes", 257, [])
    tokenizer.prefixed = prefixed
    encode = tokenizer.encode_batch
    pieces = []
    monkeypatch.setattr("data.encodings.MIN_PIECE", 7)

    def watch(texts):
        pieces.extend(texts)
        return encode(texts)

    monkeypatch.setattr(tokenizer, "encode_batch", watch)
    write_ids([WORDS], tokenizer, Path("x.bin"))
    ids = np.fromfile("x.bin", np.uint16)
    assert ids.tolist() == [256, *WORDS.encode()]
    assert (len(pieces) == 1) == prefixed


def test_a_second_run_reuses_and_a_change_is_noticed(monkeypatch):
    lines = []
    first = make(say=lines.append)
    assert "made first" in lines[0]
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "read_corpus", lambda *a: pytest.fail("the corpus was read again"))
        again = make(say=lines.append, fraction=0.5, vocab_size=999, document_mask=True)
    assert "reusing" in lines[2]
    assert again.fingerprint == first.fingerprint
    assert again.identity != first.identity

    folders = {first.folder}
    for changes in (
        {"val_fraction": 0.2},
        {"tokenizer": "bpe", "vocab_size": 300},
        {"tokenizer": "bpe", "vocab_size": 301},
    ):
        folders.add(make(**changes).folder)
    Path("x.txt").write_text(WORDS.replace("word7", "w0rd7"))  # of the same length
    os.utime("x.txt", ns=(1, 1))
    changed = make()
    assert len(folders | {changed.folder}) == 5
    assert changed.fingerprint != first.fingerprint


KILLED = """
import os
from data import DataConfig, prepare, tokens
plain = tokens.sha256
def kill(file):
    if file.name == "val.bin":
        os.kill(os.getpid(), 9)
    return plain(file)
tokens.sha256 = kill
config = DataConfig(name="text", path="x.txt", tokenizer="bytes", cache_dir="cache")
prepare(config)
"""


def test_a_killed_build_leaves_nothing_half_valid():
    command = [sys.executable, "-c", KILLED]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True)
    assert result.returncode == -signal.SIGKILL
    (scratch,) = Path("cache").iterdir()
    assert scratch.name.startswith(".tmp-")
    assert not (scratch / "meta.json").exists()
    found = make()
    num_tokens = len(found.train) + len(found.val)
    assert num_tokens == len(WORDS) + 2


def test_a_failed_build_cleans_up_and_a_damaged_one_is_told(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "write_atomic", full)
        with pytest.raises(OSError, match="No space left"):
            make()
    assert not list(Path("cache").iterdir())
    (make().folder / "val.bin").write_bytes(b"12")
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
    lines = []
    found = make_bins(lines.append)
    assert isinstance(found.train, np.memmap)
    assert found.train.tolist() == list(range(50))
    assert found.val_bytes is None
    assert len(lines) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "sha256", lambda file: pytest.fail("read again"))
        assert make_bins().fingerprint == found.fingerprint
    Path("bins/val.bin").write_bytes(bytes(78))
    assert make_bins().fingerprint != found.fingerprint


BAD_BINS = [
    ("ids", "val.bin", b"\62\0", "data.path=.*val.bin: holds token 50, ids has 50"),
    ("bpe", "val.bin", b"1234", "data.tokenizer=bpe: .*data.tokenizer=gpt2"),
    ("gpt2", "meta.pkl", b"", "data.tokenizer=gpt2: .*data=text .*data.tokenizer=char"),
]


@pytest.mark.parametrize("tokenizer, name, content, rule", BAD_BINS)
def test_bad_bins_are_one_line(tokenizer, name, content, rule):
    file = Path("bins", name)
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{rule}"):
        make_bins(tokenizer=tokenizer)


def test_documents_of_text_are_told_apart_on_demand():
    plain = make()
    found = make(document_mask=True)
    assert found.folder == plain.folder
    assert plain.blocks("train", 16).bos is None
    assert found.blocks("train", 16).bos == 256
    with pytest.raises(UserError, match="^data.document_mask=true: tokenizer ids has no token"):
        make_bins(document_mask=True).check_length(8)


def test_rows_have_masks_that_are_in_the_fingerprint():
    found = make_rows()
    assert found.val_bytes is None
    starts = found.train_mask == 2
    assert (found.train[starts] == 256).all()
    trained = found.train[found.train_mask == 1]
    answers = found.tokenizer.decode(trained).split(END)
    assert all(answer.startswith("b") for answer in answers[:-1])
    meta = (found.folder / "meta.json").read_text()
    sums = json.loads(meta)["sha256"]
    names = ["train.bin", "train.mask.bin", "val.bin", "val.mask.bin"]
    assert sums == {name: sha256(found.folder / name) for name in names}


def test_rows_whose_prompts_fill_a_block_are_one_line():
    with pytest.raises(UserError, match="^model.block_size=1: .* train tokens do not fill a block"):
        make_rows().check_length(1)


def test_a_document_without_a_label_is_left_out(monkeypatch):
    documents = [
        ([1, 2, 3], [0, 0, 1]),
        ([4, 5], [0, 0]),
        ([6], [1]),
    ]
    monkeypatch.setattr(Tokenizer, "encode_row", lambda tokenizer, turns: documents)
    found = make_rows()
    assert set(found.train) == {1, 2, 3}
    assert found.train_mask[:4].tolist() == [2, 0, 1, 2]


def test_a_row_that_a_template_refuses_is_named(monkeypatch):
    def refuse(tokenizer, turns):
        raise UserError("the chat template refuses it")

    monkeypatch.setattr(Tokenizer, "encode_row", refuse)
    with pytest.raises(UserError, match="^data.path=rows.jsonl:[0-9]: the chat template refuses"):
        make_rows()


def test_too_little_text_is_one_line():
    Path("x.txt").write_text("a")
    with pytest.raises(UserError, match="^data.path=.*too little to train on"):
        make()


MODELS = [
    ("bytes", 300, None),
    (None, 257, None),
    (None, 200, "run: its vocabulary .200 .*bytes .257.; set data.tokenizer=run,"),
    ("bpe", 300, "run: its vocabulary .300 .*bytes .257.; set"),
]


@pytest.mark.parametrize("tokenizer, vocab_size, rule", MODELS)
def test_a_model_that_reads_other_tokens_is_refused(tokenizer, vocab_size, rule):
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    if tokenizer:
        make_tokenizer(tokenizer, 300, [WORDS]).save("run")
    make_bins().check_model("run", vocab_size, "teacher.path")  # bare ids are anybody's
    found = make()
    if rule is None:
        found.check_model("run", vocab_size, "teacher.path")
        return
    with pytest.raises(UserError, match=f"^teacher.path={rule}"):
        found.check_model("run", vocab_size, "teacher.path")
