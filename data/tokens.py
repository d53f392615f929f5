"""Token files: made once from a corpus, found again by fingerprint, read by memory map."""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data.batches import Blocks
from data.corpora import (
    DataConfig,
    find_files,
    mtime_fingerprint,
    read_corpus,
    split_documents,
)
from data.documents import Documents, FineTuningRow
from data.encodings import MaskedIds, Tokenizer, cut_into_pieces, digest
from data.files import Say, tracked
from data.packing import PackedBlocks
from data.tokenizer import find_tokenizer, given_tokenizer, load_tokenizer, make_tokenizer
from engine import UserError
from engine.checkpoint import fsync, name_in_errors, resolve, sha256, write_atomic

READER_VERSION = 2  # to be raised when a reader in data/documents.py gives other text
SPLITS = ("train", "val")
PIECES_AT_ONCE = 64  # tokenised between two moves of the progress bar


@dataclass
class Tokens:
    """A corpus as ids: two memory maps and what is needed to trust them."""

    train: np.ndarray  # [tokens] uint16, or uint32 past 65,536 entries
    val: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str  # SHA-256 over both files' sums and the tokenizer's
    folder: Path
    val_bytes: int | None = None  # of held-out text; None where only ids are known
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

    def blocks(self, split: str, block_size: int) -> Blocks:
        """The blocks of `split`, train or val."""
        tokens = getattr(self, split)
        mask = getattr(self, f"{split}_mask")
        bos = self.tokenizer.bos
        if mask is None:
            if self.document_mask and bos is None:
                raise UserError(
                    f"data.document_mask=true: tokenizer {self.tokenizer.name} has no token that "
                    "begins a document; set data.document_mask=false, or another data.tokenizer"
                )
            bos = bos if self.document_mask else None
            # Where there is nothing to train on, all of the text is measured.
            return Blocks(tokens, block_size, bos, to_the_end=len(self.train) == 0)
        if (split, block_size) not in self.packed:
            packed = PackedBlocks(tokens, mask, block_size, bos or 0)
            self.packed[split, block_size] = packed
        return self.packed[split, block_size]

    def check_length(
        self,
        block_size: int,
        say: Say = print,
        splits: tuple[str, ...] = SPLITS,
        key: str = "model.block_size",
    ) -> None:
        """UserError where a split holds not one block; `say` hears what packing cuts.

        key: the setting that block_size comes from.
        """
        for split in splits:
            if split == "train" and len(self.train) == 0:
                raise UserError(
                    "data.val_fraction=1: holds out all text, for eval.py, and leaves none to train"
                    " on; set data.val_fraction below 1"
                )
            blocks = self.blocks(split, block_size)
            if blocks.num_cut:
                say(
                    f"data: {blocks.num_cut:,} {split} documents are longer than {key}={block_size}"
                    f" and cut at their end, {blocks.share_cut:.0%} of all tokens"
                )
            if len(blocks) == 0:
                raise UserError(
                    f"{key}={block_size}: {len(blocks.tokens)} {split} tokens do not "
                    f"fill a block with labels; give more text, or set another {key}"
                )

    def check_model(
        self,
        path: str | Path,
        rows: int,
        key: str,
        partner: str | None = None,
    ) -> int:
        """How many tokens the model at `path` shares with the data, the first ones of both.

        Further ones, rows that pad its embedding or added tokens of one side, are impossible.

        Args:
            path: RUN | CHECKPOINT | HUGGING_FACE_FOLDER, which `key` set.
            rows: of its embedding.
            partner: path of the run's other model, or of its cache, if any.

        Raises: UserError where its vocabulary is another, or lacks a token that the data use.
        """
        ours = self.tokenizer
        theirs = find_tokenizer(resolve(path, key, verify=False))
        shared = min(rows, ours.vocab_size)
        if ours.content["kind"] != "ids":
            if theirs is not None:
                shared = min(shared, ours.num_shared(theirs))
            elif rows > 1.25 * ours.vocab_size + 1024:  # more than any padding in use
                shared = 0

        where = f"{key}={path}"
        if shared < ours.num_ordinary:
            raise UserError(
                f"{where}: its vocabulary ({rows} entries) is not that of the data, {ours.name} "
                f"({ours.vocab_size}); give another {key}{self.advice(path, theirs, partner)}"
            )
        if shared < ours.vocab_size:
            token = max(int(ids.max()) for ids in (self.train, self.val) if len(ids))
            if token >= shared:
                all_shared = self.train_mask is not None  # its template may use any added token
                raise UserError(
                    f"{where}: lacks a token that the data use, {token} "
                    f"({ours.decode([token])!r}), of {ours.name}'s {ours.vocab_size} it has the "
                    f"first {shared}; give another {key}"
                    f"{self.advice(path, theirs, partner, all_shared)}, or text without it"
                )
        return shared

    def advice(
        self,
        path: str | Path,
        theirs: Tokenizer | None,
        partner: str | None,
        all_shared: bool = False,
    ) -> str:
        """What else leads on where the model at `path`, of tokenizer `theirs`, does not fit.

        all_shared: data.tokenizer=path helps only where the partner has all tokens of `theirs`.
        """
        if theirs is None:
            return ", or set data.tokenizer to what it was trained with"
        other = theirs
        if self.generated_by is not None:
            other = self.tokenizer
        elif partner is not None:
            other = self.partner_tokenizer(partner) or theirs
        same = theirs.vocabulary == self.tokenizer.vocabulary
        needed = theirs.vocab_size if all_shared else 1 + (theirs.eot or 0)
        if same or theirs.num_shared(other) < needed:
            return f" with the vocabulary of {partner or 'the data'}"
        return f", or set data.tokenizer={path}"

    def partner_tokenizer(self, partner: str) -> Tokenizer | None:
        """That of the model at `partner`, if it has one; a cache was made of the data's tokens."""
        try:
            folder = resolve(partner, verify=False)
        except UserError:
            return self.tokenizer
        return find_tokenizer(folder)


def prepare(config: DataConfig, say: Say = print) -> Tokens:
    """The tokens that `config` asks for, made now if they are not there yet.

    They are found again by the corpus's file names, sizes and times of change, the tokenizer and
    the split. A changed corpus is thus noticed without being read again; one that was merely
    copied or touched is made again.
    """
    if config.name == "written":
        if config.path is None:
            raise UserError("data.path=null: data=written needs data.path=FOLDER, or teacher.path")
        return open_tokens(Path(config.path))
    read = read_bins if config.name == "bin" else prepare_text
    return replace(read(config, say), document_mask=config.document_mask)


def prepare_text(config: DataConfig, say: Say) -> Tokens:
    """Tokens of text, from the cache or made first."""
    tokenizer = given_tokenizer(config.tokenizer, say)
    name = config.tokenizer if tokenizer is None else tokenizer.name
    found = find_files(config)
    identity = {
        "reader": READER_VERSION,
        "files": mtime_fingerprint(found.files),
        "val_fraction": config.val_fraction,
        "tokenizer": config.tokenizer if tokenizer is None else tokenizer.identity,
        "vocab_size": config.vocab_size if config.tokenizer == "bpe" else None,
    }
    folder = Path(config.cache_dir) / f"{config.name}-{name}-{digest(identity)[:12]}"
    if (folder / "meta.json").is_file():
        say(f"data: reusing {folder}")
    else:
        corpus = config.path or "the standard library"
        say(f"data: no token file yet for {corpus}, so it is made first in {folder}")
        build(config, read_corpus(config, found, say), folder, tokenizer, say)
    tokens = open_tokens(folder)
    date = tokens.tokenizer.template_date
    if date is not None and tokens.train_mask is not None:
        say(
            f"data: the chat template prints today's date; these tokens have {date}, and their"
            " models' chats keep it"
        )
    say(
        f"data: {len(tokens.train):,} training, {len(tokens.val):,} held-out tokens, "
        f"vocabulary {tokens.vocab_size:,}"
    )
    return tokens


def build(
    config: DataConfig,
    documents: Documents,
    folder: Path,
    tokenizer: Tokenizer | None,
    say: Say,
) -> None:
    """Tokenises both splits into a scratch folder that is renamed into place when whole."""
    train, val = split_documents(documents, config.val_fraction)
    holds_out_all = config.val_fraction == 1
    if holds_out_all and tokenizer is None and config.tokenizer == "bpe":
        raise UserError(
            "data.val_fraction=1: leaves no text that data.tokenizer=bpe could be made of; set "
            "data.val_fraction below 1"
        )
    if not val or not (train or holds_out_all):
        raise UserError(
            f"data.path={config.path}: too little to train on and to hold out "
            f"data.val_fraction={config.val_fraction} of; give more, or set another share"
        )

    # Make the tokenizer: bpe on the training side alone, char of both, as nanoGPT's prepare.py
    is_rows = isinstance(documents[0], FineTuningRow)
    if tokenizer is None:
        texts = train if config.tokenizer == "bpe" else documents
        if is_rows:
            texts = ["\n".join(content for _, content in row.turns) for row in texts]
        tokenizer = make_tokenizer(config.tokenizer, config.vocab_size, texts)

    # Write everything into the scratch folder, then rename it
    scratch = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    try:
        scratch.mkdir(parents=True)
        write = write_rows if is_rows else write_ids
        write(train, tokenizer, scratch / "train.bin", say)
        write(val, tokenizer, scratch / "val.bin", say)
        val_bytes = None if is_rows else sum(len(text.encode()) for text in val)
        seal_folder(scratch, tokenizer, val_bytes=val_bytes)
        scratch.rename(folder)
    except OSError:
        if not (folder / "meta.json").is_file():  # else another process made the same meanwhile
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def seal_folder(folder: Path, tokenizer: Tokenizer, **facts) -> None:
    """Writes the tokenizer and, last, meta.json beside the token files that are there.

    facts: val_bytes, or writer.
    """
    tokenizer.save(folder)
    sizes = {split: os.path.getsize(folder / f"{split}.bin") for split in SPLITS}
    meta = {
        "tokens": {split: size // tokenizer.dtype.itemsize for split, size in sizes.items()},
        **facts,
        "sha256": {file.name: sha256(file) for file in folder.glob("*.bin")},
        "tokenizer": tokenizer.fingerprint,
    }
    for file in folder.iterdir():
        fsync(file)
    write_atomic(folder / "meta.json", json.dumps(meta, indent=1))


def write_ids(
    documents: list[str],
    tokenizer: Tokenizer,
    file: Path,
    say: Say = print,
) -> None:
    """Each document after one eot, and a bos where that is another token."""
    opening = dict.fromkeys((tokenizer.eot, tokenizer.bos))
    opening = [token for token in opening if token is not None]

    pieces = []  # (whether a document begins here, text)
    for document in documents:
        texts = [document] if tokenizer.prefixed else cut_into_pieces(document)
        pieces += [(place == 0, text) for place, text in enumerate(texts)]

    starts = range(0, len(pieces), PIECES_AT_ONCE)
    with name_in_errors(file), open(file, "wb") as stream:
        for start in tracked(starts, "tokenising", say):
            begins, texts = zip(*pieces[start : start + PIECES_AT_ONCE], strict=True)
            for is_first, ids in zip(begins, tokenizer.encode_batch(list(texts)), strict=True):
                ids = opening + ids if is_first else ids
                stream.write(np.array(ids, tokenizer.dtype).tobytes())


def write_rows(
    rows: list[FineTuningRow],
    tokenizer: Tokenizer,
    file: Path,
    say: Say = print,
) -> None:
    """Each row's documents that keep a label, as `write_masked` does."""

    def documents():
        for row in tracked(rows, "tokenising", say):
            try:
                encoded = tokenizer.encode_row(row.turns)
            except UserError as error:
                raise UserError(
                    f"data.path={row.place}: {error}; mend the row, or the template"
                ) from None
            yield from ((ids, mask) for ids, mask in encoded if 1 in mask[1:])

    write_masked(documents(), tokenizer, file)


def write_masked(documents: Iterable[MaskedIds], tokenizer: Tokenizer, file: Path) -> None:
    """The ids of (ids, mask), and beside them the mask.

    In the file 1 = a label in the loss, 2 = a document's first token.
    """
    mask_file = file.with_suffix(".mask.bin")
    with name_in_errors(file), open(file, "wb") as stream, open(mask_file, "wb") as mask_stream:
        for ids, mask in documents:
            stream.write(np.array(ids, tokenizer.dtype).tobytes())
            mask_stream.write(bytes([2, *mask[1:]]))


def open_tokens(folder: Path) -> Tokens:
    """Memory-maps a finished folder."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = load_tokenizer(folder)
    maps = {}
    for file in meta["sha256"]:  # train.bin, val.bin, and of rows train.mask.bin, val.mask.bin
        name = file.removesuffix(".bin").replace(".", "_")
        dtype = np.uint8 if name.endswith("mask") else tokenizer.dtype
        count = meta["tokens"][name.removesuffix("_mask")]
        if count == 0:  # which cannot be mapped: data.val_fraction=1 leaves nothing to train on
            maps[name] = np.zeros(0, dtype)
        else:
            maps[name] = np.memmap(folder / file, dtype, "r", shape=count)
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
    tokenizer = given_tokenizer(config.tokenizer, say)
    of_characters = (folder / "meta.pkl").is_file() and config.tokenizer != "ids"
    if of_characters or (tokenizer is None and config.tokenizer in ("bpe", "char")):
        raise UserError(
            f"data.tokenizer={config.tokenizer}: did not make the ids in {folder}; set "
            "data.tokenizer=gpt2, or ids with data.vocab_size; nanoGPT's characters (meta.pkl) are "
            "read by data=text data.path=input.txt data.tokenizer=char"
        )
    tokenizer = tokenizer or make_tokenizer(config.tokenizer, config.vocab_size)
    maps = {}
    sums = {}
    for split in SPLITS:
        file = folder / f"{split}.bin"
        try:
            maps[split] = np.memmap(file, np.uint16, "r")
        except ValueError as error:  # no bytes, or an odd number of them
            raise UserError(
                f"data.path={file}: {error}; write it with numpy's uint16.tofile"
            ) from None
        facts = bin_facts(file, maps[split], config.cache_dir, say)
        sums[file.name] = facts["sha256"]
        if facts["top"] >= tokenizer.vocab_size:
            raise UserError(
                f"data.path={file}: holds token {facts['top']}, {tokenizer.name} has "
                f"{tokenizer.vocab_size} tokens; set data.tokenizer to what made it, or "
                "data.tokenizer=ids data.vocab_size to its number of tokens"
            )
    fingerprint = digest([sums, tokenizer.fingerprint])
    return Tokens(**maps, tokenizer=tokenizer, fingerprint=fingerprint, folder=folder)


def bin_facts(file: Path, ids: np.ndarray, cache_dir: str, say: Say) -> dict:
    """{"sha256", "top": the largest id}, remembered under cache_dir until the file changes."""
    record = Path(cache_dir) / f"bin-{mtime_fingerprint([file])[:12]}.json"
    if not record.is_file():
        say(f"data: reading {file} once, for its largest token and SHA-256")
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps({"sha256": sha256(file), "top": int(ids.max())}))
    return json.loads(record.read_text())
