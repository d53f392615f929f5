"""Our own tokenizers as tokenizer.json, which Hugging Face's libraries read.

AutoTokenizer.from_pretrained(CHECKPOINT) then gives our ids. It reads a special token's name as
that token; here it is ordinary text.
"""

import json
import re
from pathlib import Path


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it can be printed, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters


LETTERS = byte_letters()


def spell(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def merges_of(ids: dict[bytes, int]) -> list[list[str]]:
    """Every pair of tokens that makes a third, as tiktoken merges them: the lowest id first."""
    merges = []
    for token in sorted(ids, key=ids.get):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [[spell(first), spell(second)] for first, second in pairs]
    return merges


def byte_level(ids: dict[bytes, int], special: dict[str, int], pattern: str | None) -> dict:
    """A byte-level BPE, or plain bytes where there are no longer tokens.

    Args:
        ids: of each ordinary token.
        special: the id of each special token by its name.
        pattern: regular expression of the words that tokens never span; None: the whole text.
    """
    steps = []
    if pattern is not None:
        # In this library's dialect {1,3}+ repeats the whole; at a word's end {1,3} is the same.
        pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern)
        split = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps.append({"type": "Split", **split})
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    letters["use_regex"] = False
    steps.append(letters)
    vocabulary = {spell(token): number for token, number in ids.items()}
    vocabulary |= special  # else these get the next free numbers
    pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    return describe(vocabulary, merges_of(ids), special, pre_tokenizer, letters)


def characters(chars: list[str]) -> dict:
    """A token for each character; those without one are left out."""
    vocabulary = {char: number for number, char in enumerate(chars)}
    return describe(vocabulary, [], {}, None, {"type": "Fuse"})


def describe(
    vocabulary: dict[str, int],
    merges: list[list[str]],
    special: dict[str, int],
    pre_tokenizer: dict | None,
    decoder: dict,
) -> dict:
    """tokenizer.json."""
    kept_as_it_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": name, "special": True, **kept_as_it_is}
        for name, number in special.items()
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # a word that is a token is that token
        "vocab": vocabulary,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def write(folder: Path, definition: str, eot: str | None) -> None:
    """tokenizer.json and tokenizer_config.json.

    Args: definition: JSON. eot: the name of the token between documents.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eot,
        "eos_token": eot,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
