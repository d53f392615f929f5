"""Text from a checkpoint."""

import json
from pathlib import Path

import pytest
import torch

import sample
from data.tokenizer import load_tokenizer, make_tokenizer
from engine import UserError
from model import GPT, ModelConfig
from sample import SampleConfig
from tests.recording import write_tokenizer


@pytest.fixture
def folder(tmp_path):
    GPT(ModelConfig(1, 2, 16, 32), 257).save_pretrained(tmp_path / "model")
    make_tokenizer("bytes").save(tmp_path / "model")
    return tmp_path / "model"


class Scripted:
    """A model that gives these tokens, and keeps what it was asked."""

    config = ModelConfig(block_size=64)
    head_weight = torch.zeros(1)
    vocab_size = 301
    eos = ()

    def __init__(self, *tokens):
        self.tokens = tokens

    def generate(self, ids, max_new_tokens, **options):
        self.prompt = ids[0].tolist()
        self.options = options
        yield from (torch.tensor([token]) for token in self.tokens)


def generate(model, tokenizer, **keys):
    """All that is written."""
    return "".join(sample.generate_texts(model, tokenizer, SampleConfig(**keys)))


def test_same_seed_same_texts(folder, capsys):
    def run(seed):
        sample.run(SampleConfig(str(folder), "ab ü", n=2, seed=seed, device="cpu"))
        return capsys.readouterr().out

    first = run(3)
    assert first.count("ab ü") == 2
    assert run(3) == first
    assert run(4) != first


def test_texts_end_at_the_end_of_text_and_characters_are_whole(folder):
    tokenizer = load_tokenizer(folder)
    model = Scripted(*"hü".encode(), tokenizer.eot)
    assert generate(model, tokenizer, prompt="x", n=2) == "xhü\n---\nxhü"
    assert model.prompt == [tokenizer.bos, ord("x")]

    assert generate(model, tokenizer, top_k=7, top_p=0.5) == "hü"
    assert model.prompt == [tokenizer.bos]
    assert model.options["top_k"] == 7
    assert model.options["top_p"] == 0.5
    assert model.options["stop"] == [tokenizer.eot]


def test_a_chat_prompt_is_put_as_fine_tuning_puts_it(folder):
    tokenizer = load_tokenizer(folder)
    model = Scripted()
    assert generate(model, tokenizer, prompt="hi", chat=True) == "hi\n"
    assert tokenizer.decode(model.prompt) == "<|endoftext|>User: hi\nAssistant:"


CHATML = """{%- for message in messages %}
    {%- set content = message.content.split("</think>")[-1] %}
    {{- "<|user|>" + message.role + "\\n" + content + "<|tool|>" + "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|user|>assistant\\n<think>\\n" }}{%- endif %}"""
CHAT = "<|user|>user\nhi<|tool|>\n<|user|>assistant\n<think>\n"


def test_a_chat_needs_the_templates_generation_prompt_alone(tmp_path):
    """The template drops thoughts, so that no training row is possible; its turns end otherwise."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="does not begin as the template's generation prompt"):
        tokenizer.encode_row((("user", "hi"), ("assistant", "a")))

    answer = tokenizer.encode("ok")
    end_of_turn = tokenizer.encode("<|tool|>", rendered=True)
    for end in (end_of_turn, [tokenizer.eot], [300]):
        model = Scripted(*answer, *end)
        model.eos = [300]
        text = generate(model, tokenizer, prompt="hi", chat=True)
        assert tokenizer.decode(model.prompt) == CHAT
        assert text == "hi\nok"
        assert set(model.options["stop"]) == {*end_of_turn, tokenizer.eot, 300}
    generate(model, tokenizer, prompt="hi")
    assert set(model.options["stop"]) == {tokenizer.eot, 300}
    model = Scripted()
    generate(model, tokenizer, prompt="<|tool|>", chat=True)
    assert model.prompt.count(*end_of_turn) == 1  # a special token in the question is text


def test_any_end_token_of_the_model_ends_each_text(folder):
    GPT.from_pretrained(folder).save_pretrained(folder, eos=256)
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = [*range(128), 256]
    (folder / "generation_config.json").write_text(json.dumps(config))
    model = GPT.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    written = generate(
        model,
        tokenizer,
        n=40,
        max_new_tokens=30,
        top_k=None,
    )
    texts = written.split("\n---\n")
    assert len(texts) == 40
    assert len(max(texts, key=len)) < 30
    assert not any(map(str.isascii, "".join(texts)))


def test_a_prompt_with_a_token_that_the_model_lacks_is_one_line(tmp_path):
    """The tokenizer has added tokens that the embedding has no rows for."""
    GPT(ModelConfig(1, 2, 16, 64), 257).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    sample.run(SampleConfig(str(tmp_path), "hi", device="cpu"))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(UserError, match="^prompt: token 258 ..<.tool.>.. of .* model's 257; leave"):
        sample.run(SampleConfig(str(tmp_path), "hi", chat=True, device="cpu"))


MISTAKES = [
    ({"path": "model", "prompt": "x" * 50}, "prompt: 51 tokens, the model reads at most 32"),
    ({"path": "bare"}, "bare: no tokenizer.json that transformers"),
]


@pytest.mark.parametrize("keys, match", MISTAKES)
def test_mistakes_are_one_line(folder, monkeypatch, keys, match):
    monkeypatch.chdir(folder.parent)
    GPT(ModelConfig(1, 2, 16, 32), 99).save_pretrained(Path("bare"))
    with pytest.raises(UserError, match=match):
        sample.run(SampleConfig(device="cpu", **keys))
