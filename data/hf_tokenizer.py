"""A Hugging Face folder's tokenizer.json and chat template, read by transformers."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from data.encodings import END, UNUSED, Encoding
from engine import UserError, first_line

HF_FILE = "tokenizer.json"
FILES = (HF_FILE, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")  # a byte in sentencepiece's vocabularies
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Turns = tuple[tuple[str, str], ...]  # (role, content)
MaskedIds = tuple[list[int], list[int]]  # ids, and 1 where one is a label
BREAK = "\ufdd0"  # no character: it breaks up a special token that a message spells


class HFEncoding(Encoding):
    """tokenizer.json as transformers reads it. Text is ordinary text, and no bos is added.

    token_bytes are exact for byte-level BPE (GPT-2, Llama 3, Qwen). Those of a byte-fallback one
    (Llama 2, Gemma) begin a text with a space. All others are refused.
    """

    def __init__(self, folder: Path):
        self.tokenizer = load_transformers(folder)
        self.files = {}
        for name in FILES:
            if (folder / name).is_file():
                self.files[name] = (folder / name).read_bytes()
        vocabulary = self.tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.added = self.tokenizer.added_tokens_decoder
        self.special = [token.content for token in self.added.values() if token.special]

        # Which bytes a token stands for
        definition = json.loads(self.tokenizer.backend_tokenizer.to_str())
        self.byte_of = {}
        if "ByteLevel" in json.dumps(definition["decoder"]):
            self.byte_of = byte_characters()
        elif not definition["model"].get("byte_fallback"):
            raise UserError(
                f"{folder / HF_FILE}: {definition['model']['type']} without bytes to fall back on "
                "cannot write every text; use a byte-level or byte-fallback tokenizer"
            )
        self.prefixed = self.token_bytes(self.encode("a")[0]).startswith(b" ")

        self.eot = self.tokenizer.eos_token_id
        if self.eot is None:
            self.eot = vocabulary.get(END)  # GPT-2's files name no eos_token
        self.bos = self.tokenizer.bos_token_id
        if self.bos is None:
            self.bos = self.eot
        if self.tokenizer.chat_template:
            self.chat_template = self.tokenizer.get_chat_template()
        names = ("model", "added_tokens", "normalizer", "pre_tokenizer")
        self.definition = [definition[name] for name in names]
        self.definition += [self.eot, self.bos, self.chat_template]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """`special`: a special token's name is read as that token."""
        texts = [text.encode(errors="replace").decode() for text in texts]
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=not special)
        return encoded["input_ids"]

    def token_bytes(self, token: int) -> bytes:
        text = self.tokenizer.convert_ids_to_tokens(token)
        if text is None:
            return UNUSED
        if token in self.added and (self.byte_of or self.added[token].special):
            return text.encode()
        if self.byte_of:
            return b"".join(self.byte_of.get(char) or char.encode() for char in text)
        if BYTE_NAME.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    def save(self, folder: Path) -> None:
        """Carries the folder's own files along."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def encode_chat(self, turns: Turns) -> list[MaskedIds]:
        """The documents [(ids, mask)] of a chat by the folder's template, nearly always one.

        mask: 1 = a label. Those are what the template marks as the assistant's; without marks an
        assistant's turn is what it adds to the chat before it.
        """
        messages = []
        for role, content in turns:
            for name in self.special:
                content = content.replace(name, name[:1] + BREAK + name[1:])
            messages.append({"role": role, "content": content})
        spelled = any(BREAK in message["content"] for message in messages)
        if spelled or not GENERATION_MARK.search(self.chat_template):
            return self.encode_by_difference(messages)

        chat = self.render(messages, tokenize=True, return_assistant_tokens_mask=True)
        ids = chat["input_ids"]
        mask = chat["assistant_masks"]
        # Nothing is learnt after the last answer, nor from the line break after its eot
        while mask and (mask[-1] == 0 or ids[-2:-1] == [self.eot]):
            ids.pop()
            mask.pop()
        return [(ids, mask)]

    def encode_by_difference(self, messages: list[dict]) -> list[MaskedIds]:
        """One document, and a new one wherever the template rewrites what came before.

        Qwen3's drops earlier thoughts: each answer is then a document with its own context.
        """
        documents = []
        text = ""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            context = self.render(messages[:place], tokenize=False, add_generation_prompt=True)
            whole = self.render(messages[: place + 1], tokenize=False)
            if not whole.startswith(context):
                raise UserError(
                    f"turn {place + 1} does not begin as the chat template's generation prompt "
                    'does; write it as "prompt" and "completion"'
                )
            if not documents or not context.startswith(text):
                documents.append(([], []))
                text = ""

            # The answer ends with its eot: the line break after that is the template's
            end = len(whole)
            if self.eot is not None:
                name = self.tokenizer.convert_ids_to_tokens(self.eot)
                if name in whole[len(context) :]:
                    end = whole.index(name, len(context)) + len(name)
            ids, mask = documents[-1]
            ids += self.encode_after(text, context[len(text) :], self.encode_rendered)
            mask += [0] * (len(ids) - len(mask))
            ids += self.encode_after(context, whole[len(context) : end], self.encode_rendered)
            mask += [1] * (len(ids) - len(mask))
            text = whole[:end]
        return documents

    def encode_rendered(self, text: str) -> list[int]:
        """What a template wrote: its special tokens are special, those in a message are text."""
        pieces = self.encode_batch(text.split(BREAK), special=True)
        return [token for piece in pieces for token in piece]

    def encode_after(self, before: str, text: str, encode: Callable | None = None) -> list[int]:
        """The ids of `text` where it follows `before`; a token over the edge is split there."""
        encode = encode or self.encode
        start = encode(before)
        whole = encode(before + text)
        if whole[: len(start)] == start:
            return whole[len(start) :]
        return encode(text)

    def render(self, messages: list[dict], **options):
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # a template is a program and raises what it likes
            raise UserError(
                f"the chat template refuses it ({first_line(error)}); mend it or the template"
            ) from None


def load_transformers(folder: Path):
    """The folder's tokenizer as transformers reads tokenizer.json, whatever its class is called.

    AutoTokenizer has classes that rebuild it by what config.json says, and in a checkpoint that is
    the student's family.
    """
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise UserError(
            f"data.tokenizer={folder}: needs the transformers package; pip install -e '.[hf]'"
        ) from None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises no narrower class
        raise UserError(
            f"{folder / HF_FILE}: not a tokenizer ({first_line(error)}); fetch its folder again"
        ) from None
    tokenizer.model_max_length = 10**9  # it warns past that
    tokenizer.backend_tokenizer.post_processor = None  # it trims offsets, which masks go by
    return tokenizer


def byte_characters() -> dict[str, bytes]:
    """GPT-2's character for each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: bytes([byte]) for byte, char in bytes_to_unicode().items()}
