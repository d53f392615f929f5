"""eval.py: a checkpoint on its run's text or on another."""

import json
import math
import shutil
from pathlib import Path

import pytest

import eval as evaluation
from data import DataConfig, held_out, prepare
from data.tokenizer import Tokenizer
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
    Tokenizer({"kind": "bytes"}).save(Path("model"))
    return model


def measure(path="model", teacher=None, data=TEXT, **keys):
    data = data and DataConfig(**data)
    config = evaluation.EvalConfig(path=path, data=data, device="cpu", **keys)
    config.teacher.path = teacher
    return evaluation.measure(config)


def read_tokens(**keys):
    return prepare(DataConfig(tokenizer="bytes", **keys), lambda line: None, progress=False)


def test_measures_on_a_given_text_by_the_models_own_tokenizer(model):
    measures = measure(teacher="model")
    tokens = read_tokens(**TEXT)
    loss = evaluate(model, held_out(tokens.blocks("val", 8), 4, 10**9))["val_loss"]
    assert measures["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert measures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    bits = loss / math.log(2) * len(tokens.val) / tokens.val_bytes
    assert measures["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert measures["val_agreement"] == 1
    assert measure(data=TEXT | {"tokenizer": "bytes"}) == measure()
    assert measure(tokens=16)["tokens"] == 16


def test_a_run_is_evaluated_on_its_text_at_its_own_context(model):
    step = checkpoint.save(
        Path("run"), 3, lambda folder: shutil.copytree("model", folder, dirs_exist_ok=True), {}
    )
    config = {"model": {"block_size": 4}, "data": TEXT | {"tokenizer": "bytes"}}
    Path("run/config.yaml").write_text(json.dumps(config))
    tokens = read_tokens(**TEXT)
    for block_size, given in ((4, {}), (8, {"block_size": 8}), (8, {"block_size": 99})):
        loss = evaluate(model, held_out(tokens.blocks("val", block_size), 4, 10**9))["val_loss"]
        for path in ("run", str(step)):
            measures = measure(path, data=None, **given)
            assert measures["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_the_tokens_that_are_counted_are_labels():
    rows = [{"prompt": "ab", "completion": f"answer {number}"} for number in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": "text", "path": "rows.jsonl"}
    blocks = read_tokens(**data).blocks("val", 8)
    labels = sum(int((batch.labels >= 0).sum()) for batch in held_out(blocks, 1, 10**9))
    assert measure(data=data)["tokens"] == labels


def test_the_table_has_a_line_for_each_measure(capsys):
    config = evaluation.EvalConfig(path="model", data=DataConfig(**TEXT), device="cpu")
    evaluation.run(config)
    table = capsys.readouterr().out
    assert "(perplexity)" in table and "(tokens)" in table and "(val_kl)" not in table


MISTAKES = [
    ({"path": None}, "path=null: eval.py needs path=RUN"),
    ({"data": None}, "path=model: no run's config.yaml there; say which text"),
    ({"batch_size": 0}, "batch_size=0: batch_size must be at least 1"),
    ({"teacher": "other"}, "teacher.path=other: its vocabulary is 300"),
    ({"data": TEXT | {"tokenizer": "other"}}, "data.tokenizer=other: .* its own tokenizer, bytes"),
]


@pytest.mark.parametrize("keys, match", MISTAKES)
def test_mistakes_are_one_line(keys, match):
    GPT(ModelConfig(1, 2, 16, 8), 300).save_pretrained(Path("other"))
    if "data" in keys:
        Tokenizer({"kind": "ids", "vocab_size": 300}).save(Path("other"))
    with pytest.raises(UserError, match=match):
        measure(**keys)
