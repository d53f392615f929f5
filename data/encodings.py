"""Text to ids and back: what tokenizers have in common, and our own kinds of them.

bytes, characters, BPE (ours or tiktoken's), and ids without text.
"""

import base64
import codecs
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from data import tokenizer_json
from engine import UserError, check_choice, first_line

END = "<|endoftext|>"
UNUSED = "\ufffd".encode()  # what a number without a token reads as
# A long document is cut into pieces at a place where no token can span, so that several threads
# share a book. A piece without such a place is cut anyway: tiktoken and rustbpe panic at a million
# spaces.
MIN_PIECE = 2**16  # characters
MAX_PIECE = 2**18
SAFE_CUT = re.compile(r"(?<=\w)(?= \w)|(?<=\S\n)(?=\w)")  # every pattern in use ends a token there
Turns = tuple[tuple[str, str], ...]  # (role, content)
MaskedIds = tuple[list[int], list[int]]  # ids, and 1 where one is a label


class Tokenizer:
    """Each kind has `vocab_size`, `encode(text)` -> ids, and `bytes_of(token)` -> bytes.

    Text is ordinary text: a written <|endoftext|> is not the special token.

    Args:
        content: plain JSON, {"kind": bytes | char | bpe | tiktoken | ids | hf, ...}. It determines
            everything but a Hugging Face tokenizer, which its folder's files do.
    """

    FILE = "nanodistill_tokenizer.json"
    vocab_size: int
    eot: int | None = None  # the token between documents
    bos: int | None = None  # the token that a document begins with
    end_of_turn: int | None = None  # the token that a chat template writes after an answer
    template_date: str | None = None  # 2026-11-28: the day that a chat template prints as today
    prefixed = False  # it puts a space before what it reads

    def __init__(self, content: dict):
        self.content = content
        self.name = content.get("name", content["kind"])
        self.fingerprint = digest(content)

    @property
    def identity(self) -> str:
        """What the tokens of a corpus are found again by."""
        return self.fingerprint

    @property
    def dtype(self) -> np.dtype:
        """Of token files."""
        return np.dtype("uint16" if self.vocab_size <= 2**16 else "uint32")

    @cached_property
    def vocabulary(self) -> str:
        """SHA-256 over the bytes of all ids: two kinds of tokenizer may have one vocabulary."""
        return digest([self.bytes_of(token).hex() for token in range(self.vocab_size)])

    @property
    def num_ordinary(self) -> int:
        """How many tokens there are before the final added ones, special tokens and the like."""
        return self.vocab_size

    def num_shared(self, other: "Tokenizer") -> int:
        """How many of the first tokens are the same in both.

        0 unless these are all but the final added ones of either: then it is another vocabulary.
        """
        if other.vocabulary == self.vocabulary:
            return self.vocab_size
        shared = 0
        smaller = min(self.vocab_size, other.vocab_size)
        while shared < smaller and self.bytes_of(shared) == other.bytes_of(shared):
            shared += 1
        is_same_text = shared >= max(self.num_ordinary, other.num_ordinary)
        return shared if is_same_text else 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel where the library can."""
        return [self.encode(text) for text in texts]

    def encode_after(self, before: str, text: str) -> list[int]:
        """The ids of `text` where it follows `before`."""
        return self.encode(text)

    def encode_row(self, turns: Turns) -> list[MaskedIds]:
        """The documents [(ids, mask)] of a fine-tuning row, nearly always one; mask 1 = a label.

        turns ((role, content), ...): a prompt and its completion, or a chat. A chat is what the
        folder's own template makes of it; without one it reads
        "System: ...\\nUser: ...\\nAssistant: ...\\n". Labels are completions and assistant turns
        with the token that ends them. bos goes before what no template wrote; an eot ends every
        document.
        """
        documents = self.encode_turns(turns)
        for ids, mask in documents:
            if self.eot is not None and ids[-1:] != [self.eot]:
                ids.append(self.eot)
                mask.append(1)
        return documents

    def encode_turns(self, turns: Turns) -> list[MaskedIds]:
        """The one document of a row without a template, each part encoded where it stands."""
        parts = [(content, role == "completion") for role, content in turns]
        if turns[0][0] != "prompt":
            parts = []
            for role, content in turns:
                parts.append((f"{role.title()}:", False))
                parts.append((f" {content}\n", role == "assistant"))
            while not parts[-1][1]:  # nothing is learnt after the last answer
                parts.pop()

        ids = [] if self.bos is None else [self.bos]
        mask = [0] * len(ids)
        before = ""
        for text, trained in parts:
            ids += self.encode_after(before, text)
            mask += [int(trained)] * (len(ids) - len(mask))
            before += text
        return [(ids, mask)]

    def is_ordinary(self, token: int) -> bool:
        """Whether it is a piece of text, and no special or other added token."""
        return token < self.num_ordinary

    def end_tokens(self, named: list[int]) -> list[int]:
        """All tokens that end a text: those that a model's folder names, and eot.

        A single one that is ordinary is a default that nobody chose (2 in transformers' Llama).
        """
        if len(named) == 1 and self.is_ordinary(named[0]):
            named = []
        if self.eot is None or self.eot in named:
            return list(named)
        return [*named, self.eot]

    def check_prompt(self, ids: list[int], vocab_size: int, key: str) -> None:
        """UserError naming `key` where a token is none of a model's first vocab_size."""
        token = max(ids, default=0)
        if token >= vocab_size:
            raise UserError(
                f"{key}: token {token} ({self.decode([token])!r}) of {self.name} is none of the"
                f" model's {vocab_size}; leave it out, or give another model"
            )

    def encode_question(self, question: str) -> list[int]:
        """A chat of one user's turn, up to where the answer begins."""
        turns = (("user", question), ("assistant", "answer"))
        ((ids, mask),) = Tokenizer.encode_turns(self, turns)
        return ids[: mask.index(1)]

    def token_bytes(self, token: int) -> bytes:
        """Its UTF-8 bytes: of a special token its name, of an unused number U+FFFD."""
        # a model may have more rows than there are tokens
        return self.bytes_of(int(token)) if token < self.vocab_size else UNUSED

    def decode(self, ids) -> str:
        """Ids to text; bytes that are no UTF-8 read as U+FFFD."""
        text = b"".join(map(self.token_bytes, ids)).decode(errors="replace")
        return text.removeprefix(" ") if self.prefixed else text

    def stream(self) -> Callable[[int], str]:
        """A function token -> text that waits for a character's last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(self.token_bytes(token))

    def save(self, folder: str | Path) -> None:
        """Writes what `load_tokenizer` reads and, of our kinds with text, tokenizer.json."""
        Path(folder, self.FILE).write_text(json.dumps(self.content))
        if self.hf_definition is not None:
            eot = None if self.eot is None else self.bytes_of(self.eot).decode()
            tokenizer_json.write(Path(folder), self.hf_definition, eot)

    @cached_property
    def hf_definition(self) -> str | None:
        """The content of tokenizer.json; None where it cannot be written or is there already."""
        return None


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and <|endoftext|> as number 256."""

    vocab_size = 257
    num_ordinary = 256
    eot = bos = 256

    def encode(self, text):
        return list(text.encode(errors="replace"))  # half a surrogate pair reads as "?"

    def bytes_of(self, token):
        return END.encode() if token == self.eot else bytes([token])

    @cached_property
    def hf_definition(self):
        ids = {bytes([byte]): byte for byte in range(256)}
        return json.dumps(tokenizer_json.byte_level(ids, {END: self.eot}, pattern=None))


class CharTokenizer(Tokenizer):
    """The characters of a text, as nanoGPT's shakespeare_char has them."""

    def __init__(self, content: dict):
        super().__init__(content)
        self.chars = content["chars"]
        self.ids = {char: number for number, char in enumerate(self.chars)}
        self.vocab_size = len(self.chars)

    def encode(self, text):
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            raise UserError(
                f"{error}: is no character of the training text, which is all that tokenizer=char"
                " knows; leave it out, or train with data.tokenizer=bytes or bpe"
            ) from None

    def bytes_of(self, token):
        return self.chars[token].encode()

    @cached_property
    def hf_definition(self):
        return json.dumps(tokenizer_json.characters(self.chars))


class IdsOnly(Tokenizer):
    """Ids of a tokenizer that we do not have: nothing can be encoded."""

    num_ordinary = 0  # nothing is known of them

    @property
    def vocab_size(self) -> int:
        return self.content["vocab_size"]

    def encode(self, text):
        raise UserError("data.tokenizer=ids: cannot read text; set the tokenizer that made the ids")

    def bytes_of(self, token):
        return f"<{token}>".encode()


class BPETokenizer(Tokenizer):
    """Byte-level BPE, ours or one of tiktoken's."""

    def __init__(self, content: dict):
        super().__init__(content)
        if content["kind"] == "tiktoken":
            self.encoding = load_tiktoken(content["name"])
        else:
            tokens = [base64.b64decode(token) for token in content["tokens"]]
            self.encoding = tiktoken.Encoding(
                "bpe",
                pat_str=content["pattern"],
                mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
                special_tokens={END: len(tokens)},
            )
        self.vocab_size = self.encoding.n_vocab
        self.eot = self.bos = self.encoding.eot_token

    @property
    def num_ordinary(self) -> int:
        special = self.encoding.special_tokens_set
        return min(self.encoding.encode_single_token(name) for name in special)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts):
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def bytes_of(self, token):
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # an unused number: cl100k_base has some
            return UNUSED

    @cached_property
    def hf_definition(self):
        encoding = self.encoding
        number_of = encoding.encode_single_token
        ids = {token: number_of(token) for token in encoding.token_byte_values()}
        special = {name: number_of(name) for name in sorted(encoding.special_tokens_set)}
        return json.dumps(tokenizer_json.byte_level(ids, special, encoding._pat_str))


def digest(content) -> str:
    """SHA-256 over plain JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def from_content(content: dict) -> Tokenizer:
    """The tokenizer that plain JSON describes."""
    classes = {"bytes": ByteTokenizer, "char": CharTokenizer, "ids": IdsOnly}
    return classes.get(content["kind"], BPETokenizer)(content)


def kinds() -> tuple[str, ...]:
    """The names that data.tokenizer takes, folders aside."""
    return ("bytes", "char", "bpe", "ids", *tiktoken.list_encoding_names())


def load_tiktoken(name: str) -> tiktoken.Encoding:
    """tiktoken's encoding, from its cache (TIKTOKEN_CACHE_DIR) or the network."""
    check_choice("data.tokenizer", name, (*kinds(), "RUN_OR_FOLDER"))
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.tokenizer={name}: could not be fetched ({first_line(error)[:80]}); set "
            "TIKTOKEN_CACHE_DIR to a filled cache, or data.tokenizer=bpe (data=bin: ids)"
        ) from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict:
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
