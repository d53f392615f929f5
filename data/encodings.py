"""Our own ways of turning text into ids: bytes, characters, BPE by tiktoken, and ids without text.

eot is the token between documents, bos the one that a document begins with (None: there is none).
"""

import base64
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import rustbpe
import tiktoken

from engine import UserError, first_line, nearest

END = "<|endoftext|>"
UNUSED = "\ufffd".encode()  # what a number without a token reads as
# A long document is cut into pieces at a place where no token can span, so that several threads
# share a book. A piece without such a place is cut anyway: tiktoken and rustbpe panic at a million
# spaces.
MIN_PIECE = 2**16  # characters
MAX_PIECE = 2**18
SAFE_CUT = re.compile(r"(?<=\w)(?= \w)|(?<=\S\n)(?=\w)")  # every pattern in use ends a token there


class Encoding:
    """What encodings have in common; each has vocab_size, encode(text) and token_bytes(token)."""

    eot: int | None = None
    bos: int | None = None
    prefixed = False  # whether a space is put before a text
    chat_template: str | None = None
    definition: list | None = None  # what determines the ids, where plain JSON does not

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_after(self, before: str, text: str) -> list[int]:
        """The ids of `text` where it follows `before`."""
        return self.encode(text)

    def save(self, folder: Path) -> None:
        """Writes what the tokenizer's plain JSON does not hold: nothing."""


class ByteEncoding(Encoding):
    """UTF-8 bytes, and <|endoftext|> as number 256."""

    vocab_size = 257
    eot = bos = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="replace"))  # half a surrogate pair reads as "?"

    def token_bytes(self, token: int) -> bytes:
        return END.encode() if token == self.eot else bytes([token])


class CharEncoding(Encoding):
    """The characters of a text, as nanoGPT's shakespeare_char has them."""

    def __init__(self, chars: list[str]):
        self.chars = chars
        self.ids = {char: number for number, char in enumerate(chars)}
        self.vocab_size = len(chars)

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self.ids.keys())
        if unknown:
            raise UserError(
                f"{unknown[0]!r}: not among the tokenizer's {self.vocab_size} characters; "
                "leave it out"
            )
        return [self.ids[char] for char in text]

    def token_bytes(self, token: int) -> bytes:
        return self.chars[token].encode()


class IdsOnly(Encoding):
    """Ids of a tokenizer that we do not have: nothing can be encoded."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        raise UserError(
            "data.tokenizer=ids: ids alone cannot read text; set the tokenizer that made them"
        )

    def token_bytes(self, token: int) -> bytes:
        return f"<{token}>".encode()


class BPEEncoding(Encoding):
    """Byte-level BPE, ours or one of tiktoken's."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eot = self.bos = encoding.eot_token

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def token_bytes(self, token: int) -> bytes:
        if token == self.eot:
            return END.encode()
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # an unused number: cl100k_base has some
            return UNUSED


def make_encoding(content: dict) -> Encoding:
    """The encoding that a tokenizer's plain JSON describes."""
    kind = content["kind"]
    if kind == "bytes":
        return ByteEncoding()
    if kind == "char":
        return CharEncoding(content["chars"])
    if kind == "ids":
        return IdsOnly(content["vocab_size"])
    if kind == "tiktoken":
        return BPEEncoding(load_tiktoken(content["name"]))
    tokens = [base64.b64decode(token) for token in content["tokens"]]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "bpe",
        pat_str=content["pattern"],
        mergeable_ranks=ranks,
        special_tokens={END: len(ranks)},
    )
    return BPEEncoding(encoding)


def kinds() -> tuple[str, ...]:
    """The names that data.tokenizer takes, folders aside."""
    return ("bytes", "char", "bpe", "ids", *tiktoken.list_encoding_names())


def load_tiktoken(name: str) -> tiktoken.Encoding:
    """tiktoken's encoding, from its cache (TIKTOKEN_CACHE_DIR) or the network."""
    if name not in kinds():
        raise UserError(
            f"data.tokenizer={name}: one of {', '.join(kinds())}, "
            f"or a folder{nearest(name, kinds())}"
        )
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.tokenizer={name}: its vocabulary is not in tiktoken's cache and could not be "
            f"fetched ({first_line(error)[:80]}); set TIKTOKEN_CACHE_DIR to a filled cache, or use "
            "data.tokenizer=bpe (data=bin: data.tokenizer=ids data.vocab_size=50257)"
        ) from None


def train_bpe(texts: list[str], vocab_size: int) -> dict:
    """A byte-level BPE as plain JSON, of vocab_size entries or as many as the text yields."""
    logging.getLogger("rustbpe").setLevel(logging.WARNING)  # it reports every merge
    trainer = rustbpe.Tokenizer()
    pieces = (piece for text in texts for piece in cut_into_pieces(text))
    trainer.train_from_iterator(pieces, vocab_size - 1)  # <|endoftext|> is the last
    ranked = sorted(trainer.get_mergeable_ranks(), key=lambda entry: entry[1])
    tokens = [base64.b64encode(bytes(token)).decode() for token, _ in ranked]
    return {"kind": "bpe", "pattern": trainer.get_pattern(), "tokens": tokens}


def cut_into_pieces(document: str) -> Iterator[str]:
    """The document in order, cut so that the pieces' tokens are the whole's."""
    start = 0
    while len(document) - start > MIN_PIECE:
        end = min(start + MAX_PIECE, len(document))
        safe = SAFE_CUT.search(document, start + MIN_PIECE, end)
        if safe:
            end = safe.start()
        yield document[start:end]
        start = end
    if start < len(document):
        yield document[start:]
