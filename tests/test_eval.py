"""eval.py: a checkpoint on its run's text or on another."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import eval as evaluation
from data import DataConfig, held_out, prepare
from data.tokenizer import make_tokenizer
from engine import UserError, checkpoint
from model import GPT, ModelConfig
from model.metrics import evaluate

TEXT = {"name": "text", "path": "text.txt"}
BYTES = TEXT | {"tokenizer": "bytes"}


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
    config.resolve([])
    return evaluation.measure(config)


def save_run():
    """A run of the model in model/, on the text at a context of 4; its checkpoint's folder."""

    def write(folder):
        shutil.copytree("model", folder, dirs_exist_ok=True)

    step = checkpoint.save(Path("run"), 3, write, {})
    config = {"model": {"block_size": 4}, "data": BYTES}
    Path("run/config.yaml").write_text(json.dumps(config))
    return step


def held_out_batches(data, block_size):
    settings = {"tokenizer": "bytes", "val_fraction": 1.0} | data
    config = DataConfig(**settings)
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
        "bits_per_byte": bits,
        "val_agreement": 1,
    }
    measures = measure(teacher="model")
    for name, value in want.items():
        assert measures[name] == pytest.approx(value, rel=1e-5)
    assert measure(data=BYTES) == measure()
    assert measure(tokens=16)["tokens"] == 16

    # The whole text, to its last byte; the last block has 4 labels
    measures = measure()
    assert measures["tokens"] == tokens.val_bytes == 23 * 60

    # A teacher of a shorter context, which both are read at
    GPT(ModelConfig(1, 2, 16, 4), 257).save_pretrained(Path("short"))
    shorter = measure(block_size=4)
    assert measure(teacher="short")["val_loss"] == shorter["val_loss"]


def test_a_run_is_evaluated_on_its_text_at_its_own_context(model):
    step = save_run()
    block_sizes = {None: 4, 8: 8, 99: 8}
    for given, block_size in block_sizes.items():
        _, batches = held_out_batches(TEXT | {"val_fraction": 0.1}, block_size)
        loss = evaluate(model, batches)["val_loss"]
        for path in ("run", str(step)):
            measures = measure(path, data=None, block_size=given)
            assert measures["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_the_tokens_that_are_counted_are_labels():
    lines = [json.dumps({"prompt": "ab", "completion": f"answer {row}"}) for row in range(40)]
    Path("rows.jsonl").write_text("\n".join(lines))
    data = {"name": "text", "path": "rows.jsonl"}
    _, batches = held_out_batches(data, 8)
    num_labels = 0
    for batch in batches:
        is_label = batch.labels >= 0
        num_labels += is_label.sum().item()
    assert measure(data=data)["tokens"] == num_labels


def test_a_text_is_read_whole_unless_the_user_says_how_much(model, capsys):
    config = evaluation.EvalConfig(path="model", data=DataConfig(**TEXT))
    config.resolve(["data=text", "data.val_fraction=0.1"])
    assert config.data.val_fraction == 0.1
    for name in ("stdlib", "bin"):
        config.data = DataConfig(name, path="x" if name == "bin" else None)
        config.resolve([])
        assert config.data.val_fraction == 0.1

    # A text of three bytes, in one short block
    Path("short.txt").write_text("abc")
    measures = measure(data=TEXT | {"path": "short.txt"})
    assert measures["tokens"] == 3
    ids = torch.tensor([[256, *b"abc"]])
    log_probs = model(ids).log_softmax(-1)
    label_log_probs = log_probs[0, :3].gather(1, ids[0, 1:, None])
    loss = -label_log_probs.mean().item()
    assert measures["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert measures["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)


def test_a_run_measured_on_its_training_text_is_told(capsys):
    save_run()
    measure("run", data=TEXT | {"path": "./text.txt"})
    assert "data: run was trained on most of it; leave data out" in capsys.readouterr().out
    measure("run", data=None)
    shutil.copy("text.txt", "other.txt")
    measure("run", data=TEXT | {"path": "other.txt"})
    assert "was trained on" not in capsys.readouterr().out


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
    ({"path": "other"}, "path=other: has no tokenizer; set data.tokenizer to the one"),
    ({"data": TEXT | {"path": "rows.jsonl"}, "block_size": 2}, "^block_size=2: .*another block_s"),
    ({"teacher": "other"}, "teacher.path=other: its vocabulary .2000"),
    ({"data": TEXT | {"tokenizer": "char"}}, "path=model: its vocabulary .* data, char"),
]


@pytest.mark.parametrize("keys, match", MISTAKES)
def test_mistakes_are_one_line(keys, match):
    Path("rows.jsonl").write_text('{"prompt": "long", "completion": "x"}')
    GPT(ModelConfig(1, 2, 16, 8), 2000).save_pretrained(Path("other"))
    with pytest.raises(UserError, match=match):
        measure(**keys)


def test_a_runs_text_that_has_changed_is_said(capsys):
    step = save_run()
    manifest = json.loads((step / "manifest.json").read_text())
    tokens = prepare(DataConfig(**BYTES))
    for recorded, is_said in ((tokens.fingerprint, False), ("other", True)):
        manifest["fingerprints"] = {"tokens": recorded}
        (step / "manifest.json").write_text(json.dumps(manifest))
        measure("run", data=None)
        assert ("has changed since" in capsys.readouterr().out) == is_said


def test_token_files_are_read_by_the_models_own_tokenizer():
    data = DataConfig("bin", path="x", tokenizer="gpt2")
    config = evaluation.EvalConfig(path="model", data=data)
    assert evaluation.choose_data(config, Path("model")).tokenizer == "model"
