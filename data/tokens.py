"""Token files: made once from a corpus, found again by fingerprint, read by memory map."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.corpora import DataConfig, find_files, stamp, texts
from data.tokenizer import Tokenizer, given_tokenizer, make_tokenizer, pieces, read_meta
from engine import UserError
from engine.checkpoint import fsync, sha256, write_atomic

BATCH = 64  # pieces tokenised between two moves of the progress bar


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

    def check_length(self, block_size: int) -> None:
        """UserError where either split holds less than one block and its next token."""
        for name, tokens in (("training", self.train), ("held-out", self.val)):
            if len(tokens) <= block_size:
                raise UserError(
                    f"model.block_size={block_size}: the {name} text has {len(tokens)} tokens, not one block and its"
                    " next token; give more text (data.path), or set a smaller model.block_size"
                )


def prepare(config: DataConfig, say: Callable[[str], object] = print, progress: bool = True) -> Tokens:
    """The tokens that `config` asks for, made now if they are not there yet.

    They are found again by the corpus's file names, sizes and times of change, the tokenizer and the split. A corpus
    is thus noticed to have changed without being read again; one that was merely copied or touched is made again.
    """
    if config.name == "bin":
        return read_bins(config, say)
    files = find_files(config)
    given = given_tokenizer(config.tokenizer)
    wanted = asdict(config) | {"fraction": None, "cache_dir": None, "path": None, "files": stamp(files)}
    if config.tokenizer != "bpe":  # it alone is made to size
        wanted |= {"tokenizer": given.fingerprint if given else config.tokenizer, "vocab_size": None}
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(config.cache_dir) / f"{config.name}-{given.name if given else config.tokenizer}-{digest}"
    if (folder / "meta.json").is_file():
        say(f"data: reusing {folder}")
    else:
        say(f"data: no token file yet for {config.path or 'the standard library'}, so it is made first in {folder}")
        build(config, folder, given, say, progress)
    return open_tokens(folder)


def build(config: DataConfig, folder: Path, tokenizer: Tokenizer | None, say, progress: bool) -> None:
    """Tokenises both splits into a scratch folder that is renamed into place when whole."""
    train, val = texts(config, say)
    if not train:
        raise UserError(f"data.path={config.path}: too little text to train on and hold some out; give more")
    tokenizer = tokenizer or make_tokenizer(config.tokenizer, config.vocab_size, train, say)
    scratch = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    parts = {"train": train, "val": val}
    try:
        scratch.mkdir(parents=True)
        counts = {name: write_ids(part, tokenizer, scratch / f"{name}.bin", progress) for name, part in parts.items()}
        tokenizer.save(scratch)
        meta = {
            "tokens": counts,
            "train_bytes": sum(len(text.encode()) for text in train),
            "val_bytes": sum(len(text.encode()) for text in val),
            "sha256": {f"{name}.bin": sha256(scratch / f"{name}.bin") for name in parts},
            "tokenizer": tokenizer.fingerprint,
        }
        for file in scratch.iterdir():
            fsync(file)
        write_atomic(scratch / "meta.json", json.dumps(meta, indent=1))
        if folder.is_dir() and not (folder / "meta.json").is_file():
            shutil.rmtree(folder)
        os.rename(scratch, folder)
    except OSError as error:
        if not (folder / "meta.json").is_file():  # else another process made the same meanwhile
            rule = f"cannot write there ({error.strerror}); give another"
            raise UserError(f"data.cache_dir={config.cache_dir}: {rule}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say(f"data: {counts['train']:,} training, {counts['val']:,} held-out tokens, vocabulary {tokenizer.vocab_size:,}")


def id_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_ids(documents: list[str], tokenizer: Tokenizer, file: Path, progress: bool) -> int:
    """Each document after one <|endoftext|>; returns the number of tokens."""
    from rich.progress import track

    dtype, count = id_dtype(tokenizer.vocab_size), 0
    parts = [(not place, part) for document in documents for place, part in enumerate(pieces(document))]
    starts, quiet = range(0, len(parts), BATCH), not (progress and sys.stdout.isatty())
    with open(file, "wb") as stream:
        for start in track(starts, f"tokenising {file.stem}", disable=quiet, transient=True):
            opens, batch = zip(*parts[start : start + BATCH], strict=True)
            for first, ids in zip(opens, tokenizer.encode_batch(list(batch)), strict=True):
                ids = [tokenizer.eot, *ids] if first and tokenizer.eot is not None else ids
                count += len(ids)
                stream.write(np.asarray(ids, dtype=dtype).tobytes())
    return count


def assemble(maps: dict, sums: dict[str, str], tokenizer: Tokenizer, val_bytes: int | None, folder: Path) -> Tokens:
    fingerprint = hashlib.sha256(json.dumps([sums, tokenizer.fingerprint], sort_keys=True).encode()).hexdigest()
    return Tokens(**maps, tokenizer=tokenizer, fingerprint=fingerprint, val_bytes=val_bytes, folder=folder)


def open_tokens(folder: Path) -> Tokens:
    """Memory-maps a finished folder; UserError where a file is not as long as it was made."""
    meta, tokenizer = json.loads((folder / "meta.json").read_text()), Tokenizer.load(folder)
    dtype, maps = id_dtype(tokenizer.vocab_size), {}
    for name, count in meta["tokens"].items():
        file = folder / f"{name}.bin"
        size = file.stat().st_size if file.is_file() else 0
        if size != count * np.dtype(dtype).itemsize:
            raise UserError(f"{file}: {size} bytes are not the {count} tokens written; delete {folder} and run again")
        maps[name] = np.memmap(file, dtype, "r")
    return assemble(maps, meta["sha256"], tokenizer, meta["val_bytes"], folder)


def read_bins(config: DataConfig, say) -> Tokens:
    """nanoGPT's own train.bin and val.bin (uint16), with its meta.pkl where there is one."""
    folder, maps, facts = Path(config.path), {}, {}
    for name in ("train", "val"):
        file = folder / f"{name}.bin"
        if not file.is_file():
            hint = "data=bin needs a folder with train.bin and val.bin, data=text takes text"
            raise UserError(f"data.path={config.path}: no {name}.bin there; {hint}")
        size = file.stat().st_size
        if size < 2 or size % 2:
            raise UserError(f"data.path={file}: {size} bytes are no uint16 tokens; write it with numpy's uint16.tofile")
        maps[name] = np.memmap(file, np.uint16, "r")
        facts[file.name] = bin_facts(file, maps[name], config.cache_dir, say)
    tokenizer = bin_tokenizer(config, folder / "meta.pkl", say)
    for name, fact in facts.items():
        if fact["top"] >= tokenizer.vocab_size:
            rule = f"holds token {fact['top']}, {tokenizer.name} has {tokenizer.vocab_size} tokens"
            raise UserError(f"data.path={folder / name}: {rule}; set data.tokenizer to what made it")
    return assemble(maps, {name: fact["sha256"] for name, fact in facts.items()}, tokenizer, None, folder)


def bin_facts(file: Path, ids: np.ndarray, cache_dir: str, say) -> dict:
    """{"sha256", "top": the largest id}, read once and remembered under cache_dir until the file changes."""
    record = Path(cache_dir) / f"bin-{stamp([file])[:12]}.json"
    if record.is_file():
        return json.loads(record.read_text())
    say(f"data: reading {file} once, for its largest token and SHA-256")
    top = max(int(ids[start : start + 2**24].max()) for start in range(0, len(ids), 2**24))
    facts = {"sha256": sha256(file), "top": top}
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps(facts))
    except OSError as error:
        raise UserError(f"data.cache_dir={cache_dir}: cannot write there ({error.strerror}); give another") from None
    return facts


def bin_tokenizer(config: DataConfig, meta: Path, say) -> Tokenizer:
    """meta.pkl's characters where it is there, else what data.tokenizer names."""
    if meta.is_file():
        tokenizer = read_meta(meta)
        say(f"data: the {tokenizer.vocab_size} characters of {meta}")
        return tokenizer
    if config.tokenizer == "bpe":
        hint = "set data.tokenizer=gpt2, or data.tokenizer=ids with data.vocab_size"
        raise UserError(f"data.tokenizer=bpe: data=bin holds ids that another tokenizer made; {hint}")
    return given_tokenizer(config.tokenizer) or make_tokenizer(config.tokenizer, config.vocab_size, [], say)
