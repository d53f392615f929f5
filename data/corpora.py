"""Where text comes from, document by document, and which of it is held out."""

import hashlib
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from data.documents import Documents, FineTuningRow, read_file, suffixes
from data.files import FileList, Say, list_files, tracked
from engine import UserError, check_choice, check_range, check_ranges

# A new kind of file is a suffix in documents.read_file; a new kind of corpus is a name here, an
# option in conf/data/ and a branch in `find_files` (of text) or in data/tokens.prepare (of tokens).
KINDS = ("stdlib", "text", "bin", "written")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "dist-packages"}


@dataclass
class DataConfig:
    """The corpus, its tokenizer, and how much of it is used."""

    name: str = "stdlib"  # stdlib | text | bin (nanoGPT's train.bin, val.bin) | written (a teacher)
    path: str | None = None  # a file or folder; of written an earlier one (unset: written first)
    tokenizer: str = "bpe"  # bytes | char | bpe | gpt2, ... | RUN | HUGGING_FACE_FOLDER | ids (bin)
    vocab_size: int = 4096  # of bpe, <|endoftext|> included; of ids
    fraction: float = 1.0  # of the training text, in blocks spread evenly over all of it, 0..1
    val_fraction: float = 0.1  # held out of the bytes, whole documents where there are several;
    # 1: all of it, to measure on (eval.py)
    document_mask: bool = False  # attention stays within a document (of rows it always does)
    prompts: str | None = None  # written: a file, a line or .jsonl "prompt" each; unset: no prompts
    documents: int = 1024  # written: how many, where there are no prompts
    max_tokens: int | None = None  # written: the longest document; unset: one block of the student
    cache_dir: str = "runs/tokens"  # where token files are kept and found again

    def __post_init__(self):
        check_choice("data", self.name, KINDS)
        check_range("data.fraction", self.fraction, above=0, high=1)
        check_range("data.val_fraction", self.val_fraction, above=0, high=1)
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


def find_files(config: DataConfig) -> FileList:
    """The corpus's files, sorted."""
    if config.name != "stdlib":
        root = Path(config.path)
        if not root.exists():
            raise UserError(f"data.path={root}: no such file or folder")
        return list_files(root) if root.is_dir() else FileList([root])
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for file in sorted(root.rglob("*.py")):
        names = file.relative_to(root).parts
        hidden = any(name.startswith(".") for name in names)
        if file.is_file() and not hidden and SKIPPED_FOLDERS.isdisjoint(names):
            files.append(file)
    return FileList(files)


def mtime_fingerprint(files: list[Path]) -> str:
    """SHA-256 over names, sizes and times of change: it notices a change without reading a file."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_corpus(config: DataConfig, found: FileList, say: Say = print) -> Documents:
    """All documents that have content; says how many files there are, of which kinds.

    Raises UserError for a corpus without text, or of text and fine-tuning rows.
    """
    given = Path(config.path or "")
    texts = []
    rows = []
    first = {}  # str | FineTuningRow -> the first file of such documents
    kinds = Counter()
    for file in tracked(found.files, "reading", say):
        documents = read_file(file, found, given=file == given)
        if documents is not None:
            kinds["".join(suffixes(file))] += 1
        for document in documents or ():
            if isinstance(document, FineTuningRow):
                rows.append(document)
            elif document.strip():
                texts.append(document)
            else:
                continue
            first.setdefault(type(document), file)

    counts = f"data.path={config.path}: {len(texts):,} texts and {len(rows):,} fine-tuning rows"
    if texts and rows:
        raise UserError(
            f"{counts}, the first in {first[str]} and {first[FineTuningRow]}; give a folder of text"
            " alone, or of rows alone"
        )
    if not (texts or rows):
        raise UserError(
            f"{counts} in {found.describe(kinds)}; give text, or rows (token files: data=bin)"
        )
    documents = texts or rows
    noun = "documents" if texts else "fine-tuning rows"
    say(f"data: {found.describe(kinds)}; {len(documents):,} {noun}")
    return documents


def split_documents(documents: list, val_fraction: float) -> tuple[list, list]:
    """(training, held-out) documents, both in the order of their SHA-256.

    That order is random to the eye and the same on every machine. Whole documents are held out,
    equal ones together, while they fit val_fraction of the bytes. Where they fill less than half
    of that (a few books), the last part of each text is held out instead. A fine-tuning row is
    never cut. val_fraction=1 holds out all, as it is.
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
    # The first part of each text to train on, and its last part held out, as nanoGPT cuts one.
    # Copies are all cut at the same place.
    cuts = {text: min(int((1 - val_fraction) * len(text)), len(text) - 1) for text in copies}
    train = [text[: cuts[text]] for text in documents if cuts[text] > 0]
    return train, [text[cuts[text] :] for text in documents]


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
