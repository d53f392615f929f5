"""eval.py: a checkpoint on its run's text or on another."""

import json
import math
import shutil
from pathlib import Path

import pytest

import eval as evaluation
from data import DataConfig, held_out, prepare
from data.tokenizer import make_tokenizer
from engine import UserError, checkpoint
from model import GPT, ModelConfig
from model.metrics import evaluate

TEXT = {"name": "text", "path": "text.txt"}


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    """A model of bytes in model/, and a text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text to hold out. " * 60)
    model = GPT(ModelConfig(1, 2, 16, 8), 257)
    model.save_pretrained(Path("model"))
    make_tokenizer("bytes").save(Path("model"))
    return model


def measure(path="model", teacher=None, data=TEXT, **keys):
    config = evaluation.EvalConfig(
        path=path,
        device="cpu",
        **keys,
    )
    config.teacher.path = teacher
    if data is not None:
        config.data = DataConfig(**data)
    return evaluation.measure(config)


def held_out_batches(data, block_size):
    config = DataConfig(tokenizer="bytes", **data)
    tokens = prepare(config)
    blocks = tokens.blocks("val", block_size)
    return tokens, held_out(blocks, batch_size=4, max_tokens=10**9)


def test_measures_on_a_given_text_by_the_models_own_tokenizer(model):
    tokens, batches = held_out_batches(TEXT, 8)
    loss = evaluate(model, batches)["val_loss"]
    bits = loss / math.log(2)
    want = {
        "val_loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits * len(tokens.val) / tokens.val_bytes,
        "val_agreement": 1,
    }
    measures = measure(teacher="model")
    for name, value in want.items():
        assert measures[name] == pytest.approx(value, rel=1e-5)
    assert measure(data=TEXT | {"tokenizer": "bytes"}) == measure()
    assert measure(tokens=16)["tokens"] == 16

    # A teacher of a shorter context, which both are read at
    GPT(ModelConfig(1, 2, 16, 4), 257).save_pretrained(Path("short"))
    shorter = measure(block_size=4)
    assert measure(teacher="short")["val_loss"] == shorter["val_loss"]


def test_a_run_is_evaluated_on_its_text_at_its_own_context(model):
    def write(folder):
        shutil.copytree("model", folder, dirs_exist_ok=True)

    step = checkpoint.save(Path("run"), 3, write, {})
    config = {"model": {"block_size": 4}, "data": TEXT | {"tokenizer": "bytes"}}
    Path("run/config.yaml").write_text(json.dumps(config))
    block_sizes = {None: 4, 8: 8, 99: 8}
    for given, block_size in block_sizes.items():
        _, batches = held_out_batches(TEXT, block_size)
        loss = evaluate(model, batches)["val_loss"]
        for path in ("run", str(step)):
            measures = measure(path, data=None, block_size=given)
            assert measures["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_the_tokens_that_are_counted_are_labels():
    lines = [json.dumps({"prompt": "ab", "completion": f"answer {row}"}) for row in range(40)]
    Path("rows.jsonl").write_text("\n".join(lines))
    data = {"name": "text", "path": "rows.jsonl"}
    _, batches = held_out_batches(data, 8)
    labels = sum(int((batch.labels >= 0).sum()) for batch in batches)
    assert measure(data=data)["tokens"] == labels


def test_the_table_has_a_line_for_each_measure(capsys):
    config = evaluation.EvalConfig(
        path="model",
        data=DataConfig(**TEXT),
        device="cpu",
    )
    evaluation.run(config)
    table = capsys.readouterr().out
    assert "(perplexity)" in table
    assert "(val_kl)" not in table


MISTAKES = [
    ({"data": None}, "path=model: no run's config.yaml there; say which text"),
    ({"teacher": "other"}, "teacher.path=other: its vocabulary .2000"),
    ({"data": TEXT | {"tokenizer": "char"}}, "path=model: its vocabulary .* data, char"),
]


@pytest.mark.parametrize("keys, match", MISTAKES)
def test_mistakes_are_one_line(keys, match):
    GPT(ModelConfig(1, 2, 16, 8), 2000).save_pretrained(Path("other"))
    with pytest.raises(UserError, match=match):
        measure(**keys)
