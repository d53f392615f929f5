"""Where text comes from, document by document, and which of it is held out."""

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from engine import UserError, check_choice, check_range, check_ranges

# A new kind of file is a suffix in `read_file`; a new kind of corpus is a name here, an option in
# conf/data/ and a branch in `find_files` (of text) or in data/tokens.prepare (of tokens).
KINDS = ("stdlib", "text", "bin", "written")
ROLES = {"system", "user", "assistant"}  # of a chat
PAIR = ("prompt", "completion")
ANSWERS = ("assistant", "completion")
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
        check_choice("data", self.name, KINDS)
        check_range("data.fraction", self.fraction, above=0, high=1)
        check_range("data.val_fraction", self.val_fraction, above=0, below=1)
        check_ranges(self, "documents max_tokens", "data.", low=2)
        makes_bpe = self.tokenizer == "bpe" and self.name in ("stdlib", "text")
        check_range("data.vocab_size", self.vocab_size, low=257 if makes_bpe else 1)
        if self.name in ("text", "bin") and self.path is None:
            raise UserError(f"data.path=null: data={self.name} needs data.path=FILE_OR_FOLDER")
        unread = [] if self.name == "written" else ["prompts", "documents", "max_tokens"]
        if self.name == "stdlib":
            unread.append("path")
        for key in unread:
            value = getattr(self, key)
            if value != getattr(DataConfig, key):
                raise UserError(
                    f"data.{key}={value}: data={self.name} does not read it; leave it out, or set "
                    "data=text, bin (data.path) or written (all of them)"
                )


@dataclass(frozen=True)
class FineTuningRow:
    """A chat, or a prompt and its completion."""

    turns: tuple[tuple[str, str], ...]  # (role, content); the roles of a pair: prompt, completion
    place: str = field(compare=False)  # file:line

    def encode(self) -> bytes:
        """The row as bytes: what tells rows apart, and their size (str.encode of a document)."""
        return json.dumps(self.turns).encode()


def find_files(config: DataConfig) -> list[Path]:
    """The corpus's files, sorted."""
    root = Path(config.path or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        return [root]
    pattern = "*.py" if config.name == "stdlib" else "*"
    skipped = SKIPPED_FOLDERS if config.name == "stdlib" else set()
    files = []
    for file in sorted(root.rglob(pattern)):  # it enters no linked folder, which could be a circle
        names = file.relative_to(root).parts
        hidden = any(name.startswith(".") for name in names)
        if file.is_file() and not hidden and skipped.isdisjoint(names):
            files.append(file)
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
    try:
        entry = json.loads(line)
        if "text" in entry:
            turns = [("text", entry["text"])]
        elif "messages" in entry:
            turns = [(message["role"], message["content"]) for message in entry["messages"]]
        else:
            turns = [(role, entry[role]) for role in PAIR]
        for _, content in turns:
            content.encode()  # half a surrogate pair is JSON, but no text
        if "text" in entry:
            return entry["text"]
        answers = [content.strip() for role, content in turns if role in ANSWERS]
        roles = ROLES if "messages" in entry else PAIR
        is_good = answers and all(answers) and all(role in roles for role, _ in turns)
    except (ValueError, KeyError, TypeError, AttributeError):
        is_good = False
    if not is_good:
        raise UserError(
            f'data.path={place}: neither "text", nor "prompt" and "completion", nor "messages" of '
            '"role" (system, user, assistant) and "content", or an answer is empty; mend the line'
        )
    return FineTuningRow(tuple(turns), place)


def read_file(file: Path) -> list[str] | list[FineTuningRow] | None:
    """The documents of one file (one, but for .jsonl), or None where it is not UTF-8 text."""
    content = file.read_bytes()
    try:
        if file.suffix == ".gz":
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:  # a download that was cut short
        raise UserError(f"data.path={file}: cannot be unpacked ({error}); fetch it again") from None
    if "\0" in text[:8192]:
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

    Raises UserError for a corpus without text, or of text and fine-tuning rows; says how many files
    were skipped because they are not text.
    """
    texts = []
    rows = []
    skipped = []
    for file in files:
        documents = read_file(file)
        if documents is None:
            skipped.append(file)
        for document in documents or ():
            if isinstance(document, FineTuningRow):
                rows.append(document)
            elif document.strip():
                texts.append(document)

    if skipped:
        say(f"data: {len(skipped)} files skipped that are not UTF-8 text, the first {skipped[0]}")
    if bool(texts) == bool(rows):
        raise UserError(
            f"data.path={config.path}: {len(texts)} texts and {len(rows)} fine-tuning rows in "
            f"{len(files)} files, {len(skipped)} of them not UTF-8; give text, or rows alone "
            "(token files: data=bin)"
        )
    return texts or rows


def split_documents(documents: list, val_fraction: float) -> tuple[list, list]:
    """(training, held-out) documents, both in the order of their SHA-256.

    That order is random to the eye and the same on every machine. Whole documents are held out,
    equal ones together, while they fit val_fraction of the bytes. Where they fill less than half
    of that (a few books), the last part of each text is held out instead. A fine-tuning row is
    never cut.
    """
    copies = Counter(documents)
    sizes = {document: len(document.encode()) * count for document, count in copies.items()}
    wanted = val_fraction * sum(sizes.values())
    remaining = wanted
    train = []
    val = []
    for document in sorted(copies, key=lambda each: hashlib.sha256(each.encode()).digest()):
        side = train
        if sizes[document] <= remaining:
            remaining -= sizes[document]
            side = val
        side += [document] * copies[document]

    is_rows = isinstance(documents[0], FineTuningRow)
    if is_rows or (train and val and remaining <= wanted / 2):
        return train, val
    # The first part of each text to train on, and its last part held out, as nanoGPT cuts one
    cuts = {text: min(int((1 - val_fraction) * len(text)), len(text) - 1) for text in copies}
    train = [text[:cut] for text, cut in cuts.items() if cut > 0]
    return train, [text[cut:] for text, cut in cuts.items()]


def run_config(folder: Path) -> DictConfig | None:
    """The configuration of the run whose checkpoint `folder` is; None for another folder."""
    record = folder.parent.parent / "config.yaml"
    if folder.parent.name == "checkpoints" and record.is_file():
        return OmegaConf.load(record)
    return None


def run_block_size(folder: Path) -> int | None:
    """The context of a checkpoint's run, perhaps shorter than its model's; None without a run."""
    config = run_config(folder)
    return None if config is None else config.model.block_size


def run_data(path: str | Path, folder: Path, key: str) -> DataConfig:
    """The data of the run whose checkpoint `folder` is, as `path` under `key` led to."""
    config = run_config(folder)
    if config is None:
        raise UserError(
            f"{key}={path}: no run's config.yaml there; say which text (data=text data.path=...)"
        )
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), config.data))
