"""Text from a checkpoint."""

import pytest
import torch

import sample
from data.tokenizer import Tokenizer
from engine import UserError
from model import GPT, ModelConfig


@pytest.fixture
def home(tmp_path):
    torch.manual_seed(0)
    GPT(ModelConfig(1, 2, 16, 32), 257).save_pretrained(tmp_path / "model")
    Tokenizer({"kind": "bytes"}).save(tmp_path / "model")
    return tmp_path / "model"


def test_same_seed_same_texts_streamed_as_returned(home, capsys):
    config = sample.SampleConfig(
        path=str(home), prompt="ab ü", n=2, max_new_tokens=40, seed=3, device="cpu"
    )
    sample.run(config)
    first = capsys.readouterr().out
    sample.run(config)
    assert capsys.readouterr().out == first
    assert first.count("ab ü") == 2 and "\n---\n" in first
    config.seed = 4
    sample.run(config)
    assert capsys.readouterr().out != first


def test_generated_texts_end_at_the_end_of_text(home):
    model, tokenizer = GPT.from_pretrained(home), Tokenizer.load(home)
    model.head_weight.data[256] = 10 * model.head_weight.data.abs().max()  # or nearly always so
    real = model.generate
    model.generate = lambda *args, **options: iter(
        [torch.tensor([104]), torch.tensor([105]), torch.tensor([256])]
    )
    pieces = []
    texts = sample.generate_texts(model, tokenizer, sample.SampleConfig(prompt="x"), pieces.append)
    assert texts == ["xhi"] and "".join(pieces) == "xhi\n" and real is not None


def test_a_chat_prompt_is_put_as_fine_tuning_puts_it(home, monkeypatch):
    model, tokenizer, pieces, seen = GPT.from_pretrained(home), Tokenizer.load(home), [], []
    monkeypatch.setattr(
        model, "generate", lambda ids, *args, **options: seen.append(ids[0].tolist()) or iter([])
    )
    sample.generate_texts(
        model, tokenizer, sample.SampleConfig(prompt="hi", chat=True), pieces.append
    )
    ((ids, mask),) = tokenizer.encode_row((("user", "hi"), ("assistant", "yes")))
    assert (
        seen == [ids[: mask.index(1)]]
        and tokenizer.decode(seen[0]) == "<|endoftext|>User: hi\nAssistant:"
    )
    assert pieces[0] == "hi\n"


def test_what_cannot_be_sampled_is_one_line(home, tmp_path):
    with pytest.raises(UserError, match="path=null"):
        sample.run(sample.SampleConfig())
    with pytest.raises(UserError, match="prompt: 50 tokens, the model reads at most 31"):
        sample.run(sample.SampleConfig(path=str(home), prompt="x" * 50, device="cpu"))
    GPT(ModelConfig(1, 2, 16, 32), 99).save_pretrained(tmp_path / "bare")
    with pytest.raises(
        UserError, match="neither nanodistill_tokenizer.json nor tokenizer.json beside the weights"
    ):
        sample.run(sample.SampleConfig(path=str(tmp_path / "bare"), device="cpu"))
    with pytest.raises(UserError, match="top_p=0: top_p must be above 0"):
        sample.SampleConfig(top_p=0)
