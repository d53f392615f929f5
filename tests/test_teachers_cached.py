"""A recorded teacher gives the targets of one beside the student, or is refused."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conf.schema import Config
from data.batches import training_subset
from engine import UserError
from engine.logger import read_metrics
from engine.optim import OptimConfig
from model.loss import LossConfig, SparseTargets
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.cached import CachedTeacher
from teachers.online import OnlineTeacher, TeacherConfig
from tests.helpers import assert_close
from tests.recording import SHAPE, TOPK, Recording, T, read_tokens


@pytest.fixture
def recording(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Recording()


def open_cache(tokens, **changes) -> CachedTeacher:
    arguments = {
        "path": "cache",
        "block_size": T,
        "access": TOPK,
        "temperature": 1.0,
        "vocab_size": 257,
    }
    return CachedTeacher(tokens=tokens, **arguments | changes)


def targets_of(recording, batch, access, temperature) -> tuple[SparseTargets, SparseTargets]:
    """[N,...] from the cache, by way of the batch as in training, and from the teacher itself."""
    cached = open_cache(recording.tokens, access=access, temperature=temperature)
    batch = batch._replace(targets=cached.read_targets(batch))
    online = OnlineTeacher(recording.teacher, access, temperature, nullcontext)
    return cached.targets(batch), online.targets(batch)


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_a_cache_gives_the_targets_of_the_teacher_itself(kind, recording):
    """Draws, ids and final weights to the bit; log-probabilities but for their quantisation."""
    access = replace(TOPK, kind=kind)
    temperature = 1.0 if ACCESS_KINDS[kind].final_weights else 2.0
    recording.record(access, temperatures=[temperature])
    batch = recording.batch([5, 0, 300])
    cached, online = targets_of(recording, batch, access, temperature)
    if kind == "full":  # in the vocabulary's order
        assert cached.ids is None
        z = online.hidden @ online.head.T
        log_norm = (z / 2).logsumexp(1) - z.logsumexp(1) / 2
        online = SparseTargets(None, z.log_softmax(1), log_norm)
    else:
        assert torch.equal(cached.ids.long(), online.ids.long())
    if kind in ("greedy", "text", "sampled"):
        assert torch.equal(cached.log_probs, online.log_probs)
    assert_close(cached.log_probs.exp(), online.log_probs.exp(), rtol=0, atol=0.02)
    if temperature == 2.0:
        assert_close(cached.log_norm, online.log_norm, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["topk", "residual_to_label"])
def test_everything_is_in_a_full_cache(kind, recording):
    recording.record(AccessConfig("full"), temperatures=[2.0])
    access = replace(TOPK, kind=kind)
    temperature = 2.0 if kind == "topk" else 1.0
    batch = recording.batch([0, 1])
    cached, online = targets_of(recording, batch, access, temperature)
    same = cached.ids == online.ids
    assert same.float().mean() > 0.98  # float16 makes ties
    assert_close(cached.log_probs[:, :8], online.log_probs[:, :8], rtol=0, atol=0.01)
    if kind == "topk":
        assert_close(cached.log_norm, online.log_norm, rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", ["topk", "full"])
def test_val_kl_is_measured_on_all_that_is_recorded(kind, recording):
    """The likeliest first, whether the student sees one entry or eight."""
    recording.record(replace(TOPK, kind=kind))
    batch = recording.batch([0], "val")
    with torch.no_grad():
        log_probs = recording.teacher(batch.ids).log_softmax(-1)  # [1,T,V]
    for access in (replace(TOPK, kind=kind), replace(TOPK, k=2), AccessConfig("greedy")):
        shown = open_cache(recording.tokens, access=access).teacher_topk(batch)
        assert shown.ids.shape == (1, T, 257 if kind == "full" else 8)
        assert torch.equal(shown.ids[..., 0], log_probs.argmax(-1))
        assert (shown.ids.sort().values.diff() > 0).all()  # each id once
        expected = log_probs.gather(2, shown.ids)
        assert (shown.log_probs - expected).abs().max() < 0.1


def test_blocks_that_are_not_recorded_are_refused(recording):
    recording.data.fraction = 0.5
    recording.record(eval_tokens=10 * T)
    recording.record(AccessConfig("text"), eval_tokens=10 * T, out="text")
    cached = open_cache(recording.tokens)
    num_blocks = len(recording.tokens.blocks("train", T))
    for fraction in (0.5, 0.2):
        cached.check_share(training_subset(num_blocks, fraction))
    message = r"^data.fraction: the cache holds \d+ of \d+ blocks; set data.fraction=0.5"
    with pytest.raises(UserError, match=message):
        cached.check_share(np.arange(num_blocks))

    for eval_tokens in (10 * T, 10 * T + 1, 5 * T, T):
        cached.check_held_out(eval_tokens)
    message = r"^eval_tokens=240: the cache holds \d of the 15 held-out .* set eval_tokens=160, or"
    with pytest.raises(UserError, match=message):
        cached.check_held_out(15 * T)
    text = open_cache(recording.tokens, path="text", access=AccessConfig("text"))
    text.check_held_out(15 * T)  # no val_kl is measured
    assert text.teacher_topk(recording.batch([0], "val")) is None


def test_what_does_not_fit_is_refused_before_step_0(recording):
    recording.record()
    tokens = recording.tokens
    Path("texts/3.txt").write_text("another text " * 300)
    cases = [
        ({"access": replace(TOPK, fresh=True)}, "access.fresh=true: a cache holds one drawing"),
        ({"temperature": 3.0}, "loss.temperature=3.0: .*set loss.temperature to 1.0"),
        ({"vocab_size": 200}, "model.vocab_size=200: .*257, its teacher's"),
        (
            {"tokens": replace(tokens, document_mask=True)},
            "data.document_mask=True: not what .*set data.document_mask to False",
        ),
        (
            {"tokens": read_tokens(recording.data)},
            r"data: not what the cache cache holds; .*\(data=text data.path=texts\)",
        ),
        # Of the same fingerprint, so that only the shards' own hashes can tell.
        (
            {"tokens": replace(tokens, train=tokens.train[::-1])},
            ".* train-00000.bin covers other tokens",
        ),
        (
            {"tokens": replace(tokens, val=tokens.val[::-1])},
            ".* val-00000.bin covers other tokens",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=f"^{message}"):
            open_cache(**{"tokens": tokens} | changes)
    open_cache(tokens, temperature=3.0, tail="renormalize_both")


@pytest.mark.parametrize(
    "tail, temperatures",
    [
        ("ghost", [2.0]),
        ("renormalize", []),  # the temperature's normaliser cancels: it need not be recorded
    ],
)
def test_a_student_learns_from_a_cache_as_beside_its_teacher(tail, temperatures, recording):
    recording.record(temperatures=temperatures)
    teachers = {
        "offline": TeacherConfig(kind="cache", path="cache"),
        "beside": TeacherConfig(path="teacher"),
    }
    metrics = {}
    for name, teacher in teachers.items():
        config = Config(
            data=recording.data,
            model=SHAPE,
            teacher=teacher,
            access=TOPK,
            loss=LossConfig(kl_weight=0.7, temperature=2.0, tail=tail),
            optim=OptimConfig(lr=1e-2, warmup_steps=2),
            batch_size=8,
            max_steps=4,
            eval_tokens=256,
            run_dir=name,
            device="cpu",
        )
        train.run(config)
        metrics[name] = read_metrics(Path(name))
    offline = metrics["offline"]
    beside = metrics["beside"]
    assert offline[0]["ce"] == beside[0]["ce"]
    assert offline[0]["loss"] == pytest.approx(beside[0]["loss"], rel=1e-3)
    # All that is not recorded is one outcome, so this is a lower bound.
    assert 0.8 < offline[-1]["val_kl"] / beside[-1]["val_kl"] < 1
