"""What a teacher beside the student shows, and which teachers are refused."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.schema import Config
from data import prepare
from data.tokenizer import Tokenizer
from engine import UserError
from engine.checkpoint import fingerprint
from model import GPT, ModelConfig
from model.loss import LossConfig, TeacherStates
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.online import (
    OnlineTeacher,
    TeacherConfig,
    check_teacher_vocabulary,
    load_model,
    load_teacher,
    open_teacher,
    query_teacher,
)
from tests.helpers import save_teacher, small_corpus

T = 16
CPU = torch.device("cpu")


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return prepare(small_corpus(tmp_path), say=lambda line: None, progress=False)


@pytest.fixture
def teacher(tokens):
    return save_teacher("teacher")


def online(model, access, generated_by_teacher=False):
    return OnlineTeacher(model, access, 1.0, nullcontext, generated_by_teacher)


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_each_access_shows_its_part_of_the_distribution(kind, tokens, teacher):
    batch = tokens.blocks("train", T).read(np.array([3, 9]))
    output = query_teacher(teacher, batch, AccessConfig(kind, k=8, n=5), (1.0, 2.0))
    with torch.no_grad():
        log_t = teacher(batch.ids).flatten(0, 1).log_softmax(-1)  # [N,V]
    num_entries = {"greedy": 1, "text": 0, "sampled": 0, "full": 257}.get(kind, 8)
    num_draws = {"text": 1, "sampled": 5, "unbiased": 1, "stratified": 5}.get(kind, 0)
    if num_entries:
        top = log_t.topk(num_entries)
        if kind != "full":  # where the unlikeliest are as good as equal
            assert torch.equal(output.ids.long(), top.indices)
        torch.testing.assert_close(output.log_probs, top.values, rtol=1e-4, atol=1e-4)
        log_norm = (log_t / 2).logsumexp(1)
        torch.testing.assert_close(output.log_norm[:, 1], log_norm, rtol=1e-4, atol=1e-5)
    else:
        assert output.ids is None
    if num_draws:
        assert output.draws.shape == (2 * T, num_draws)
        inside = (log_t.argsort(descending=True)[:, None, :8] == output.draws[..., None]).any()
        assert inside == (kind != "stratified")
    else:
        assert output.draws is None


def test_draws_belong_to_seed_and_position(tokens, teacher):
    blocks = tokens.blocks("train", T)
    access = AccessConfig("sampled", n=5, seed=3)
    one = online(teacher, access).targets(blocks.read(np.array([3, 9])))
    other = online(teacher, access).targets(blocks.read(np.array([9, 1, 3])))
    assert torch.equal(one.ids[:T], other.ids[2 * T :])
    assert torch.equal(one.ids[T:], other.ids[:T])
    reseeded = online(teacher, replace(access, seed=4)).targets(blocks.read(np.array([3, 9])))
    assert (reseeded.ids != one.ids).float().mean() > 0.2


@pytest.mark.parametrize("kind", ["topk", "full"])
def test_the_teacher_sees_no_other_document(kind, tokens, teacher):
    batch = replace(tokens, document_mask=True).blocks("train", T).read(np.array([5]))
    documents = torch.tensor([[0] * 8 + [1] * 8])
    shown = []
    for token in (65, 66):
        ids = batch.ids.clone()
        ids[0, 2] = token
        targets = online(teacher, AccessConfig(kind, k=8)).targets(
            batch._replace(ids=ids, document_ids=documents)
        )
        shown.append(targets.hidden if isinstance(targets, TeacherStates) else targets.log_probs)
    assert torch.equal(shown[0][8:], shown[1][8:])
    assert not torch.equal(shown[0][:8], shown[1][:8])


@pytest.mark.parametrize("kind", ["text", "unbiased", "sampled", "stratified"])
def test_of_its_own_text_the_next_token_is_the_draw(kind, tokens, teacher):
    """But for several draws, and for one from the tail, which the token need not be."""
    batch = tokens.blocks("train", T).read(np.arange(3))
    batch.labels[0, -3:] = -100
    labels = batch.labels.flatten().clamp(min=-1)
    n = 3 if kind == "sampled" else 1
    access = AccessConfig(kind, k=4, n=n)
    ids = online(teacher, access, generated_by_teacher=True).targets(batch).ids.long()
    if kind == "text":
        assert torch.equal(ids[:, 0], labels)
    elif kind == "unbiased":
        inside = (ids[:, :4] == labels[:, None]).any(1)
        assert torch.equal(ids[~inside, 4], labels[~inside])
        assert (ids[inside, 4] == -1).all() and 0 < inside.float().mean() < 1
    else:
        assert torch.equal(ids, online(teacher, access).targets(batch).ids.long())


def test_only_the_teacher_that_wrote_a_text_drew_its_tokens(tokens, teacher):
    config = Config(
        model=ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=T),
        teacher=TeacherConfig(path="teacher"),
        access=AccessConfig("topk", k=8),
        loss=LossConfig(temperature=2.0),
    )
    for generated_by, expected in (
        (None, False),
        ("x", False),
        (fingerprint(Path("teacher")), True),
    ):
        text = replace(tokens, generated_by=generated_by)
        opened = open_teacher("teacher", text, config, CPU, nullcontext)
        assert opened.generated_by_teacher == expected
    assert opened.path == "teacher" and opened.fingerprint == fingerprint(Path("teacher"))
    assert opened.temperature == 2.0 and opened.teacher_topk(None) is None
    assert not any(param.requires_grad for param in opened.model.parameters())


def test_a_teacher_that_does_not_fit_is_one_line(tokens):
    topk = AccessConfig("topk", k=8)
    save_teacher("teacher")
    save_teacher("short", block_size=8)
    save_teacher("few", vocab_size=200)
    wide = save_teacher("wide", vocab_size=300)
    Tokenizer({"kind": "ids", "vocab_size": 257}).save("few")
    GPT(ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=T), 200).save_pretrained("bare")
    student = GPT(ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=T), 257)
    cases = [
        (
            lambda: load_teacher("nowhere", tokens, T, topk),
            "teacher.path=nowhere: no such folder",
        ),
        (
            lambda: load_teacher("short", tokens, T, topk, "block_size"),
            "block_size=16: the teacher at short reads at most 8 tokens; set block_size=8",
        ),
        (
            lambda: load_teacher("teacher", tokens, T, AccessConfig(k=300)),
            "access.k=300: the vocabulary has 257 tokens; set access.k=257 or less",
        ),
        (
            lambda: load_teacher("bare", tokens, T, topk),
            "teacher.path=bare: its vocabulary is 200, the data's 257; set data.tokenizer=bare",
        ),
        (
            lambda: load_model("few", tokens, "path", fix="give another"),
            r"path=few: it reads tokens of ids \(vocabulary 257\), the data are tokens of bytes"
            r" \(vocabulary 257\); give another",
        ),
        (
            lambda: check_teacher_vocabulary(wide, "wide", student),
            "teacher.path=wide: its vocabulary is 300, the student's 257; set model.vocab_size=300",
        ),
        (
            lambda: TeacherConfig(kind="cache"),
            "teacher.path=null: teacher=cache needs the folder",
        ),
    ]
    for open_it, message in cases:
        with pytest.raises(UserError, match=f"^{message}"):
            open_it()
    load_teacher("wide", tokens, T, AccessConfig("greedy", k=999))
