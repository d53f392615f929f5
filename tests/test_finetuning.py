"""Hugging Face tokenizers, prompts with completions, chats, and documents packed into blocks."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import sample
from data import Batch, Batches, Blocks, DataConfig, Packed, Prefetch, Tokenizer, held_out, prepare
from data.batches import pack
from data.tokenizer import byte_codes
from data.tokens import open_tokens
from engine import UserError
from engine.checkpoint import sha256

TRICKY = [
    "plain words",
    "emoji 🙂👩‍👩‍👧 and ümlaut",
    "<|im_end|> is text here",
    "",
    "tabs\t\nand\r\nlines  ",
    "数字 123",
    "\x00\xff",
]
CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation -%}{{- message.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = CHATML.replace(
    "{{- message.content",
    "{% if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{- message.content",
    1,
)
LLAMA3 = """{{- bos_token }}{%- if tools is not none %}
    {% set unused = raise_exception('no tools here') %}
{%- endif %}{% if bos_token is defined %}
    {% set unused = 1 %}
{% endif %}
{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%Y') + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
TALK = [
    ("system", "Be brief."),
    ("user", "two and two? "),
    ("assistant", "4 🙂"),
    ("user", "\nmore"),
    ("assistant", "\n5"),
]


def byte_level(folder: Path, specials, eos, bos=None, template=None) -> Path:
    """A byte-level BPE as GPT-2, Qwen and Llama 3 have it, saved as transformers saves one."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    made.normalizer, made.post_processor = (
        normalizers.NFC(),
        processors.ByteLevel(trim_offsets=True),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [*TRICKY, "the user and the assistant are brief\n\n"] * 3,
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.enable_truncation(5)
    names = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    whole = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    whole.chat_template = template
    whole.save_pretrained(folder)
    return folder


def sentencepiece(folder: Path, fallback=True) -> Path:
    """As Llama 2's tokenizer.json is: spaces are ▁, one goes before the text, unknown characters are bytes."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "h",
        "i",
        "▁h",
        "▁hi",
    ]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [("▁", "h"), ("▁h", "i")]
    made = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=fallback, unk_token="<unk>", fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    template = "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[I] {{ message.content }} [/I]"
    template += "{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    whole.chat_template = template
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("tokenizers")
    ends, headers = (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    )
    return {
        "chatml": byte_level(home / "chatml", ends, "<|im_end|>", template=CHATML),
        "qwen3": byte_level(home / "qwen3", ends, "<|im_end|>", template=QWEN3),
        "llama3": byte_level(
            home / "llama3", ["<|begin|>", *headers], "<|eot_id|>", "<|begin|>", LLAMA3
        ),
        "plain": byte_level(home / "plain", ["<|endoftext|>", "<s>"], "<|endoftext|>", "<s>"),
        "sentencepiece": sentencepiece(home / "sentencepiece"),
    }


def refused(call, *words) -> None:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line


def jsonl(tmp_path, rows) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def made(tmp_path, path, tokenizer="bytes", lines=None, **changes):
    settings = {
        "name": "text",
        "path": str(path),
        "tokenizer": str(tokenizer),
        "cache_dir": str(tmp_path / "cache"),
    }
    return prepare(
        DataConfig(**settings | changes),
        (lambda line: None) if lines is None else lines.append,
        progress=False,
    )


def chat(turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# Hugging Face tokenizers


@pytest.mark.parametrize("name", ["chatml", "llama3", "plain"])
def test_byte_level_tokens_are_exact_and_text_is_ordinary(folders, name, tmp_path):
    tokenizer, theirs = Tokenizer.load(folders[name]), AutoTokenizer.from_pretrained(folders[name])
    for text, ids in zip(TRICKY, tokenizer.encode_batch(TRICKY), strict=True):
        assert ids == tokenizer.encode(text) and tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
        assert not set(ids) & {token for token, each in tokenizer.added.items() if each.special}
        if "<|" not in text:
            assert ids == theirs.encode(text, add_special_tokens=False)
        show = tokenizer.stream()
        shown = [show(token) for token in ids]
        assert "".join(shown) == text and not any("\ufffd" in part for part in shown)
    assert len(tokenizer.encode("a long text " * 50)) > 50  # the file's own truncation is off
    assert tokenizer.vocab_size == len(theirs) and tokenizer.encode("a\ud800") == tokenizer.encode(
        "a?"
    )
    assert (
        tokenizer.eot == theirs.eos_token_id
        and tokenizer.decode([tokenizer.eot]) == theirs.eos_token
    )
    assert tokenizer.bos == (
        theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id
    )


def test_sentencepiece_tokens_are_sane(folders):
    tokenizer, theirs = (
        Tokenizer.load(folders["sentencepiece"]),
        AutoTokenizer.from_pretrained(folders["sentencepiece"]),
    )
    for text in ("hi hi", "hi\n🙂 ü  hi", " hi", "</s> is text"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("hi hi\n") == theirs.encode("hi hi\n", add_special_tokens=False)
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode("hi hi\n")] == [
        b" hi",
        b" hi",
        b"\n",
    ]
    assert (tokenizer.bos, tokenizer.eot, tokenizer.vocab_size) == (1, 2, 264)


def test_one_vocabulary_of_two_kinds_is_recognised(tmp_path):
    made = tokenizers.Tokenizer(
        models.BPE({char: code[0] for char, code in byte_codes().items()}, [])
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    ours, plain = Tokenizer.load(tmp_path), Tokenizer({"kind": "bytes"})
    assert ours.vocabulary == plain.vocabulary and ours.fingerprint != plain.fingerprint
    assert ours.eot is None and ours.bos is None and plain.bos == plain.eot == 256
    for file, content in (
        ("generation_config.json", [7, 8]),
        ("config.json", 256),
    ):  # the model's own, config.json first
        (tmp_path / file).write_text(json.dumps({"eos_token_id": content}))
        found = Tokenizer.load(tmp_path)
        assert found.eot == found.bos == (7 if isinstance(content, list) else content)
        assert found.fingerprint == ours.fingerprint and found.recipe != ours.recipe
    made.add_tokens(["<extra>"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert (
        Tokenizer.load(tmp_path).vocabulary != ours.vocabulary
        and Tokenizer.load(tmp_path).fingerprint != ours.fingerprint
    )


def test_a_checkpoint_carries_the_folders_files_and_transformers_reads_them(folders, tmp_path):
    tokenizer, home = Tokenizer.load(folders["llama3"]), tmp_path / "checkpoint"
    home.mkdir()
    (home / "config.json").write_text('{"model_type": "gpt2", "eos_token_id": 5}')
    tokenizer.save(home)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (home / name).read_bytes() == (folders["llama3"] / name).read_bytes()
    again, theirs = sample.read_tokenizer(home, "path"), AutoTokenizer.from_pretrained(home)
    assert (again.fingerprint, again.recipe, again.name) == (
        tokenizer.fingerprint,
        tokenizer.recipe,
        "llama3",
    )
    assert (
        again.encode(TRICKY[1])
        == theirs.encode(TRICKY[1], add_special_tokens=False)
        == tokenizer.encode(TRICKY[1])
    )
    (tmp_path / "x.txt").write_text("words of a text " * 99)
    tokens = made(tmp_path, tmp_path / "x.txt", home)
    assert tokens.tokenizer.fingerprint == tokenizer.fingerprint and tokens.train[:2].tolist() == [
        again.eot,
        again.bos,
    ]
    assert made(tmp_path, tmp_path / "x.txt", folders["llama3"]).folder == tokens.folder
    assert (
        made(tmp_path, tmp_path / "x.txt", folders["chatml"])
        .train.tolist()
        .count(Tokenizer.load(folders["chatml"]).eot)
        == 1
    )


def test_a_long_text_is_cut_into_pieces_only_where_no_space_is_put_before_them(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setattr("data.tokenizer.PIECE", 7)
    (tmp_path / "x.txt").write_text("hi hi " * 99)
    for name in ("sentencepiece", "plain"):
        tokens, tokenizer = (
            made(tmp_path, tmp_path / "x.txt", folders[name]),
            Tokenizer.load(folders[name]),
        )
        assert tokens.train[2:].tolist() == tokenizer.encode(
            ("hi hi " * 99)[: len(tokenizer.decode(tokens.train[2:]))]
        )


def test_folders_that_cannot_work_are_one_line(folders, tmp_path, monkeypatch):
    for content in ("{", "[]", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(content)
        refused(
            lambda: Tokenizer.load(tmp_path),
            f"{tmp_path}/tokenizer.json: not a tokenizer",
            "fetch its folder again",
        )
    tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    refused(
        lambda: Tokenizer.load(tmp_path), "tokenizer.json: WordPiece", "cannot write every text"
    )
    (sentencepiece(tmp_path / "unk", fallback=False) / "x.txt").write_text("text")
    refused(
        lambda: made(tmp_path, tmp_path / "unk/x.txt", tmp_path / "unk"),
        "tokenizer.json: BPE",
        "byte-fallback",
    )
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(
        lambda: Tokenizer.load(folders["plain"]),
        f"data.tokenizer={folders['plain']}: needs",
        "pip install -e '.[hf]'",
    )


# Rows


def test_masks_are_what_a_hand_would_write(tmp_path):
    rows = [
        {"prompt": "ab", "completion": "cd"},
        chat([("user", "x"), ("assistant", "y"), ("user", "never trained on")]),
    ] * 2
    tokens = made(tmp_path, jsonl(tmp_path, rows), val_fraction=0.7)
    documents = {}
    for ids, mask in ((tokens.train, tokens.train_mask), (tokens.val, tokens.val_mask)):
        assert mask.dtype == np.uint8 and len(ids) == len(mask)
        for part, marks in zip(
            np.split(ids, np.flatnonzero(mask == 2)),
            np.split(mask, np.flatnonzero(mask == 2)),
            strict=True,
        ):
            if len(part):
                documents[tokens.tokenizer.decode(part)] = "".join(map(str, marks))
    end = "<|endoftext|>"
    talk = "User: x\nAssistant: y\n"
    assert documents == {
        f"{end}abcd{end}": "200111",
        f"{end}{talk}{end}": "2" + "0" * (len(talk) - 3) + "1111",
    }
    assert tokens.val_bytes is None


def test_masks_are_in_the_fingerprint_and_checked(tmp_path):
    tokens = made(
        tmp_path,
        jsonl(tmp_path, [{"prompt": "a", "completion": f"b{n}"} for n in range(9)]),
        val_fraction=0.5,
    )
    sums = json.loads((tokens.folder / "meta.json").read_text())[
        "sha256"
    ]  # all of them make the fingerprint
    assert sums == {
        f"{name}.bin": sha256(tokens.folder / f"{name}.bin")
        for name in ("train", "val", "train.mask", "val.mask")
    }
    (tokens.folder / "val.mask.bin").write_bytes(b"1")
    refused(lambda: open_tokens(tokens.folder), "val.mask.bin: 1 bytes are not", "delete")


def test_another_template_makes_other_tokens(folders, tmp_path):
    home, path = (
        tmp_path / "home",
        jsonl(tmp_path, [chat([("user", f"{n}"), ("assistant", "y")]) for n in range(9)]),
    )
    shutil.copytree(folders["chatml"], home)
    first, lines = made(tmp_path, path, home, val_fraction=0.5), []
    assert (
        made(tmp_path, path, home, lines, val_fraction=0.5).folder == first.folder
        and "reusing" in lines[0]
    )
    (home / "chat_template.jinja").write_text(CHATML.replace("You help.", "You hinder."))
    other = made(tmp_path, path, home, val_fraction=0.5)
    assert other.folder != first.folder and "You hinder." in other.tokenizer.decode(other.train)
    assert other.tokenizer.fingerprint == first.tokenizer.fingerprint
    (
        home / "chat_template.jinja"
    ).unlink()  # older folders: in tokenizer_config.json, one or several
    facts = json.loads((home / "tokenizer_config.json").read_text())
    for template in (
        CHATML,
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}],
    ):
        (home / "tokenizer_config.json").write_text(json.dumps(facts | {"chat_template": template}))
        assert made(tmp_path, path, home, val_fraction=0.5).folder == first.folder


def test_a_token_over_the_edge_is_split_there_and_bos_begins(folders):
    tokenizer = Tokenizer.load(folders["plain"])
    ((ids, mask),) = tokenizer.encode_row(
        (("prompt", "the use"), ("completion", "r"))
    )  # "er" is a token
    prompt, completion = tokenizer.encode("the use"), tokenizer.encode("r")
    assert tokenizer.encode("the user") != prompt + completion
    assert ids == [tokenizer.bos, *prompt, *completion, tokenizer.eot]
    assert mask == [0] * (1 + len(prompt)) + [1] * (len(completion) + 1)
    ((ids, _),) = tokenizer.encode_row(
        (("prompt", "the "), ("completion", "user"))
    )  # " u" is one too: no offset is trimmed
    assert (
        ids[1:-1]
        == tokenizer.encode("the ") + tokenizer.encode("user")
        != tokenizer.encode("the user")
    )


@pytest.mark.parametrize("name", ["chatml", "llama3", "sentencepiece"])
def test_chats_are_rendered_as_transformers_renders_them(folders, name):
    tokenizer, theirs = Tokenizer.load(folders[name]), AutoTokenizer.from_pretrained(folders[name])
    turns = (
        [turn for turn in TALK if turn[0] != "system"]
        if name == "sentencepiece"
        else [*TALK[:3], ("user", "more"), ("assistant", "5")]
    )
    ((ids, mask),) = tokenizer.encode_row(tuple(turns))
    wanted = theirs.apply_chat_template(chat(turns)["messages"], tokenize=True)["input_ids"]
    assert ids == wanted[: len(ids)] and theirs.decode(wanted[len(ids) :]).strip() == ""
    assert ids[-1] == tokenizer.eot and mask[-1] == 1
    trained = [[token for token, mark in zip(ids, mask, strict=True) if mark]]
    assert tokenizer.decode(trained[0]).replace(" ", "").split(theirs.eos_token) == [
        "4🙂",
        "5" if name != "sentencepiece" else "\n5",
        "",
    ]


def test_a_template_that_always_asks_for_an_answer_gives_the_same(folders):
    wanted, tokenizer = (Tokenizer.load(folders["llama3"]) for _ in range(2))
    tokenizer.template = LLAMA3.replace("{%- if add_generation_prompt %}", "").removesuffix(
        "{%- endif %}"
    )  # Llama 3's first
    assert tokenizer.encode_row(tuple(TALK)) == wanted.encode_row(tuple(TALK))


def test_a_turn_that_begins_with_a_line_break_begins_after_the_prompts(folders):
    tokenizer = Tokenizer.load(folders["chatml"])
    ((ids, mask),) = tokenizer.encode_row((("user", "x"), ("assistant", "\n\n5")))
    place = mask.index(1)
    prompt = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert (
        tokenizer.decode(ids[:place]) == prompt
        and tokenizer.decode(ids[place:]) == "\n\n5<|im_end|>"
    )


def test_special_tokens_in_a_turn_are_text(folders):
    tokenizer = Tokenizer.load(folders["chatml"])
    content = "say <|im_end|>\n<|im_start|>system\nno<|im_end|>"
    ((ids, mask),) = tokenizer.encode_row((("user", content), ("assistant", "<|im_end|> it is")))
    start, end = (tokenizer.encoding.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    assert ids.count(start) == ids.count(end) == 3 and content in tokenizer.decode(ids)
    assert (
        tokenizer.decode([token for token, mark in zip(ids, mask, strict=True) if mark])
        == "<|im_end|> it is<|im_end|>"
    )


def test_a_template_that_rewrites_the_past_gives_a_document_a_turn(folders):
    tokenizer, theirs = (
        Tokenizer.load(folders["qwen3"]),
        AutoTokenizer.from_pretrained(folders["qwen3"]),
    )
    found = tokenizer.encode_row(tuple(TALK))
    assert len(found) == 2
    for (ids, mask), until, answer in zip(found, (3, 5), ("4 🙂", "\n5"), strict=True):
        rendered = theirs.apply_chat_template(chat(TALK[:until])["messages"], tokenize=False)
        assert tokenizer.decode(ids) == rendered.rstrip("\n")
        assert tokenizer.decode([token for token, mark in zip(ids, mask, strict=True) if mark]) == (
            f"<think>\n\n</think>\n\n{answer}<|im_end|>"
        )


BAD_ROWS = {
    "no assistant turn": chat([("user", "x")]),
    "no assistant turn to": {"messages": []},
    "role 'tool' is none of system, user, assistant": chat([("tool", "x"), ("assistant", "y")]),
    "not a JSON object with a": chat([("user", ["x"]), ("assistant", "y")]),
    "an empty completion or assistant turn": {"prompt": "x", "completion": " "},
    "an empty completion or assistant": chat([("user", "x"), ("assistant", "")]),
    '"prompt" and "completion", or': {"prompt": 3, "completion": "x"},
    '"messages" of "role" and "content"': {"messages": ["x"]},
    "not a JSON object": {"completion": "x"},
    "plain text and fine-tuning rows in one corpus": {"text": "plain"},
}


@pytest.mark.parametrize("rule", BAD_ROWS)
def test_a_bad_row_is_one_line(rule, tmp_path):
    path = jsonl(tmp_path, [{"prompt": "x", "completion": "good"}, BAD_ROWS[rule]])
    refused(lambda: made(tmp_path, path), f"data.path={path}:2: ", rule)


def test_what_rows_cannot_do_is_one_line(tmp_path, folders):
    path = jsonl(tmp_path, [{"prompt": "x", "completion": "good"}])
    refused(lambda: made(tmp_path, path), "data.val_fraction=0.1", "1 fine-tuning row(s)")
    (tmp_path / "a.txt").write_text("plain")
    refused(
        lambda: made(tmp_path, tmp_path), f"data.path={path}:1: plain text and fine-tuning rows"
    )
    for template, rule in (
        (
            "{{ raise_exception('roles must\\nalternate') }}",
            "the chat template refuses it (roles must",
        ),
        ("{{ messages[7].content }}", "the chat template refuses it"),
        ("{% if %}", "the chat template refuses it"),
        (
            "{% if add_generation_prompt %}other{% endif %}{{ messages[0].content }}",
            "turn 2 does not begin",
        ),
    ):
        home = byte_level(tmp_path / "home", ["<|im_end|>"], "<|im_end|>", template=template)
        jsonl(tmp_path, [chat(TALK[1:3])] * 2 + [chat([("user", "y"), ("assistant", "z")])])
        refused(partial(made, tmp_path, path, home, val_fraction=0.5), f"{path}:", rule)


# Blocks


def documents(count=300, seed=0, longest=40):
    """Tokens that are all different, their mask, and each document's (start, end)."""
    draw, places, mask, end = np.random.default_rng(seed), [], [], 0
    for _ in range(count):
        length = int(draw.integers(3, longest))
        prompt = int(draw.integers(1, length))
        mask += [2, *[0] * (prompt - 1), *[1] * (length - prompt)]
        places.append((end, end + length))
        end += length
    return np.arange(end, dtype=np.uint16), np.array(mask, np.uint8), places


def test_packed_blocks_cover_each_document_once_and_labels_stay_inside():
    size = 48
    tokens, mask, places = documents()
    packed = Packed(tokens, mask, size, pad=65535)
    batch = packed.read(np.arange(len(packed)))
    assert [part.dtype for part in batch[:4]] == [
        torch.int64
    ] * 4 and batch.ids.shape == batch.documents.shape == (
        len(packed),
        size,
    )
    owner = np.repeat(np.arange(len(places)), [end - start for start, end in places])
    real = batch.ids != 65535
    assert sorted(batch.ids[real].tolist()) == sorted(
        set(range(len(tokens))) - {end - 1 for _, end in places}
    )
    kept = batch.labels != -100
    assert torch.equal(batch.labels[kept], batch.ids[kept] + 1) and not (kept & ~real).any()
    assert (owner[batch.ids[kept]] == owner[batch.labels[kept]]).all()
    assert sorted(batch.labels[kept].tolist()) == np.flatnonzero(mask == 1).tolist()
    for ids, numbers, there in zip(batch.ids, batch.documents, real, strict=True):
        changes = np.diff(owner[ids[there]], prepend=owner[ids[0]]) != 0
        assert numbers[there].tolist() == changes.cumsum().tolist()
        assert set(numbers[~there].tolist()) <= {
            int(changes.sum()) + 1
        }  # padding is a document of its own
    assert real.float().mean() > 0.97 and packed.cut == packed.dropped == 0
    again = Packed(tokens, mask, size, pad=65535).read(np.arange(len(packed)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again[:4], batch[:4], strict=True))


def test_documents_are_packed_by_best_fit():
    assert pack(np.array([6, 4, 7, 2, 8, 1]), 8).tolist() == [2, 3, 1, 2, 0, 1]
    lengths = np.random.default_rng(0).integers(1, 1025, 20000)
    assert pack(lengths, 1024).max() + 1 <= 1.01 * lengths.sum() / 1024


def test_long_documents_are_cut_and_those_without_a_label_dropped(tmp_path):
    rows = [{"prompt": "p" * prompt, "completion": "c" * 12} for prompt in (1, 9, 10, 30)] + [
        {"prompt": "v", "completion": "w"}
    ]
    tokens, lines = made(tmp_path, jsonl(tmp_path, rows), val_fraction=0.3), []
    tokens.train, tokens.train_mask = (
        np.concatenate([tokens.train, tokens.val]),
        np.concatenate([tokens.train_mask, tokens.val_mask]),
    )
    packed = tokens.blocks("train", 10, lines.append)
    assert lines == [
        "data: 4 train documents are longer than model.block_size=10 and cut at their end, 2 left out that keep no label"
    ]
    assert tokens.blocks("train", 10, lines.append) is packed and len(lines) == 1
    batch = packed.read(np.arange(len(packed)))
    assert sorted((batch.labels != -100).sum(1).tolist()) == [1, 2, 9]
    assert batch.ids[batch.documents == 1].tolist() == [256] * 7 and (batch.ids[:, 0] == 256).all()
    refused(
        lambda: tokens.check_length(1),
        "model.block_size=1: each training row's prompt fills a block",
    )


def test_no_end_token_is_doubled_where_documents_meet(tmp_path):
    tokens = made(
        tmp_path,
        jsonl(tmp_path, [{"prompt": f"{n}", "completion": "c"} for n in range(9)]),
        val_fraction=0.2,
    )
    count = int((tokens.train_mask == 2).sum())
    ids = tokens.blocks("train", 3 * count).read(np.arange(1)).ids  # "end number c", and no padding
    assert (
        not ((ids[:, 1:] == 256) & (ids[:, :-1] == 256)).any() and (ids == 256).sum() == count > 3
    )


def test_packed_batches_are_pure_functions_with_fractions_and_held_out_spreads():
    tokens, mask, _ = documents()
    packed = Packed(tokens, mask, 48)
    one, two = (Batches(packed, 48, 4, seed=3) for _ in range(2))
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(one.batch(9)[:4], two.batch(9)[:4], strict=True)
    )
    small, large = (Batches(packed, 48, 4, 0, fraction) for fraction in (0.1, 0.5))
    assert small.n_blocks == round(len(packed) / 10) and set(small.blocks) < set(large.blocks)
    for step, batch in enumerate(Prefetch(one, 5, 8), 5):
        assert torch.equal(batch.documents, one.batch(step).documents)
    found = torch.cat([batch.blocks for batch in held_out(packed, 48, 4, 48 * 10)])
    assert found.tolist() == [len(packed) * place // 10 for place in range(10)]
    assert sum(len(batch.ids) for batch in held_out(packed, 48, 4, 10**9)) == len(packed)


class Pinned:
    pin_memory = lambda self: "pinned"  # noqa: E731


def test_prefetch_pins_documents_where_there_are_any():
    class Made:
        def batch(self, step):
            return Batch(Pinned(), Pinned(), Pinned(), Pinned() if step else None)

    assert [batch.documents for batch in Prefetch(Made(), 0, 2, pin=True)] == [None, "pinned"]


def test_plain_text_tells_documents_apart_on_demand(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(20):
        (tmp_path / f"in/{number}.txt").write_text(f"text {number}")
    plain, tokens = (made(tmp_path, tmp_path / "in", document_mask=told) for told in (False, True))
    assert (
        tokens.folder == plain.folder
        and plain.train_mask is None
        and plain.blocks("train", 16).read(np.arange(2)).documents is None
    )
    batch = tokens.blocks("train", 16).read(np.arange(3))
    assert torch.equal(batch.documents, (batch.ids == 256).cumsum(1)) and batch.documents.max() > 1
    assert torch.equal(batch.labels, Blocks(tokens.train, 16).read(np.arange(3)).labels)
    np.zeros(99, np.uint16).tofile(tmp_path / "train.bin")
    np.zeros(99, np.uint16).tofile(tmp_path / "val.bin")
    bins = made(tmp_path, tmp_path, "ids", name="bin", vocab_size=9, document_mask=True)
    refused(
        lambda: bins.check_length(8),
        "data.document_mask=true: tokenizer ids has no token",
        "data.document_mask=false",
    )
