"""The student with its loss: what reaches the op, whole distributions, and one compiled graph."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data.batches import Batch
from kernels import topk_kl
from model import GPT, ModelConfig
from model.loss import LossConfig, SparseTargets, StudentWithLoss, TeacherStates
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.online import OnlineTeacher
from tests.helpers import assert_close

V = 31
SHAPE = ModelConfig(n_layer=2, n_embd=16, n_head=2, block_size=16)
LLAMA = replace(
    SHAPE,
    norm="rmsnorm",
    rope_theta=1e4,
    mlp="swiglu",
    qk_norm=True,
    logit_softcap=5.0,
)


@pytest.fixture
def batch():
    ids = torch.randint(V, (2, 16))
    labels = torch.randint(V, (2, 16))
    return Batch(ids, labels, blocks=torch.arange(2))


@pytest.fixture
def teach():
    """A function (kind, temperature) -> a teacher, always of the same model."""
    model = GPT(replace(SHAPE, n_embd=32), V)

    def make(kind="topk", temperature=1.0, k=8):
        access = AccessConfig(kind=kind, k=k, n=3)
        return OnlineTeacher(model, access, temperature, nullcontext)

    return make


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("student_rows", [V, V + 7])
def test_a_whole_distribution_is_the_loss_of_all_its_entries(
    batch, teach, temperature, student_rows
):
    loss = LossConfig(kl_weight=0.7, temperature=temperature)
    module = StudentWithLoss(GPT(SHAPE, student_rows), loss)

    # The same V entries: ranked, in the vocabulary's order as a cache has them, and as states.
    ranked = teach("topk", temperature, k=V).targets(batch)
    in_order = torch.zeros_like(ranked.log_probs)
    in_order.scatter_(1, ranked.ids.long(), ranked.log_probs)
    cached = SparseTargets(None, in_order, ranked.log_norm)
    states = teach("full", temperature).targets(batch)
    assert isinstance(states, TeacherStates)

    results = []
    for targets in (ranked, cached, states):
        output = module(batch.ids, batch.labels, targets)
        gradients = torch.autograd.grad(output.loss, list(module.parameters()))
        results.append([output.loss, output.kl, output.ce, *gradients])
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "topk"])
@pytest.mark.parametrize("student_softcap", [None, 0.2])
@pytest.mark.parametrize("teacher_softcap", [None, 0.1])
def test_softcaps_reach_the_loss(batch, teach, kind, student_softcap, teacher_softcap):
    student = GPT(replace(SHAPE, logit_softcap=student_softcap), V)
    teacher = teach(kind, temperature=2.0, k=V)
    teacher.model.config.logit_softcap = teacher_softcap
    module = StudentWithLoss(student, LossConfig(kl_weight=0.7, temperature=2.0))
    targets = teacher.targets(batch)
    outputs = [
        module(batch.ids, batch.labels),
        module(batch.ids, batch.labels, targets),
    ]

    # The same from whole logits, which the models have softcapped themselves
    logits = student(batch.ids).flatten(0, 1)
    labels = batch.labels.flatten()
    teacher_logits = teacher.model(batch.ids).flatten(0, 1)
    log_t = teacher_logits.log_softmax(dim=1)
    taught = topk_kl(
        logits,
        None,
        log_t,
        labels=labels,
        log_norm=(log_t / 2).logsumexp(1),
        kl_weight=0.7,
        temperature=2.0,
        reduction="sum",
    )
    expected = [F.cross_entropy(logits, labels, reduction="sum"), taught.loss]

    weights = list(student.parameters())
    for output, loss in zip(outputs, expected, strict=True):
        assert_close(output.loss, loss, rtol=1e-4)
        gradients = torch.autograd.grad(output.loss, weights)
        wanted = torch.autograd.grad(loss, weights, retain_graph=True)
        for actual, want in zip(gradients, wanted, strict=True):
            assert_close(actual, want, rtol=1e-3, atol=1e-5)


def test_the_temperature_reaches_the_loss(batch, teach):
    outputs = []
    for temperature in (1.0, 4.0):
        module = StudentWithLoss(GPT(SHAPE, V), LossConfig(temperature=temperature))
        targets = teach("topk", temperature).targets(batch)
        outputs.append(module(batch.ids, batch.labels, targets))
    sharp, flat = outputs
    assert_close(sharp.loss, sharp.kl)
    assert_close(flat.loss, 16 * flat.kl)
    # A flatter teacher has less mass in the same k entries.
    assert sharp.teacher_mass > flat.teacher_mass + 0.01


def assert_one_graph(function, *arguments):
    torch._dynamo.reset()
    report = torch._dynamo.explain(function)(*arguments)
    assert report.graph_count == 1, report.break_reasons
    assert report.graph_break_count == 0, report.break_reasons


@pytest.mark.parametrize("shape", [SHAPE, LLAMA])
@pytest.mark.parametrize("taught", [False, True])
def test_the_students_side_is_one_graph(batch, teach, shape, taught):
    document_ids = (batch.ids == 3).cumsum(1)
    module = StudentWithLoss(GPT(shape, V), LossConfig(kl_weight=0.7))
    targets = teach().targets(batch) if taught else None
    assert_one_graph(
        module,
        batch.ids,
        batch.labels,
        targets,
        document_ids,
    )


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_the_teachers_side_is_one_graph(batch, teach, kind):
    assert_one_graph(teach(kind).targets, batch)
