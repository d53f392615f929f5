"""A Hugging Face folder's tokenizer.json and chat template, read by transformers."""

import json
import re
from datetime import date
from functools import cached_property
from itertools import chain
from pathlib import Path

from data.encodings import END, UNUSED, MaskedIds, Tokenizer, Turns, digest
from engine import UserError, first_line

HF_FILE = "tokenizer.json"
FILES = (HF_FILE, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")  # a byte in sentencepiece's vocabularies
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
TODAY_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
BREAK = "\ufdd0"  # no character: it breaks up a special token that a message spells


class HFTokenizer(Tokenizer):
    """tokenizer.json as transformers reads it. Text is ordinary text, and no bos is added.

    Bytes are exact for byte-level BPE (GPT-2, Llama 3, Qwen). Those of a byte-fallback one
    (Llama 2, Gemma) begin a text with a space. All others are refused.
    """

    def __init__(self, content: dict, folder: Path):
        super().__init__(content)
        self.tokenizer = load_transformers(folder)
        present = [name for name in FILES if (folder / name).is_file()]
        self.files = {name: (folder / name).read_bytes() for name in present}
        vocabulary = self.tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.added = self.tokenizer.added_tokens_decoder

        # Which bytes a token stands for
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        definition = json.loads(self.tokenizer.backend_tokenizer.to_str())
        self.byte_of = {}
        if "ByteLevel" in json.dumps(definition["decoder"]):
            self.byte_of = {char: bytes([byte]) for byte, char in bytes_to_unicode().items()}
        elif not definition["model"].get("byte_fallback"):
            raise UserError(
                f"{folder}: tokenizer.json cannot write every text; data.tokenizer must be "
                "byte-level or have bytes to fall back on"
            )
        first_token = self.encode("a")[0]
        self.prefixed = self.bytes_of(first_token).startswith(b" ")

        # GPT-2's files name no eos_token
        self.eot = vocabulary.get(self.tokenizer.eos_token or END)
        self.bos = vocabulary.get(self.tokenizer.bos_token, self.eot)
        self.chat_template = None
        if self.tokenizer.chat_template:
            self.chat_template = self.tokenizer.get_chat_template()

        # A template that prints the date would make other tokens every day
        self.kept_date = content.get("date")
        if TODAY_CALL.search(self.chat_template or ""):
            self.template_date = self.kept_date or today()
            self.content = content | {"date": self.template_date}

        names = ("model", "added_tokens", "normalizer", "pre_tokenizer")
        parts = [definition[name] for name in names]
        self.fingerprint = digest([*parts, self.eot, self.bos, self.chat_template])

    @property
    def identity(self):
        # Not of a folder that keeps no date: its corpus's tokens are found again on another day
        if self.kept_date is None:
            return self.fingerprint
        return digest([self.fingerprint, self.kept_date])

    @cached_property
    def dated_template(self) -> str:
        """The chat template with template_date in the place of today's."""
        day = date.fromisoformat(self.template_date)
        return TODAY_CALL.sub(lambda call: json.dumps(day.strftime(call[2])), self.chat_template)

    @cached_property
    def num_ordinary(self) -> int:
        number = self.vocab_size
        while number > 0 and (number - 1 in self.added or self.bytes_of(number - 1) == UNUSED):
            number -= 1
        return number

    def is_ordinary(self, token):
        return token < self.vocab_size and token not in self.added

    def encode(self, text: str, rendered: bool = False) -> list[int]:
        """`rendered` by a template: its special tokens are special, those in a message are text."""
        pieces = text.split(BREAK) if rendered else [text]
        encoded = self.encode_batch(pieces, special=rendered)
        return list(chain.from_iterable(encoded))

    def encode_batch(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """`special`: a special token's name is read as that token."""
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=not special)
        return encoded["input_ids"]

    def encode_after(
        self,
        before: str,
        text: str,
        rendered: bool = False,
    ) -> list[int]:
        """The ids of `text` where it follows `before`; a token over the edge is split there."""
        start = self.encode(before, rendered)
        whole = self.encode(before + text, rendered)
        if whole[: len(start)] == start:
            return whole[len(start) :]
        return self.encode(text, rendered)

    def bytes_of(self, token):
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

    def save(self, folder):
        """Carries the folder's own files along."""
        super().save(folder)
        for name, content in self.files.items():
            Path(folder, name).write_bytes(content)

    def encode_turns(self, turns):
        """The documents [(ids, mask)] of a chat by the folder's template, nearly always one.

        mask: 1 = a label. Those are what the template marks as the assistant's; without marks an
        assistant's turn is what it adds to the chat before it.
        """
        if turns[0][0] == "prompt" or self.chat_template is None:
            return super().encode_turns(turns)
        messages = self.to_messages(turns)
        spelled = any(BREAK in message["content"] for message in messages)
        if spelled or not GENERATION_MARK.search(self.chat_template):
            return self.encode_by_difference(messages)

        chat = self.render(messages, return_assistant_tokens_mask=True)
        ids = chat["input_ids"]
        mask = chat["assistant_masks"]
        # Nothing is learnt after the last answer, nor from the line break after its eot
        while mask and (mask[-1] == 0 or ids[-2:-1] == [self.eot]):
            ids.pop()
            mask.pop()
        return [(ids, mask)]

    def to_messages(self, turns: Turns) -> list[dict]:
        """What a template reads, with a mark in each special token that a message spells."""
        messages = []
        for role, content in turns:
            for token in self.added.values():
                if token.special:
                    name = token.content
                    content = content.replace(name, name[:1] + BREAK + name[1:])
            messages.append({"role": role, "content": content})
        return messages

    def encode_question(self, question: str) -> list[int]:
        if self.chat_template is None:
            return super().encode_question(question)
        messages = self.to_messages((("user", question),))
        text = self.render(messages, tokenize=False, add_generation_prompt=True)
        return self.encode(text, rendered=True)

    @cached_property
    def end_of_turn(self) -> int | None:
        if self.chat_template is None:
            return None
        messages = self.to_messages((("user", "question"), ("assistant", "answer")))
        try:
            text = self.render(messages, tokenize=False)
        except UserError:  # a template for other chats
            return None
        after = text.rpartition("answer")[2].lstrip()
        first = self.encode(after, rendered=True)[:1]
        return first[0] if first and first[0] in self.added else None

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
                    f"turn {place + 1} does not begin as the template's generation prompt does; "
                    'write it as "prompt" and "completion"'
                )
            if not documents or not context.startswith(text):
                documents.append(([], []))
                text = ""

            # The answer ends with its eot: the line break after that is the template's
            answer = whole.removeprefix(context)
            if self.eot is not None:
                end = self.bytes_of(self.eot).decode()
                before, end, _ = answer.partition(end)
                answer = before + end
            ids, mask = documents[-1]
            ids += self.encode_after(text, context.removeprefix(text), rendered=True)
            mask += [0] * (len(ids) - len(mask))
            ids += self.encode_after(context, answer, rendered=True)
            mask += [1] * (len(ids) - len(mask))
            text = context + answer
        return documents

    def render(self, messages: list[dict], **options):
        """The messages as the folder's template writes them."""
        if self.template_date is not None:
            options["chat_template"] = self.dated_template
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # a template is a program and raises what it likes
            raise UserError(f"the chat template refuses it: {first_line(error)}") from None


def today() -> str:
    return date.today().isoformat()


def load_transformers(folder: Path):
    """The folder's tokenizer as transformers reads tokenizer.json, whatever its class is called.

    AutoTokenizer has classes that rebuild it by what config.json says, and in a checkpoint that is
    the student's family.
    """
    try:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises no narrower class
        raise UserError(
            f"{folder}: no tokenizer.json that transformers (pip install -e '.[hf]') reads "
            f"({first_line(error)}); give another data.tokenizer, path or teacher.path"
        ) from None
    tokenizer.model_max_length = 10**9  # it warns past that
    tokenizer.backend_tokenizer.post_processor = None  # it trims offsets, which masks go by
    return tokenizer
