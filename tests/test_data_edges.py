"""Edges of data/ beyond test_data.py: odd files and settings, kills and races, pieces of a book, odd tokenizers."""

import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import numpy as np
import pytest
import tiktoken
import torch
from hydra.core.config_store import ConfigStore

from conf.schema import Config
from data import Batch, Batches, DataConfig, Prefetch, Tokenizer, held_out, prepare
from data import tokenizer as tokenizers
from data import tokens as token_files
from data.corpora import find_files, read_corpus, split
from data.tokenizer import END, make_tokenizer, train_bpe
from engine import UserError
from engine.cli import compose

ROOT = Path(__file__).parent.parent
STORY = "The café was naïve 🙂 in 東京: x = 1\n\tdef f(): pass  # <|endoftext|> \r\n  'll we've\n\n"
WORDS = "".join(f"word{number} and another, " for number in range(400))


def write(file: Path, content) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def config(path, tmp_path, **changes) -> DataConfig:
    settings = {
        "name": "text",
        "path": str(path),
        "tokenizer": "bytes",
        "cache_dir": str(tmp_path / "cache"),
    }
    return DataConfig(**settings | changes)


def make(path, tmp_path, lines=None, **changes):
    say = (lambda line: None) if lines is None else lines.append
    return prepare(config(path, tmp_path, **changes), say=say, progress=False)


def documents(path, tmp_path, lines=None):
    made = config(path, tmp_path)
    return read_corpus(
        made, find_files(made), (lambda line: None) if lines is None else lines.append
    )


def texts(path, tmp_path, **changes):
    """The training documents, and the held-out ones."""
    made = config(path, tmp_path, **changes)
    return split(read_corpus(made, find_files(made), lambda line: None), made.val_fraction)


def refused(call, *words) -> str:
    """`call` raises UserError itself, in one line that holds all `words`."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert caught.type is UserError and "\n" not in line
    assert all(word in line for word in words), line
    return line


# Corpora


def test_every_kind_of_file(tmp_path):
    write(tmp_path / "in/b.txt", "\ufeffplain é")
    write(tmp_path / "in/a/c.txt.gz", gzip.compress(b"packed"))
    write(
        tmp_path / "in/d.jsonl",
        '{"text": "one\u2028two"}\n\n{"id": 2, "text": "three"}\r\n{"text": ""}\n',
    )
    write(tmp_path / "in/e.jsonl.gz", gzip.compress(b'{"text": "four"}'))
    write(tmp_path / "in/f.md", " \n")
    write(tmp_path / "in/image.png", b"\x89PNG\0\0")
    write(tmp_path / "in/latin.txt", "é".encode("latin-1"))
    write(tmp_path / "in/.hidden/x.txt", "hidden")
    write(tmp_path / "in/.secret", "hidden")
    lines = []
    assert documents(tmp_path / "in", tmp_path, lines) == [
        "packed",
        "plain é",
        "one\u2028two",
        "three",
        "four",
    ]
    assert len(lines) == 1 and "2 files skipped" in lines[0]
    assert documents(tmp_path / "in/b.txt", tmp_path) == ["plain é"]


MISTAKES = {
    "no such path": (None, ["data.path=", "no such file"]),
    "empty file": ("", ["data.path=", "no text"]),
    "blank file": (" \n\n", ["data.path=", "no text"]),
    "one letter": ("a", ["data.path=", "too little text"]),
    "binary": (b"MZ\0\1", ["data.path=", "binary", "data=bin"]),
    "latin-1": ("é".encode("latin-1"), ["data.path=", "UTF-8"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_text_is_one_line(name, tmp_path):
    content, words = MISTAKES[name]
    if content is not None:
        write(tmp_path / "x.txt", content)
    refused(lambda: make(tmp_path / "x.txt", tmp_path), *words)
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize(
    "line",
    [
        "{oops",
        "[1]",
        '"text"',
        '{"tex": "a"}',
        '{"text": 3}',
        '{"text": ["a"]}',
        '{"text": "\\ud800"}',
    ],
)
def test_a_bad_jsonl_line_is_named(line, tmp_path):
    file = write(tmp_path / "x.jsonl", '{"text": "good"}\n\n' + line + "\n")
    refused(lambda: make(file, tmp_path), "data.path=", "x.jsonl:3:")


@pytest.mark.parametrize(
    "content",
    [
        b"not packed",
        gzip.compress(b"x" * 99)[:-12],
        gzip.compress(bytes(range(256)))[:20] + b"\xff" * 30,
    ],
)
def test_a_broken_gz_is_one_line(content, tmp_path):
    refused(
        lambda: make(write(tmp_path / "x.txt.gz", content), tmp_path),
        "data.path=",
        "cannot be read",
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "txt"}, ["data=txt", "did you mean text?"]),
        ({"name": "text"}, ["data.path=null", "data=text"]),
        ({"name": "bin"}, ["data.path=null", "train.bin"]),
        ({"fraction": 0.0}, ["data.fraction=0.0"]),
        ({"fraction": 1.5}, ["data.fraction=1.5"]),
        ({"fraction": float("nan")}, ["data.fraction=nan"]),
        ({"val_fraction": 0.0}, ["data.val_fraction=0.0"]),
        ({"val_fraction": 1.0}, ["data.val_fraction=1.0"]),
        ({"vocab_size": 256}, ["data.vocab_size=256", "257"]),
        ({"vocab_size": 0, "tokenizer": "ids"}, ["data.vocab_size=0"]),
    ],
)
def test_a_bad_setting_is_one_line(changes, words):
    refused(lambda: DataConfig(**changes), *words)


# Splits


def some_documents(count=300):
    sizes = np.exp(np.random.default_rng(0).normal(5, 1, count)).astype(int)
    return [f"{number} " + "é" * int(size) for number, size in enumerate(sizes)]


def test_the_split_depends_on_content_alone():
    made = some_documents()
    assert split(made, 0.1) == split(made[::-1], 0.1)
    train, _ = split(made, 0.1)
    numbers = [int(text.split()[0]) for text in train]
    assert (
        abs(np.corrcoef(numbers, range(len(numbers)))[0, 1]) < 0.2
    )  # no trace of the files' order: a prefix is a fair sample


def test_texts_gives_both_sides(tmp_path):
    file = write(tmp_path / "x.txt", WORDS)
    train, val = texts(file, tmp_path, val_fraction=0.25)
    assert train[0] + val[0] == WORDS and len(val[0]) == round(len(WORDS) / 4)


# Tokenizers


def tiny_encoding(name="tiny", special=END):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    return tiktoken.Encoding(
        name, pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={special: 300}
    )


@pytest.fixture
def fake_gpt2(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiny_encoding())
    return Tokenizer({"kind": "tiktoken", "name": "gpt2"})


def every_tokenizer(fake_gpt2):
    return [
        make_tokenizer("bytes", 257, []),
        train_bpe([STORY * 9], 300, lambda line: None),
        fake_gpt2,
    ]


def test_round_trip_special_text_included(fake_gpt2, tmp_path):
    for tokenizer in every_tokenizer(fake_gpt2):
        ids = tokenizer.encode(STORY)
        assert tokenizer.decode(ids) == STORY
        assert (
            tokenizer.eot is not None and tokenizer.eot not in ids
        )  # the text's own <|endoftext|> is ordinary text
        assert b"".join(tokenizer.token_bytes(token) for token in ids) == STORY.encode()
        assert tokenizer.encode_batch([STORY, "", "a"]) == [ids, [], tokenizer.encode("a")]
        assert tokenizer.decode([tokenizer.eot]) == END and 0 <= max(ids) < tokenizer.vocab_size
        tokenizer.save(tmp_path)
        again = Tokenizer.load(tmp_path)
        assert again.encode(STORY) == ids and again.fingerprint == tokenizer.fingerprint
        assert (again.vocab_size, again.eot, again.name) == (
            tokenizer.vocab_size,
            tokenizer.eot,
            tokenizer.name,
        )


def test_stream_never_shows_half_a_character(fake_gpt2):
    for tokenizer in every_tokenizer(fake_gpt2):
        show = tokenizer.stream()
        shown = [show(token) for token in tokenizer.encode("a🙂é")]
        assert "".join(shown) == "a🙂é" and not any("\ufffd" in part for part in shown)
    assert make_tokenizer("bytes", 257, []).decode([0xF0, 0x9F]) == "\ufffd"


def test_half_a_surrogate_pair_and_unused_numbers_are_no_traceback(fake_gpt2):
    assert make_tokenizer("bytes", 257, []).encode("a\ud800") == [97, 63]
    assert fake_gpt2.decode([97, 280]) == "a\ufffd"


def test_bpe_has_the_size_asked_and_equal_text_gives_equal_fingerprints():
    lines = []
    first, second = (train_bpe([WORDS], 400, lines.append) for _ in range(2))
    assert first.vocab_size == 400 and first.eot == 399 and not lines
    assert (
        first.fingerprint == second.fingerprint != train_bpe([WORDS], 399, lines.append).fingerprint
    )
    assert train_bpe([WORDS], 257, lines.append).vocab_size == 257
    few = train_bpe(["abab"], 1000, lines.append)
    assert (
        few.vocab_size < 1000
        and few.eot == few.vocab_size - 1
        and "data.vocab_size=1000" in lines[-1]
    )


def test_one_vocabulary_under_two_names_is_one_fingerprint(monkeypatch, fake_gpt2):
    assert Tokenizer({"kind": "tiktoken", "name": "r50k_base"}).fingerprint == fake_gpt2.fingerprint
    monkeypatch.setattr(
        tiktoken, "get_encoding", lambda name: tiny_encoding(special="<|endoftext|>x")
    )
    assert tiny_encoding().n_vocab == 301
    with pytest.raises(KeyError):  # an encoding without <|endoftext|> is none that tiktoken has
        Tokenizer({"kind": "tiktoken", "name": "gpt2"})


def test_bpe_is_trained_on_the_training_side_alone(tmp_path):
    file = write(tmp_path / "x.txt", "ab " * 900 + "zq" * 150)
    tokenizer = make(file, tmp_path, tokenizer="bpe", vocab_size=300).tokenizer
    assert b"zq" not in {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}


def test_a_mistyped_tokenizer_gets_the_nearest(tmp_path, monkeypatch, fake_gpt2):
    file = write(tmp_path / "x.txt", WORDS)
    refused(
        lambda: make(file, tmp_path, tokenizer="gtp2"), "data.tokenizer=gtp2", "did you mean gpt2?"
    )
    refused(lambda: make(file, tmp_path, tokenizer="ids"), "data.tokenizer=ids")
    write(tmp_path / "gpt2/config.json", "{}")
    refused(
        lambda: make(file, tmp_path, tokenizer=str(tmp_path / "gpt2")),
        "data.tokenizer=",
        "nanodistill_tokenizer.json",
    )
    monkeypatch.chdir(tmp_path)  # where a Hugging Face folder has the vocabulary's name
    assert make(file, tmp_path, tokenizer="gpt2").tokenizer.name == "gpt2"


@pytest.mark.parametrize("content", ["", "[]", "{}", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_broken_tokenizer_file_is_one_line(content, tmp_path):
    write(tmp_path / "nanodistill_tokenizer.json", content)
    refused(lambda: Tokenizer.load(tmp_path), "nanodistill_tokenizer.json", "not a tokenizer")


# Token files


def test_ids_are_uint16_up_to_65536_entries(tmp_path, fake_gpt2):
    assert token_files.id_dtype(65536) is np.uint16 and token_files.id_dtype(65537) is np.uint32
    fake_gpt2.eot = 65536
    for size, dtype in ((65536, np.uint16), (65537, np.uint32)):
        fake_gpt2.vocab_size, fake_gpt2.eot = size, size - 1
        count = token_files.write_ids(["th", "é"], fake_gpt2, tmp_path / "x.bin", progress=False)
        ids = np.fromfile(tmp_path / "x.bin", dtype)
        assert count == len(ids) and ids.tolist() == [size - 1, 256, size - 1, 0xC3, 0xA9]


def test_files_hold_every_document_after_one_endoftext(tmp_path):
    for number, text in enumerate(some_documents(60)):
        write(tmp_path / f"in/{number}.txt", text)
    tokens = make(tmp_path / "in", tmp_path, tokenizer="bpe", vocab_size=300)
    train, val = texts(tmp_path / "in", tmp_path)
    for ids, side in ((tokens.train, train), (tokens.val, val)):
        assert (
            isinstance(ids, np.memmap) and ids.dtype == np.uint16 and ids[0] == tokens.tokenizer.eot
        )
        assert tokens.tokenizer.decode(ids) == "".join(END + text for text in side)
    assert tokens.val_bytes == sum(len(text.encode()) for text in val)
    meta = json.loads((tokens.folder / "meta.json").read_text())
    assert meta["tokens"] == {"train": len(tokens.train), "val": len(tokens.val)}
    assert meta["train_bytes"] == sum(len(text.encode()) for text in train)


PATTERNS = {
    "rustbpe": None,
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "o200k": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+(?i:'s|'ll)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}\p{M}]+[\p{Ll}\p{Lo}\p{M}]*|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_long_document_in_pieces_gives_the_same_tokens(name, monkeypatch):
    text = (STORY + WORDS[:300] + "\n\n\nif x:\n    y = 12345 67\n_z}\n//  a\n b\r\nc ٣٤ ²\n") * 20
    tokenizer = train_bpe([text], 600, lambda line: None)
    if PATTERNS[name]:
        tokenizer.content["pattern"] = PATTERNS[name]
        tokenizer = Tokenizer(tokenizer.content)
    monkeypatch.setattr(tokenizers, "PIECE", 7)
    found = list(tokenizers.pieces(text))
    assert len(found) > 400 and "".join(found) == text
    assert [token for ids in tokenizer.encode_batch(found) for token in ids] == tokenizer.encode(
        text
    )


def test_a_million_spaces_do_not_panic(tmp_path):
    text = "a" + " " * 1_200_000 + "b" + WORDS
    tokens = make(write(tmp_path / "x.txt", text), tmp_path, tokenizer="bpe", vocab_size=300)
    assert (tokens.tokenizer.decode(tokens.train) + tokens.tokenizer.decode(tokens.val)).replace(
        END, ""
    ) == text
    assert (tokens.train == tokens.tokenizer.eot).sum() == 1


def test_a_second_run_reuses_and_a_changed_corpus_is_noticed(tmp_path, monkeypatch):
    file = write(tmp_path / "in/a.txt", WORDS)
    lines = []
    first = make(tmp_path / "in", tmp_path, lines)
    assert "made first" in lines[0] and "training" in lines[1]
    with monkeypatch.context() as patch:
        patch.setattr(
            token_files, "read_corpus", lambda *a: pytest.fail("the corpus was read again")
        )
        again = make(tmp_path / "in", tmp_path, lines)
        assert (
            "reusing" in lines[2]
            and again.fingerprint == first.fingerprint
            and again.folder == first.folder
        )
        assert make(tmp_path / "in", tmp_path, fraction=0.5, vocab_size=999).folder == first.folder
    file.write_bytes(WORDS.replace("word7", "w0rd7").encode())  # same length
    os.utime(file, ns=(1, 1))
    assert make(tmp_path / "in", tmp_path).fingerprint != first.fingerprint
    write(tmp_path / "in/b.txt", "more")
    third = make(tmp_path / "in", tmp_path)
    changed = [
        {"val_fraction": 0.2},
        {"tokenizer": "bpe", "vocab_size": 300},
        {"tokenizer": "bpe", "vocab_size": 301},
    ]
    folders = {make(tmp_path / "in", tmp_path, **each).folder for each in changed} | {
        first.folder,
        third.folder,
    }
    assert len(folders) == 5


KILLED = """
import os, sys
from data import DataConfig, prepare, tokens
plain = tokens.sha256
def kill(file):
    if file.name == "val.bin":
        os.kill(os.getpid(), 9)
    return plain(file)
tokens.sha256 = kill
prepare(DataConfig(name="text", path=sys.argv[1], tokenizer="bytes", cache_dir=sys.argv[2]), progress=False)
"""


def test_a_killed_build_leaves_nothing_half_valid(tmp_path):
    file = write(tmp_path / "x.txt", WORDS)
    command = [sys.executable, "-c", KILLED, str(file), str(tmp_path / "cache")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    left = list((tmp_path / "cache").iterdir())
    assert (
        len(left) == 1 and left[0].name.startswith(".tmp-") and not (left[0] / "meta.json").exists()
    )
    lines = []
    tokens = make(file, tmp_path, lines)
    assert "made first" in lines[0] and len(tokens.train) + len(tokens.val) == len(WORDS) + 2


def test_a_failed_build_cleans_up_and_a_lost_meta_is_made_again(tmp_path, monkeypatch):
    file = write(tmp_path / "x.txt", WORDS)
    with monkeypatch.context() as patch:
        patch.setattr(
            token_files,
            "write_atomic",
            lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")),
        )
        refused(lambda: make(file, tmp_path), "data.cache_dir=", "No space left")
    assert not list((tmp_path / "cache").iterdir())
    first = make(file, tmp_path)
    (first.folder / "meta.json").unlink()
    assert make(file, tmp_path).fingerprint == first.fingerprint
    (first.folder / "val.bin").write_bytes(b"12")
    refused(lambda: make(file, tmp_path), "val.bin", "delete")


def test_another_process_that_made_the_same_meanwhile_wins(tmp_path, monkeypatch):
    file = write(tmp_path / "x.txt", WORDS)
    plain, made = token_files.write_ids, []

    def slow(*args):
        if not made:
            made.append(None)
            made.append(make(file, tmp_path / "other").folder)
            os.makedirs(tmp_path / "cache", exist_ok=True)
            os.rename(made[1], tmp_path / "cache" / made[1].name)
        return plain(*args)

    monkeypatch.setattr(token_files, "write_ids", slow)
    assert len(make(file, tmp_path).train) > 0
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [made[1].name]


# nanoGPT's folders


def bins(folder: Path, train=range(50), val=range(40), meta=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in (("train", train), ("val", val)):
        np.array(ids, np.uint16).tofile(folder / f"{name}.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(meta)
    return folder


def make_bin(folder, tmp_path, lines=None, **changes):
    return make(
        folder, tmp_path, lines, **{"name": "bin", "tokenizer": "ids", "vocab_size": 50} | changes
    )


def test_bins_are_mapped_and_read_once(tmp_path, monkeypatch):
    lines = []
    tokens = make_bin(bins(tmp_path / "a"), tmp_path, lines)
    assert isinstance(tokens.train, np.memmap) and tokens.train.tolist() == list(range(50))
    assert tokens.vocab_size == 50 and tokens.val_bytes is None and len(lines) == 2
    copied = make_bin(bins(tmp_path / "b"), tmp_path)
    assert copied.fingerprint == tokens.fingerprint  # by content, wherever it lies
    assert make_bin(bins(tmp_path / "c", val=range(39)), tmp_path).fingerprint != tokens.fingerprint
    monkeypatch.setattr(token_files, "sha256", lambda file: pytest.fail("read again"))
    make_bin(tmp_path / "a", tmp_path, lines)
    assert len(lines) == 2


@pytest.mark.parametrize("chars", [None, "abc"])
def test_nanogpts_characters_with_and_without_their_table(chars, tmp_path, monkeypatch):
    """experiment=shakespeare_char on bare bins: 65 ids and no download; a meta.pkl beside them goes before that."""
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("asked for tiktoken's"))
    meta = chars and pickle.dumps({"stoi": {char: code for code, char in enumerate(chars)}})
    folder = bins(tmp_path / "a", range(3), range(3), meta)
    ConfigStore.instance().store(name="train_schema", node=Config)
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = [
            "experiment=shakespeare_char",
            f"data.path={folder}",
            f"data.cache_dir={tmp_path / 'cache'}",
        ]
        found = prepare(compose("train", words).data, lambda line: None).tokenizer
    assert (found.name, found.vocab_size) == (("char", 3) if chars else ("ids", 65))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-run",)


BAD_META = [
    b"",
    b"junk",
    b".",
    [1],
    {"stoi": [1]},
    {"stoi": {"a": 0, "b": 2}},
    {"stoi": {1: 0}},
    {"a": 1},
    Evil(),
]


@pytest.mark.parametrize("meta", BAD_META, ids=lambda meta: repr(meta)[:20])
def test_a_bad_meta_pkl_is_one_line_and_runs_nothing(meta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = meta if isinstance(meta, bytes) else pickle.dumps(meta)
    refused(
        lambda: make_bin(bins(tmp_path / "a", meta=content), tmp_path), "data.path=", "meta.pkl"
    )
    assert not Path("evil-was-run").exists()


def test_bad_bins_are_one_line(tmp_path, fake_gpt2):
    folder = bins(tmp_path / "a")
    refused(
        lambda: make_bin(folder, tmp_path, vocab_size=49), "train.bin", "token 49", "data.tokenizer"
    )
    refused(
        lambda: make_bin(folder, tmp_path, tokenizer="bpe"),
        "data.tokenizer=bpe",
        "data.tokenizer=gpt2",
    )
    refused(lambda: make_bin(folder / "train.bin", tmp_path), "data.path=", "no train.bin")
    assert make_bin(folder, tmp_path, tokenizer="gpt2").vocab_size == 301
    (folder / "val.bin").write_bytes(b"123")
    refused(lambda: make_bin(folder, tmp_path), "data.path=", "val.bin", "3 bytes")
    (folder / "val.bin").unlink()
    refused(lambda: make_bin(folder, tmp_path), "data.path=", "no val.bin")


def run_with_tokenizer(folder: Path, tokenizer: Tokenizer) -> Path:
    write(folder / "config.json", "{}")
    tokenizer.save(folder)
    return folder


def test_a_runs_own_tokenizer_reads_other_text_and_bins(tmp_path):
    tokenizer = train_bpe([WORDS], 300, lambda line: None)
    run = str(run_with_tokenizer(tmp_path / "run", tokenizer))
    file = write(tmp_path / "x.txt", "other text altogether " * 20)
    assert make(file, tmp_path, tokenizer=run).tokenizer.fingerprint == tokenizer.fingerprint
    assert (
        make_bin(bins(tmp_path / "a"), tmp_path, tokenizer=run).tokenizer.fingerprint
        == tokenizer.fingerprint
    )


# Batches: token number i is i, so every position can be told


def test_a_batch_is_a_pure_function_of_seed_and_step():
    tokens = np.arange(10 * 8 + 1, dtype=np.uint16)
    once = [Batches(tokens, 8, 4, seed=0).batch(step) for step in range(9)]
    batches = Batches(tokens, 8, 4, seed=0)
    for step in (7, 2, 8, 0, 3, 3, 1, 6, 5, 4):
        assert all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(batches.batch(step)[:3], once[step][:3], strict=True)
        )
    orders = {
        tuple(Batches(tokens, 8, 10, seed).batch(epoch).blocks.tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    halves = [Batches(tokens, 8, 2, seed=0).batch(step).blocks for step in (4, 5)]
    assert torch.equal(
        torch.cat(halves), once[2].blocks
    )  # the size of a batch does not change the order


class Racing(Batches):
    """Another thread asks for another epoch the moment this one's order is kept."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "cached" and value[0] == 1:
            super().__setattr__(name, (2, value[1][::-1]))


def test_a_thread_in_another_epoch_does_not_change_this_ones_order():
    tokens = np.arange(10 * 8 + 1, dtype=np.uint16)
    batches, wanted = Racing(tokens, 8, 10, seed=0), Batches(tokens, 8, 10, seed=0).batch(1)
    assert torch.equal(batches.batch(1).blocks, wanted.blocks)


def test_prefetch_gives_the_same_batches():
    batches = Batches(np.arange(1000, dtype=np.uint16), 8, 4, seed=0)
    ahead = Prefetch(batches, 3, 60)
    found = list(ahead)
    assert len(found) == 57 and all(isinstance(batch, Batch) for batch in found)
    for step, batch in enumerate(found, 3):
        assert all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(batch[:3], batches.batch(step)[:3], strict=True)
        )
    assert list(ahead) == []  # used up, not stuck
    ahead.close()
    assert (
        not any(thread.is_alive() for thread in ahead.pool._threads)
        and list(Prefetch(batches, 5, 5)) == []
    )


class Broken:
    def batch(self, step):
        if step == 2:
            raise RuntimeError("disk gone")
        return Batch(*[torch.zeros(1)] * 3)


def test_prefetch_passes_errors_on_and_closes_early():
    ahead, seen = Prefetch(Broken(), 0, 9), []
    with pytest.raises(RuntimeError, match="disk gone"):
        seen.extend(ahead)
    ahead.close()
    early = Prefetch(Batches(np.arange(1000), 8, 4, seed=0), 0, 10**9)
    next(iter(early))
    started = time.monotonic()
    early.close()
    early.close()
    assert (
        not any(thread.is_alive() for thread in early.pool._threads)
        and time.monotonic() - started < 2
        and list(early) == []
    )


def test_held_out_is_spread_over_the_text_in_order():
    tokens = np.arange(1001, dtype=np.uint16)
    found = list(held_out(tokens, 8, 4, max_tokens=80))
    assert [len(batch.ids) for batch in found] == [4, 4, 2]
    assert torch.cat([batch.blocks for batch in found]).tolist() == [
        12 * place + place // 2 for place in range(10)
    ]  # of 125
    ids, labels = (torch.cat([batch[part] for batch in found]) for part in (0, 1))
    assert torch.equal(ids[:, 0], torch.cat([batch.blocks for batch in found]) * 8) and torch.equal(
        labels, ids + 1
    )
    assert sum(batch.ids.numel() for batch in held_out(tokens, 8, 4, max_tokens=10**9)) == 1000
    assert [batch.ids.shape for batch in held_out(tokens, 8, 4, max_tokens=1)] == [(1, 8)]
    with pytest.raises(AssertionError):
        list(held_out(tokens[:8], 8, 4, 80))
