"""A recorded teacher gives the targets of one beside the student, and is refused where it does not fit."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conf.schema import Config
from data import held_out, prepare
from data.batches import training_subset
from data.tokenizer import Tokenizer
from engine import UserError
from engine.logger import read_metrics
from engine.optim import OptimConfig
from model import GPT, ModelConfig
from model.loss import LossConfig, SparseTargets
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.cached import CachedTeacher
from teachers.online import OnlineTeacher, TeacherConfig
from tests.helpers import assert_close, record, save_teacher, small_corpus

T = 16
TOPK = AccessConfig("topk", k=8, n=5, seed=3)


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


def cached(tokens, access=TOPK, temperature=1.0, tail=None, path="cache", vocab_size=257, size=T):
    return CachedTeacher(path, tokens, size, access, temperature, vocab_size, tail)


def targets_of(teacher: CachedTeacher, batch) -> SparseTargets:
    """[N,...], by way of the batch, as training does."""
    return teacher.targets(batch._replace(targets=teacher.read_targets(batch)))


def online(model, access, temperature=1.0) -> OnlineTeacher:
    return OnlineTeacher(model, access, temperature, nullcontext)


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_a_cache_gives_the_targets_of_the_teacher_itself(kind, tokens, data, teacher):
    """Draws, ids and final weights to the bit; log-probabilities within the bound of quantisation."""
    access = replace(TOPK, kind=kind)
    temperature = 1.0 if ACCESS_KINDS[kind].final_weights else 2.0
    record(tokens, data, access, temperatures=[temperature])
    blocks = tokens.blocks("train", T)
    batch = blocks.read(np.array([5, 0, len(blocks) - 1]))
    recorded = cached(tokens, access, temperature)
    found = targets_of(recorded, batch)
    expected = online(teacher, access, temperature).targets(batch)
    if kind == "full":  # in the vocabulary's order
        assert found.ids is None
        z = expected.hidden @ expected.head.T
        log_norm = (z / 2).logsumexp(1) - z.logsumexp(1) / 2
        expected = SparseTargets(None, z.log_softmax(1), log_norm)
    else:
        assert torch.equal(found.ids.long(), expected.ids.long())
    if kind in ("greedy", "text", "sampled"):
        assert torch.equal(found.log_probs, expected.log_probs)
    assert (found.log_probs.exp() - expected.log_probs.exp()).abs().max() < 0.02
    if temperature != 1:
        assert_close(found.log_norm, expected.log_norm, rtol=0.05, atol=0.05)
        log_t = expected.log_probs / 2 - expected.log_norm[:, None]
        log_q = found.log_probs / 2 - found.log_norm[:, None]
        tail_t = (1 - log_t.exp().sum(1)).clamp(min=1e-9)
        tail_q = (1 - log_q.exp().sum(1)).clamp(min=1e-9)
        kl = (log_t.exp() * (log_t - log_q)).sum(1) + tail_t * (tail_t / tail_q).log()
        assert kl.max() < 1.5e-4
    local = recorded.read_targets(batch.select([1, 2]))
    assert torch.equal(local.log_probs.flatten(0, 1), found.log_probs[T:])


@pytest.mark.parametrize("kind", ["topk", "greedy", "residual_to_label"])
def test_everything_is_in_a_full_cache(kind, tokens, data, teacher):
    record(tokens, data, AccessConfig("full"), temperatures=[2.0])
    access = replace(TOPK, kind=kind)
    temperature = 2.0 if kind == "topk" else 1.0
    batch = tokens.blocks("train", T).read(np.arange(2))
    found = targets_of(cached(tokens, access, temperature), batch)
    expected = online(teacher, access, temperature).targets(batch)
    assert (found.ids == expected.ids).float().mean() > 0.98  # float16 makes ties
    assert_close(found.log_probs[:, :8], expected.log_probs[:, :8], rtol=0, atol=0.01)
    if kind == "topk":
        assert_close(found.log_norm, expected.log_norm, rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", ["topk", "full"])
def test_val_kl_is_measured_on_all_that_is_recorded(kind, tokens, data, teacher):
    """The likeliest first, whether the student sees one entry or eight."""
    record(tokens, data, replace(TOPK, kind=kind))
    batch = tokens.blocks("val", T).read(np.arange(1))
    with torch.no_grad():
        log_probs = teacher(batch.ids).log_softmax(-1)
    for access in (AccessConfig(kind, k=8), AccessConfig("topk", k=2), AccessConfig("greedy")):
        shown = cached(tokens, access).teacher_topk(batch)
        assert shown.ids.shape == (1, T, 257 if kind == "full" else 8)
        assert torch.equal(shown.ids[..., 0], log_probs.argmax(-1))
        assert (shown.log_probs - log_probs.gather(2, shown.ids)).abs().max() < 0.1
    assert (shown.ids.sort().values.diff() > 0).all()


def test_what_is_not_recorded_is_refused(tokens, data, teacher):
    record(tokens, replace(data, fraction=0.5), TOPK, eval_tokens=10 * T)
    record(tokens, data, AccessConfig("text"), eval_tokens=10 * T, out="text")
    recorded = cached(tokens)
    num_blocks = len(tokens.blocks("train", T))
    for fraction in (0.5, 0.2):
        recorded.check_share(training_subset(num_blocks, fraction))
    message = r"^data.fraction: the cache holds [\d,]+ of [\d,]+ blocks; set data.fraction=0.5"
    with pytest.raises(UserError, match=message):
        recorded.check_share(np.arange(num_blocks))
    for eval_tokens in (10 * T, 10 * T + 1, 5 * T, T):
        recorded.check_held_out(eval_tokens)
    message = (
        r"^eval_tokens=240: the cache holds \d of the 15 held-out blocks that are evaluated;"
        " set eval_tokens=160, or"
    )
    with pytest.raises(UserError, match=message):
        recorded.check_held_out(15 * T)
    cached(tokens, AccessConfig("text"), path="text").check_held_out(15 * T)  # measures no val_kl


REFUSED = {
    "k": ({"access": replace(TOPK, k=9)}, "access.k=9: .*set access.k to 8 or less"),
    "kind": ({"access": AccessConfig("text")}, "access=text: .*set access to greedy or topk or"),
    "temperature": ({"temperature": 3.0}, "loss.temperature=3.0: .*set loss.temperature to 1.0"),
    "tail": ({"temperature": 3.0, "tail": "ghost"}, "loss.temperature=3.0: "),
    "block size": ({"size": 8}, "model.block_size=8: .*set model.block_size to 16"),
    "vocabulary": ({"vocab_size": 200}, "model.vocab_size=200: .*257, its teacher's"),
    "fresh": ({"access": replace(TOPK, fresh=True)}, "access.fresh=true: a cache holds one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_step_0(case, tokens, data, teacher):
    record(tokens, data, TOPK)
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=f"^{message}"):
        cached(tokens, **changes)


def test_other_tokens_are_refused(tokens, data, teacher):
    record(tokens, data, TOPK)
    Path("texts/3.txt").write_text("another text " * 300)
    other_text = prepare(data, say=lambda line: None, progress=False)
    ids = Tokenizer({"kind": "ids", "vocab_size": 257})
    cases = [
        (
            replace(tokens, document_mask=True),
            "data.document_mask=True: not what .*set data.document_mask to False, or capture",
        ),
        (
            replace(tokens, tokenizer=ids),
            r"data.tokenizer: not what the cache cache holds; .*\(bytes, 257 tokens\)",
        ),
        (
            other_text,
            r"data: not what the cache cache holds; .*\(data=text data.path=texts\)",
        ),
        # Of the same fingerprint: only the shards' own hashes can tell.
        (replace(tokens, train=tokens.train[::-1]), ".* train-00000.bin covers other tokens"),
        (replace(tokens, val=tokens.val[::-1]), ".* val-00000.bin covers other tokens"),
    ]
    for other, message in cases:
        with pytest.raises(UserError, match=f"^{message}"):
            cached(other, vocab_size=None)


def train_on(run_dir, teacher, data, loss, access=TOPK) -> list[dict]:
    config = Config(
        data=data,
        model=ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=T),
        teacher=teacher,
        access=access,
        loss=loss,
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        batch_size=8,
        max_steps=4,
        eval_every=4,
        eval_tokens=256,
        run_dir=run_dir,
        device="cpu",
    )
    train.run(config)
    return read_metrics(Path(run_dir))


def test_a_student_of_a_cache_learns_as_one_beside_its_teacher(tokens, data, teacher):
    record(tokens, data, TOPK, temperatures=[2.0])
    loss = LossConfig(kl_weight=0.7, temperature=2.0)
    offline = train_on("offline", TeacherConfig(kind="cache", path="cache"), data, loss)
    beside = train_on("beside", TeacherConfig(path="teacher"), data, loss)
    assert offline[0]["ce"] == beside[0]["ce"]
    assert offline[0]["loss"] == pytest.approx(beside[0]["loss"], rel=1e-4)

    # Its val_kl counts all that is not recorded as one outcome.
    student = GPT.from_pretrained("offline/checkpoints/step-00000004")
    sums = []
    for batch in held_out(tokens.blocks("val", T), 8, 256):
        ids = cached(tokens).teacher_topk(batch).ids
        with torch.no_grad():
            t = teacher(batch.ids).softmax(-1).gather(2, ids)
            p = student(batch.ids).softmax(-1).gather(2, ids)
        t = torch.cat([t, 1 - t.sum(2, keepdim=True)], 2)
        p = torch.cat([p, 1 - p.sum(2, keepdim=True)], 2)
        sums.append((t * (t / p).log()).sum(2))
    expected = torch.cat(sums).mean().item()
    assert offline[-1]["val_kl"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("tail", ["renormalize", "renormalize_both"])
def test_a_temperature_that_cancels_need_not_be_recorded(tail, tokens, data, teacher):
    record(tokens, data, TOPK)
    loss = LossConfig(kl_weight=0.7, temperature=2.0, tail=tail)
    offline = train_on("offline", TeacherConfig(kind="cache", path="cache"), data, loss)
    beside = train_on("beside", TeacherConfig(path="teacher"), data, loss)
    assert offline[0]["loss"] == pytest.approx(beside[0]["loss"], rel=1e-3)
