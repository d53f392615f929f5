"""Our own tokenizers: bytes, characters, BPE, tiktoken's; folders that hold one."""

import base64
import hashlib
import json

import pytest
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public

from data import Tokenizer, encodings
from data.encodings import END, cut_into_pieces, load_tiktoken
from data.tokenizer import given_tokenizer, make_tokenizer, read_tokenizer
from engine import UserError

STORY = "The café was naïve 🙂 in 東京: x = 1\n\tdef f(): pass  # <|endoftext|> \r\n  'll we've\n\n"
WORDS = "".join(f"word{number} and another, " for number in range(400))
END_OF_TEXT_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"


@pytest.fixture
def gpt2(monkeypatch):
    """A small vocabulary under the name of one of tiktoken's."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks[b"th"] = 256
    encoding = tiktoken.Encoding(
        "tiny", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={END: 300}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


@pytest.mark.parametrize("name", ["bytes", "char", "bpe", "gpt2"])
def test_round_trip(name, gpt2, tmp_path):
    tokenizer = make_tokenizer(name, 300, [STORY * 9])
    ids = tokenizer.encode(STORY)
    assert tokenizer.decode(ids) == STORY
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == STORY.encode()
    batch = tokenizer.encode_batch([STORY, "", "a"])
    assert batch == [ids, [], tokenizer.encode("a")]
    assert max(ids) < tokenizer.vocab_size

    # The text's own <|endoftext|> is ordinary text
    assert tokenizer.eot not in ids
    if name == "char":
        assert tokenizer.eot is None
        assert tokenizer.bos is None
    else:
        assert tokenizer.decode([tokenizer.eot]) == END

    # No half of a character is shown
    show = tokenizer.stream()
    shown = [show(token) for token in tokenizer.encode("a🙂é")]
    assert "".join(shown) == "a🙂é"
    assert not any("\ufffd" in piece for piece in shown)

    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(STORY) == ids
    for attribute in ("fingerprint", "vocabulary", "vocab_size", "eot", "bos", "name"):
        assert getattr(again, attribute) == getattr(tokenizer, attribute)


def test_what_is_no_text_reads_as_a_mark(gpt2):
    tokenizer = make_tokenizer("bytes", 257, [])
    assert tokenizer.encode("a\ud800") == [97, 63]  # half a surrogate pair
    assert tokenizer.decode([0xF0, 0x9F]) == "\ufffd"
    assert tokenizer.decode([97, 300]) == "a\ufffd"  # a padded row of a model
    assert make_tokenizer("gpt2", 0, []).decode([97, 280]) == "a\ufffd"  # an unused number


def test_characters_are_those_of_the_text_in_order():
    tokenizer = make_tokenizer("char", 0, ["ba", "cab"])
    assert tokenizer.encode("abc") == [0, 1, 2]
    assert tokenizer.vocab_size == 3
    with pytest.raises(UserError, match="^'z': not among the tokenizer's 3 characters"):
        tokenizer.encode("bz")


def test_bpe_has_the_size_asked_or_what_the_text_yields():
    first = make_tokenizer("bpe", 400, [WORDS])
    assert first.vocab_size == 400
    assert first.eot == 399
    assert first.fingerprint == make_tokenizer("bpe", 400, [WORDS]).fingerprint
    assert first.fingerprint != make_tokenizer("bpe", 399, [WORDS]).fingerprint
    few = make_tokenizer("bpe", 1000, ["abab"])
    assert 257 <= few.vocab_size < 1000
    assert few.eot == few.vocab_size - 1


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
        tokenizer = Tokenizer(tokenizer.content | {"pattern": PATTERNS[name]})
    monkeypatch.setattr(encodings, "MIN_PIECE", 7)
    pieces = list(cut_into_pieces(text))
    assert len(pieces) > 400
    assert "".join(pieces) == text
    tokens = [token for ids in tokenizer.encode_batch(pieces) for token in ids]
    assert tokens == tokenizer.encode(text)


def test_no_network_is_one_line(monkeypatch):
    def refuse(name):
        raise OSError("name resolution failed\nmany lines")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="name resolution failed.*TIKTOKEN_CACHE_DIR") as caught:
        load_tiktoken("gpt2")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"data.tokenizer=gtp2: one of .*did you mean gpt2\?"):
        load_tiktoken("gtp2")


def test_tiktokens_cache_is_enough(tmp_path, monkeypatch):
    lines = [base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)]
    file = tmp_path / hashlib.sha1(END_OF_TEXT_URL.encode()).hexdigest()
    file.write_bytes(b"".join(lines))
    load = tiktoken.load.load_tiktoken_bpe
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: pytest.fail("asked the network"))
    monkeypatch.setattr(
        tiktoken_ext.openai_public,
        "load_tiktoken_bpe",
        lambda path, expected_hash=None: load(path),
    )
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert load_tiktoken("cl100k_base").encode_ordinary("ab") == [97, 98]


def test_a_tokenizer_is_found_by_name_or_folder(tmp_path, monkeypatch):
    for name in ("gpt2", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": 300}))
    tokenizer = make_tokenizer("bpe", 300, [WORDS])
    tokenizer.save(tmp_path / "run")
    assert given_tokenizer(str(tmp_path / "run")).fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match=r"gpt2: neither nanodistill_tokenizer.json nor"):
        given_tokenizer(str(tmp_path / "gpt2"))
    monkeypatch.chdir(tmp_path)
    assert given_tokenizer("gpt2") is None  # the name, whatever folder is there


def test_gpt2s_own_tokenizer_where_its_weights_have_none(tmp_path, gpt2):
    (tmp_path / "config.json").write_text('{"vocab_size": 50257}')
    assert read_tokenizer(tmp_path, "path").name == "gpt2"
    (tmp_path / "config.json").write_text('{"vocab_size": 300}')
    with pytest.raises(UserError, match="^path=.*a vocabulary of 300 is not GPT-2's"):
        read_tokenizer(tmp_path, "path")


def test_a_row_without_a_template():
    tokenizer = make_tokenizer("bytes", 257, [])
    turns = (("prompt", "ab"), ("completion", "cd"))
    ((ids, mask),) = tokenizer.encode_row(turns)
    assert tokenizer.decode(ids) == f"{END}abcd{END}"
    assert mask == [0, 0, 0, 1, 1, 1]
    turns = (("prompt", ""), ("completion", "c"))
    ((ids, mask),) = tokenizer.encode_row(turns)
    assert ids == [256, 99, 256]
    assert mask == [0, 1, 1]
    turns = (
        ("system", "s"),
        ("user", "x"),
        ("assistant", "y"),
        ("user", "never trained on"),
    )
    ((ids, mask),) = tokenizer.encode_row(turns)
    assert tokenizer.decode(ids) == f"{END}System: s\nUser: x\nAssistant: y\n{END}"
    assert mask == [0] * (len(ids) - 4) + [1] * 4
