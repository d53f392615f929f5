"""Where text comes from, document by document, and which of it is held out."""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from engine import UserError, check_choice, check_range, check_ranges

# The kinds of corpus, and the keys that not every kind reads. A new kind of file is a suffix in
# `read_file`; a new kind of corpus is a name here, an option in conf/data/ and a branch in
# `find_files` (of text) or in data/tokens.prepare (of tokens).
KINDS = {
    "stdlib": (),
    "text": ("path",),
    "bin": ("path",),
    "written": ("path", "prompts", "documents", "max_tokens"),
}
OPTIONAL_KEYS = KINDS["written"]
NEEDS_PATH = {"text": "a file or folder of text", "bin": "a folder with train.bin and val.bin"}
ROLES = ("system", "user", "assistant")
ROW_FORMATS = (
    'not a JSON object with a "text" string, "prompt" and "completion", '
    'or "messages" of "role" and "content"'
)
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "dist-packages"}


@dataclass
class DataConfig:
    """The corpus, its tokenizer, and how much of it is used."""

    name: str = "stdlib"  # stdlib | text | bin (nanoGPT's train.bin, val.bin) | written (a teacher)
    path: str | None = None  # a file or folder; of written an earlier one (unset: written first)
    tokenizer: str = "bpe"  # bytes | char | bpe | gpt2, ... | RUN | HUGGING_FACE_FOLDER | ids (bin)
    vocab_size: int = 4096  # of bpe, <|endoftext|> included; of ids
    fraction: float = 1.0  # of the training text, in blocks spread evenly over all of it, 0..1
    val_fraction: float = 0.1  # held out of the bytes, whole documents where there are several
    document_mask: bool = False  # attention stays within a document (of rows it always does)
    prompts: str | None = None  # written: a file, a line or .jsonl "prompt" each; unset: no prompts
    documents: int = 1024  # written: how many, where there are no prompts
    max_tokens: int | None = None  # written: the longest document; unset: one block of the student
    cache_dir: str = "runs/tokens"  # where token files are kept and found again

    def __post_init__(self):
        check_choice("data", self.name, tuple(KINDS))
        check_range("data.fraction", self.fraction, above=0, high=1)
        check_range("data.val_fraction", self.val_fraction, above=0, below=1)
        check_ranges(self, "documents max_tokens", "data.", low=2)
        for key in OPTIONAL_KEYS:
            value = getattr(self, key)
            if key not in KINDS[self.name] and value != getattr(DataConfig, key):
                readers = " or ".join(f"data={name}" for name in KINDS if key in KINDS[name])
                raise UserError(
                    f"data.{key}={value}: only {readers} reads it, and this is data={self.name}; "
                    f"set one of these, or leave data.{key} out"
                )
        if self.path is None and self.name in NEEDS_PATH:
            raise UserError(f"data.path=null: data={self.name} needs {NEEDS_PATH[self.name]}")
        check_range("data.vocab_size", self.vocab_size, low=1)
        if self.tokenizer == "bpe" and self.name in ("stdlib", "text") and self.vocab_size < 257:
            raise UserError(
                f"data.vocab_size={self.vocab_size}: "
                "bpe needs at least 257 (256 bytes and <|endoftext|>)"
            )


@dataclass(frozen=True)
class FineTuningRow:
    """A chat, or a prompt and its completion."""

    turns: tuple[tuple[str, str], ...]  # (role, content); the roles of a pair: prompt, completion
    place: str  # file:line

    def encode(self) -> bytes:
        """The row as bytes: what tells rows apart, and their size (str.encode of a document)."""
        return json.dumps(self.turns).encode()


def find_files(config: DataConfig) -> list[Path]:
    """The corpus's files, sorted; UserError where there are none."""
    pattern = "*"
    skipped = set()
    root = Path(config.path or sysconfig.get_paths()["stdlib"])
    if config.name == "stdlib":
        pattern = "*.py"
        skipped = SKIPPED_FOLDERS
    if not root.exists():
        raise UserError(f"data.path={root}: no such file or folder (from {os.getcwd()})")
    if root.is_file():
        return [root]

    files = []
    for file in sorted(root.rglob(pattern)):
        names = file.relative_to(root).parts
        hidden = any(name.startswith(".") for name in names)
        if file.is_file() and not hidden and not skipped.intersection(names):
            files.append(file)
    if not files:
        raise UserError(f"data.path={root}: the folder holds no files; give one with text")
    return files


def mtime_fingerprint(files: list[Path]) -> str:
    """SHA-256 over names, sizes and times of change: it notices a change without reading a file."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def parse_line(line: str, place: str) -> str | FineTuningRow:
    """The text or the fine-tuning row of a .jsonl line; UserError naming its `place`, file:line."""

    def refuse(rule: str) -> UserError:
        return UserError(f"data.path={place}: {rule}; mend the line or leave it out")

    try:
        entry = json.loads(line)
        if "text" in entry:
            turns = [("text", entry["text"])]
        elif "messages" in entry:
            turns = [(message["role"], message["content"]) for message in entry["messages"]]
        else:
            turns = [(role, entry[role]) for role in ("prompt", "completion")]
        for _, content in turns:
            content.encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, KeyError, TypeError, AttributeError):
        raise refuse(ROW_FORMATS) from None

    if "text" in entry:
        return entry["text"]
    for role, _ in turns:
        if "messages" in entry and role not in ROLES:
            raise refuse(f"role {role!r} is none of {', '.join(ROLES)}")
    answers = [content for role, content in turns if role in ("assistant", "completion")]
    if not answers:
        raise refuse("no assistant turn to learn from")
    if not all(answer.strip() for answer in answers):
        raise refuse("an empty completion or assistant turn")
    return FineTuningRow(tuple(turns), place)


def read_file(file: Path) -> list[str] | list[FineTuningRow] | None:
    """The documents of one file (one, but for .jsonl), or None where it is not UTF-8 text."""
    content = file.read_bytes()
    if file.suffix == ".gz":
        content = gzip.decompress(content)
    if b"\0" in content[:8192]:
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None

    if ".jsonl" not in file.suffixes:
        return [text]
    # splitlines would also cut at U+2028, which JSON allows inside a string
    lines = enumerate(text.split("\n"), start=1)
    return [parse_line(line, f"{file}:{number}") for number, line in lines if line.strip()]


def read_corpus(
    config: DataConfig, files: list[Path], say: Callable[[str], object] = print
) -> list[str] | list[FineTuningRow]:
    """All documents that have content.

    Raises UserError for a corpus without text, or of text and fine-tuning rows; says which files
    were skipped because they are not text.
    """
    documents = []
    skipped = []
    for file in files:
        try:
            content = read_file(file)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"data.path={file}: cannot be read ({error})") from None
        if content is None:
            skipped.append(file)
        else:
            documents += content

    if skipped and len(skipped) == len(files):
        raise UserError(
            f"data.path={config.path}: {skipped[0].name} is binary or not UTF-8 text; "
            "save it as UTF-8, or use data=bin for token files"
        )
    if skipped:
        say(
            f"data: {len(skipped)} files skipped that are binary or not UTF-8 text, "
            f"the first {skipped[0]}"
        )
    rows = [document for document in documents if isinstance(document, FineTuningRow)]
    texts = [document for document in documents if isinstance(document, str) and document.strip()]
    if rows and texts:
        raise UserError(
            f"data.path={rows[0].place}: plain text and fine-tuning rows in one corpus; "
            "keep one kind there"
        )
    if not rows and not texts:
        raise UserError(
            f"data.path={config.path}: no text in {len(files)} file(s); give files with content"
        )
    return rows or texts


def split_documents(documents: list, val_fraction: float) -> tuple[list, list]:
    """(training, held-out) documents, both in the order of their SHA-256.

    That order is random to the eye and the same on every machine. Whole documents are held out,
    equal ones together, while they fit val_fraction of the bytes. Where they fill less than half
    of that (a few books), the last part of each text is held out instead. A fine-tuning row is
    never cut: UserError where none fits.
    """
    copies: dict[bytes, list] = {}
    for document in documents:
        copies.setdefault(hashlib.sha256(document.encode()).digest(), []).append(document)

    # Hold out whole documents while they fit
    wanted = val_fraction * sum(len(document.encode()) for document in documents)
    remaining = wanted
    train = []
    val = []
    for key in sorted(copies):
        size = sum(len(document.encode()) for document in copies[key])
        if size <= remaining:
            remaining -= size
            val += copies[key]
        else:
            train += copies[key]

    is_rows = isinstance(documents[0], FineTuningRow)
    if is_rows and not (train and val):
        raise UserError(
            f"data.val_fraction={val_fraction}: none of {len(documents)} fine-tuning row(s) fits "
            "that share; give more rows, or set a larger one"
        )
    if is_rows or (train and val and remaining <= wanted / 2):
        return train, val
    return split_each(list(dict.fromkeys(documents)), val_fraction)


def split_each(texts: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """The first part of each text to train on, and its last part held out, as nanoGPT cuts one."""
    train = []
    val = []
    for text in texts:
        cut = min(int((1 - val_fraction) * len(text)), len(text) - 1)
        train.append(text[:cut])
        val.append(text[cut:])
    return [text for text in train if text], val


def run_block_size(folder: Path) -> int | None:
    """The context that the run of the checkpoint `folder` reads; None for another folder.

    It may be shorter than the model's own.
    """
    record = folder.parent.parent / "config.yaml"
    if folder.parent.name != "checkpoints" or not record.is_file():
        return None
    return OmegaConf.load(record).model.block_size


def run_data(path: str | Path, folder: Path, key: str) -> DataConfig:
    """The data of the run at `path`, or of the run that the checkpoint `folder` lies in.

    Raises UserError naming `key` where neither is a run.
    """
    for home in (Path(path), folder.parent.parent):
        record = home / "config.yaml"
        if record.is_file():
            data = OmegaConf.load(record).data
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), data))
    raise UserError(
        f"{key}={path}: no run's config.yaml there; say which text (data=text data.path=...)"
    )
