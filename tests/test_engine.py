"""Checkpoint folders, run directories, schedules, logs."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import eval as evaluation
import sample
import train
from conf.schema import Config
from engine import UserError, check_choice, check_range, checkpoint
from engine import ranks as processes
from engine.logger import RunLog, WandbConfig, read_metrics
from engine.optim import OptimConfig, learning_rate, make_optimizers
from engine.progress import ProgressLine, format_duration, print_closing
from engine.ranks import Ranks, peak_flops, pick_device, request_stop
from engine.run_dir import claim, fixed, identity
from model import GPT, ModelConfig
from teachers import capture

ROOT = Path(__file__).parent.parent


def make(run_dir, step, loss=None, text="weights"):
    def write(folder):
        (folder / "model.safetensors").write_text(f"{text} {step}")
        (folder / "config.json").write_text("{}")

    return checkpoint.save(run_dir, step, write, {"val_loss": loss})


def test_a_checkpoint_verifies_and_every_kind_of_damage_shows(tmp_path):
    folder = make(tmp_path, 5, 1.0)
    assert checkpoint.fault(folder) is None
    file = folder / "model.safetensors"
    file.write_text("weightz 5")
    assert "does not match" in checkpoint.fault(folder)
    file.unlink()
    assert "is missing" in checkpoint.fault(folder)
    (folder / "manifest.json").write_text('{"step": 5, "sha')
    assert "manifest" in checkpoint.fault(folder)


def test_latest_falls_back_with_a_named_warning(tmp_path):
    make(tmp_path, 5)
    newer = make(tmp_path, 10)
    (newer / "model.safetensors").write_text("x")
    lines = []
    assert checkpoint.latest(tmp_path, lines.append).name == "step-00000005"
    assert len(lines) == 1 and "step-00000010" in lines[0]


def test_a_corrupt_checkpoint_by_name_is_an_error_that_names_the_newest_good_one(tmp_path):
    make(tmp_path, 5)
    newer = make(tmp_path, 10)
    (newer / "model.safetensors").write_text("x")
    with pytest.raises(UserError, match=r"corrupt.*newest good one is .*step-00000005"):
        checkpoint.resolve(newer, key="teacher.path")


def test_resolve_takes_the_best_of_a_run(tmp_path):
    make(tmp_path, 5, 2.0)
    make(tmp_path, 10, 1.5)
    make(tmp_path, 15, 1.9)
    make(tmp_path, 20, math.nan)
    assert checkpoint.resolve(tmp_path).name == "step-00000010"
    with pytest.raises(UserError, match="path=.*no such folder"):
        checkpoint.resolve(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a model"):
        checkpoint.resolve(tmp_path / "empty")


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.7)):
        make(tmp_path, step, loss)
    checkpoint.prune(tmp_path, keep=2)
    assert [folder.name[-1] for folder in checkpoint.folders(tmp_path)] == ["2", "4", "5"]


@pytest.mark.parametrize("broken", ['{"step": 3, "val', "[]", "null", ""])
def test_an_unreadable_manifest_stops_neither_saving_nor_loading(tmp_path, broken):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 0.5), (4, 2.5), (5, 2.7)):
        make(tmp_path, step, loss)
    (tmp_path / "checkpoints/step-00000003/manifest.json").write_text(broken)
    checkpoint.prune(tmp_path, keep=2)
    assert [folder.name[-1] for folder in checkpoint.folders(tmp_path)] == ["2", "3", "4", "5"]
    assert checkpoint.resolve(tmp_path).name == "step-00000002"
    with pytest.raises(
        UserError, match="step-00000003 is corrupt, manifest.json is missing or unreadable"
    ):
        checkpoint.resolve(tmp_path / "checkpoints/step-00000003")


@pytest.mark.slow
def test_sigkill_while_saving_leaves_only_whole_checkpoints(tmp_path):
    script = f"""
import itertools, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from engine import checkpoint
def write(folder):
    for name in ("model.safetensors", "config.json", "trainer.pt"):
        (folder / name).write_bytes(bytes(3_000_000))
print("go", flush=True)
for step in itertools.count():
    checkpoint.save(Path({str(tmp_path)!r}), step % 7, write, {{"val_loss": None}})
"""
    for trial in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(0.15 + 0.037 * trial)
        process.kill()
        process.wait()
        assert all(checkpoint.fault(folder) is None for folder in checkpoint.folders(tmp_path))
    assert checkpoint.folders(tmp_path)


def test_failing_writer_leaves_no_checkpoint(tmp_path):
    def write(folder):
        (folder / "model.safetensors").write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match=r"cannot save step 3 \(disk full\)"):
        checkpoint.save(tmp_path, 3, write, {})
    assert checkpoint.folders(tmp_path) == [] and checkpoint.latest(tmp_path) is None
    assert not list((tmp_path / "checkpoints").iterdir())  # the half gives its room back


def like_torch():
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904


FULL = {
    "No space left on device": like_torch,
    "unexpected pos": lambda: (_ for _ in ()).throw(
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")
    ),
    "I/O error: disk quota": lambda: (_ for _ in ()).throw(
        SafetensorError("Error while serializing: I/O error: disk quota")
    ),
}


@pytest.mark.parametrize("words", FULL)
def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay(tmp_path, words):
    make(tmp_path, 1)
    with pytest.raises(
        UserError, match=f"cannot save step 2 .*{words}.*earlier checkpoints are kept; make room"
    ) as caught:
        checkpoint.save(tmp_path, 2, lambda folder: FULL[words](), {})
    assert str(caught.value).startswith(f"run_dir={tmp_path}: ") and "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ and [
        folder.name for folder in checkpoint.folders(tmp_path)
    ] == ["step-00000001"]
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.save(
            tmp_path, 2, lambda folder: (_ for _ in ()).throw(RuntimeError("a bug")), {}
        )


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="no /dev/full, Linux's full disk, on this system"
)
def test_a_disk_too_full_for_metrics_is_one_line(tmp_path):
    log = RunLog(tmp_path, WandbConfig(), {}, 0)
    log.row({"step": 1})
    log.stream.close()
    log.stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115 (closed by the log)
    for act in (lambda: log.row({"step": 2}), log.close):  # closing flushes what row could not
        with pytest.raises(
            UserError, match="cannot write metrics.jsonl .No space left on device.; make room"
        ) as caught:
            act()
        assert (
            str(caught.value).startswith(f"run_dir={tmp_path}: ")
            and caught.value.__suppress_context__
        )
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_the_progress_line_says_that_a_caches_kl_is_a_bound(capsys):
    row = {
        "step": 1,
        "loss": 2.0,
        "val_loss": 3.0,
        "val_kl": 0.25,
        "teacher_mass": 0.0,
        "tokens_per_s": 5.0,
    }
    for bound, words in ((False, "kl to teacher 0.250"), (True, "kl to teacher >= 0.250")):
        ProgressLine("student", 9, True, bound).show(row, 1.0, None, 0)
        assert words in capsys.readouterr().out


def test_the_last_lines_prompt_where_the_text_is_code(capsys):
    student = {"parameters": 1, "text_tokens": 1, "best_val_loss": 1.0, "teacher": None}
    for data, line in (
        ("stdlib", "Next: python sample.py path=r prompt='def '"),
        ("text", "Next: python sample.py path=r"),
    ):
        print_closing("r", student, None, "", data)
        assert line in capsys.readouterr().out.splitlines()


CONFIG = {
    "optim": {"lr": 0.1},
    "max_steps": 10,
    "resume": "auto",
    "run_dir": "x",
    "wandb": {"mode": "disabled"},
}


def test_run_dir_of_another_config_is_refused_and_free_keys_are_not(tmp_path):
    claim(tmp_path, CONFIG).close()
    claim(tmp_path, CONFIG | {"optim": {"lr": 0.2}}).close()  # nothing saved yet: nothing to mix up
    make(tmp_path, 1)
    claim(
        tmp_path, CONFIG | {"optim": {"lr": 0.2}, "max_steps": 20, "wandb": {"mode": "offline"}}
    ).close()
    with pytest.raises(UserError, match=r"optim.lr=0.2, this one has optim.lr=0.1"):
        claim(tmp_path, CONFIG)
    with pytest.raises(UserError, match="resume=never"):
        claim(tmp_path, CONFIG | {"optim": {"lr": 0.2}, "resume": "never"})
    with pytest.raises(
        UserError, match="resume=elsewhere/step-1: run_dir=.* holds checkpoints of its own"
    ):
        claim(tmp_path, CONFIG | {"optim": {"lr": 0.2}, "resume": "elsewhere/step-1"})
    claim(
        tmp_path,
        CONFIG | {"optim": {"lr": 0.2}, "resume": str(tmp_path / "checkpoints/step-00000001")},
    ).close()


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    handle = claim(tmp_path, CONFIG)
    with pytest.raises(UserError, match="another process"):
        claim(tmp_path, CONFIG)
    handle.close()
    claim(tmp_path, CONFIG).close()


def test_unwritable_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir=.*cannot write there.*another run_dir"):
        claim(tmp_path / "file" / "run", CONFIG)


def test_identity_follows_what_is_learned_and_nothing_else():
    assert identity(CONFIG, "a") == identity(CONFIG | {"run_dir": "y"}, "a")
    assert identity(CONFIG, "a") != identity(CONFIG, "b")
    assert identity(CONFIG, "a") != identity(CONFIG | {"max_steps": 11}, "a")
    assert fixed(CONFIG) == {"optim.lr": 0.1}


def test_schedules_at_their_corners():
    cosine = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    assert learning_rate(cosine, 0, 100) == pytest.approx(0.1)
    assert learning_rate(cosine, 9, 100) == pytest.approx(1.0)
    assert learning_rate(cosine, 10, 100) == pytest.approx(1.0)
    assert learning_rate(cosine, 99, 100) == pytest.approx(0.1)
    middle = learning_rate(cosine, 10 + 44, 99 + 1 - 1)  # half way from 10 to 98
    assert middle == pytest.approx(0.55)
    wsd = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2)
    assert learning_rate(wsd, 79, 100) == pytest.approx(1.0)
    assert learning_rate(wsd, 89, 100) == pytest.approx(0.5)
    assert learning_rate(wsd, 99, 100) == pytest.approx(0.0)
    assert learning_rate(OptimConfig(lr=1.0, schedule="constant"), 99, 100) == 1.0


def test_decay_reaches_matrices_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, free = make_optimizers(model, OptimConfig(lr=1e-3, weight_decay=0.3))[0].param_groups
    assert [param.dim() for param in decayed["params"]] == [2] and decayed["weight_decay"] == 0.3
    assert [param.dim() for param in free["params"]] == [1, 1, 1] and free["weight_decay"] == 0.0


def test_metrics_survive_a_kill_and_drop_the_steps_that_are_taken_again(tmp_path):
    log = RunLog(tmp_path, WandbConfig(), {}, 0)
    for step in (1, 2, 3):
        log.row({"step": step, "loss": 1.0})
    assert len(read_metrics(tmp_path)) == 3  # flushed before close
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    log = RunLog(tmp_path, WandbConfig(), {}, 2)
    log.row({"step": 3, "loss": 2.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
    ]


def test_a_row_cut_short_by_a_kill_does_not_swallow_the_rows_after_it(tmp_path):
    log = RunLog(tmp_path, WandbConfig(), {}, 0)
    log.row({"step": 1, "loss": 1.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 2, "lo')
    log = RunLog(
        tmp_path, WandbConfig(), {}, 1
    )  # every whole row is kept: the last, half one must go all the same
    log.row({"step": 2, "loss": 2.0}), log.row({"step": 3, "loss": 3.0})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_wandb_that_does_not_start_is_a_warning(tmp_path, monkeypatch, capsys):
    import wandb

    def fail(mode, settings, **options):
        assert settings.init_timeout == settings.finish_timeout == 20
        raise TimeoutError(f"no {mode}")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "init", fail)
    log = RunLog(tmp_path, WandbConfig(mode="online"), {}, 0)
    log.row({"step": 1, "loss": 1.0})
    log.close()
    out = capsys.readouterr().out
    assert "wandb online did not start (no online)" in out and "offline did not start" in out
    assert len(read_metrics(tmp_path)) == 1


def test_wandb_that_breaks_midway_is_a_warning(tmp_path, capsys):
    class Broken:
        def log(self, row, step):
            raise RuntimeError("boom\nmore")

    log = RunLog(tmp_path, WandbConfig(), {}, 0)
    log.wandb = Broken()
    log.row({"step": 1, "loss": 1.0})
    log.row({"step": 2, "loss": 1.0})
    log.close()
    assert "wandb stopped (boom)" in capsys.readouterr().out and len(read_metrics(tmp_path)) == 2


def test_first_signal_asks_second_ctrl_c_leaves():
    ranks = Ranks()
    with pytest.raises(KeyboardInterrupt):  # nothing to save yet
        request_stop(ranks, signal.SIGINT)
    ranks.training = True
    request_stop(ranks, signal.SIGTERM)
    assert ranks.stop == "SIGTERM"
    with pytest.raises(KeyboardInterrupt):
        request_stop(ranks, signal.SIGINT)


def test_device_that_is_not_there_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError, match="device=cuda"):
        pick_device("cuda", 0)
    assert pick_device("cpu", 0).type == "cpu"


class PrecisionSet(Exception):
    """An entry point chose how fp32 products are computed; the test needs no more of it."""


@pytest.fixture
def pretended_cuda(monkeypatch):
    """The device is CUDA as far as engine/ranks.py can tell; setting the precision ends the program."""

    def stop(precision):
        raise PrecisionSet(precision)

    monkeypatch.setattr(
        processes, "pick_device", lambda name, local_rank: torch.device("cuda", local_rank)
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", stop)


ENTRY_POINTS = {
    "train": lambda path: train.run(Config()),
    "capture": lambda path: capture.run(
        capture.CaptureConfig(capture.TeacherPath(path), out="cache")
    ),
    "eval": lambda path: evaluation.run(evaluation.EvalConfig(path)),
    "sample": lambda path: sample.run(sample.SampleConfig(path)),
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_entry_point_chooses_tf32_on_cuda(name, tmp_path, pretended_cuda):
    GPT(ModelConfig(1, 2, 16, 32), 257).save_pretrained(tmp_path)
    with pytest.raises(PrecisionSet, match="^high$"):
        ENTRY_POINTS[name](str(tmp_path))


def test_importing_the_entry_points_leaves_the_precision_alone():
    words = "import torch, train, eval, sample, teachers.capture; print(torch.get_float32_matmul_precision())"
    done = subprocess.run(
        [sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "highest\n"


def test_choices_and_ranges_say_the_rule():
    with pytest.raises(UserError, match=r"loss.tail=gost: .*did you mean ghost\?"):
        check_choice("loss.tail", "gost", ("ghost", "truncate"))
    with pytest.raises(UserError, match="optim.lr=-1: optim.lr must be above 0"):
        check_range("optim.lr", -1, above=0)
    with pytest.raises(UserError, match="at most 1"):
        check_range("x", math.nan, high=1)


def test_mfu_knows_the_card_or_says_nothing(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in (
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA RTX A1000", None),
        ("Unheard Of", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak


@pytest.mark.slow
def test_jobs_of_one_process_are_separate_wandb_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    for job in ("0", "1"):
        (tmp_path / job).mkdir()
        log = RunLog(
            tmp_path / job, WandbConfig(mode="offline", group="g", tags=["t"]), {"a": 1}, 0
        )
        assert log.wandb is not None and log.wandb.name == job
        log.row({"step": 1, "loss": 1.0})
        log.close()
        assert len(list((tmp_path / job / "wandb").glob("offline-run-*"))) == 1


def test_clock():
    assert format_duration(59.6) == "0:59" and format_duration(3725) == "1:02:05"


def test_manifest_is_plain_json(tmp_path):
    folder = make(tmp_path, 2, 1.25)
    content = json.loads((folder / "manifest.json").read_text())
    assert (
        content["step"] == 2
        and content["val_loss"] == 1.25
        and set(content["sha256"]) == {"model.safetensors", "config.json"}
    )
    assert not [name for name in os.listdir(folder.parent) if name.startswith(".")]
