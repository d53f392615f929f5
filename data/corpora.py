"""Where text comes from, document by document, and which of it is held out."""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from engine import UserError, check_choice, check_range, check_ranges

ROLES = ("system", "user", "assistant")
MIXED = "plain text and fine-tuning rows in one corpus; keep one kind there"
READERS = {"path": ("text", "bin", "written")} | dict.fromkeys(
    ("prompts", "documents", "max_tokens"), ("written",)
)
SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "dist-packages"}


@dataclass
class DataConfig:
    """The corpus, its tokenizer, and how much of it is used."""

    name: str = "stdlib"  # stdlib | text (a file or folder) | bin (nanoGPT's train.bin, val.bin) | written (by the teacher)
    path: str | None = (
        None  # for text and bin; for written an earlier folder (unset: the teacher writes one first)
    )
    tokenizer: str = "bpe"  # bytes | bpe (made here) | gpt2, ... (tiktoken's) | RUN or HUGGING_FACE_FOLDER | ids (bin alone)
    vocab_size: int = 4096  # of bpe, <|endoftext|> included; of ids
    fraction: float = (
        1.0  # of the training text that is trained on, drawn in blocks evenly over all of it, 0..1
    )
    val_fraction: float = 0.1  # of the bytes held out, whole documents where there are several
    document_mask: bool = (
        False  # plain text: attention stays within a document (fine-tuning rows: always)
    )
    prompts: str | None = (
        None  # written: a file of prompts, a line or a .jsonl "prompt" each; unset: documents from nothing
    )
    documents: int = 1024  # written: how many, where there are no prompts
    max_tokens: int | None = (
        None  # written: the longest document; unset: what one block of the student holds
    )
    cache_dir: str = "runs/tokens"  # where token files are kept and found again

    def __post_init__(self):
        check_choice("data", self.name, ("stdlib", "text", "bin", "written"))
        check_range("data.fraction", self.fraction, above=0, high=1)
        check_range("data.val_fraction", self.val_fraction, above=0, below=1)
        check_ranges(self, "documents max_tokens", "data.", low=2)
        for key, names in READERS.items():
            value = getattr(self, key)
            if self.name not in names and value != getattr(DataConfig, key):
                rule = f"only data={' or data='.join(names)} reads it, and this is data={self.name}"
                raise UserError(
                    f"data.{key}={value}: {rule}; set one of these, or leave data.{key} out"
                )
        if self.name in ("text", "bin") and self.path is None:
            rule = (
                "a file or folder of text"
                if self.name == "text"
                else "a folder with train.bin and val.bin"
            )
            raise UserError(f"data.path=null: data={self.name} needs {rule}")
        if self.tokenizer == "bpe" and self.name in ("stdlib", "text") and self.vocab_size < 257:
            raise UserError(
                f"data.vocab_size={self.vocab_size}: bpe needs at least 257 (256 bytes and <|endoftext|>)"
            )
        check_range("data.vocab_size", self.vocab_size, low=1)


@dataclass(frozen=True)
class Row:
    """One fine-tuning row: ((role, content), ...) of a chat, or of the roles prompt and completion; and its file:line."""

    turns: tuple[tuple[str, str], ...]
    place: str

    def encode(self) -> bytes:
        """What tells rows apart, and their size."""
        return json.dumps(self.turns).encode()


def find_files(config: DataConfig) -> list[Path]:
    """The corpus's files, sorted; UserError where there are none."""
    if config.name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [
            file for file in root.rglob("*.py") if not SKIPPED & set(file.relative_to(root).parts)
        ]
        if not found:
            raise UserError(
                f"data=stdlib: no sources of this Python in {root}; use data=text data.path=FILE_OR_FOLDER"
            )
        return sorted(found)
    root = Path(config.path)
    if not root.exists():
        raise UserError(f"data.path={config.path}: no such file or folder (from {os.getcwd()})")
    if root.is_file():
        return [root]
    parts = ((file, file.relative_to(root).parts) for file in root.rglob("*") if file.is_file())
    found = sorted(file for file, names in parts if not any(name.startswith(".") for name in names))
    if not found:
        raise UserError(f"data.path={config.path}: the folder holds no files; give one with text")
    return found


def mtime_fingerprint(files: list[Path]) -> str:
    """SHA-256 over names, sizes and times of change: a changed corpus is noticed without reading it again."""
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(f"{file.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def parse_line(line: str, place: str) -> str | Row:
    """The text or the fine-tuning row of one line of a .jsonl file; UserError naming its `place`, file:line."""
    try:
        found = json.loads(line)
        if "text" in found:
            turns = [("text", found["text"])]
        elif "messages" in found:
            turns = [(turn["role"], turn["content"]) for turn in found["messages"]]
        else:
            turns = [(key, found[key]) for key in ("prompt", "completion")]
        "".join(
            content for _, content in turns
        ).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, KeyError, TypeError, AttributeError):
        rule = 'not a JSON object with a "text" string, "prompt" and "completion", or "messages" of "role" and "content"'
        raise UserError(f"data.path={place}: {rule}; mend the line or leave it out") from None
    if "text" in found:
        return turns[0][1]
    trained = [content.strip() for role, content in turns if role in ("assistant", "completion")]
    rule = None if all(trained) else "an empty completion or assistant turn"
    rule = rule if trained else "no assistant turn to learn from"
    for role in [role for role, _ in turns if "messages" in found and role not in ROLES]:
        rule = f"role {role!r} is none of {', '.join(ROLES)}"
    if rule:
        raise UserError(f"data.path={place}: {rule}; mend the line or leave it out")
    return Row(tuple(turns), place)


def read_file(file: Path) -> list[str] | list[Row] | None:
    """The documents of one file (one, but for .jsonl), or None where it is not UTF-8 text."""
    raw = file.read_bytes()
    if file.suffix == ".gz":
        raw = gzip.decompress(raw)
    if b"\0" in raw[:8192]:
        return None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if ".jsonl" not in file.suffixes:
        return [text]
    documents = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # splitlines would cut at U+2028, which JSON allows in a string
        if not line.strip():
            continue
        documents.append(parse_line(line, f"{file}:{number}"))
        if type(documents[-1]) is not type(documents[0]):
            raise UserError(f"data.path={file}:{number}: {MIXED}")
    return documents


def read_corpus(config: DataConfig, files: list[Path], say=print) -> list[str] | list[Row]:
    """All documents with content; UserError for a single binary file or an empty corpus, a line for skipped files."""
    documents, skipped = [], []
    for file in files:
        try:
            found = read_file(file)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"data.path={file}: cannot be read ({error})") from None
        if found is None:
            skipped.append(file)
        else:
            documents += [
                document for document in found if isinstance(document, Row) or document.strip()
            ]
    if skipped and len(skipped) == len(files):
        hint = "save it as UTF-8, or use data=bin for token files"
        raise UserError(
            f"data.path={config.path}: {skipped[0].name} is binary or not UTF-8 text; {hint}"
        )
    if skipped:
        say(
            f"data: {len(skipped)} files skipped that are binary or not UTF-8 text, the first {skipped[0]}"
        )
    if not documents:
        raise UserError(
            f"data.path={config.path}: no text in {len(files)} file(s); give files with content"
        )
    rows = [document for document in documents if isinstance(document, Row)]
    if 0 < len(rows) < len(documents):
        raise UserError(f"data.path={rows[0].place}: {MIXED}")
    return documents


def split(documents: list, val_fraction: float, say=lambda line: None) -> tuple[list, list]:
    """(training, held-out) documents, both in the order of their SHA-256: random to the eye, the same on every machine.

    Whole documents are held out, equal ones together, while they fit val_fraction of the bytes; where they fill less than
    half of that (a few books), the last part of each document is held out instead. Of fine-tuning rows none is cut: `say`
    hears of less than half, and none at all is a UserError.
    """
    groups: dict[bytes, list] = {}
    for document in documents:
        groups.setdefault(hashlib.sha256(document.encode()).digest(), []).append(document)
    whole = budget = val_fraction * sum(len(document.encode()) for document in documents)
    train, val = [], []
    for key in sorted(groups):
        size = sum(len(document.encode()) for document in groups[key])
        if size <= budget:
            budget -= size
            val += groups[key]
        else:
            train += groups[key]
    rows = isinstance(documents[0], Row)
    if val and train and (rows or budget <= whole / 2):
        if budget > whole / 2:
            say(
                f"data: {1 - budget / whole:.0%} of data.val_fraction={val_fraction} is held out: a fine-tuning row is not cut"
            )
        return train, val
    if rows:
        rule = f"none of {len(documents)} fine-tuning row(s) fits that share; give more rows, or set a larger one"
        raise UserError(f"data.val_fraction={val_fraction}: {rule}")
    unique = dict.fromkeys(documents)
    cuts = [
        (document, len(document) - max(1, round(val_fraction * len(document))))
        for document in unique
    ]
    return [document[:cut] for document, cut in cuts if cut], [
        document[cut:] for document, cut in cuts
    ]


def run_block_size(folder: Path) -> int | None:
    """The context that the run of a checkpoint reads, which may be shorter than its model's; None for another folder."""
    record = folder.parent.parent / "config.yaml"
    return (
        OmegaConf.load(record).model.block_size
        if folder.parent.name == "checkpoints" and record.is_file()
        else None
    )


def run_data(path: str | Path, folder: Path, key: str) -> DataConfig:
    """The data of the run at `path`, or of the one that the checkpoint `folder` lies in; UserError naming `key` without one."""
    places = [Path(path) / "config.yaml", folder.parent.parent / "config.yaml"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(
            f"{key}={path}: no run's config.yaml there; say which text (data=text data.path=...)"
        )
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(found).data)
    )
