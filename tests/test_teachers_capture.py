"""Capturing: the same bytes whatever killed it and however many ranks, and what is refused."""

import os
import random
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data import prepare
from engine import UserError
from engine.logger import read_metrics
from engine.ranks import Ranks
from model import GPT
from teachers import capture
from teachers.access import AccessConfig
from teachers.cache import Cache
from teachers.cached import CachedTeacher, recorded_blocks
from teachers.capture import CaptureConfig, TeacherPath
from teachers.online import query_teacher
from tests.helpers import record, save_teacher, small_corpus

ROOT = Path(__file__).parent.parent
T = 16
TOPK = AccessConfig("topk", k=8, n=5)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_corpus(tmp_path)


@pytest.fixture
def tokens(data):
    return prepare(data, say=lambda line: None, progress=False)


@pytest.fixture
def teacher(tokens):
    return save_teacher("teacher")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("teachers.cache.SHARD_BYTES", 2**14)


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("kind", ["topk", "stratified"])
def test_a_capture_killed_anywhere_and_run_again_ends_in_the_same_bytes(
    kind, tokens, data, teacher, small_shards, monkeypatch
):
    access = replace(TOPK, kind=kind)
    record(tokens, data, access, out="whole")
    assert len(contents("whole")) > 5
    generator = random.Random(0)
    killed = 0
    while True:
        answers = iter(range(generator.randrange(1, 40)))

        def dying(*inputs, answers=answers, **options):
            if next(answers, None) is None:
                raise KeyboardInterrupt
            return query_teacher(*inputs, **options)

        monkeypatch.setattr(capture, "query_teacher", dying)
        try:
            record(tokens, data, access, out="broken")
            break
        except KeyboardInterrupt:
            killed += 1
    assert killed > 3 and contents("broken") == contents("whole")


def test_ranks_share_the_shards(tokens, data, teacher, small_shards, monkeypatch):
    record(tokens, data, TOPK, out="whole")
    for rank in (1, 0):  # rank 0, which comes last here, writes the manifest
        ranks = Ranks(rank=rank, world=2)
        monkeypatch.setattr(ranks, "share", lambda value: value)
        record(tokens, data, TOPK, ranks, out="shared")
        assert (len(contents("shared")) == len(contents("whole"))) == (rank == 0)
    assert contents("shared") == contents("whole")


def test_held_out_draws_are_not_the_training_texts(tokens, data, teacher):
    """Even where the text is the same."""
    same = replace(tokens, val=tokens.train)
    access = AccessConfig("sampled", n=5)
    record(same, data, access)
    cached = CachedTeacher("cache", same, T, access, 1.0, 257)
    blocks = same.blocks("val", T)
    batch = blocks.read(recorded_blocks("val", len(blocks), cached.spec)[:4])
    draws = {}
    for split, first_position in (("train", 0), ("val", 2**40)):
        draws[split] = cached.read(split, batch).draws.long()
        output = query_teacher(teacher, batch, access, (1.0,), first_position=first_position)
        assert torch.equal(draws[split], output.draws.long())
    assert not torch.equal(draws["train"], draws["val"])


def test_what_cannot_be_recorded_is_one_line(tokens, data, teacher):
    sampled = AccessConfig("sampled")
    cases = [
        (lambda: CaptureConfig(temperatures=[20.0]), "temperatures=20.0: .* at most 10"),
        (lambda: CaptureConfig(temperatures=[2.0, 0.05]), "temperatures=0.05: .* at least 0.1"),
        (
            lambda: CaptureConfig(access=sampled, temperatures=[2.0]),
            r"temperatures=\[2.0\]: access=sampled gives final",
        ),
        (lambda: capture.run(CaptureConfig(out="cache")), "teacher.path=null: .*needs"),
        (
            lambda: capture.run(CaptureConfig(teacher=TeacherPath("teacher"))),
            "out=null: .*needs out=FOLDER",
        ),
        (
            lambda: record(tokens, data, TOPK, out="texts"),
            "out=texts: a folder of other files, 0.txt among them; give a new or an empty one",
        ),
    ]
    for capture_it, message in cases:
        with pytest.raises(UserError, match=f"^{message}"):
            capture_it()
    assert len(contents("texts")) == 3
    CaptureConfig(access=sampled, temperatures=[1.0])
    CaptureConfig(temperatures=[0.1, 10.0])


def test_a_large_vocabulary_is_not_recorded_whole(tokens, data, teacher, monkeypatch):
    monkeypatch.setattr(capture, "FULL_VOCABULARY_LIMIT", 256)
    with pytest.raises(UserError, match="^access=full: .*257 .*set access=topk access.k=64"):
        record(tokens, data, AccessConfig("full"))
    record(tokens, data, TOPK)


@pytest.mark.slow
def test_the_commands_themselves(tokens, data, teacher):
    """Two ranks record under torchrun, the tool looks at it, students learn from it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def call(command: str) -> str:
        words = [sys.executable, "-m", *shlex.split(command)]
        result = subprocess.run(words, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr
        return result.stdout

    torchrun = "torch.distributed.run --standalone --nproc_per_node=2"
    corpus = "data=text data.path=texts data.tokenizer=bytes data.cache_dir=tokens device=cpu"
    sizes = "model.n_layer=1 model.n_embd=16 max_steps=3 batch_size=4 device=cpu"
    recorded = (
        f"teacher.path=teacher access=unbiased access.k=5 block_size=16 eval_tokens=256 {corpus}"
    )
    call(f"{torchrun} -m teachers.capture {recorded} out=two")
    said = call(f"teachers.capture {recorded} out=one")
    assert contents("two") == contents("one")
    assert "unbiased k=5" in call("teachers.cache info one")
    assert "whole" in call("teachers.cache verify one")

    # The command that it names says all that a student of the cache needs; ranks read their part.
    student = re.search("Next: python train.py (.*)", said)[1]
    call(f"train {student} {sizes} run_dir=alone")
    call(f"{torchrun} {ROOT}/train.py {student} {sizes} micro_batch_size=2 run_dir=both")
    assert [row["step"] for row in read_metrics(Path("alone"))] == [1, 2, 3]
    weights = [
        GPT.from_pretrained(f"{run}/checkpoints/step-00000003").state_dict()
        for run in ("alone", "both")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    # What is not given is the teacher's own text and context; the newest teacher is found.
    Path("runs").mkdir(exist_ok=True)
    Path("alone").rename("runs/teacher-x")
    call("teachers.capture access=greedy out=own device=cpu")
    assert Cache("own").spec.block_size == 16
