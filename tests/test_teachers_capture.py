"""Capturing: the same bytes whatever killed it and however many ranks, and what is refused."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data import DataConfig
from engine import UserError
from engine.logger import read_metrics
from model import GPT
from teachers import capture
from teachers.access import AccessConfig
from teachers.cache import Cache
from teachers.cached import recorded_blocks
from teachers.capture import CaptureConfig
from teachers.online import query_teacher
from tests.command_line import error_line
from tests.recording import TOPK, Recording, T, contents, open_cache, record

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recording(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("teachers.cache.SHARD_BYTES", 2**14)
    return Recording()


def test_a_capture_killed_anywhere_and_run_again_ends_in_the_same_bytes(recording, monkeypatch):
    access = replace(TOPK, kind="stratified")
    recording.record(access, out="whole")
    assert len(contents("whole")) > 5
    answers_left = 0

    def dying(*inputs):
        nonlocal answers_left
        answers_left -= 1
        if answers_left < 0:
            raise KeyboardInterrupt
        return query_teacher(*inputs)

    monkeypatch.setattr(capture, "query_teacher", dying)
    kills = 0
    while not Path("broken/manifest.json").is_file():
        answers_left = 20 + 7 * kills % 20
        try:
            recording.record(access, out="broken")
        except KeyboardInterrupt:
            kills += 1
    assert kills > 3
    assert contents("broken") == contents("whole")


def test_the_newest_teacher_is_one_of_the_text_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate(("a.txt", "b.txt")):
        run = Path(f"runs/teacher-{number}")
        model = run / "checkpoints/step-00000002/config.json"
        model.parent.mkdir(parents=True)
        model.touch()
        os.utime(model, (number, number))
        (run / "config.yaml").write_text(f"data: {{name: text, path: {path}}}")
    assert capture.newest_teacher(None) == "runs/teacher-1"
    assert capture.newest_teacher(DataConfig("text", "a.txt")) == "runs/teacher-0"
    with pytest.raises(UserError, match="data.path=c.txt is here"):
        capture.newest_teacher(DataConfig("text", "c.txt"))


def test_held_out_draws_are_not_the_training_texts(recording):
    """Even where the text is the same."""
    tokens = replace(recording.tokens, val=recording.tokens.train)
    access = AccessConfig("sampled", n=5)
    record(tokens, recording.data, access)
    cached = open_cache(tokens, access)
    blocks = tokens.blocks("val", T)
    batch = blocks.read(recorded_blocks("val", len(blocks), cached.spec)[:4])
    draws = {}
    for split, first_position in (("train", 0), ("val", 2**40)):
        draws[split] = cached.read(split, batch).draws
        online = query_teacher(recording.teacher, batch, access, (1.0,), False, first_position)
        assert torch.equal(draws[split], online.draws)
    assert not torch.equal(draws["train"], draws["val"])


MISTAKES = {
    "teacher.path=teacher": "out is not set; write out=VALUE",
    "out=cache": "teacher.path=null: no runs/teacher-[*] is here; give a run",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words, recording, monkeypatch, capsys):
    script = ("capture", capture.run, CaptureConfig)
    line = error_line(monkeypatch, capsys, *script, [words])
    assert re.search(f"^error: {MISTAKES[words]}", line)


@pytest.mark.slow
def test_the_commands_themselves(recording):
    """Two ranks record under torchrun, the tool looks at it, students learn from it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def call(command: str) -> str:
        words = [sys.executable, "-m", *shlex.split(command)]
        result = subprocess.run(words, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr
        return result.stdout

    torchrun = "torch.distributed.run --standalone --nproc_per_node=2"
    corpus = "data=text data.path=texts data.tokenizer=bytes data.cache_dir=tokens"
    teacher = "teacher.path=teacher access=unbiased access.k=5 block_size=16 eval_tokens=256"
    command = f"teachers.capture {teacher} {corpus} device=cpu"
    call(f"{torchrun} -m {command} out=two")
    output = call(f"{command} out=one")
    assert contents("two") == contents("one")
    assert "unbiased" in call("teachers.cache info one")

    # The command that it names says all that a student needs; each rank reads its own sequences.
    student = re.search("Next: python train.py (.*)", output)[1]
    student += " model.n_layer=1 model.n_embd=16 max_steps=3 batch_size=4 micro_batch_size=2"
    call(f"train {student} device=cpu run_dir=alone")
    call(f"{torchrun} {ROOT}/train.py {student} device=cpu run_dir=both")
    assert len(read_metrics(Path("alone"))) == 3
    alone = GPT.from_pretrained("alone").state_dict()
    both = GPT.from_pretrained("both").state_dict()
    assert all(torch.equal(alone[name], both[name]) for name in alone)

    # What is not given is the newest teacher, its own text and its context.
    Path("runs").mkdir()
    Path("alone").rename("runs/teacher-x")
    call("teachers.capture access=greedy out=own device=cpu")
    assert Cache("own").spec.block_size == 16
