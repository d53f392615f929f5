"""Each measure on a case computed by hand."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as evaluation
from data import DataConfig, held_out, prepare
from data.batches import Batch
from engine import UserError, checkpoint
from model import GPT, ModelConfig, metrics
from model.metrics import evaluate, expected_calibration_error, measure_rows, row_measures
from tests.helpers import assert_close

STUDENT = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]], dtype=torch.float64)
TEACHER = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]], dtype=torch.float64)


def test_a_cached_teachers_measures_by_hand():
    """Two entries and the rest as one outcome; the whole KL is at least that."""
    told = (
        torch.tensor([[1, 0], [1, 0]]),
        torch.tensor([[0.5, 0.25], [0.7, 0.2]], dtype=torch.float64).log(),
    )
    found = row_measures(STUDENT.log() + 7, torch.tensor([0, 2]), teacher_topk=told)
    kl = [
        0.5 * math.log(2) + 0.25 * math.log(0.5),
        0.7 * math.log(7 / 6) + 0.2 * math.log(2) + 0.1 * math.log(1 / 3),
    ]
    assert_close(found["kl"], torch.tensor(kl, dtype=torch.float64), rtol=1e-9)
    assert_close(found["acceptance"], torch.tensor([0.75, 0.8], dtype=torch.float64), rtol=1e-9)
    assert found["agreement"].tolist() == [0, 1]


def test_row_measures_by_hand():
    found = row_measures(STUDENT.log() + 7, torch.tensor([0, 2]), TEACHER.log() - 3)
    assert_close(
        found["loss"], torch.tensor([math.log(2), -math.log(0.3)], dtype=torch.float64), rtol=1e-12
    )
    kl = [
        0.25 * math.log(0.5) + 0.5 * math.log(2),
        0.2 * math.log(2) + 0.7 * math.log(7 / 6) + 0.1 * math.log(1 / 3),
    ]
    assert_close(found["kl"], torch.tensor(kl, dtype=torch.float64), rtol=1e-9)
    assert_close(found["acceptance"], torch.tensor([0.75, 0.8], dtype=torch.float64), rtol=1e-12)
    assert found["agreement"].tolist() == [0, 1] and found["correct"].tolist() == [1, 0]
    assert_close(found["confidence"], torch.tensor([0.5, 0.6], dtype=torch.float64), rtol=1e-12)


def test_calibration_error_by_hand():
    """Bins of 1/15: two rows at .50 (one right) and two at .95 (one right): (2*|.5-.5| + 2*|.5-.95|)/4 = .225."""
    confidence, correct = torch.tensor([0.5, 0.5, 0.95, 0.95]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.225, abs=1e-6)
    assert expected_calibration_error(
        torch.tensor([0.9, 0.9]), torch.tensor([1.0, 1.0])
    ) == pytest.approx(0.1, abs=1e-6)
    near = torch.tensor(
        [0.61, 0.66]
    )  # one bin (.6, .667]: its gap is |1 - 1.27| / 2, not the sum of two
    assert expected_calibration_error(near, torch.tensor([1.0, 0.0])) == pytest.approx(
        0.135, abs=1e-6
    )
    assert expected_calibration_error(torch.tensor([1.0]), torch.tensor([1.0])) == 0


@pytest.fixture
def models():
    return GPT(ModelConfig(1, 2, 16, 8), 31), GPT(ModelConfig(2, 2, 32, 8), 31)


def test_means_over_kept_positions_whatever_the_chunk(models, monkeypatch):
    student, teacher = models
    ids, labels = torch.randint(31, (3, 8)), torch.randint(31, (3, 8))
    labels[0, :5] = -100
    batch = Batch(ids, labels, torch.arange(3))
    whole = evaluate(student, [batch], teacher)
    monkeypatch.setattr(metrics, "ROWS", 3)
    split = [Batch(ids[:1], labels[:1], None), Batch(ids[1:], labels[1:], None)]
    bins = torch.tensor(whole.pop("val_reliability"))
    parts = evaluate(student, split, teacher)
    assert_close(torch.tensor(parts.pop("val_reliability")), bins, rtol=1e-4)
    assert parts == pytest.approx(whole, rel=1e-4)
    kept = labels.flatten() != -100
    want = torch.nn.functional.cross_entropy(
        student.eval()(ids).flatten(0, 1)[kept], labels.flatten()[kept]
    )
    assert whole["val_loss"] == pytest.approx(want.item(), rel=1e-6)
    assert set(whole) == {"val_loss", "val_kl", "val_acceptance", "val_agreement", "val_ece"}
    assert len(measure_rows(student, [batch])["loss"]) == int(kept.sum())


def test_a_teacher_of_itself_is_fully_accepted(models):
    batch = Batch(torch.randint(31, (2, 8)), torch.randint(31, (2, 8)), None)
    found = evaluate(models[0], [batch], models[0])
    assert (
        abs(found["val_kl"]) < 1e-7
        and found["val_acceptance"] == pytest.approx(1, abs=1e-6)
        and found["val_agreement"] == 1
    )


def test_evaluation_restores_the_mode_and_refuses_nothing(models):
    models[0].train()
    batch = Batch(torch.zeros(1, 8, dtype=torch.long), torch.full((1, 8), -100), None)
    with pytest.raises(ValueError, match="no held-out position"):
        evaluate(models[0], [batch])
    assert models[0].training


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text to hold out. " * 60)
    data = DataConfig(name="text", path="text.txt", tokenizer="bytes")
    tokens = prepare(data, lambda line: None, progress=False)
    model = GPT(ModelConfig(1, 2, 16, 8), 257)
    model.save_pretrained(tmp_path / "model")
    tokens.tokenizer.save(tmp_path / "model")
    return data, tokens, model


def test_eval_on_given_text(saved):
    data, tokens, model = saved
    config = evaluation.EvalConfig(path="model", data=data, device="cpu")
    config.teacher.path = "model"
    found = evaluation.measure(config)
    want = evaluate(model, held_out(tokens.val, 8, 4, 10**9))
    assert found["val_loss"] == pytest.approx(want["val_loss"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(want["val_loss"]), rel=1e-5)
    per_byte = found["val_loss"] / math.log(2) * len(tokens.val) / tokens.val_bytes
    assert found["bits_per_byte"] == pytest.approx(per_byte) and found["val_agreement"] == 1


def test_a_run_is_evaluated_at_its_own_context_and_labels_are_counted(saved):
    data, _, model = saved

    def write(folder):
        shutil.copytree("model", folder, dirs_exist_ok=True)

    step = checkpoint.save(Path("run"), 3, write, {"val_loss": 1.0})
    Path("run/config.yaml").write_text("model: {block_size: 4}")
    rows = [{"prompt": "ab", "completion": f"answer {number}"} for number in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for given, size in (("run", 4), (str(step), 4), ("model", 8)):
        found = evaluation.measure(
            evaluation.EvalConfig(path=given, data=replace(data), device="cpu")
        )
        tokens = prepare(data, lambda line: None, progress=False)
        assert found["val_loss"] == pytest.approx(
            evaluate(model, held_out(tokens.val, size, 4, 10**9))["val_loss"], rel=1e-5
        )
    assert (
        evaluation.measure(
            evaluation.EvalConfig(path="run", data=data, block_size=8, device="cpu")
        )["tokens"]
        % 8
        == 0
    )
    rows = DataConfig(name="text", path="rows.jsonl", tokenizer="bytes")
    config = evaluation.EvalConfig(path="model", data=rows, block_size=8, device="cpu")
    tokens = prepare(rows, lambda line: None, progress=False)
    assert evaluation.measure(config)["tokens"] == sum(
        int((batch.labels >= 0).sum()) for batch in held_out(tokens.blocks("val", 8), 8, 1, 10**9)
    )


def test_eval_mistakes_are_one_line(saved):
    data, *_ = saved
    with pytest.raises(UserError, match="path=null"):
        evaluation.measure(evaluation.EvalConfig())
    with pytest.raises(UserError, match=r"path=model: no run's config.yaml there; say which text"):
        evaluation.measure(evaluation.EvalConfig(path="model"))
    for key in ("batch_size", "block_size", "tokens"):
        with pytest.raises(UserError, match=f"{key}=0: {key} must be at least 1"):
            evaluation.EvalConfig(**{key: 0})
    GPT(ModelConfig(1, 2, 16, 8), 300).save_pretrained(Path("other"))
    with pytest.raises(UserError, match="teacher.path=other: its vocabulary is 300"):
        wrong = evaluation.EvalConfig(path="model", data=replace(data))
        wrong.teacher.path = "other"
        evaluation.measure(wrong)
