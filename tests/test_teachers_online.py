"""What a teacher beside the student shows, and which teachers are refused."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.schema import Config
from engine import UserError
from engine.checkpoint import fingerprint
from model.loss import LossConfig
from teachers import online
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.online import OnlineTeacher, query_teacher
from tests.helpers import assert_close
from tests.recording import SHAPE, TOPK, Recording, T, save_teacher


@pytest.fixture
def recording(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Recording()


def targets_of(
    recording,
    batch,
    access,
    generated_by_teacher=False,
):
    teacher = OnlineTeacher(
        recording.teacher,
        access,
        1.0,
        nullcontext,
        generated_by_teacher,
    )
    return teacher.targets(batch)


ENTRIES = {  # else k
    "greedy": 1,
    "text": 0,
    "sampled": 0,
    "full": 257,
}
DRAWS = {  # else none
    "text": 1,
    "sampled": 5,
    "unbiased": 1,
    "stratified": 5,
}


@pytest.mark.parametrize("kind", ACCESS_KINDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_each_access_shows_its_part_of_the_distribution(kind, softcap, recording):
    recording.teacher.config.logit_softcap = softcap
    batch = recording.batch([3, 9])
    access = replace(TOPK, kind=kind)
    output = query_teacher(recording.teacher, batch, access, temperatures=(1.0, 2.0))
    with torch.no_grad():
        logits = recording.teacher(batch.ids)
    log_t = logits.flatten(0, 1).log_softmax(-1)  # [N,V]
    num_entries = ENTRIES.get(kind, 8)
    top = log_t.topk(num_entries)
    if num_entries == 0:
        assert output.ids is None
    else:
        assert_close(output.log_probs, top.values, atol=1e-4)
        log_norm = (log_t / 2).logsumexp(1)
        assert_close(output.log_norm[:, 1], log_norm, atol=1e-4)

    if kind not in DRAWS:
        assert output.draws is None
    else:
        assert output.draws.shape == (2 * T, DRAWS[kind])
        support = log_t.topk(8).indices[:, None]  # [N,1,8]
        in_support = (support == output.draws[..., None]).any()
        assert in_support == (kind != "stratified")


def test_a_softcapped_teacher_draws_from_its_softcapped_logits(recording):
    recording.teacher.config.logit_softcap = 0.01  # nearly all tokens alike
    access = AccessConfig("sampled", n=40)
    draws = query_teacher(recording.teacher, recording.batch([3, 9]), access, (1.0,)).draws
    assert len(draws.unique()) > 240


def test_draws_belong_to_seed_and_position(recording):
    access = replace(TOPK, kind="sampled")
    two = recording.batch([3, 9])
    ids = targets_of(recording, two, access).ids
    others = targets_of(recording, recording.batch([9, 1, 3]), access).ids
    assert torch.equal(ids, torch.cat([others[2 * T :], others[:T]]))
    reseeded = targets_of(recording, two, replace(access, seed=4)).ids
    assert (reseeded != ids).float().mean() > 0.2
    two.ids[1] = two.ids[0]
    ids = targets_of(recording, two, access).ids
    assert (ids[:T] != ids[T:]).float().mean() > 0.2


def test_the_teacher_sees_no_other_document(recording):
    document_ids = torch.tensor([[0] * 8 + [1] * 8])
    batch = recording.batch([5])._replace(document_ids=document_ids)
    shown = []
    for token in (65, 66):
        batch.ids[0, 2] = token
        states = targets_of(recording, batch, AccessConfig("full"))
        topk = targets_of(recording, batch, TOPK)
        shown.append(torch.cat([states.hidden, topk.log_probs], dim=1))
    same = shown[0] == shown[1]  # [T,n_embd+k]
    assert same[8:].all()
    assert not same[:8].all(0).any()


def test_of_its_own_text_the_next_token_is_the_draw(recording):
    """But not of several draws, nor of one from the tail: test_teachers_generate has `text`."""
    batch = recording.batch([0, 1, 2])
    batch.labels[0, -3:] = -100
    unbiased = AccessConfig("unbiased", k=100)
    own = targets_of(recording, batch, unbiased, generated_by_teacher=True)
    ids = own.ids.long()
    labels = batch.labels.flatten().clamp(min=-1)
    inside = (ids[:, :100] == labels[:, None]).any(1)
    expected = torch.where(inside, -1, labels)
    last = ids[:, 100]
    assert torch.equal(last, expected)
    assert inside.any() and not inside.all()
    for access in (AccessConfig("sampled", n=3), AccessConfig("stratified", n=1)):
        own = targets_of(recording, batch, access, generated_by_teacher=True)
        drawn = targets_of(recording, batch, access)
        assert torch.equal(own.ids, drawn.ids)


def test_only_the_teacher_that_wrote_a_text_drew_its_tokens(recording):
    config = Config(model=SHAPE, access=TOPK, loss=LossConfig(temperature=2.0))
    own = fingerprint(Path("teacher"))
    for generated_by in (None, "another", own):
        tokens = replace(recording.tokens, generated_by=generated_by)
        device = torch.device("cpu")
        teacher = online.open_teacher("teacher", tokens, config, device, nullcontext)
        assert teacher.generated_by_teacher == (generated_by == own)
    assert teacher.path == "teacher"
    assert teacher.fingerprint == own
    assert teacher.temperature == 2.0
    assert teacher.teacher_topk(None) is None


def test_a_teacher_that_does_not_fit_is_refused(recording):
    save_teacher("few", vocab_size=200)
    save_teacher("wide", vocab_size=300)
    assert online.load_model("wide", recording.tokens).vocab_size == 257  # the rest is padding
    with pytest.raises(UserError, match="^teacher.path=wide: it reads at most 16 tokens; set"):
        online.load_model("wide", recording.tokens, block_size=17)
    with pytest.raises(UserError, match="^teacher.path=few: .*200 entries.*give another"):
        online.load_model("few", recording.tokens)
