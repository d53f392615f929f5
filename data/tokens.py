"""Token files: made once from a corpus, found again by fingerprint, read by memory map."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.corpora import DataConfig, find_files, stamp, texts
from data.tokenizer import Tokenizer, given_tokenizer, make_tokenizer, read_meta
from engine import UserError
from engine.checkpoint import sha256, write_atomic

BATCH = 256  # documents tokenised between two moves of the progress bar


@dataclass
class Tokens:
    """A corpus as ids: two memory maps and what is needed to trust them."""

    train: np.ndarray  # [tokens] uint16, or uint32 past 65,536 entries
    val: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str  # SHA-256 over both files' sums and the tokenizer's
    val_bytes: int | None  # of held-out text; None where only ids are known
    folder: Path

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def train_part(self, fraction: float, block_size: int) -> np.ndarray:
        """The first `fraction` of the training tokens: whole documents in random order, so a fair sample."""
        part = self.train[: int(fraction * len(self.train))]
        for name, tokens, key in (("training", part, "data.fraction"), ("held-out", self.val, "data.val_fraction")):
            if len(tokens) <= block_size:
                raise UserError(
                    f"model.block_size={block_size}: the {name} text has {len(tokens)} tokens, not one block and its next token;"
                    f" give more text, raise {key}, or set a smaller model.block_size"
                )
        return part


def prepare(config: DataConfig, say=print, progress: bool = True) -> Tokens:
    """The tokens that `config` asks for, made now if they are not there yet.

    They are found again by the corpus's file names, sizes and times of change, the tokenizer and the split.
    """
    if config.name == "bin":
        return read_bins(config, say)
    files = find_files(config)
    given = given_tokenizer(config.tokenizer)
    wanted = asdict(config) | {"fraction": None, "cache_dir": None, "path": None, "files": stamp(files)}
    wanted |= {"tokenizer": given.fingerprint, "vocab_size": None} if given else {}
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(config.cache_dir) / f"{config.name}-{given.name if given else config.tokenizer}-{digest}"
    if (folder / "meta.json").is_file():
        say(f"data: reusing {folder}")
    else:
        say(f"data: no token file yet for {config.path or 'the standard library'}, so it is made first in {folder}")
        build(config, folder, say, progress)
    return open_tokens(folder)


def build(config: DataConfig, folder: Path, say, progress: bool) -> None:
    """Tokenises both splits into a scratch folder that is renamed into place when whole."""
    train, val = texts(config, say)
    tokenizer = given_tokenizer(config.tokenizer) or make_tokenizer(config.tokenizer, config.vocab_size, train, say)
    scratch = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    try:
        scratch.mkdir(parents=True)
        counts = {name: write_ids(part, tokenizer, scratch / f"{name}.bin", progress) for name, part in (("train", train), ("val", val))}
        tokenizer.save(scratch)
        sums = {f"{name}.bin": sha256(scratch / f"{name}.bin") for name in counts}
        size = sum(len(text.encode()) for text in val)
        meta = {"tokens": counts, "val_bytes": size, "sha256": sums, "tokenizer": tokenizer.fingerprint}
        write_atomic(scratch / "meta.json", json.dumps(meta, indent=1))
        if not folder.exists():  # else another process made the same meanwhile
            os.rename(scratch, folder)
    except OSError as error:
        raise UserError(f"data.cache_dir={config.cache_dir}: cannot write there ({error.strerror}); give another") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say(f"data: {counts['train']:,} training and {counts['val']:,} held-out tokens, vocabulary {tokenizer.vocab_size:,}")


def id_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_ids(documents: list[str], tokenizer: Tokenizer, file: Path, progress: bool) -> int:
    """Each document after one <|endoftext|>; returns the number of tokens."""
    from rich.progress import track

    dtype, count = id_dtype(tokenizer.vocab_size), 0
    starts = range(0, len(documents), BATCH)
    with open(file, "wb") as stream:
        for start in track(starts, f"tokenising {file.stem}", disable=not (progress and sys.stdout.isatty()), transient=True):
            for ids in tokenizer.encode_batch(documents[start : start + BATCH]):
                ids = ids if tokenizer.eot is None else [tokenizer.eot, *ids]
                count += len(ids)
                np.asarray(ids, dtype=dtype).tofile(stream)
    return count


def open_tokens(folder: Path) -> Tokens:
    """Memory-maps a finished folder; UserError where a file is not as long as it was made."""
    meta, tokenizer = json.loads((folder / "meta.json").read_text()), Tokenizer.load(folder)
    dtype, parts = id_dtype(tokenizer.vocab_size), {}
    for name, count in meta["tokens"].items():
        file = folder / f"{name}.bin"
        size = file.stat().st_size if file.is_file() else 0
        if size != count * np.dtype(dtype).itemsize:
            raise UserError(f"{file}: {size} bytes are not the {count} tokens that were written; delete {folder} and run again")
        parts[name] = np.memmap(file, dtype, "r")
    content = json.dumps([meta["sha256"], tokenizer.fingerprint], sort_keys=True)
    return Tokens(**parts, tokenizer=tokenizer, fingerprint=hashlib.sha256(content.encode()).hexdigest(), val_bytes=meta["val_bytes"], folder=folder)


def read_bins(config: DataConfig, say=print) -> Tokens:
    """nanoGPT's own train.bin and val.bin (uint16), with its meta.pkl where there is one."""
    folder = Path(config.path)
    parts, sums = {}, {}
    for name in ("train", "val"):
        file = folder / f"{name}.bin"
        if not file.is_file():
            raise UserError(f"data.path={config.path}: no {name}.bin there; data=bin needs train.bin and val.bin, data=text takes text")
        if file.stat().st_size < 2 or file.stat().st_size % 2:
            raise UserError(f"{file}: {file.stat().st_size} bytes are no uint16 tokens; write it with numpy's uint16.tofile")
        parts[name], sums[name] = np.memmap(file, np.uint16, "r"), stamp([file])
    meta = folder / "meta.pkl"
    tokenizer = read_meta(meta) if meta.is_file() else make_tokenizer(bin_tokenizer(config), config.vocab_size, [], say)
    for name, ids in parts.items():
        top = max(int(ids[start : start + 2**24].max()) for start in range(0, len(ids), 2**24))
        if top >= tokenizer.vocab_size:
            raise UserError(
                f"{folder / name}.bin: holds token {top}, the tokenizer {tokenizer.name} has {tokenizer.vocab_size}; set data.tokenizer"
            )
    content = json.dumps([sums, tokenizer.fingerprint], sort_keys=True)
    return Tokens(**parts, tokenizer=tokenizer, fingerprint=hashlib.sha256(content.encode()).hexdigest(), val_bytes=None, folder=folder)


def bin_tokenizer(config: DataConfig) -> str:
    if config.tokenizer == "bpe":
        raise UserError("data.tokenizer=bpe: data=bin holds ids that somebody else's tokenizer made; set data.tokenizer=gpt2, or ids with data.vocab_size")
    return config.tokenizer
