"""Token files: made once from a corpus, found again by fingerprint, read by memory map."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data.batches import Blocks
from data.corpora import (
    DataConfig,
    FineTuningRow,
    find_files,
    mtime_fingerprint,
    read_corpus,
    split_documents,
)
from data.encodings import cut_into_pieces
from data.packing import PackedBlocks
from data.tokenizer import Tokenizer, digest, given_tokenizer, make_tokenizer
from engine import UserError
from engine.checkpoint import fsync, report_os_errors, resolve, sha256, write_atomic

READER_VERSION = 1  # to be raised when a reader in data/corpora.py gives other text
PIECES_AT_ONCE = 64  # tokenised between two moves of the progress bar
Say = Callable[[str], object]


@dataclass
class Tokens:
    """A corpus as ids: two memory maps and what is needed to trust them."""

    train: np.ndarray  # [tokens] uint16, or uint32 past 65,536 entries
    val: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str  # SHA-256 over both files' sums and the tokenizer's
    val_bytes: int | None  # of held-out text; None where only ids are known
    folder: Path
    # [tokens] uint8: 1 = a label in the loss, 2 = a document's first token; None = plain text
    train_mask: np.ndarray | None = None
    val_mask: np.ndarray | None = None
    document_mask: bool = False  # plain text: documents are told apart
    generated_by: str | None = None  # fingerprint of the model whose draw each next token is
    packed: dict[tuple[str, int], PackedBlocks] = field(default_factory=dict, repr=False)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def identity(self) -> str:
        """What a teacher's words about a position depend on."""
        return self.fingerprint + ("+documents" if self.document_mask else "")

    def blocks(self, split: str, block_size: int, say: Say = lambda line: None) -> Blocks:
        """The blocks of `split`, train or val; `say` hears what packing cut."""
        tokens = getattr(self, split)
        mask = getattr(self, f"{split}_mask")
        bos = self.tokenizer.bos
        if mask is None:
            if self.document_mask and bos is None:
                raise UserError(
                    f"data.document_mask=true: tokenizer {self.tokenizer.name} has no token that "
                    "begins a document; set data.document_mask=false, or another data.tokenizer"
                )
            return Blocks(tokens, block_size, bos if self.document_mask else None)

        if (split, block_size) not in self.packed:
            packed = PackedBlocks(tokens, mask, block_size, bos or 0)
            self.packed[split, block_size] = packed
            if packed.num_cut:
                say(
                    f"data: {packed.num_cut:,} {split} documents are longer than "
                    f"model.block_size={block_size} and cut at their end, "
                    f"{packed.num_dropped:,} left out that keep no label"
                )
        return self.packed[split, block_size]

    def check_length(self, block_size: int, say: Say = lambda line: None) -> None:
        """UserError where either split holds not one block; `say` hears what packing cuts."""
        for split, name in (("train", "training"), ("val", "held-out")):
            if len(self.blocks(split, block_size, say)) > 0:
                continue
            if self.train_mask is not None:
                raise UserError(
                    f"model.block_size={block_size}: each {name} row's prompt fills a block, so "
                    "that no label is left; set a larger model.block_size"
                )
            raise UserError(
                f"model.block_size={block_size}: the {name} text has {len(getattr(self, split))} "
                "tokens, not one block and its next token; give more text (data.path), or set a "
                "smaller model.block_size"
            )

    def check_model(self, path, vocab_size: int, key: str, fix: str | None = None) -> None:
        """UserError unless the model of vocab_size entries at `path` reads these tokens.

        path: RUN | CHECKPOINT | HUGGING_FACE_FOLDER, which `key` set. fix: what to do instead of
        taking its tokenizer.
        """
        ours = self.tokenizer
        theirs = Tokenizer.find(resolve(path, key, verify=False))
        fix = fix or f"set data.tokenizer={path}"
        if theirs is not None and ours.name != "ids" and theirs.vocabulary != ours.vocabulary:
            raise UserError(
                f"{key}={path}: it reads tokens of {theirs.name} (vocabulary {theirs.vocab_size}), "
                f"the data are tokens of {ours.name} (vocabulary {ours.vocab_size}); {fix}"
            )
        if vocab_size < ours.vocab_size:
            raise UserError(
                f"{key}={path}: its vocabulary is {vocab_size}, the data's {ours.vocab_size}; {fix}"
            )


def prepare(config: DataConfig, say: Say = print, progress: bool = True) -> Tokens:
    """The tokens that `config` asks for, made now if they are not there yet.

    They are found again by the corpus's file names, sizes and times of change, the tokenizer and
    the split. A changed corpus is thus noticed without being read again; one that was merely
    copied or touched is made again.
    """
    if config.name == "bin":
        tokens = read_bins(config, say)
    elif config.name == "written":
        if config.path is None or not (Path(config.path) / "meta.json").is_file():
            raise UserError(
                f"data.path={config.path}: data=written needs a folder that a teacher wrote, or "
                "teacher.path to write one"
            )
        return open_tokens(Path(config.path))
    else:
        tokens = prepare_text(config, say, progress)
    return replace(tokens, document_mask=config.document_mask)


def prepare_text(config: DataConfig, say: Say, progress: bool) -> Tokens:
    """Tokens of text, from the cache or made first."""
    tokenizer = given_tokenizer(config.tokenizer)
    name = config.tokenizer if tokenizer is None else tokenizer.name
    identity = {
        "reader": READER_VERSION,
        "files": mtime_fingerprint(find_files(config)),
        "val_fraction": config.val_fraction,
        "tokenizer": config.tokenizer if tokenizer is None else tokenizer.fingerprint,
        "vocab_size": config.vocab_size if config.tokenizer == "bpe" else None,
    }
    folder = Path(config.cache_dir) / f"{config.name}-{name}-{digest(identity)[:12]}"
    if (folder / "meta.json").is_file():
        say(f"data: reusing {folder}")
    else:
        corpus = config.path or "the standard library"
        say(f"data: no token file yet for {corpus}, so it is made first in {folder}")
        build(config, folder, tokenizer, say, progress)
    return open_tokens(folder)


def build(
    config: DataConfig, folder: Path, tokenizer: Tokenizer | None, say: Say, progress: bool
) -> None:
    """Tokenises both splits into a scratch folder that is renamed into place when whole."""
    # Read and split the corpus
    documents = read_corpus(config, find_files(config), say)
    train, val = split_documents(documents, config.val_fraction)
    if not train:
        raise UserError(
            f"data.path={config.path}: too little text to train on and hold some out; give more"
        )

    # Make the tokenizer: bpe on the training side alone, char of both, as nanoGPT's prepare.py
    is_rows = isinstance(train[0], FineTuningRow)
    if tokenizer is None:
        texts = train if config.tokenizer == "bpe" else documents
        if is_rows:
            texts = ["\n".join(content for _, content in row.turns) for row in texts]
        tokenizer = make_tokenizer(config.tokenizer, config.vocab_size, texts)

    # Write everything into the scratch folder, then rename it
    scratch = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    write = write_rows if is_rows else write_ids
    counts = {}
    sizes = {}
    try:
        scratch.mkdir(parents=True)
        for name, side in (("train", train), ("val", val)):
            counts[name] = write(side, tokenizer, scratch / f"{name}.bin", progress)
            sizes[f"{name}_bytes"] = None
            if not is_rows:
                sizes[f"{name}_bytes"] = sum(len(text.encode()) for text in side)
        seal_folder(scratch, tokenizer, counts, **sizes)
        if folder.is_dir() and not (folder / "meta.json").is_file():
            shutil.rmtree(folder)
        os.rename(scratch, folder)
    except OSError as error:
        if not (folder / "meta.json").is_file():  # else another process made the same meanwhile
            raise UserError(
                f"data.cache_dir={config.cache_dir}: cannot write there ({error.strerror}); "
                "give another"
            ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say(
        f"data: {counts['train']:,} training, {counts['val']:,} held-out tokens, "
        f"vocabulary {tokenizer.vocab_size:,}"
    )


def seal_folder(folder: Path, tokenizer: Tokenizer, counts: dict, **facts) -> None:
    """Writes the tokenizer and, last, meta.json beside the token files that are there.

    counts: tokens of train and val. facts: train_bytes and val_bytes, or writer.
    """
    tokenizer.save(folder)
    meta = {
        "tokens": counts,
        **facts,
        "sha256": {file.name: sha256(file) for file in folder.glob("*.bin")},
        "tokenizer": tokenizer.fingerprint,
    }
    for file in folder.iterdir():
        fsync(file)
    write_atomic(folder / "meta.json", json.dumps(meta, indent=1))


def id_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def tracked(items, file: Path, progress: bool):
    """`items` behind a progress bar, on a terminal."""
    from rich.progress import track

    quiet = not (progress and sys.stdout.isatty())
    return track(items, f"tokenising {file.stem}", disable=quiet, transient=True)


def write_ids(documents: list[str], tokenizer: Tokenizer, file: Path, progress: bool) -> int:
    """Each document after one eot, and a bos where that is another token; returns the tokens."""
    opening = [token for token in (tokenizer.eot, tokenizer.bos) if token is not None]
    opening = list(dict.fromkeys(opening))

    # (whether a document begins here, text)
    pieces = []
    for document in documents:
        texts = [document] if tokenizer.prefixed else cut_into_pieces(document)
        pieces += [(place == 0, text) for place, text in enumerate(texts)]

    count = 0
    with open(file, "wb") as stream:
        for start in tracked(range(0, len(pieces), PIECES_AT_ONCE), file, progress):
            batch = pieces[start : start + PIECES_AT_ONCE]
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (begins, _), ids in zip(batch, encoded, strict=True):
                if begins:
                    ids = opening + ids
                stream.write(np.asarray(ids, dtype=id_dtype(tokenizer.vocab_size)).tobytes())
                count += len(ids)
    return count


def write_rows(rows: list[FineTuningRow], tokenizer: Tokenizer, file: Path, progress: bool) -> int:
    """Each row's documents that keep a label, as `write_masked` does."""

    def documents():
        for row in tracked(rows, file, progress):
            try:
                encoded = tokenizer.encode_row(row.turns)
            except UserError as error:
                raise UserError(f"data.path={row.place}: {error}") from None
            yield from ((ids, mask) for ids, mask in encoded if 1 in mask[1:])

    return write_masked(documents(), tokenizer, file)


def write_masked(
    documents: Iterable[tuple[list[int], list[int]]], tokenizer: Tokenizer, file: Path
) -> int:
    """The ids of (ids, mask), and beside them the mask; returns the tokens.

    In the file 1 = a label in the loss, 2 = a document's first token.
    """
    dtype = id_dtype(tokenizer.vocab_size)
    count = 0
    with open(file, "wb") as stream, open(file.with_suffix(".mask.bin"), "wb") as mask_stream:
        for ids, mask in documents:
            stream.write(np.asarray(ids, dtype=dtype).tobytes())
            mask_stream.write(bytes([2, *mask[1:]]))
            count += len(ids)
    return count


def open_tokens(folder: Path) -> Tokens:
    """Memory-maps a finished folder; UserError where a file is not as long as it was made."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = Tokenizer.load(folder)
    maps = {}
    # train.bin, val.bin, and of rows train.mask.bin, val.mask.bin
    for name in meta["sha256"]:
        split, *mask = name.removesuffix(".bin").split(".")
        count = meta["tokens"][split]
        dtype = np.dtype(np.uint8 if mask else id_dtype(tokenizer.vocab_size))
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if size != count * dtype.itemsize:
            raise UserError(
                f"{file}: {size} bytes are not the {count} tokens written; "
                f"delete {folder} and run again"
            )
        maps["_".join([split, *mask])] = np.memmap(file, dtype, "r")
    return Tokens(
        **maps,
        tokenizer=tokenizer,
        fingerprint=digest([meta["sha256"], tokenizer.fingerprint]),
        val_bytes=meta.get("val_bytes"),
        folder=folder,
        generated_by=meta.get("writer"),
    )


def read_bins(config: DataConfig, say: Say) -> Tokens:
    """nanoGPT's train.bin and val.bin (uint16)."""
    folder = Path(config.path)
    if (folder / "meta.pkl").is_file() and config.tokenizer != "ids":
        raise UserError(
            f"data.path={folder}: these are ids of characters (meta.pkl); read their text by "
            "data=text data.path=input.txt data.tokenizer=char"
        )
    if config.tokenizer in ("bpe", "char"):
        raise UserError(
            f"data.tokenizer={config.tokenizer}: data=bin holds ids that another tokenizer made; "
            "set data.tokenizer=gpt2, or data.tokenizer=ids with data.vocab_size"
        )
    tokenizer = given_tokenizer(config.tokenizer)
    if tokenizer is None:
        tokenizer = make_tokenizer(config.tokenizer, config.vocab_size, [])

    maps = {}
    sums = {}
    for split in ("train", "val"):
        file = folder / f"{split}.bin"
        if not file.is_file():
            raise UserError(
                f"data.path={folder}: no {file.name} there; data=bin needs a folder with "
                "train.bin and val.bin, data=text takes text"
            )
        size = file.stat().st_size
        if size == 0 or size % 2:
            raise UserError(
                f"data.path={file}: {size} bytes are no uint16 tokens; "
                "write it with numpy's uint16.tofile"
            )
        maps[split] = np.memmap(file, np.uint16, "r")
        facts = bin_facts(file, maps[split], config.cache_dir, say)
        sums[file.name] = facts["sha256"]
        if facts["top"] >= tokenizer.vocab_size:
            raise UserError(
                f"data.path={file}: holds token {facts['top']}, {tokenizer.name} has "
                f"{tokenizer.vocab_size} tokens; set data.tokenizer to what made it, or "
                "data.tokenizer=ids data.vocab_size to its number of tokens"
            )
    fingerprint = digest([sums, tokenizer.fingerprint])
    return Tokens(
        **maps, tokenizer=tokenizer, fingerprint=fingerprint, val_bytes=None, folder=folder
    )


def bin_facts(file: Path, ids: np.ndarray, cache_dir: str, say: Say) -> dict:
    """{"sha256", "top": the largest id}, remembered under cache_dir until the file changes."""
    record = Path(cache_dir) / f"bin-{mtime_fingerprint([file])[:12]}.json"
    if record.is_file():
        return json.loads(record.read_text())
    say(f"data: reading {file} once, for its largest token and SHA-256")
    top = max(int(ids[start : start + 2**24].max()) for start in range(0, len(ids), 2**24))
    facts = {"sha256": sha256(file), "top": top}
    with report_os_errors(f"data.cache_dir={cache_dir}"):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps(facts))
    return facts
