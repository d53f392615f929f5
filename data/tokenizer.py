"""Text to ids and back: bytes, BPE trained by rustbpe, tiktoken's vocabularies, Hugging Face folders, nanoGPT's characters."""

import base64
import codecs
import hashlib
import json
import logging
import os
import pickle
import re
from bisect import bisect_right
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path

from engine import UserError, first_line, nearest
from engine.checkpoint import resolve
from engine.logger import bounded

FILE_NAME = "nanodistill_tokenizer.json"
HF_NAME = "tokenizer.json"
HF_FILES = (HF_NAME, "tokenizer_config.json", "chat_template.jinja")
FALLBACK = re.compile("<0x[0-9A-F]{2}>")  # a byte's name in sentencepiece's vocabularies
BREAK = "\ufdd0"  # no character: it breaks a special token that a chat's content spells
END = "<|endoftext|>"
PATIENCE = 20.0  # seconds for a vocabulary's download: tiktoken itself would wait without end
PIECE = (
    2**16
)  # characters after which a document is cut where no token can span: threads share a single book
LONGEST = (
    2**18
)  # a piece with no such place is cut here: tiktoken and rustbpe panic at a million spaces
SAFE = re.compile(
    r"(?<=\w)(?= \w)|(?<=\S\n)(?=\w)"
)  # before a word: every pattern in use ends a token there


class Tokenizer:
    """`content` is plain JSON and determines everything: {"kind": bytes | bpe | tiktoken | char, ...}."""

    prefixed = False  # it puts a space before what it reads
    template: str | None = None  # of chats

    def __init__(self, content: dict):
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
            self.encoding = (
                load_tiktoken(content["name"]) if kind == "tiktoken" else make_bpe(content)
            )
            self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token
        facts = named_facts(self.encoding) if kind == "tiktoken" else content
        self.recipe = self.fingerprint = digest(facts)

    @property
    def bos(self) -> int | None:
        """The token that each document begins with."""
        return self.content.get("bos", self.eot)

    @cached_property
    def vocabulary(self) -> str:
        """SHA-256 over the bytes of all ids: equal where two kinds of tokenizer have one vocabulary."""
        return digest([self.token_bytes(token).hex() for token in range(self.vocab_size)])

    def encode(self, text: str) -> list[int]:
        """Text as ordinary text: a written <|endoftext|> is not the special token."""
        if self.name == "ids":
            raise UserError(
                "data.tokenizer=ids: ids alone cannot read text; set the tokenizer that made them"
            )
        if self.chars is not None:
            unknown = sorted(set(text) - self.codes.keys())
            if unknown:
                raise UserError(
                    f"{unknown[0]!r}: not among the tokenizer's {len(self.chars)} characters; leave it out"
                )
            return [self.codes[char] for char in text]
        if self.encoding is None:
            return list(
                text.encode(errors="replace")
            )  # half a surrogate pair (from a terminal) reads as "?"
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, by as many threads as there are cores."""
        if self.encoding is None:
            return [self.encode(text) for text in texts]
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def encode_row(self, turns: tuple[tuple[str, str], ...]) -> list[tuple[list[int], list[int]]]:
        """The documents [(ids, mask)] of a fine-tuning row, nearly always one; mask 1 = a label in the loss.

        turns ((role, content), ...): a prompt and its completion, or a chat. A chat is what the folder's own template makes
        of it; without one it reads "System: ...\\nUser: ...\\nAssistant: ...\\n". Labels are completions and assistant turns
        with the token that ends them. bos goes before what no template wrote; an eot ends every document.
        """
        rendered = self.template is not None and turns[0][0] != "prompt"
        documents = []
        for parts in self.render(turns) if rendered else [plain(turns)]:
            ids, mask = self.encode_parts(parts, rendered)
            if self.bos is not None and not rendered:
                ids, mask = [self.bos, *ids], [0, *mask]
            if self.eot not in (None, *ids[-1:]):
                ids, mask = [*ids, self.eot], [*mask, 1]
            documents.append((ids, mask))
        return documents

    def encode_parts(
        self, parts: list[tuple[str, bool]], special: bool = False
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of [(text, whether it is trained on), ...], each encoded for itself."""
        found = [(self.encode(text), int(trained)) for text, trained in parts]
        return [token for ids, _ in found for token in ids], [
            trained for ids, trained in found for _ in ids
        ]

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
        text = b"".join(self.token_bytes(int(token)) for token in ids).decode(errors="replace")
        return text.removeprefix(" ") if self.prefixed else text

    def stream(self):
        """A function token -> text that never shows half a character: it waits for a character's last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(self.token_bytes(int(token)))

    def save(self, folder: Path) -> None:
        (Path(folder) / FILE_NAME).write_text(json.dumps(self.content))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The one that `save` put there, or a Hugging Face folder's own; UserError where the file is missing or corrupt."""
        folder = Path(folder)
        content = read_json(folder / FILE_NAME)
        if content.get("kind") == "hf" or (
            (folder / HF_NAME).is_file() and not (folder / FILE_NAME).is_file()
        ):
            return HFTokenizer(folder, content)
        if "kind" not in content:
            raise UserError(f"{folder / FILE_NAME}: not a tokenizer; make its folder again")
        return cls(content)

    @classmethod
    def find(cls, folder: Path) -> "Tokenizer | None":
        """The one that `load` gives, or None where the folder has none."""
        return (
            cls.load(folder)
            if any((folder / name).is_file() for name in (FILE_NAME, HF_NAME))
            else None
        )


class HFTokenizer(Tokenizer):
    """A Hugging Face folder's tokenizer.json, read by the `tokenizers` package; `save` carries the folder's files along.

    Text is ordinary text and no bos is added. token_bytes are exact for byte-level BPE (GPT-2, Llama 3, Qwen); those of a
    byte-fallback one (Llama 2, Gemma) begin a text with a space, which `decode` takes off. All others are refused.
    """

    def __init__(self, folder: Path, content: dict):
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"data.tokenizer={folder}: needs the tokenizers package; pip install -e '.[hf]'"
            ) from None
        self.folder, self.chars = folder, None
        self.files = {
            name: (folder / name).read_bytes() for name in HF_FILES if (folder / name).is_file()
        }
        facts, config = (read_json(folder / name) for name in HF_FILES[:2])
        try:
            self.encoding = tokenizers.Tokenizer.from_str(json.dumps(facts))
        except Exception as error:  # the library raises no narrower class
            raise UserError(
                f"{folder / HF_NAME}: not a tokenizer ({first_line(error)}); fetch its folder again"
            ) from None
        decoder = facts.get("decoder") or {}
        kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
        self.codes = byte_codes() if "ByteLevel" in kinds else None
        if self.codes is None and not facts["model"].get("byte_fallback"):
            kind = f"{facts['model'].get('type')} without bytes to fall back on: it cannot write every text"
            raise UserError(f"{folder / HF_NAME}: {kind}; use a byte-level or byte-fallback one")
        self.encoding.no_truncation()
        self.encoding.no_padding()
        self.encoding.post_processor = None  # it adds bos, and trims offsets
        self.encoding.encode_special_tokens = True  # that is, as ordinary text
        self.added = self.encoding.get_added_tokens_decoder()
        self.special = [token.content for token in self.added.values() if token.special]
        self.vocab_size = max(self.encoding.get_vocab().values()) + 1
        names = {
            key: config[key] for key in config if key.endswith("_token")
        }  # bos_token, eos_token, ... and add_bos_token
        names = {
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in names.items()
        }
        self.names = {key: value for key, value in names.items() if isinstance(value, str)}
        self.content = {"kind": "hf", "name": folder.resolve().name} | self.find_ends() | content
        self.name, self.eot = self.content["name"], self.content["eot"]
        self.template = self.find_template(config.get("chat_template"))
        merges = facts["model"].get("merges", [])  # pairs, or in older files strings
        facts["model"]["merges"] = [
            pair if isinstance(pair, str) else " ".join(pair) for pair in merges
        ]
        self.fingerprint = digest(
            [facts.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")]
        )
        self.recipe = digest([self.fingerprint, self.eot, self.bos, self.template, self.names])

    def find_ends(self) -> dict:
        """{"bos", "eot"}: ids by tokenizer_config.json, eot else by the model's own configuration."""
        bos, eot = (
            self.encoding.token_to_id(self.names.get(name, ""))
            for name in ("bos_token", "eos_token")
        )
        for name in ("config.json", "generation_config.json"):
            eot = read_json(self.folder / name).get("eos_token_id") if eot is None else eot
        eot = eot[0] if isinstance(eot, list) else eot
        return {"bos": eot if bos is None else bos, "eot": eot}

    def find_template(self, template) -> str | None:
        """chat_template.jinja, else tokenizer_config.json's: one, or several with names."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode(errors="replace")
        if isinstance(template, list):
            template = {each["name"]: each["template"] for each in template}.get("default")
        return template

    @cached_property
    def prefixed(self) -> bool:
        return b"".join(map(self.token_bytes, self.encode("a"))) == b" a"

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(
            text.encode(errors="replace").decode(), add_special_tokens=False
        ).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [
            found.ids for found in self.encoding.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def encode_parts(
        self, parts: list[tuple[str, bool]], special: bool = False
    ) -> tuple[list[int], list[int]]:
        """All parts at once, as one text; each for itself where a token would span two. `special` reads special tokens."""
        self.encoding.encode_special_tokens = not special
        found = self.encoding.encode("".join(text for text, _ in parts), add_special_tokens=False)
        ends = list(accumulate(len(text) for text, _ in parts))
        places = [min(bisect_right(ends, start), len(parts) - 1) for start, _ in found.offsets]
        ids, mask = found.ids, [int(parts[place][1]) for place in places]
        if any(end > ends[place] for place, (_, end) in zip(places, found.offsets, strict=True)):
            ids, mask = super().encode_parts(parts)
        self.encoding.encode_special_tokens = True
        return ids, mask

    def token_bytes(self, token: int) -> bytes:
        text = self.encoding.id_to_token(token)
        if text is None:
            return "\ufffd".encode()
        if token in self.added and (self.codes or self.added[token].special):
            return text.encode()
        if self.codes:
            return b"".join(self.codes.get(char) or char.encode() for char in text)
        return (
            bytes([int(text[3:5], 16)])
            if FALLBACK.fullmatch(text)
            else text.replace("▁", " ").encode()
        )

    def save(self, folder: Path) -> None:
        super().save(folder)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    @cached_property
    def compiled(self):
        """The chat template in jinja2's sandbox, with the names that transformers gives it."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message):
            raise jinja2.TemplateError(message)

        room = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        room.filters["tojson"] = lambda value, **options: json.dumps(
            value, **{"ensure_ascii": False} | options
        )
        room.globals |= {
            "raise_exception": refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        text = re.sub(
            r"(\{%-?\s*)generation(?=\s*-?%\})", r"\1if true", self.template
        )  # transformers' own tag
        text = re.sub(r"(\{%-?\s*)endgeneration(?=\s*-?%\})", r"\1endif", text)
        return partial(room.from_string(text).render, **self.names, tools=None, documents=None)

    def render(self, turns: tuple[tuple[str, str], ...]) -> list[list[tuple[str, bool]]]:
        """A chat by its template: documents of parts (text, whether it is trained on), each turn trained on once.

        An assistant turn is what its rendering adds to the rendering of all before it, up to the token that ends it. Where
        a template then rewrites the past (Qwen3 drops earlier thoughts) a new document begins, with that past as context.
        """
        messages = []
        for role, content in turns:
            for name in (
                self.special
            ):  # written by a user it is text: the two halves become parts of their own
                content = content.replace(name, name[:1] + BREAK + name[1:])
            messages.append({"role": role, "content": content})
        stop = self.encoding.id_to_token(self.eot) if self.eot is not None else None
        documents, parts, text = [], [], ""
        for place, (role, _) in enumerate(turns):
            if role != "assistant":
                continue
            try:
                before = self.compiled(messages=messages[:place], add_generation_prompt=True)
                after = self.compiled(messages=messages[: place + 1], add_generation_prompt=False)
            except Exception as error:  # a template is a program and raises what it likes
                raise UserError(
                    f"the chat template refuses it ({first_line(error)}); mend it or the template"
                ) from None
            if not after.startswith(before):
                rule = (
                    f"turn {place + 1} does not begin as the chat template's generation prompt does"
                )
                raise UserError(f'{rule}; write it as "prompt" and "completion"')
            if not before.startswith(text):
                documents.append(parts)
                parts, text = [], ""
            end = after.find(stop, len(before)) if stop else -1
            end = len(after) if end < 0 else end + len(stop)
            parts += [(part, False) for part in before[len(text) :].split(BREAK)]
            parts += [(part, True) for part in after[len(before) : end].split(BREAK)]
            text = after[:end]
        return [*documents, parts]


def digest(facts) -> str:
    """SHA-256 over plain JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_json(file: Path) -> dict:
    """The object in `file`, {} where there is none; UserError where it holds anything else."""
    try:
        found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: not a tokenizer's file ({first_line(error)}); fetch its folder again"
        ) from None
    return found


def byte_codes() -> dict[str, bytes]:
    """GPT-2's character for each byte: itself where it can be seen, else one past 255."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return {
        chr(256 + unseen.index(byte) if byte in unseen else byte): bytes([byte])
        for byte in range(256)
    }


def plain(turns: tuple[tuple[str, str], ...]) -> list[tuple[str, bool]]:
    """A row without a template, as parts (text, whether it is trained on), up to the last that is."""
    if turns[0][0] == "prompt":
        return [(content, role == "completion") for role, content in turns]
    parts = []
    for role, content in turns:
        parts += [(f"{role.title()}:", False), (f" {content}\n", role == "assistant")]
    while not parts[-1][1]:
        parts.pop()
    return parts


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
    return tiktoken.Encoding(
        "bpe", pat_str=content["pattern"], mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )


def named_facts(encoding) -> list:
    """All that determines a named encoding's ids, so that two names of one vocabulary (gpt2, r50k_base) are one."""
    ranks = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
    return [encoding._pat_str, sorted(encoding._special_tokens.items()), ranks]


def known_names() -> tuple[str, ...]:
    import tiktoken

    return ("bytes", "bpe", "ids", *tiktoken.list_encoding_names())


def load_tiktoken(name: str, patience: float = PATIENCE):
    """tiktoken's encoding, from its cache (TIKTOKEN_CACHE_DIR) or the network within `patience` seconds."""
    import tiktoken

    words = known_names()
    if name not in words:
        raise UserError(
            f"data.tokenizer={name}: one of {', '.join(words)}, or a folder{nearest(name, words)}"
        )
    try:
        return bounded(lambda: tiktoken.get_encoding(name), patience)
    except (OSError, TimeoutError, ValueError) as error:
        rule = f"its vocabulary is not in tiktoken's cache and could not be fetched ({first_line(error)[:80]})"
        other = "data.tokenizer=bpe (data=bin: data.tokenizer=ids data.vocab_size=50257)"
        raise UserError(
            f"data.tokenizer={name}: {rule}; set TIKTOKEN_CACHE_DIR to a filled cache, or use {other}"
        ) from None


def train_bpe(texts: list[str], vocab_size: int, say=print) -> Tokenizer:
    """A byte-level BPE of vocab_size entries, <|endoftext|> the last; fewer where the text has no more pairs."""
    import rustbpe

    logging.getLogger("rustbpe").setLevel(logging.WARNING)  # it reports every merge
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator((part for text in texts for part in pieces(text)), vocab_size - 1)
    ranks = sorted(
        ((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks()),
        key=lambda pair: pair[0],
    )
    tokens = [base64.b64encode(token).decode() for _, token in ranks]
    if len(tokens) < vocab_size - 1:
        say(
            f"data: the text yields {len(tokens) + 1} of data.vocab_size={vocab_size} tokens; going on with these"
        )
    return Tokenizer({"kind": "bpe", "pattern": trainer.get_pattern(), "tokens": tokens})


def make_tokenizer(name: str, vocab_size: int, texts: list[str], say=print) -> Tokenizer:
    if name == "bpe":
        return train_bpe(texts, vocab_size, say)
    if name == "ids":
        return Tokenizer({"kind": "ids", "vocab_size": vocab_size})
    return Tokenizer({"kind": "bytes"} if name == "bytes" else {"kind": "tiktoken", "name": name})


def given_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of the run or checkpoint that `name` is a path of; None for the name of a kind."""
    if (
        name in known_names() or not Path(name).is_dir()
    ):  # a Hugging Face folder gpt2/ does not hide the name
        return None
    alone = (Path(name) / HF_NAME).is_file() and not (
        Path(name) / "config.json"
    ).is_file()  # without a model
    folder = Path(name) if alone else resolve(name, "data.tokenizer")
    found = Tokenizer.find(folder)
    if found is None:
        rule = f"neither {FILE_NAME} nor {HF_NAME} there"
        raise UserError(
            f"data.tokenizer={name}: {rule}; give another folder, or a name such as gpt2"
        )
    return found


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
    except (
        pickle.UnpicklingError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        EOFError,
    ) as error:
        rule = f"not nanoGPT's character table ({first_line(error)})"
        raise UserError(f"data.path={file}: {rule}; make it again with its prepare.py") from None
    return Tokenizer({"kind": "char", "chars": chars})


def read_tokenizer(folder: Path, key: str) -> Tokenizer:
    """The tokenizer beside a model's weights, ours or Hugging Face's; GPT-2's for one of its vocabulary that has none."""
    found = Tokenizer.find(folder)
    vocab_size = json.loads((folder / "config.json").read_text()).get("vocab_size")
    if found is None and vocab_size != 50257:
        rule = f"neither {FILE_NAME} nor {HF_NAME} beside the weights, and a vocabulary of {vocab_size} is not GPT-2's"
        raise UserError(f"{key}={folder}: {rule}; give a folder that has one")
    return found or Tokenizer({"kind": "tiktoken", "name": "gpt2"})
