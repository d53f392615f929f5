"""Token files: made, found again, killed, and read."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from conf.schema import Config
from data import DataConfig, Tokenizer, prepare, tokens
from data.corpora import find_files, read_corpus, split_documents
from data.tokenizer import make_tokenizer
from data.tokens import id_dtype, open_tokens, write_ids
from engine import UserError
from engine.checkpoint import sha256
from engine.logger import read_metrics
from engine.optim import OptimConfig
from model import ModelConfig
from model.loss import LossConfig
from teachers.online import TeacherConfig

ROOT = Path(__file__).parent.parent
END = "<|endoftext|>"
WORDS = "".join(f"word{number} and another, " for number in range(400))


def quiet(line):
    pass


def make(path, say=quiet, **changes):
    settings = {"name": "text", "path": str(path), "tokenizer": "bytes"}
    settings["cache_dir"] = str(path.parent / "cache")
    return prepare(DataConfig(**settings | changes), say, progress=False)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text(WORDS)
    return file


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    for number in range(9):
        row = {"prompt": f"{number}", "completion": f"b{number}"}
        with open(file, "a") as stream:
            stream.write(json.dumps(row) + "\n")
    return file


@pytest.mark.parametrize("tokenizer", ["bytes", "char", "bpe"])
def test_each_document_follows_one_end_of_text(tokenizer, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"document {number} é " * (number + 20))
    found = make(folder, tokenizer=tokenizer, vocab_size=300)
    config = DataConfig(name="text", path=str(folder))
    documents = read_corpus(config, find_files(config))
    train, val = split_documents(documents, 0.1)
    end = "" if tokenizer == "char" else END
    for ids, side in ((found.train, train), (found.val, val)):
        assert isinstance(ids, np.memmap)
        assert found.tokenizer.decode(ids) == "".join(end + document for document in side)
    assert found.val_bytes == sum(len(document.encode()) for document in val)


def test_bpe_sees_the_training_side_alone_and_char_both(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("ab " * 900 + "zq" * 150)
    tokenizer = make(file, tokenizer="bpe", vocab_size=300).tokenizer
    assert b"zq" not in [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    tokenizer = make(file, tokenizer="char").tokenizer
    assert "".join(tokenizer.content["chars"]) == " abqz"


def test_ids_are_uint16_up_to_65536_entries(tmp_path):
    tokenizer = make_tokenizer("bytes", 257, [])
    for size, dtype in ((65536, np.uint16), (65537, np.uint32)):
        assert id_dtype(size) is dtype
        tokenizer.vocab_size = size
        tokenizer.eot = size - 1
        tokenizer.bos = 7
        count = write_ids(["h", "é"], tokenizer, tmp_path / "x.bin", progress=False)
        ids = np.fromfile(tmp_path / "x.bin", dtype)
        eot = size - 1
        assert ids.tolist() == [eot, 7, 104, eot, 7, 0xC3, 0xA9]
        assert count == len(ids)


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_text_is_cut_into_pieces_unless_each_would_begin_with_a_space(
    prefixed, tmp_path, monkeypatch
):
    tokenizer = make_tokenizer("bytes", 257, [])
    tokenizer.prefixed = prefixed
    seen = []
    monkeypatch.setattr("data.encodings.MIN_PIECE", 7)
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda texts: seen.extend(texts) or [[]] * len(texts)
    )
    write_ids([WORDS], tokenizer, tmp_path / "x.bin", progress=False)
    assert "".join(seen) == WORDS
    assert (len(seen) == 1) == prefixed


def test_a_million_spaces_do_not_panic(tmp_path):
    content = "a" + " " * 1_200_000 + "b" + WORDS
    (tmp_path / "x.txt").write_text(content)
    found = make(tmp_path / "x.txt", tokenizer="bpe", vocab_size=300)
    ids = np.concatenate([found.train, found.val])
    assert found.tokenizer.decode(ids).replace(END, "") == content
    assert (found.train == found.tokenizer.eot).sum() == 1


def test_a_second_run_reuses_and_a_change_is_noticed(text, monkeypatch):
    lines = []
    first = make(text, lines.append)
    assert "made first" in lines[0]
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "read_corpus", lambda *a: pytest.fail("the corpus was read again"))
        again = make(text, lines.append, fraction=0.5, vocab_size=999, document_mask=True)
    assert "reusing" in lines[2]
    assert again.fingerprint == first.fingerprint
    assert again.identity != first.identity
    folders = {first.folder}
    for changes in (
        {"val_fraction": 0.2},
        {"tokenizer": "bpe", "vocab_size": 300},
        {"tokenizer": "bpe", "vocab_size": 301},
    ):
        folders.add(make(text, **changes).folder)
    text.write_text(WORDS.replace("word7", "w0rd7"))  # of the same length
    os.utime(text, ns=(1, 1))
    changed = make(text)
    assert len(folders | {changed.folder}) == 5
    assert changed.fingerprint != first.fingerprint


KILLED = """
import os, sys
from data import DataConfig, prepare, tokens
plain = tokens.sha256
def kill(file):
    if file.name == "val.bin":
        os.kill(os.getpid(), 9)
    return plain(file)
tokens.sha256 = kill
config = DataConfig(name="text", path=sys.argv[1], tokenizer="bytes", cache_dir=sys.argv[2])
prepare(config, progress=False)
"""


def test_a_killed_build_leaves_nothing_half_valid(text, tmp_path):
    command = [sys.executable, "-c", KILLED, str(text), str(tmp_path / "cache")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    (scratch,) = (tmp_path / "cache").iterdir()
    assert scratch.name.startswith(".tmp-")
    assert not (scratch / "meta.json").exists()
    found = make(text)
    assert len(found.train) + len(found.val) == len(WORDS) + 2


def test_a_failed_build_cleans_up_and_a_damaged_one_is_told(text, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "write_atomic", full)
        with pytest.raises(UserError, match="^data.cache_dir=.*No space left"):
            make(text)
    assert not list((tmp_path / "cache").iterdir())
    first = make(text)
    (first.folder / "meta.json").unlink()
    assert make(text).fingerprint == first.fingerprint
    (first.folder / "val.bin").write_bytes(b"12")
    with pytest.raises(UserError, match=r"val.bin: 2 bytes are not the \d+ tokens.*delete"):
        make(text)


def test_another_process_that_made_the_same_meanwhile_wins(text, tmp_path, monkeypatch):
    plain = tokens.write_ids
    made = make(text, cache_dir=str(tmp_path / "other")).folder

    def slow(*args):
        if made.exists():
            os.rename(made, tmp_path / "cache" / made.name)
        return plain(*args)

    monkeypatch.setattr(tokens, "write_ids", slow)
    assert len(make(text).train) > 0
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name == made.name


def test_a_large_file_is_mapped_not_read(tmp_path):
    with open(tmp_path / "train.bin", "wb") as stream:
        stream.truncate(8 * 2**30)
    meta = {
        "tokens": {"train": 4 * 2**30, "val": 1},
        "sha256": {"train.bin": "", "val.bin": ""},
    }
    (tmp_path / "val.bin").write_bytes(b"12")
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    make_tokenizer("bytes", 257, []).save(tmp_path)
    assert open_tokens(tmp_path).train[3 * 2**30] == 0


# nanoGPT's token files


@pytest.fixture
def bins(tmp_path):
    folder = tmp_path / "bins"
    folder.mkdir()
    np.arange(50, dtype=np.uint16).tofile(folder / "train.bin")
    np.arange(40, dtype=np.uint16).tofile(folder / "val.bin")
    return folder


def make_bins(folder, say=quiet, **changes):
    settings = {"name": "bin", "tokenizer": "ids", "vocab_size": 50}
    return make(folder, say, **settings | changes)


def test_bins_are_mapped_and_read_once(bins, monkeypatch):
    lines = []
    found = make_bins(bins, lines.append)
    assert isinstance(found.train, np.memmap)
    assert found.train.tolist() == list(range(50))
    assert found.vocab_size == 50
    assert found.val_bytes is None
    assert len(lines) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "sha256", lambda file: pytest.fail("read again"))
        assert make_bins(bins).fingerprint == found.fingerprint
    np.arange(39, dtype=np.uint16).tofile(bins / "val.bin")
    assert make_bins(bins).fingerprint != found.fingerprint
    make_tokenizer("bpe", 300, [WORDS]).save(bins)
    assert make_bins(bins, tokenizer=str(bins)).tokenizer.name == "bpe"


BAD_BINS = [
    ({"vocab_size": 49}, {}, "data.path=.*train.bin: holds token 49, ids has 49.*data.vocab_size"),
    ({"tokenizer": "bytes"}, {"val.bin": b"\1\1\1\1"}, "data.path=.*val.bin: holds token 257"),
    ({"tokenizer": "bpe"}, {}, "data.tokenizer=bpe: .*data.tokenizer=gpt2"),
    ({"tokenizer": "char"}, {}, "data.tokenizer=char: "),
    ({"tokenizer": "gpt2"}, {"meta.pkl": b""}, "data.path=.*data=text .*data.tokenizer=char"),
    ({}, {"val.bin": b"123"}, "data.path=.*val.bin: 3 bytes"),
    ({}, {"val.bin": b""}, "data.path=.*val.bin: 0 bytes"),
    ({}, {"val.bin": None}, "data.path=.*no val.bin there"),
]


@pytest.mark.parametrize("changes, files, rule", BAD_BINS)
def test_bad_bins_are_one_line(changes, files, rule, bins):
    for name, content in files.items():
        (bins / name).unlink(missing_ok=True)
        if content is not None:
            (bins / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^{rule}"):
        make_bins(bins, **changes)


# Blocks, and whether a model reads these tokens


def test_documents_of_text_are_told_apart_on_demand(text, bins):
    plain = make(text)
    found = make(text, document_mask=True)
    assert found.folder == plain.folder
    assert plain.blocks("train", 16).bos is None
    assert found.blocks("train", 16).bos == 256
    with pytest.raises(UserError, match="^data.document_mask=true: tokenizer ids has no token"):
        make_bins(bins, document_mask=True).check_length(8)


def test_rows_have_masks_that_are_in_the_fingerprint(rows):
    found = make(rows, val_fraction=0.5)
    assert found.train_mask.dtype == np.uint8
    assert len(found.train_mask) == len(found.train)
    assert found.val_bytes is None
    starts = found.train_mask == 2
    assert (found.train[starts] == 256).all()
    trained = found.tokenizer.decode(found.train[found.train_mask == 1])
    assert all(answer[0] == "b" for answer in trained.split(END) if answer)
    sums = json.loads((found.folder / "meta.json").read_text())["sha256"]
    for name in ("train", "val", "train.mask", "val.mask"):
        assert sums.pop(f"{name}.bin") == sha256(found.folder / f"{name}.bin")
    assert sums == {}


def test_what_packing_cuts_is_said_once(rows):
    found = make(rows, val_fraction=0.5)
    lines = []
    packed = found.blocks("train", 2, lines.append)
    assert found.blocks("train", 2, lines.append) is packed
    assert len(lines) == 1
    assert f"{packed.num_cut} train documents are longer than model.block_size=2" in lines[0]
    with pytest.raises(UserError, match="^model.block_size=1: each training row's prompt fills"):
        found.check_length(1)


def test_a_document_without_a_label_is_left_out(rows, monkeypatch):
    documents = [
        ([1, 2, 3], [0, 0, 1]),
        ([4, 5], [0, 0]),
        ([6], [1]),
    ]
    monkeypatch.setattr(Tokenizer, "encode_row", lambda tokenizer, turns: documents)
    found = make(rows, val_fraction=0.5)
    assert found.train[:3].tolist() == [1, 2, 3]
    assert found.train_mask[:3].tolist() == [2, 0, 1]
    assert found.train.max() == 3


def test_a_row_that_a_template_refuses_is_named(rows, monkeypatch):
    def refuse(tokenizer, turns):
        raise UserError("the chat template refuses it")

    monkeypatch.setattr(Tokenizer, "encode_row", refuse)
    with pytest.raises(UserError, match=f"^data.path={rows}:[0-9]: the chat template refuses it"):
        make(rows, val_fraction=0.5)


def test_a_short_text_is_one_line(text, tmp_path):
    with pytest.raises(UserError, match=r"^model.block_size=9000: the training text has \d+ tok"):
        make(text).check_length(9000)
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(UserError, match="^data.path=.*too little text"):
        make(text)


MODELS = [
    ("bytes", 300, None),
    (None, 257, None),
    (None, 200, "run: its vocabulary is 200, the data's 257; set data.tokenizer=.*run$"),
    ("bpe", 300, r"run: it reads tokens of bpe \(vocabulary 300\), the data are tokens of bytes"),
]


@pytest.mark.parametrize("tokenizer, vocab_size, rule", MODELS)
def test_a_model_that_reads_other_tokens_is_refused(tokenizer, vocab_size, rule, text, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if tokenizer:
        make_tokenizer(tokenizer, 300, [WORDS]).save(folder)
    found = make(text)
    if rule is None:
        return found.check_model(folder, vocab_size, "teacher.path")
    with pytest.raises(UserError, match=f"^teacher.path=.*{rule}"):
        found.check_model(folder, vocab_size, "teacher.path")
    with pytest.raises(UserError, match="; do this$"):
        found.check_model(folder, vocab_size, "teacher.path", fix="do this")
    return None


def test_bare_ids_are_anybodys(bins, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    make_tokenizer("bytes", 257, []).save(tmp_path)
    make_bins(bins).check_model(tmp_path, 257, "teacher.path")


def test_rows_train_a_model(tmp_path, monkeypatch):
    """From a file of rows to a student that has learnt how they are answered."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} + {n} =", "completion": f" is {2 * n}"} for n in range(50)]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = Config(
        data=DataConfig(name="text", path="rows.jsonl", tokenizer="bytes"),
        model=ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=32),
        teacher=TeacherConfig(kind="none"),
        loss=LossConfig(name="ce"),
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        batch_size=4,
        max_steps=60,
        run_dir="run",
        device="cpu",
    )
    train.run(config)
    metrics = read_metrics(Path("run"))
    assert metrics[-1]["step"] == 60
    assert metrics[-1]["val_loss"] < 0.4 * metrics[0]["loss"]
