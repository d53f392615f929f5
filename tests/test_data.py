"""Corpora, splits, tokenizers, token files, batches."""

import gzip
import json
import os
import pickle
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

import engine.progress
from data import Batches, DataConfig, Prefetch, Tokenizer, held_out, prepare
from data import tokens as tokens_module
from data.corpora import Row, find_files, read_corpus, split
from data.tokenizer import load_tiktoken, train_bpe
from data.tokens import id_dtype
from engine import UserError


def quiet(line):
    pass


def text_config(path, tmp_path, **changes):
    return replace(
        DataConfig(
            name="text", path=str(path), tokenizer="bytes", cache_dir=str(tmp_path / "tokens")
        ),
        **changes,
    )


@pytest.fixture
def folder(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for place in range(20):
        (corpus / f"{place:02}.txt").write_text(f"document {place} " * 40)
    return corpus


def test_split_holds_out_whole_documents_and_leaks_none():
    documents = [f"document {place} " * 40 for place in range(50)] + ["twice " * 30] * 2
    train, val = split(documents, 0.1)
    assert sorted(train + val) == sorted(documents)
    assert (
        not set(train) & set(val)
        and len([each for each in (*train, *val) if each.startswith("twice")]) == 2
    )
    assert 0.05 < sum(map(len, val)) / sum(map(len, documents)) <= 0.1
    assert (train, val) == split(documents[::-1], 0.1)  # the same whatever order files are found in


def test_a_single_document_is_split_by_its_last_part_inside_no_character():
    book = "".join(f"chapter {place} äöü🙂 " for place in range(100))
    (train,), (val,) = split([book], 0.1)
    assert train + val == book and 0.08 < len(val) / len(book) < 0.12
    train, val = split([book, book], 0.1)  # two copies are one document
    assert train[0] + val[0] == book and len(train) == 1


def test_two_large_documents_are_cut_both():
    train, val = split(["a" * 1000, "b" * 1000], 0.1)
    assert sorted(map(len, train)) == [900, 900] and sorted(map(len, val)) == [100, 100]


def test_a_small_document_is_not_all_that_is_held_out_of_large_ones():
    licence = "may be copied " * 70
    train, val = split(["a" * 60_000, "b" * 60_000, licence], 0.1)
    assert sorted(map(len, val)) == [98, 6000, 6000] and sum(
        map(len, train + val)
    ) == 120_000 + len(licence)


def test_of_fine_tuning_rows_less_than_the_share_is_held_out_and_said():
    rows = [
        Row((("prompt", "p"), ("completion", letter * size)), "x:1")
        for letter, size in (("a", 900), ("b", 900), ("c", 20))
    ]
    lines = []
    train, val = split(rows, 0.1, lines.append)
    assert (len(train), val) == (2, rows[2:])
    assert (
        len(lines) == 1
        and "% of data.val_fraction=0.1 is held out: a fine-tuning row is not cut" in lines[0]
    )
    assert (
        split([*rows, *(replace(rows[2], place=str(n)) for n in range(2))], 0.1, pytest.fail)[0]
        == train
    )  # more than half


def test_every_kind_of_file_is_read(tmp_path):
    corpus = tmp_path / "mixed"
    (corpus / "sub").mkdir(parents=True)
    (corpus / ".git").mkdir()
    (corpus / ".git/hidden.txt").write_text("hidden")
    (corpus / "a.txt").write_text("plain")
    (corpus / "sub/b.md").write_text("\ufeffmarkdown", encoding="utf-8")
    (corpus / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    (corpus / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    (corpus / "e.bin").write_bytes(b"\0\1\2")
    (corpus / "f.latin").write_bytes(b"\xff\xfe\xfd")
    (corpus / "g.txt").write_text("  \n")
    lines = []
    config = text_config(corpus, tmp_path)
    found = read_corpus(config, find_files(config), lines.append)
    assert sorted(found) == ["markdown", "one", "packed", "plain", "two"]
    assert len(lines) == 1 and "2 files skipped that are binary" in lines[0]


def test_stdlib_is_there_and_without_its_tests():
    files = find_files(DataConfig())
    assert len(files) > 300 and not any(
        {"test", "tests", "site-packages"} & set(file.parts[-3:]) for file in files
    )


@pytest.mark.parametrize(
    "case",
    [
        "missing",
        "empty folder",
        "empty file",
        "binary",
        "bad jsonl",
        "no text key",
        "bad gzip",
        "short",
    ],
)
def test_bad_corpora_are_one_line_that_names_the_key(tmp_path, case):
    path = tmp_path / "x"
    contents = {
        "empty file": ("x.txt", b" \n"),
        "binary": ("x.bin", b"\0\1\2"),
        "bad jsonl": ("x.jsonl", b'{"text": "a"}\n{oops\n'),
        "no text key": ("x.jsonl", b'{"words": "a"}\n'),
        "bad gzip": ("x.txt.gz", b"not gzip"),
        "short": ("x.txt", b"tiny"),
    }
    if case == "empty folder":
        path.mkdir()
    elif case in contents:
        path = tmp_path / contents[case][0]
        path.write_bytes(contents[case][1])
    rules = {
        "missing": r"data.path=.*no such file or folder",
        "empty folder": r"data.path=.*holds no files",
        "empty file": r"data.path=.*no text in 1 file",
        "binary": r"data.path=.*binary.*data=bin",
        "bad jsonl": r"x.jsonl:2: not a JSON object with a \"text\" string",
        "no text key": r"x.jsonl:1: not a JSON object",
        "bad gzip": r"data.path=.*cannot be read",
        "short": r"model.block_size=128: the training text has \d tokens",
    }
    with pytest.raises(UserError, match=rules[case]) as caught:
        prepare(text_config(path, tmp_path), quiet, progress=False).check_length(128)
    assert "\n" not in str(caught.value)


def test_configs_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="data.path=null: data=text needs a file or folder"):
        DataConfig(name="text")
    with pytest.raises(UserError, match="data.vocab_size=256: bpe needs at least 257"):
        DataConfig(vocab_size=256)
    with pytest.raises(UserError, match="data.fraction=0: data.fraction must be above 0"):
        DataConfig(fraction=0)


TRICKY = [
    "plain words",
    "emoji 🙂👩‍👩‍👧 and ümlaut",
    "<|endoftext|> is text here",
    "",
    "tabs\t\nand\r\nlines",
    "数字 123",
]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizers_round_trip_and_never_make_the_special_token_from_text(kind, tmp_path):
    tokenizer = train_bpe(TRICKY * 3, 300, quiet) if kind == "bpe" else Tokenizer({"kind": "bytes"})
    for text, ids in zip(TRICKY, tokenizer.encode_batch(TRICKY), strict=True):
        assert (
            tokenizer.decode(ids) == text
            and tokenizer.eot not in ids
            and list(ids) == tokenizer.encode(text)
        )
    assert (
        tokenizer.eot == tokenizer.vocab_size - 1
        and tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    )
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    assert Tokenizer.load(tmp_path).encode(TRICKY[1]) == tokenizer.encode(TRICKY[1])


def test_a_vocabulary_that_the_text_cannot_fill_is_said():
    lines = []
    tokenizer = train_bpe(["ab ab ab"], 5000, lines.append)
    assert 257 <= tokenizer.vocab_size < 5000 and "of data.vocab_size=5000" in lines[0]


def test_streaming_never_shows_half_a_character():
    tokenizer = Tokenizer({"kind": "bytes"})
    show = tokenizer.stream()
    pieces = [show(token) for token in tokenizer.encode("a🙂ü")]
    assert "".join(pieces) == "a🙂ü" and "\ufffd" not in "".join(pieces) and pieces[1] == ""


def test_tiktoken_without_network_is_one_line_and_does_not_wait(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(30))
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"data.tokenizer=gpt2: .*TIKTOKEN_CACHE_DIR.*data.tokenizer=bpe"
    ) as caught:
        load_tiktoken("gpt2", patience=0.2)
    assert time.monotonic() - started < 5 and "\n" not in str(caught.value)

    def refuse(name):
        raise OSError("name resolution failed\nmany lines")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="name resolution failed"):
        load_tiktoken("gpt2", patience=5)
    with pytest.raises(UserError, match=r"data.tokenizer=gtp2: one of .*did you mean gpt2\?"):
        load_tiktoken("gtp2", patience=5)


def test_tiktokens_offline_cache_is_honoured(tmp_path, monkeypatch):
    """A vocabulary in TIKTOKEN_CACHE_DIR is enough: no request is made."""
    import base64
    import hashlib

    import tiktoken.load
    import tiktoken_ext.openai_public as public

    ranks = (
        b"\n".join(
            base64.b64encode(bytes([byte])) + b" " + str(byte).encode() for byte in range(256)
        )
        + b"\n"
    )
    url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(ranks)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: pytest.fail("asked the network"))
    real = tiktoken.load.load_tiktoken_bpe
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda path, expected_hash=None: real(path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert load_tiktoken("cl100k_base", patience=5).encode_ordinary("ab") == [97, 98]


def test_ids_are_two_bytes_up_to_65536_entries():
    assert id_dtype(65536) is np.uint16 and id_dtype(65537) is np.uint32


def test_token_files_hold_each_document_after_one_end_of_text(folder, tmp_path):
    tokens = prepare(text_config(folder, tmp_path), quiet, progress=False)
    for part in (tokens.train, tokens.val):
        assert isinstance(part, np.memmap) and part[0] == 256
    pieces = tokens.tokenizer.decode(np.concatenate([tokens.train, tokens.val])).split(
        "<|endoftext|>"
    )[1:]
    assert sorted(pieces) == sorted(file.read_text() for file in folder.iterdir())
    assert tokens.val_bytes == int((tokens.val != 256).sum())


def test_a_second_run_reuses_and_a_changed_corpus_is_noticed(folder, tmp_path, monkeypatch):
    config = text_config(folder, tmp_path)
    first = prepare(config, quiet, progress=False)
    monkeypatch.setattr(tokens_module, "read_corpus", lambda *a: pytest.fail("read again"))
    lines = []
    again = prepare(config, lines.append, progress=False)
    assert again.fingerprint == first.fingerprint and "reusing" in lines[0]
    monkeypatch.undo()
    (folder / "00.txt").write_text("changed " * 50)
    changed = prepare(config, quiet, progress=False)
    assert changed.fingerprint != first.fingerprint and changed.folder != first.folder


def test_a_build_that_dies_leaves_nothing_half_valid(folder, tmp_path, monkeypatch):
    config = text_config(folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            tokens_module, "write_atomic", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            prepare(config, quiet, progress=False)
    assert not list((tmp_path / "tokens").iterdir())
    assert len(prepare(config, quiet, progress=False).train) > 0


def test_a_truncated_token_file_is_one_line(folder, tmp_path):
    config = text_config(folder, tmp_path)
    file = prepare(config, quiet, progress=False).folder / "val.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"val.bin: \d+ bytes are not the \d+ tokens.*delete"):
        prepare(config, quiet, progress=False)


def test_an_unwritable_cache_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache_dir=.*cannot write there"):
        prepare(
            text_config(folder, tmp_path, cache_dir=str(tmp_path / "file")), quiet, progress=False
        )


def test_a_runs_tokenizer_reads_other_text(folder, tmp_path):
    tokenizer = train_bpe(["words of another text " * 20], 280, quiet)
    home = tmp_path / "model"
    home.mkdir()
    (home / "config.json").write_text("{}")
    tokenizer.save(home)
    tokens = prepare(text_config(folder, tmp_path, tokenizer=str(home)), quiet, progress=False)
    assert tokens.tokenizer.fingerprint == tokenizer.fingerprint


def bins(tmp_path, ids, meta=None):
    for name in ("train", "val"):
        np.asarray(ids, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    if meta is not None:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    return DataConfig(name="bin", path=str(tmp_path), tokenizer="ids", vocab_size=10)


def test_nanogpts_own_bins_and_characters(tmp_path):
    config = bins(
        tmp_path,
        [0, 1, 2, 1],
        {"stoi": {"a": 0, "b": 1, "c": 2}, "itos": {0: "a", 1: "b", 2: "c"}, "vocab_size": 3},
    )
    tokens = prepare(config, quiet)
    assert (
        tokens.vocab_size == 3
        and tokens.tokenizer.decode(tokens.train) == "abcb"
        and tokens.tokenizer.encode("cab") == [2, 0, 1]
    )
    with pytest.raises(UserError, match="'z': not among"):
        tokens.tokenizer.encode("z")


def test_bins_that_do_not_fit_are_one_line(tmp_path):
    config = bins(tmp_path, [0, 10])
    with pytest.raises(UserError, match=r"train.bin: holds token 10, ids has 10 tokens"):
        prepare(config, quiet)
    assert prepare(replace(config, vocab_size=11), quiet).vocab_size == 11
    with pytest.raises(UserError, match="data.tokenizer=bpe: data=bin holds ids"):
        prepare(replace(config, tokenizer="bpe", vocab_size=300), quiet)
    (tmp_path / "val.bin").unlink()
    with pytest.raises(UserError, match="no val.bin there"):
        prepare(config, quiet)


class Evil:
    def __reduce__(self):
        return os.system, ("echo evil",)


def test_a_meta_pkl_that_holds_code_is_refused(tmp_path):
    config = bins(tmp_path, [0, 1], {"stoi": Evil()})
    with pytest.raises(UserError, match=r"meta.pkl: not nanoGPT's character table"):
        prepare(config, quiet)


def test_labels_are_the_next_tokens():
    batch = Batches(np.arange(100, dtype=np.uint16), 8, 4, seed=0).batch(0)
    assert batch.ids.dtype == torch.int64
    assert torch.equal(batch.labels, batch.ids + 1)
    assert torch.equal(batch.ids[:, 0], batch.blocks * 8)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    make = lambda seed: Batches(np.arange(1000, dtype=np.uint16), 8, 16, seed)  # noqa: E731
    one, other = make(3), make(3)
    late = other.batch(50)
    assert all(
        torch.equal(a, b)
        for step in (0, 50, 7)
        for a, b in zip(one.batch(step)[:3], other.batch(step)[:3], strict=True)
    )
    assert torch.equal(late.ids, one.batch(50).ids)
    assert not torch.equal(make(4).batch(0).blocks, one.batch(0).blocks)


def test_every_block_comes_once_an_epoch_across_its_edge():
    batches = Batches(np.arange(8 * 21 + 1, dtype=np.uint16), 8, 6, seed=0)
    blocks = torch.cat(
        [batches.batch(step).blocks for step in range(7)]
    ).tolist()  # 42 = two epochs of 21
    assert (
        sorted(blocks[:21]) == list(range(21)) == sorted(blocks[21:]) and blocks[:21] != blocks[21:]
    )
    whole = Batches(np.arange(8 * 3 + 1, dtype=np.uint16), 8, 10, seed=0).batch(
        0
    )  # a batch of more than three epochs
    assert torch.bincount(whole.blocks).tolist() in ([4, 3, 3], [3, 4, 3], [3, 3, 4])


def test_a_fraction_is_spread_over_the_text_the_same_for_every_seed_and_nested():
    tokens = np.arange(8 * 1000 + 1, dtype=np.uint16)
    small, large = (Batches(tokens, 8, 4, 0, fraction) for fraction in (0.05, 0.2))
    assert small.n_blocks == 50 and set(small.blocks) <= set(large.blocks)
    assert set(small.blocks) == set(Batches(tokens, 8, 4, 1, 0.05).blocks)
    assert small.blocks.min() < 150 and small.blocks.max() > 850
    assert set(np.unique([small.batch(step).blocks for step in range(30)])) == set(small.blocks)


def test_prefetch_gives_the_same_batches_and_closes_and_tells_errors():
    batches = Batches(np.arange(1000, dtype=np.uint16), 8, 4, seed=0)
    ahead = Prefetch(batches, 3, 9)
    assert all(
        torch.equal(batch.ids, batches.batch(3 + place).ids) for place, batch in enumerate(ahead)
    )
    ahead.close()
    ahead = Prefetch(batches, 0, 10**9)
    next(iter(ahead))
    ahead.close()
    assert not any(thread.is_alive() for thread in ahead.pool._threads)
    batches.source = None
    with pytest.raises(AttributeError):
        next(iter(Prefetch(batches, 0, 3)))


def test_the_pace_of_a_long_job_is_told_every_ten_seconds(monkeypatch):
    moments, lines = iter([0, 5, 11, 12, 30]), []
    monkeypatch.setattr(engine.progress, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    pace = engine.progress.ProgressPrinter("job", 8, lines.append)
    for _ in range(4):
        pace.add(2, 99)
    assert lines == ["job: 50% | 18 tok/s | ETA 0:11", "job: 100% | 13 tok/s | ETA 0:00"]


def test_held_out_is_read_in_order_and_bounded():
    tokens = np.arange(8 * 10 + 1, dtype=np.uint16)
    found = list(held_out(tokens, 8, 4, 10**9))
    assert [len(batch.ids) for batch in found] == [4, 4, 2]
    assert torch.cat([batch.blocks for batch in found]).tolist() == list(range(10))
    assert sum(len(batch.ids) for batch in held_out(tokens, 8, 4, 24)) == 3
    assert sum(len(batch.ids) for batch in held_out(tokens, 8, 4, 1)) == 1


def test_a_large_file_is_mapped_not_read(tmp_path):
    for name in ("train", "val"):
        with open(tmp_path / f"{name}.bin", "wb") as stream:
            stream.truncate(8 * 2**30 if name == "train" else 2**20)
    (tmp_path / "meta.json").write_text(
        json.dumps(
            {
                "tokens": {"train": 4 * 2**30, "val": 2**19},
                "val_bytes": 1,
                "sha256": {"train.bin": "", "val.bin": ""},
            }
        )
    )
    Tokenizer({"kind": "bytes"}).save(tmp_path)
    started = time.monotonic()
    tokens = tokens_module.open_tokens(tmp_path)
    assert (
        time.monotonic() - started < 1
        and len(tokens.train) == 4 * 2**30
        and tokens.train[3 * 2**30] == 0
    )
