"""The tokenizer that a name, a folder or a model stands for."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from data.corpora import DataConfig
from data.encodings import Tokenizer, from_content, kinds, train_bpe
from data.hf_tokenizer import HF_FILE, HFTokenizer
from engine.checkpoint import best, resolve


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """What `save` put there, or a Hugging Face folder's own."""
    content = {"kind": "hf", "name": Path(folder).resolve().name}
    file = Path(folder, Tokenizer.FILE)
    if file.is_file():
        content = json.loads(file.read_text())
    if content["kind"] == "hf":
        return HFTokenizer(content, Path(folder))
    return from_content(content)


def has_tokenizer(folder: str | Path) -> bool:
    return any(Path(folder, name).is_file() for name in (Tokenizer.FILE, HF_FILE))


def find_tokenizer(folder: str | Path) -> Tokenizer | None:
    """What `load_tokenizer` gives, or None where the folder has no tokenizer."""
    return load_tokenizer(folder) if has_tokenizer(folder) else None


def read_by_model(data: DataConfig, path: str | Path, key: str) -> DataConfig:
    """`data` with the tokenizer of the model at `path`, unless another than the default is set.

    path: RUN | CHECKPOINT | HUGGING_FACE_FOLDER, which `key` set.
    """
    default = "gpt2" if data.name == "bin" else "bpe"  # as conf/data/*.yaml have it
    is_default = data.tokenizer in (default, "bpe")
    if is_default and has_tokenizer(resolve(path, key, verify=False)):
        return replace(data, tokenizer=str(path))
    return data


def make_tokenizer(name: str, vocab_size: int = 0, texts: Iterable[str] = ()) -> Tokenizer:
    """A tokenizer of a kind by its name; bpe and char are made from `texts`."""
    content = {"kind": name}
    if name == "bpe":
        content = train_bpe(texts, vocab_size)
    elif name == "char":
        content["chars"] = sorted(set().union(*texts))
    elif name == "ids":
        content["vocab_size"] = vocab_size
    elif name != "bytes":
        content = {"kind": "tiktoken", "name": name}
    return from_content(content)


def given_tokenizer(name: str, say: Callable[[str], object] = print) -> Tokenizer | None:
    """The tokenizer in the folder, checkpoint or run `name`; None where that names a kind.

    A folder with a tokenizer comes before a kind of its name (gpt2, bpe), and `say` hears of it.
    """
    if not Path(name).is_dir():
        return None
    tokenizer = find_tokenizer(name)
    is_kind = name in kinds()
    if tokenizer is None:
        if is_kind and best(Path(name)) is None:
            return None
        tokenizer = load_tokenizer(resolve(name, "data.tokenizer"))
    if is_kind:
        say(f"data: data.tokenizer={name} is the folder {name}/ here, not the kind of that name")
    return tokenizer
