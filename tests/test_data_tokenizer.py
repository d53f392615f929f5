"""Our own tokenizers: bytes, characters, BPE, tiktoken's; folders that hold one."""

import base64
import random
import shutil
from itertools import chain
from pathlib import Path

import pytest
import tiktoken
from transformers import AutoTokenizer

from data import DataConfig, encodings, prepare
from data.encodings import END, cut_into_pieces, from_content
from data.tokenizer import given_tokenizer, load_tokenizer, make_tokenizer
from engine import UserError, checkpoint
from model import GPT, ModelConfig
from tests.recording import write_tokenizer

STORY = "The café was naïve 🙂 in 東京: x = 1\n\tdef f(): pass  # <|endoftext|> \r\n  'll we've\n\n"
WORDS = "".join(f"word{number} and another, " for number in range(400))


@pytest.fixture
def gpt2(monkeypatch):
    """A small vocabulary under the name of one of tiktoken's."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        "tiny",
        pat_str=r"\w+|\W+",
        mergeable_ranks=ranks | {b"th": 256},
        special_tokens={END: 300},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


@pytest.mark.parametrize("name", ["bytes", "char", "bpe", "gpt2"])
def test_round_trip(name, gpt2, tmp_path):
    tokenizer = make_tokenizer(name, 300, [STORY * 9])
    ids = tokenizer.encode(STORY)
    assert tokenizer.decode(ids) == STORY
    content = [tokenizer.token_bytes(token) for token in ids]
    assert b"".join(content) == STORY.encode()
    assert tokenizer.encode_batch([STORY, "", "a"]) == [ids, [], tokenizer.encode("a")]
    assert max(ids) < tokenizer.vocab_size

    # The text's own <|endoftext|> is ordinary text
    assert tokenizer.eot not in ids
    assert tokenizer.bos == tokenizer.eot
    if name != "char":
        assert tokenizer.decode([tokenizer.eot]) == END

    # No half of a character is shown
    shown = map(tokenizer.stream(), tokenizer.encode("a🙂é"))
    assert "".join(shown) == "a🙂é"

    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(STORY) == ids
    for attribute in ("fingerprint", "vocabulary", "vocab_size", "eot", "bos", "name"):
        assert getattr(again, attribute) == getattr(tokenizer, attribute)


def test_what_is_no_text_reads_as_a_mark(gpt2):
    tokenizer = make_tokenizer("bytes")
    assert tokenizer.encode("a\ud800") == [97, 63]  # half a surrogate pair
    assert tokenizer.decode([0xF0, 0x9F]) == "\ufffd"
    assert tokenizer.decode([97, 300]) == "a\ufffd"  # a padded row of a model
    assert make_tokenizer("gpt2").decode([97, 280]) == "a\ufffd"  # an unused number


def test_characters_are_those_of_the_text_in_order():
    tokenizer = make_tokenizer("char", 0, ["ba", "cab"])
    assert tokenizer.encode("abc") == [0, 1, 2]
    with pytest.raises(UserError, match="^'z': is no character of the training text"):
        tokenizer.encode("bz")
    with pytest.raises(UserError, match="^data.tokenizer=ids: cannot read text"):
        make_tokenizer("ids", 5).encode("a")


def test_bpe_has_the_size_asked_or_what_the_text_yields():
    asked = make_tokenizer("bpe", 400, [WORDS])
    assert asked.vocab_size == 400
    few = make_tokenizer("bpe", 1000, ["abab"])
    assert 257 <= few.vocab_size < 1000
    for tokenizer in (asked, few):
        assert tokenizer.eot == tokenizer.vocab_size - 1


PATTERNS = {
    "rustbpe": None,
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "o200k": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+(?i:'s|'ll)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}\p{M}]+[\p{Ll}\p{Lo}\p{M}]*|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_long_document_in_pieces_gives_the_same_tokens(name, monkeypatch):
    text = (STORY + WORDS[:300] + "\n\n\nif x:\n    y = 12345 67\n_z}\n//  a\n b\r\nc ٣٤ ²\n") * 20
    tokenizer = make_tokenizer("bpe", 600, [text])
    if PATTERNS[name]:
        tokenizer = from_content(tokenizer.content | {"pattern": PATTERNS[name]})
    monkeypatch.setattr(encodings, "MIN_PIECE", 7)
    pieces = list(cut_into_pieces(text))
    assert len(pieces) > 400
    assert "".join(pieces) == text
    tokens = chain.from_iterable(tokenizer.encode_batch(pieces))
    assert list(tokens) == tokenizer.encode(text)


def test_a_million_spaces_do_not_panic():
    text = "a" + " " * 1_200_000 + "b" + WORDS
    tokenizer = make_tokenizer("bpe", 300, [text])
    pieces = list(cut_into_pieces(text))
    assert "".join(pieces) == text
    encoded = tokenizer.encode_batch(pieces)
    assert [tokenizer.decode(ids) for ids in encoded] == pieces


def test_a_tokenizer_is_found_by_name_or_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("gpt2", "run"):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text("{}")
    assert given_tokenizer("gpt2") is None  # the name: the folder has no tokenizer
    with pytest.raises(UserError, match="run: no tokenizer.json"):
        given_tokenizer("run")

    tokenizer = make_tokenizer("bpe", 300, [WORDS])
    tokenizer.save("run")
    assert given_tokenizer("run").fingerprint == tokenizer.fingerprint


CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
WRITTEN = {
    "bytes": None,
    "char": None,
    "gpt2": None,
    "bpe": None,
    "bpe_gpt2": PATTERNS["gpt2"],
    "bpe_o200k": PATTERNS["o200k"],
    "bpe_cl100k": CL100K,
}
FAMILIES = {
    "gpt2": {},
    "llama": {"norm": "rmsnorm", "rope_theta": 1e4, "mlp": "swiglu", "bias": "none"},
    "nanodistill": {"mlp": "relu2"},
}


SAVED = [(name, "llama") for name in WRITTEN] + [("bpe", "gpt2"), ("bpe", "nanodistill")]


@pytest.mark.parametrize("name, family", SAVED)
def test_transformers_reads_what_we_save(name, family, gpt2, tmp_path):
    """A checkpoint's AutoTokenizer gives our ids; our own reader still reads our own file."""
    letters = "ab  \n\n\r\t'sLL12345.,;(é東🙂\u2028\u0085\u00a0٣²\u0301_-/<|>"
    tokenizer = make_tokenizer(name.split("_")[0], 600, [STORY * 9, WORDS, letters])
    if WRITTEN[name]:
        tokenizer = from_content(tokenizer.content | {"pattern": WRITTEN[name]})
    GPT(ModelConfig(1, 2, 16, **FAMILIES[family]), 600).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)

    random.seed(0)
    texts = [STORY.replace(END, "\n"), "", " ", WORDS[:99]]
    texts += ["".join(random.choices(letters, k=random.randrange(30))) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eot
    assert theirs.bos_token_id == tokenizer.bos
    if tokenizer.eot is not None:
        assert theirs.encode(END) == [tokenizer.eot]
    assert type(load_tokenizer(tmp_path)) is type(tokenizer)


def test_a_lone_end_token_that_is_ordinary_text_is_a_default_that_nobody_chose():
    tokenizer = make_tokenizer("bytes")
    ends = {(): [256], (2,): [256], (256,): [256], (300,): [300, 256], (2, 5): [2, 5, 256]}
    for named, all_ends in ends.items():
        assert tokenizer.end_tokens(list(named)) == all_ends
    assert make_tokenizer("ids", 5).end_tokens([2]) == [2]


def test_a_word_that_no_merge_makes_is_a_token(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)] + [b"abc"]
    content = {"kind": "bpe", "pattern": r"\w+|\W+"}
    content["tokens"] = [base64.b64encode(token).decode() for token in tokens]
    tokenizer = from_content(content)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("abc xabc") == tokenizer.encode("abc xabc") == [256, 32, *b"xabc"]


def test_ids_alone_have_no_tokenizer_json(tmp_path):
    make_tokenizer("ids", 5).save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["nanodistill_tokenizer.json"]


@pytest.mark.parametrize("name", ["gpt2", "bpe", "bytes", "char", "ids"])
def test_a_folder_with_a_tokenizer_comes_before_a_kind_of_its_name(name, tmp_path, monkeypatch):
    """With or without ./, as a run too; an empty folder of that name does not."""
    monkeypatch.chdir(tmp_path)
    lines = []
    Path(name).mkdir()
    assert given_tokenizer(name, lines.append) is None
    write_tokenizer(name)
    folder = load_tokenizer(name)
    assert given_tokenizer(name, lines.append).fingerprint == folder.fingerprint
    line = f"data: data.tokenizer={name} is the folder {name}/ here, not the kind of that name"
    assert lines == [line]
    assert given_tokenizer(f"./{name}", lines.append).fingerprint == folder.fingerprint
    assert len(lines) == 1

    Path("text.txt").write_text("some words " * 90)
    found = prepare(DataConfig("text", "text.txt", name, cache_dir="cache"), lines.append)
    assert found.tokenizer.fingerprint == folder.fingerprint
    assert found.tokenizer.vocab_size == 259
    shutil.rmtree(name)
    own = make_tokenizer("bpe", 300, [WORDS])

    def write(checkpoint):
        (checkpoint / "config.json").write_text("{}")
        own.save(checkpoint)

    checkpoint.save(Path(name), 1, write, {})
    assert given_tokenizer(name).fingerprint == own.fingerprint


ROWS = [
    ("prompt=ab completion=cd", "ab", "cd"),
    ("prompt= completion=c", "", "c"),
    ("system=s user=x assistant=y user=z", "System: s\nUser: x\nAssistant:", " y\n"),
]


@pytest.mark.parametrize("turns, prompt, answer", ROWS)
def test_a_row_without_a_template(turns, prompt, answer):
    tokenizer = make_tokenizer("bytes")
    turns = [turn.split("=") for turn in turns.split()]
    ((ids, mask),) = tokenizer.encode_row(turns)
    assert tokenizer.decode(ids) == END + prompt + answer + END
    start = 1 + len(prompt)
    assert mask == [0] * start + [1] * (len(ids) - start)
