"""Text to ids and back, by whichever encoding: made, saved, found again."""

import codecs
import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from data.encodings import UNUSED, Encoding, kinds, make_encoding, train_bpe
from data.hf_tokenizer import HF_FILE, HFEncoding, MaskedIds, Turns
from engine import UserError
from engine.checkpoint import resolve

FILE_NAME = "nanodistill_tokenizer.json"


class Tokenizer:
    """`content` is plain JSON, {"kind": bytes | char | bpe | tiktoken | ids | hf, ...}.

    It determines everything but a Hugging Face tokenizer, which its folder's files do.
    """

    def __init__(self, content: dict, encoding: Encoding | None = None):
        self.content = content
        self.encoding = encoding or make_encoding(content)
        self.name = content.get("name", content["kind"])
        self.vocab_size = self.encoding.vocab_size
        self.eot = self.encoding.eot  # the token between documents, or None
        self.bos = self.encoding.bos  # the token that a document begins with, or None
        self.prefixed = self.encoding.prefixed  # it puts a space before what it reads
        self.fingerprint = digest(self.encoding.definition or content)

    @cached_property
    def vocabulary(self) -> str:
        """SHA-256 over the bytes of all ids: two kinds of tokenizer may have one vocabulary."""
        return digest([self.token_bytes(token).hex() for token in range(self.vocab_size)])

    def encode(self, text: str) -> list[int]:
        """Text as ordinary text: a written <|endoftext|> is not the special token."""
        return self.encoding.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel where the library can."""
        return self.encoding.encode_batch(texts)

    def encode_row(self, turns: Turns) -> list[MaskedIds]:
        """The documents [(ids, mask)] of a fine-tuning row, nearly always one; mask 1 = a label.

        turns ((role, content), ...): a prompt and its completion, or a chat. A chat is what the
        folder's own template makes of it; without one it reads
        "System: ...\\nUser: ...\\nAssistant: ...\\n". Labels are completions and assistant turns
        with the token that ends them. bos goes before what no template wrote; an eot ends every
        document.
        """
        if self.encoding.chat_template and turns[0][0] != "prompt":
            documents = self.encoding.encode_chat(turns)
        else:
            documents = [self.encode_plain_row(turns)]
        for ids, mask in documents:
            if self.eot is not None and ids[-1:] != [self.eot]:
                ids.append(self.eot)
                mask.append(1)
        return documents

    def encode_plain_row(self, turns: Turns) -> MaskedIds:
        """(ids, mask) of a row without a template, each part encoded where it stands."""
        ids = [] if self.bos is None else [self.bos]
        mask = [0] * len(ids)
        before = ""
        for text, trained in plain_parts(turns):
            part = self.encoding.encode_after(before, text)
            ids += part
            mask += [int(trained)] * len(part)
            before += text
        return ids, mask

    def token_bytes(self, token: int) -> bytes:
        """Its UTF-8 bytes: of a special token its name, of an unused number U+FFFD."""
        if token >= self.vocab_size:  # a padded row of a model
            return UNUSED
        return self.encoding.token_bytes(token)

    def decode(self, ids) -> str:
        """Ids to text; bytes that are no UTF-8 read as U+FFFD."""
        text = b"".join(self.token_bytes(int(token)) for token in ids).decode(errors="replace")
        return text.removeprefix(" ") if self.prefixed else text

    def stream(self) -> Callable[[int], str]:
        """A function token -> text that waits for a character's last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(self.token_bytes(int(token)))

    def save(self, folder: Path) -> None:
        (Path(folder) / FILE_NAME).write_text(json.dumps(self.content))
        self.encoding.save(Path(folder))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """What `save` put there, or a Hugging Face folder's own."""
        folder = Path(folder)
        content = {"kind": "hf", "name": folder.resolve().name}
        if (folder / FILE_NAME).is_file():
            content = json.loads((folder / FILE_NAME).read_text())
        if content["kind"] == "hf":
            return cls(content, HFEncoding(folder))
        return cls(content)

    @classmethod
    def find(cls, folder: Path) -> "Tokenizer | None":
        """What `load` gives, or None where the folder has no tokenizer."""
        names = (FILE_NAME, HF_FILE)
        if not any((Path(folder) / name).is_file() for name in names):
            return None
        return cls.load(folder)


def digest(content) -> str:
    """SHA-256 over plain JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plain_parts(turns: Turns) -> list[tuple[str, bool]]:
    """A row without a template: (text, whether it is trained on), up to the last that is."""
    if turns[0][0] == "prompt":
        return [(content, role == "completion") for role, content in turns]
    parts = []
    for role, content in turns:
        parts.append((f"{role.title()}:", False))
        parts.append((f" {content}\n", role == "assistant"))
    while not parts[-1][1]:
        parts.pop()
    return parts


def make_tokenizer(name: str, vocab_size: int, texts: list[str]) -> Tokenizer:
    """A tokenizer of a kind by its name; bpe and char are made from `texts`."""
    if name == "bpe":
        return Tokenizer(train_bpe(texts, vocab_size))
    if name == "char":
        return Tokenizer({"kind": "char", "chars": sorted(set().union(*texts))})
    if name == "ids":
        return Tokenizer({"kind": "ids", "vocab_size": vocab_size})
    if name == "bytes":
        return Tokenizer({"kind": "bytes"})
    return Tokenizer({"kind": "tiktoken", "name": name})


def given_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer in the folder, checkpoint or run `name`; None where that names a kind."""
    folder = Path(name)
    if name in kinds() or not folder.is_dir():  # a folder gpt2/ does not hide the name
        return None
    tokenizer = Tokenizer.find(folder) or Tokenizer.find(resolve(name, "data.tokenizer"))
    if tokenizer is None:
        raise UserError(
            f"data.tokenizer={name}: neither {FILE_NAME} nor {HF_FILE} there; "
            "give another folder, or a name such as gpt2"
        )
    return tokenizer


def read_tokenizer(folder: Path, key: str) -> Tokenizer:
    """The tokenizer beside a model's weights; GPT-2's for one of its vocabulary that has none."""
    tokenizer = Tokenizer.find(folder)
    if tokenizer is not None:
        return tokenizer
    vocab_size = json.loads((folder / "config.json").read_text()).get("vocab_size")
    if vocab_size != 50257:
        raise UserError(
            f"{key}={folder}: neither {FILE_NAME} nor {HF_FILE} beside the weights, and a "
            f"vocabulary of {vocab_size} is not GPT-2's; give a folder that has one"
        )
    return Tokenizer({"kind": "tiktoken", "name": "gpt2"})
