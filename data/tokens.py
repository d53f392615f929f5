"""Token files: made once from a corpus, found again by fingerprint, read by memory map."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from data.batches import Blocks
from data.corpora import DataConfig, Row, find_files, mtime_fingerprint, read_corpus, split
from data.packing import PackedBlocks
from data.tokenizer import Tokenizer, digest, given_tokenizer, make_tokenizer, pieces, read_meta
from engine import UserError
from engine.checkpoint import fsync, report_os_errors, sha256, write_atomic

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
    train_mask: np.ndarray | None = (
        None  # [tokens] uint8: 1 = a label in the loss, 2 = a document's first; None = plain text
    )
    val_mask: np.ndarray | None = None
    document_mask: bool = False  # plain text: documents are told apart
    generated_by: str | None = None  # the fingerprint of the model whose draw each next token is
    packed: dict[tuple[str, int], PackedBlocks] = field(default_factory=dict, repr=False)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def identity(self) -> str:
        """The fingerprint, and whether documents are told apart: what a teacher's words about a position depend on."""
        return self.fingerprint + ("+documents" if self.document_mask else "")

    def blocks(
        self, split: str, block_size: int, say: Callable[[str], object] = lambda line: None
    ) -> Blocks:
        """The blocks of `split` (train or val), for Batches and held_out; packed once, and said what packing cut."""
        tokens, mask = getattr(self, split), getattr(self, f"{split}_mask")
        if mask is None:
            if self.document_mask and self.tokenizer.bos is None:
                rule = f"tokenizer {self.tokenizer.name} has no token that begins a document"
                raise UserError(
                    f"data.document_mask=true: {rule}; set data.document_mask=false, or another data.tokenizer"
                )
            return Blocks(tokens, block_size, self.tokenizer.bos if self.document_mask else None)
        if (split, block_size) not in self.packed:
            packed = self.packed[split, block_size] = PackedBlocks(
                tokens, mask, block_size, self.tokenizer.bos or 0
            )
            if packed.num_cut:
                rule = f"are longer than model.block_size={block_size} and cut at their end"
                say(
                    f"data: {packed.num_cut:,} {split} documents {rule}, {packed.num_dropped:,} left out that keep no label"
                )
        return self.packed[split, block_size]

    def check_length(
        self, block_size: int, say: Callable[[str], object] = lambda line: None
    ) -> None:
        """UserError where either split holds not one block; `say` hears what packing cuts."""
        for side, name in (("train", "training"), ("val", "held-out")):
            rule = f"each {name} row's prompt fills a block, so that no label is left; set a larger model.block_size"
            if getattr(self, f"{side}_mask") is None:
                rule = f"the {name} text has {len(getattr(self, side))} tokens, not one block and its next token"
                rule += "; give more text (data.path), or set a smaller model.block_size"
            if not len(self.blocks(side, block_size, say)):
                raise UserError(f"model.block_size={block_size}: {rule}")


def prepare(
    config: DataConfig, say: Callable[[str], object] = print, progress: bool = True
) -> Tokens:
    """The tokens that `config` asks for, made now if they are not there yet.

    They are found again by the corpus's file names, sizes and times of change, the tokenizer and the split. A corpus
    is thus noticed to have changed without being read again; one that was merely copied or touched is made again.
    """
    if config.name == "bin":
        return replace(read_bins(config, say), document_mask=config.document_mask)
    if config.name == "written":
        if not (Path(config.path or "") / "meta.json").is_file():
            rule = "data=written needs a folder that a teacher wrote, or teacher.path to write one"
            raise UserError(f"data.path={config.path}: {rule}")
        return open_tokens(Path(config.path))
    files = find_files(config)
    given = given_tokenizer(config.tokenizer)
    wanted = asdict(config) | {
        "fraction": None,
        "cache_dir": None,
        "path": None,
        "files": mtime_fingerprint(files),
    }
    del wanted["document_mask"]  # read from the same tokens
    if config.tokenizer != "bpe":  # it alone is made to size
        wanted |= {"tokenizer": given.recipe if given else config.tokenizer, "vocab_size": None}
    name = given.name if given else config.tokenizer
    folder = Path(config.cache_dir) / f"{config.name}-{name}-{digest(wanted)[:12]}"
    if (folder / "meta.json").is_file():
        say(f"data: reusing {folder}")
    else:
        say(
            f"data: no token file yet for {config.path or 'the standard library'}, so it is made first in {folder}"
        )
        build(config, folder, given, say, progress)
    return replace(open_tokens(folder), document_mask=config.document_mask)


def build(
    config: DataConfig, folder: Path, tokenizer: Tokenizer | None, say, progress: bool
) -> None:
    """Tokenises both splits into a scratch folder that is renamed into place when whole."""
    train, val = split(read_corpus(config, find_files(config), say), config.val_fraction, say)
    if not train:
        raise UserError(
            f"data.path={config.path}: too little text to train on and hold some out; give more"
        )
    rows = isinstance(train[0], Row)
    said = ["\n".join(content for _, content in row.turns) for row in train] if rows else train
    tokenizer = tokenizer or make_tokenizer(config.tokenizer, config.vocab_size, said, say)
    write = write_rows if rows else write_ids
    scratch = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    parts = {"train": train, "val": val}
    try:
        scratch.mkdir(parents=True)
        counts = {
            name: write(part, tokenizer, scratch / f"{name}.bin", progress)
            for name, part in parts.items()
        }
        sizes = {
            f"{name}_bytes": None if rows else sum(len(text.encode()) for text in part)
            for name, part in parts.items()
        }
        seal_folder(scratch, tokenizer, counts, **sizes)
        if folder.is_dir() and not (folder / "meta.json").is_file():
            shutil.rmtree(folder)
        os.rename(scratch, folder)
    except OSError as error:
        if not (folder / "meta.json").is_file():  # else another process made the same meanwhile
            rule = f"cannot write there ({error.strerror}); give another"
            raise UserError(f"data.cache_dir={config.cache_dir}: {rule}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say(
        f"data: {counts['train']:,} training, {counts['val']:,} held-out tokens, vocabulary {tokenizer.vocab_size:,}"
    )


def seal_folder(folder: Path, tokenizer: Tokenizer, counts: dict, **facts) -> None:
    """Writes the tokenizer and, last, meta.json (train_bytes, val_bytes or writer) beside the token files that are there."""
    tokenizer.save(folder)
    sums = {file.name: sha256(file) for file in folder.glob("*.bin")}
    meta = {"tokens": counts, **facts, "sha256": sums}
    for file in folder.iterdir():
        fsync(file)
    write_atomic(
        folder / "meta.json", json.dumps(meta | {"tokenizer": tokenizer.fingerprint}, indent=1)
    )


def id_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def tracked(items, file: Path, progress: bool):
    """`items` behind a progress bar, on a terminal."""
    from rich.progress import track

    quiet = not (progress and sys.stdout.isatty())
    return track(items, f"tokenising {file.stem}", disable=quiet, transient=True)


def write_ids(documents: list[str], tokenizer: Tokenizer, file: Path, progress: bool) -> int:
    """Each document after one eot, and a bos where that is another token; returns the number of tokens."""
    dtype, count = id_dtype(tokenizer.vocab_size), 0
    opening = [
        token for token in dict.fromkeys([tokenizer.eot, tokenizer.bos]) if token is not None
    ]
    cut = (lambda document: [document]) if tokenizer.prefixed else pieces
    parts = [
        (not place, part) for document in documents for place, part in enumerate(cut(document))
    ]
    with open(file, "wb") as stream:
        for start in tracked(range(0, len(parts), BATCH), file, progress):
            opens, batch = zip(*parts[start : start + BATCH], strict=True)
            for first, ids in zip(opens, tokenizer.encode_batch(list(batch)), strict=True):
                ids = [*opening, *ids] if first else ids
                count += len(ids)
                stream.write(np.asarray(ids, dtype=dtype).tobytes())
    return count


def write_rows(rows: list[Row], tokenizer: Tokenizer, file: Path, progress: bool) -> int:
    """Each row's documents that keep a label, as `write_masked` does."""

    def documents():
        for row in tracked(rows, file, progress):
            try:
                yield from (found for found in tokenizer.encode_row(row.turns) if 1 in found[1][1:])
            except UserError as error:
                raise UserError(f"data.path={row.place}: {error}") from None

    return write_masked(documents(), tokenizer, file)


def write_masked(
    documents: Iterable[tuple[list[int], list[int]]], tokenizer: Tokenizer, file: Path
) -> int:
    """The ids of (ids, mask), and beside them the mask: 1 = a label in the loss, 2 = a document's first token."""
    dtype, count = id_dtype(tokenizer.vocab_size), 0
    with open(file, "wb") as stream, open(file.with_suffix(".mask.bin"), "wb") as marks:
        for ids, mask in documents:
            count += len(ids)
            stream.write(np.asarray(ids, dtype=dtype).tobytes())
            marks.write(bytes([2, *mask[1:]]))
    return count


def assemble(
    maps: dict, sums: dict[str, str], tokenizer: Tokenizer, val_bytes: int | None, folder: Path
) -> Tokens:
    fingerprint = digest([sums, tokenizer.fingerprint])
    return Tokens(
        **maps, tokenizer=tokenizer, fingerprint=fingerprint, val_bytes=val_bytes, folder=folder
    )


def open_tokens(folder: Path) -> Tokens:
    """Memory-maps a finished folder; UserError where a file is not as long as it was made."""
    meta, tokenizer, maps = (
        json.loads((folder / "meta.json").read_text()),
        Tokenizer.load(folder),
        {},
    )
    for file in map(
        folder.joinpath, meta["sha256"]
    ):  # train.bin, val.bin, and of rows train.mask.bin, val.mask.bin
        side, *mask = file.stem.split(".")
        count, dtype = (
            meta["tokens"][side],
            np.dtype(np.uint8 if mask else id_dtype(tokenizer.vocab_size)),
        )
        size = file.stat().st_size if file.is_file() else 0
        if size != count * dtype.itemsize:
            raise UserError(
                f"{file}: {size} bytes are not the {count} tokens written; delete {folder} and run again"
            )
        maps["_".join([side, *mask])] = np.memmap(file, dtype, "r")
    found = assemble(maps, meta["sha256"], tokenizer, meta.get("val_bytes"), folder)
    return replace(found, generated_by=meta.get("writer"))


def read_bins(config: DataConfig, say) -> Tokens:
    """nanoGPT's own train.bin and val.bin (uint16), with its meta.pkl's characters where there is one."""
    folder, maps, facts = Path(config.path), {}, {}
    for name in ("train", "val"):
        file = folder / f"{name}.bin"
        if not file.is_file():
            hint = "data=bin needs a folder with train.bin and val.bin, data=text takes text"
            raise UserError(f"data.path={config.path}: no {name}.bin there; {hint}")
        size = file.stat().st_size
        if size < 2 or size % 2:
            raise UserError(
                f"data.path={file}: {size} bytes are no uint16 tokens; write it with numpy's uint16.tofile"
            )
        maps[name] = np.memmap(file, np.uint16, "r")
        facts[file.name] = bin_facts(file, maps[name], config.cache_dir, say)
    if (folder / "meta.pkl").is_file():
        tokenizer = read_meta(folder / "meta.pkl")
        say(f"data: the {tokenizer.vocab_size} characters of {folder / 'meta.pkl'}")
    elif config.tokenizer == "bpe":
        hint = "set data.tokenizer=gpt2, or data.tokenizer=ids with data.vocab_size"
        raise UserError(
            f"data.tokenizer=bpe: data=bin holds ids that another tokenizer made; {hint}"
        )
    else:
        tokenizer = given_tokenizer(config.tokenizer) or make_tokenizer(
            config.tokenizer, config.vocab_size, [], say
        )
    for name, fact in facts.items():
        if fact["top"] >= tokenizer.vocab_size:
            rule = f"holds token {fact['top']}, {tokenizer.name} has {tokenizer.vocab_size} tokens"
            fix = (
                "data.vocab_size, or data.tokenizer"
                if tokenizer.name == "ids"
                else "data.tokenizer"
            )
            raise UserError(f"data.path={folder / name}: {rule}; set {fix} to what made it")
    return assemble(
        maps, {name: fact["sha256"] for name, fact in facts.items()}, tokenizer, None, folder
    )


def bin_facts(file: Path, ids: np.ndarray, cache_dir: str, say) -> dict:
    """{"sha256", "top": the largest id}, read once and remembered under cache_dir until the file changes."""
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
