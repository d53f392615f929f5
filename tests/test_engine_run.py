"""A run's record: rows a step late, the clock, what stops a run, what is saved and taken up."""

import json
import math
import re
import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conf.schema import Config
from data.tokenizer import make_tokenizer
from engine import UserError, checkpoint
from engine import run as run_module
from engine.logger import read_metrics
from engine.optim import OptimConfig, Optimizers
from engine.ranks import Ranks
from engine.run import MAX_SKIPPED_STEPS, Run, Stopped
from model import GPT, ModelConfig
from model.loss import LossConfig
from teachers.online import TeacherConfig

FINGERPRINTS = {"tokens": "a", "tokenizer": "b", "teacher": None, "init": None}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Config(
        model=ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=16),
        teacher=TeacherConfig(kind="none"),
        loss=LossConfig(name="ce"),
        optim=OptimConfig(lr=0.01),
        batch_size=8,
        max_steps=6,
        save_every=100,
        run_dir="run",
    )


def open_run(config, fingerprints=FINGERPRINTS, title="student"):
    run = Run(config, Ranks(), fingerprints, title)
    student = GPT(config.model, 257)
    tokenizer = make_tokenizer("bytes")
    run.open(student, Optimizers(student, config.optim), tokenizer)
    return run


def log(run, step, loss=2.0, grad_norm=1.0):
    run.start_step()
    values = {"loss": loss, "ce": loss, "kl": 0.0, "teacher_mass": 0.0, "grad_norm": grad_norm}
    metrics = {name: torch.tensor(value) for name, value in values.items()}
    run.log(step, metrics, lr=0.1)


def log_evaluation(run, val_loss):
    run.finish_step()
    run.log_evaluation({"val_loss": val_loss})


def logged_steps():
    return [row["step"] for row in read_metrics(Path("run"))]


def test_a_row_is_written_a_step_later_and_an_evaluation_joins_it(config):
    run = open_run(config)
    log(run, 1)
    assert logged_steps() == []
    log(run, 2)
    assert logged_steps() == [1]
    log_evaluation(run, 1.5)
    first, second = read_metrics(Path("run"))
    assert second["val_loss"] == 1.5 and "val_loss" not in first
    assert first["tokens"] == 128 and first["lr"] == 0.1 and first["tokens_per_s"] > 0


def test_evaluations_and_checkpoints_are_not_training_time(config, monkeypatch):
    now = 0.0
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: now)
    run = open_run(config)
    run.start_step()
    now = 1.0
    log(run, 1)
    run.finish_step()
    now = 11.0
    run.log_evaluation({"val_loss": 1.5})
    monkeypatch.setattr(run_module.checkpoint, "save", lambda *arguments: advance())

    def advance():
        nonlocal now
        now += 100

    run.save()
    run.start_step()
    now += 2.0
    log(run, 2)
    run.write_row()
    assert [row["seconds"] for row in read_metrics(Path("run"))] == [1.0, 3.0]
    summary = run.finish(10, 0.5)
    seconds = [summary[f"{name}_seconds"] for name in ("step", "eval", "save", "data_wait")]
    assert seconds == [3.0, 10.0, 100.0, 0.5]


def test_the_eta_is_by_the_wall_clock_and_counts_this_process_alone(config, monkeypatch):
    now = 0.0
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: now)
    run = open_run(config)
    run.first_step = 2  # taken up there
    shown = []
    monkeypatch.setattr(run.progress, "show", lambda row, eta, *others: shown.append(eta))
    run.start_step()
    now = 5.0
    log(run, 3)
    now = 10.0
    log(run, 4)
    run.write_row()
    assert shown == [30.0, 10.0]  # 3 steps of 10 s to go, then 2 of 5 s


@pytest.mark.parametrize("loss, grad_norm", [(math.inf, 1.0), (2.0, math.nan)])
def test_a_step_that_is_not_finite_stops_the_run_with_the_state_before_it(config, loss, grad_norm):
    run = open_run(config)
    log(run, 1)
    log_evaluation(run, 1.5)
    log(run, 2, loss, grad_norm)
    pattern = (
        r"step 2: loss .* stopped before the update, state saved in run; lower optim.lr=0.01,"
        " or optim.grad_clip=1.0, and give another run_dir$"
    )
    with pytest.raises(UserError, match=pattern):
        log(run, 3)
    saved = checkpoint.latest(Path("run"))
    assert saved.name == "step-00000001" and checkpoint.manifest(saved)["val_loss"] == 1.5
    assert logged_steps() == [1]


@pytest.mark.parametrize(
    "title, grad_clip, advice",
    [
        ("student", 0.0, r"; set optim.grad_clip=1 \(0 is no clipping\), or lower optim.lr=0.01,"),
        ("teacher", 1.0, "; lower teacher.lr=0.01, or optim.grad_clip=1.0$"),
        ("baseline", 1.0, "; lower optim.lr=0.01, or optim.grad_clip=1.0$"),
    ],
)
def test_the_advice_after_a_divergence_is_one_that_helps(config, title, grad_clip, advice):
    config.optim.grad_clip = grad_clip
    run = open_run(config, title=title)
    log(run, 1, math.nan)
    with pytest.raises(UserError, match=advice):
        log(run, 2)


@pytest.mark.parametrize(
    "warmup_steps, announced",
    [(6, "optim.lr=0.01, cpu"), (12, r"optim.lr=0.01 \(reaches 0.005: optim.warmup_steps=12\), c")],
)
def test_a_rate_that_is_never_reached_is_not_announced(config, warmup_steps, announced, capsys):
    config.optim.warmup_steps = warmup_steps
    open_run(config).describe(num_blocks=8)
    assert re.search(announced, capsys.readouterr().out)


def test_float16_gives_up_after_many_overflows_in_a_row(config):
    run = open_run(replace(config, dtype="float16"))
    log(run, 1, grad_norm=math.inf)
    log(run, 2)  # one overflow is no failure, and a good step ends a row of them
    for step in range(3, 4 + MAX_SKIPPED_STEPS):
        log(run, step, grad_norm=math.inf)
    with pytest.raises(UserError, match=r"loss 2, gradient norm inf: stopped"):
        log(run, 4 + MAX_SKIPPED_STEPS)


def test_what_is_saved_and_when(config):
    run = open_run(replace(config, save_every=4))
    saves = []
    for step, val_loss in enumerate([3.0, None, 3.5, None, 2.0, 2.5], start=1):
        log(run, step)
        if val_loss is not None:
            log_evaluation(run, val_loss)
        saves.append(run.should_save())
    # Improved, -, worse, at the interval, improved, at the end.
    assert saves == [True, False, False, True, True, True] and run.best_val_loss == 2.0


def test_a_continuation_takes_up_the_record_and_refuses_other_inputs(config):
    run = open_run(config)
    log(run, 1)
    log_evaluation(run, 1.5)
    with pytest.raises(Stopped):
        run.stop()
    run.close()
    run.lock.close()
    run = open_run(config)
    assert (run.step, run.val_loss, run.best_val_loss) == (1, 1.5, 1.5)
    assert run.first_step == 1
    assert run.seconds > 0
    run.lock.close()
    with pytest.raises(UserError, match="run_dir=run: the tokens of data.path=None changed"):
        open_run(config, FINGERPRINTS | {"tokens": "other"})


def test_a_model_without_a_trainers_state_is_no_checkpoint_to_resume(config):
    GPT(config.model, 257).save_pretrained(Path("bare"))
    pattern = "resume=bare: a model without its trainer's state.* model.init=bare"
    with pytest.raises(UserError, match=pattern):
        open_run(replace(config, resume="bare"))


def test_a_finished_run_logs_no_more(config, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(run_module, "RunLog", lambda *arguments: given.append(arguments[-1]))
    config = replace(config, max_steps=1)
    run = open_run(config)
    run.step = 1
    run.save()  # a signal came in the last evaluation, which is still to do
    run.lock.close()
    run = open_run(config)
    run.val_loss = 1.5
    run.save()
    run.lock.close()
    open_run(config)
    assert given == [False, False, True]
    line = "student: finished at step 1; a larger max_steps goes on"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_going_on_from_another_run_takes_its_state_and_not_its_settings(config):
    """resume=PATH in a new directory: other inputs, shapes and optimizers are refused by name."""
    run = open_run(config)
    log(run, 1)
    run.save()
    saved = "run/checkpoints/step-00000001"
    branch = replace(config, run_dir="branch", resume=saved)

    lower = OptimConfig(lr=0.001, weight_decay=0.3)
    run = open_run(replace(branch, optim=lower))
    assert run.step == 1
    decays = [group["weight_decay"] for group in run.optimizer.param_groups()]
    assert decays == [0.3, 0.0]

    other_heads = replace(config.model, n_head=4)
    for changes, message in (
        ({"model": other_heads}, "not one of model.n_head=4 .*; set model.n_head=2 "),
        ({"optim": OptimConfig("muon", lr=0.01)}, "resume: .* optim=adamw; set that"),
    ):
        with pytest.raises(UserError, match=message):
            open_run(replace(branch, **changes, run_dir=f"branch {len(message)}"))
    pattern = (
        f"resume={saved}: the tokens of .*, or start from its weights by model.init={saved}, w"
    )
    with pytest.raises(UserError, match=pattern):
        open_run(replace(branch, run_dir="third"), FINGERPRINTS | {"tokens": "other"})


# Of a checkpoint: the weights do not fit, the optimizer's state does not.
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_a_full_disk_says_so_in_its_own_words(config, share):
    run = open_run(config)
    run.save()
    size = sum(path.stat().st_size for path in checkpoint.latest(Path("run")).iterdir())
    run.step = 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), hard))
    pattern = r"cannot save step 1 \(.*File too large.*\); earlier checkpoints are kept"
    try:
        with pytest.raises(UserError, match=pattern):
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.latest(Path("run")).name == "step-00000000"


@pytest.mark.parametrize("loss, passes", [("ce", 0), ("topk_kl", 1)])
def test_the_summary_counts_the_teachers_passes_on_their_own_line(config, loss, passes):
    config = replace(config, loss=LossConfig(name=loss), teacher=TeacherConfig())
    run = open_run(config)
    log(run, 1)
    run.write_row()
    teacher = SimpleNamespace(path="teacher", model=GPT(config.model, 300))
    summary = run.finish(10, 0.5, teacher, {"val_loss": 2.0})
    assert summary == json.loads(Path("run/summary.json").read_text())
    assert summary["tokens"] == 128 and summary["text_tokens"] == 160
    assert summary["teacher"]["parameters"] == teacher.model.num_params()
    assert summary["flops"] == {
        "student": 128 * run.student.flops_per_token(16),
        "teacher": passes * 128 * teacher.model.flops_per_token(16) / 3,
    }
