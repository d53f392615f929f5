"""The runs that a run needs first: what they learn from, and that they are found again."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from conf.schema import Config
from data import DataConfig
from engine.prerequisites import train_baseline, train_missing_teacher
from engine.ranks import Ranks
from model import ModelConfig
from model.loss import LossConfig
from teachers.online import TeacherConfig, TeacherModelConfig

TOKENS = SimpleNamespace(
    fingerprint="of the tokens",
    tokenizer=SimpleNamespace(fingerprint="of the tokenizer"),
)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = TeacherModelConfig(n_layer=3, n_head=4, n_embd=32)
    config = Config(
        data=DataConfig(fraction=0.01),
        model=ModelConfig(n_layer=1, n_inner=99, norm="rmsnorm"),
        teacher=TeacherConfig(model=size, max_steps=7, lr=0.5),
        seed=5,
        run_dir="student",
        experiment="taught",
    )
    config.resolve([])
    return config


def first_run(prepare, config):
    """The configuration of the run that `prepare` starts."""
    calls = []

    def train_model(config, ranks, tokens, title):
        calls.append(config)
        return {"title": title}

    result = prepare(config, Ranks(), TOKENS, train_model)
    (started,) = calls
    assert started.loss.name == "ce"
    assert started.teacher.kind == "none"
    assert started.experiment is None  # of which it is no arm
    return started, result


def test_a_teacher_reads_all_the_text_and_is_the_students_kind_but_for_its_size(config):
    teacher, path = first_run(train_missing_teacher, config)
    assert teacher.data.fraction == 1.0
    assert (teacher.seed, teacher.max_steps, teacher.optim.lr) == (0, 7, 0.5)
    shape = replace(config.model, n_layer=3, n_head=4, n_embd=32, n_inner=None)
    assert teacher.model == shape
    assert path == teacher.run_dir


def test_a_baseline_is_the_student_on_its_own_text(config):
    baseline, summary = first_run(train_baseline, config)
    assert baseline.data == config.data
    assert baseline.model == config.model
    assert (baseline.seed, baseline.optim) == (5, config.optim)
    assert summary == {"title": "baseline"}


@pytest.mark.parametrize("prepare", [train_missing_teacher, train_baseline])
def test_it_is_found_again_by_what_it_learns_from(config, prepare, capsys):
    first, _ = first_run(prepare, config)
    other_loss = replace(config, loss=LossConfig(temperature=2.0), run_dir="other")
    other_loss.data = replace(config.data, cache_dir="elsewhere", tokenizer="./of/the/same/bytes")
    again, _ = first_run(prepare, other_loss)
    assert first.run_dir == again.run_dir

    other_model = replace(config, model=replace(config.model, norm="layernorm"))
    other, _ = first_run(prepare, other_model)
    assert other.run_dir != first.run_dir

    capsys.readouterr()
    Path(first.run_dir, "checkpoints/step-00000001").mkdir(parents=True)
    first_run(prepare, config)
    reused = "reusing" in capsys.readouterr().out
    assert reused == (prepare is train_missing_teacher)
