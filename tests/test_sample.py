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
    """The texts and all that was written."""
    pieces = []
    texts = sample.generate_texts(model, tokenizer, SampleConfig(**keys), pieces.append)
    return texts, "".join(pieces)


def test_same_seed_same_texts(folder, capsys):
    def run(seed):
        config = SampleConfig(
            path=str(folder),
            prompt="ab ü",
            n=2,
            seed=seed,
            device="cpu",
        )
        sample.run(config)
        return capsys.readouterr().out

    first = run(3)
    assert first.count("ab ü") == 2
    assert run(3) == first
    assert run(4) != first


def test_texts_end_at_the_end_of_text_and_characters_are_whole(folder):
    tokenizer = load_tokenizer(folder)
    model = Scripted(*"hü".encode(), tokenizer.eot, 105)
    texts, written = generate(model, tokenizer, prompt="x", n=2)
    assert texts == ["xhü", "xhü"]
    assert written == "xhü\n---\nxhü\n"
    assert model.prompt == [tokenizer.bos, ord("x")]

    texts, _ = generate(model, tokenizer, top_k=7, top_p=0.5)
    assert texts == ["hü"]
    assert model.prompt == [tokenizer.bos]
    assert model.options["top_k"] == 7
    assert model.options["top_p"] == 0.5


def test_a_chat_prompt_is_put_as_fine_tuning_puts_it(folder):
    tokenizer = load_tokenizer(folder)
    model = Scripted()
    assert generate(model, tokenizer, prompt="hi", chat=True) == (["hi\n"], "hi\n\n")
    assert tokenizer.decode(model.prompt) == "<|endoftext|>User: hi\nAssistant:"


def test_a_text_to_look_at(folder):
    tokenizer = load_tokenizer(folder)
    text = sample.sample_text(folder, tokenizer)
    assert 0 < len(text) <= 100
    assert sample.sample_text(folder, tokenizer) == text


MISTAKES = [
    ({"path": None}, "path=null: sample.py needs path=RUN"),
    ({"path": "model", "prompt": "x" * 50}, "prompt: 50 tokens, the model reads at most 31"),
    ({"path": "bare"}, "bare: no tokenizer.json that transformers"),
    ({"top_p": 0}, "top_p=0: top_p must be above 0"),
]


@pytest.mark.parametrize("keys, match", MISTAKES)
def test_mistakes_are_one_line(folder, monkeypatch, keys, match):
    monkeypatch.chdir(folder.parent)
    GPT(ModelConfig(1, 2, 16, 32), 99).save_pretrained(Path("bare"))
    with pytest.raises(UserError, match=match):
        sample.run(SampleConfig(device="cpu", **keys))
