"""Text to token ids and back: bytes, BPE trained by rustbpe, tiktoken's own vocabularies, nanoGPT's characters."""

import base64
import codecs
import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

from engine import UserError, nearest
from engine.checkpoint import resolve
from engine.logger import bounded, first_line

FILE_NAME = "nanodistill_tokenizer.json"
END = "<|endoftext|>"
PATIENCE = 20.0  # seconds for a vocabulary's download: tiktoken itself would wait without end
PIECE = 2**16  # characters after which a document is cut where no token can span: threads share a single book
LONGEST = 2**18  # a piece with no such place is cut here: tiktoken and rustbpe panic at a million spaces
SAFE = re.compile(r"(?<=\w)(?= \w)|(?<=\S\n)(?=\w)")  # before a word: every pattern in use ends a token there


class Tokenizer:
    """`content` is plain JSON and determines everything: {"kind": bytes | bpe | tiktoken | char, ...}."""

    def __init__(self, content: dict, patience: float = PATIENCE):
        self.content = content
        kind = content["kind"]
        self.name = content["name"] if kind == "tiktoken" else kind
        self.encoding, self.chars = None, None
        if kind == "bytes":
            self.vocab_size, self.eot = 257, 256
        elif kind == "ids":
            self.vocab_size, self.eot = content["vocab_size"], None
        elif kind == "char":
            self.chars = content["chars"]
            self.codes = {char: code for code, char in enumerate(self.chars)}
            self.vocab_size, self.eot = len(self.chars), None
        else:
            self.encoding = load_tiktoken(content["name"], patience) if kind == "tiktoken" else make_bpe(content)
            self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token
        facts = named_facts(self.encoding) if kind == "tiktoken" else content
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Text as ordinary text: a written <|endoftext|> is not the special token."""
        if self.name == "ids":
            raise UserError("data.tokenizer=ids: ids alone cannot read text; set the tokenizer that made them")
        if self.chars is not None:
            unknown = sorted(set(text) - self.codes.keys())
            if unknown:
                raise UserError(f"{unknown[0]!r}: not among the tokenizer's {len(self.chars)} characters; leave it out")
            return [self.codes[char] for char in text]
        if self.encoding is None:
            return list(text.encode(errors="replace"))  # half a surrogate pair (from a terminal) reads as "?"
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, by as many threads as there are cores."""
        if self.encoding is None:
            return [self.encode(text) for text in texts]
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def token_bytes(self, token: int) -> bytes:
        """Its UTF-8 bytes: of a special token its name, of an unused number (cl100k_base has some) U+FFFD."""
        if self.chars is not None:
            return self.chars[token].encode()
        if self.name == "ids":
            return f"<{token}>".encode()
        if token == self.eot:
            return END.encode()
        if self.encoding is None:
            return bytes([token])
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return "\ufffd".encode()

    def decode(self, ids) -> str:
        """Ids to text; bytes that are no UTF-8 read as U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode(errors="replace")

    def stream(self):
        """A function token -> text that never shows half a character: it waits for a character's last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(self.token_bytes(int(token)))

    def save(self, folder: Path) -> None:
        (Path(folder) / FILE_NAME).write_text(json.dumps(self.content))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        file = Path(folder) / FILE_NAME
        try:
            content = json.loads(file.read_text())
            content["kind"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not a tokenizer ({first_line(error)}); make its folder again") from None
        return cls(content)


def pieces(document: str) -> Iterator[str]:
    """The document in order, cut so that the pieces' tokens are the whole's (but at every LONGEST without one)."""
    start = 0
    while len(document) - start > PIECE:
        found = SAFE.search(document, start + PIECE, start + LONGEST)
        end = found.start() if found else min(start + LONGEST, len(document))
        yield document[start:end]
        start = end
    if start < len(document):
        yield document[start:]


def make_bpe(content: dict):
    import tiktoken

    ranks = {base64.b64decode(token): rank for rank, token in enumerate(content["tokens"])}
    return tiktoken.Encoding("bpe", pat_str=content["pattern"], mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def named_facts(encoding) -> list:
    """All that determines a named encoding's ids, so that two names of one vocabulary (gpt2, r50k_base) are one."""
    ranks = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
    return [encoding._pat_str, sorted(encoding._special_tokens.items()), ranks]


def known_names() -> tuple[str, ...]:
    import tiktoken

    return ("bytes", "bpe", "ids", *tiktoken.list_encoding_names())


def load_tiktoken(name: str, patience: float):
    """tiktoken's encoding, from its cache (TIKTOKEN_CACHE_DIR) or the network within `patience` seconds."""
    import tiktoken

    words = known_names()
    if name not in words:
        raise UserError(f"data.tokenizer={name}: one of {', '.join(words)}, or a run's folder{nearest(name, words)}")
    try:
        return bounded(lambda: tiktoken.get_encoding(name), patience)
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(
            f"data.tokenizer={name}: its vocabulary is not in tiktoken's cache and could not be fetched"
            f" ({first_line(error)[:80]}); set TIKTOKEN_CACHE_DIR to a filled cache, or use data.tokenizer=bpe"
            " (data=bin: data.tokenizer=ids data.vocab_size=50257)"
        ) from None


def train_bpe(texts: list[str], vocab_size: int, say=print) -> Tokenizer:
    """A byte-level BPE of vocab_size entries, <|endoftext|> the last; fewer where the text has no more pairs."""
    import rustbpe

    logging.getLogger("rustbpe").setLevel(logging.WARNING)  # it reports every merge
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator((part for text in texts for part in pieces(text)), vocab_size - 1)
    ranks = sorted(((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks()), key=lambda pair: pair[0])
    tokens = [base64.b64encode(token).decode() for _, token in ranks]
    if len(tokens) < vocab_size - 1:
        say(f"data: the text yields {len(tokens) + 1} of data.vocab_size={vocab_size} tokens; going on with these")
    return Tokenizer({"kind": "bpe", "pattern": trainer.get_pattern(), "tokens": tokens})


def make_tokenizer(name: str, vocab_size: int, texts: list[str], say=print) -> Tokenizer:
    if name == "bpe":
        return train_bpe(texts, vocab_size, say)
    if name == "ids":
        return Tokenizer({"kind": "ids", "vocab_size": vocab_size})
    return Tokenizer({"kind": "bytes"} if name == "bytes" else {"kind": "tiktoken", "name": name})


def given_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of the run or checkpoint that `name` is a path of; None for the name of a kind."""
    if name in known_names() or not Path(name).is_dir():  # a Hugging Face folder gpt2/ does not hide the name
        return None
    folder = resolve(name, "data.tokenizer")
    if not (folder / FILE_NAME).is_file():
        raise UserError(f"data.tokenizer={name}: no {FILE_NAME} there; give a run's folder, or a name such as gpt2")
    return Tokenizer.load(folder)


class Restricted(pickle.Unpickler):
    """Plain dicts, strings and numbers: any reference to code is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_meta(file: Path) -> Tokenizer:
    """The characters of nanoGPT's meta.pkl."""
    try:
        with open(file, "rb") as stream:
            codes = Restricted(stream).load()["stoi"]
        chars = sorted(codes, key=codes.get)
        if [codes[char] for char in chars] != list(range(len(chars))):
            raise ValueError("codes are not 0, 1, 2, ...")
        if not all(isinstance(char, str) for char in chars):
            raise ValueError("not text")
    except (pickle.UnpicklingError, LookupError, AttributeError, TypeError, ValueError, EOFError) as error:
        rule = f"not nanoGPT's character table ({first_line(error)})"
        raise UserError(f"data.path={file}: {rule}; make it again with its prepare.py") from None
    return Tokenizer({"kind": "char", "chars": chars})
