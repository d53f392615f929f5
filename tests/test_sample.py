"""Text from a checkpoint."""

from pathlib import Path

import pytest
import torch

import sample
from data.tokenizer import load_tokenizer, make_tokenizer
from engine import UserError
from model import GPT, ModelConfig
from sample import SampleConfig


@pytest.fixture
def folder(tmp_path):
    GPT(ModelConfig(1, 2, 16, 32), 257).save_pretrained(tmp_path / "model")
    make_tokenizer("bytes").save(tmp_path / "model")
    return tmp_path / "model"


class Scripted:
    """A model that gives these tokens, and keeps what it was asked."""

    config = ModelConfig(block_size=32)
    head_weight = torch.zeros(1)

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
    assert model.options["stop"] == tokenizer.eot


def test_a_chat_prompt_is_put_as_fine_tuning_puts_it(folder):
    tokenizer = load_tokenizer(folder)
    model = Scripted()
    assert generate(model, tokenizer, prompt="hi", chat=True) == "hi\n"
    assert tokenizer.decode(model.prompt) == "<|endoftext|>User: hi\nAssistant:"


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
