"""Each measure on a case computed by hand, and their means over batches."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from data.batches import Batch
from model import GPT, ModelConfig, metrics
from model.loss import SparseTargets
from model.metrics import BINS, bin_sums, evaluate, reliability, row_measures
from tests.helpers import assert_close

STUDENT = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]], dtype=torch.float64)
TEACHER = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]], dtype=torch.float64)
BY_HAND = {
    "loss": [math.log(2), -math.log(0.3)],
    "confidence": [0.5, 0.6],
    "correct": [1, 0],
    "kl": [
        0.25 * math.log(2),
        0.2 * math.log(2) + 0.7 * math.log(7 / 6) - 0.1 * math.log(3),
    ],
    "acceptance": [0.75, 0.8],
    "agreement": [0, 1],
}


def test_measures_by_hand():
    """A teacher's two likeliest tokens and the rest as one outcome are here all there is."""
    labels = torch.tensor([0, 2])
    logits = STUDENT.log() + 7
    top = TEACHER.topk(2)
    for measures in (
        row_measures(
            logits,
            labels,
            TEACHER.log() - 3,
        ),
        row_measures(
            logits,
            labels,
            teacher_topk=(top.indices, top.values.log()),
        ),
    ):
        assert measures.keys() == BY_HAND.keys()
        for name, want in BY_HAND.items():
            want = torch.tensor(want, dtype=torch.float64)
            assert_close(measures[name], want, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bin_holds_its_upper_edge_and_not_its_lower(dtype):
    one = torch.ones(1, dtype=dtype)
    for place in range(BINS):
        bins = reliability(bin_sums(one * (place + 1) / BINS, one))
        assert [share for share, _, _ in bins].index(1) == place
    assert reliability(bin_sums(0 * one, one))[0] == [1.0, 0.0, 1.0]

    # The mean confidence and the accuracy of three in a bin, of four in all
    confidence = torch.tensor([0.61, 0.62, 0.66, 0.9])
    correct = torch.tensor([1, 0, 0, 1])
    bins = reliability(bin_sums(confidence.to(dtype), correct.to(dtype)))
    assert bins[9] == pytest.approx([0.75, 0.63, 1 / 3])


@pytest.fixture
def student():
    config = ModelConfig(
        n_embd=16,
        block_size=8,
        dropout=0.5,
    )
    return GPT(config, 31)


@pytest.fixture
def teacher():
    config = ModelConfig(n_embd=32, block_size=8)
    return GPT(config, 29)


@pytest.fixture
def batch():
    ids = torch.randint(29, (3, 8))
    labels = torch.randint(29, (3, 8))
    labels[0, :5] = -100
    return Batch(
        ids,
        labels,
        blocks=torch.arange(3),
        document_ids=(ids % 5 == 0).cumsum(dim=1),
    )


@torch.no_grad()
@pytest.mark.parametrize("softcaps", [(None, None), (0.1, 0.3)])
def test_means_over_the_kept_positions(student, teacher, batch, softcaps, monkeypatch):
    student.config.logit_softcap = softcaps[0]
    teacher.config.logit_softcap = softcaps[1]
    found = evaluate(student, [batch], teacher)
    assert student.training
    student.eval()
    hidden = student.hidden(batch.ids, document_ids=batch.document_ids)
    logits = student.logits(hidden)
    labels = batch.labels.flatten()
    loss = F.cross_entropy(logits.flatten(0, 1), labels)  # ignores -100
    assert found["val_loss"] == pytest.approx(loss.item(), rel=1e-6)
    bins = torch.tensor(found.pop("val_reliability"))
    assert len(bins) == BINS == 15
    share, confidence, accuracy = bins.T
    errors = share * (accuracy - confidence).abs()
    assert found["val_ece"] == pytest.approx(errors.sum().item())

    # However the rows are split
    monkeypatch.setattr(metrics, "ROWS", 3)
    split = evaluate(
        student,
        [batch.select([0]), batch.select([1, 2])],
        teacher,
    )
    split_bins = torch.tensor(split.pop("val_reliability"))
    assert_close(split_bins, bins, rtol=1e-4)
    assert split == pytest.approx(found, rel=1e-4)

    # A teacher's recorded entries, here all that it has
    hidden = teacher.hidden(batch.ids, document_ids=batch.document_ids)
    logits = teacher.logits(hidden)  # [B,T,V]
    top = logits.log_softmax(dim=-1).topk(29)
    targets = SparseTargets(top.indices, top.values, None)
    recorded = evaluate(student, [batch._replace(targets=targets)])
    del recorded["val_reliability"]
    assert recorded == pytest.approx(found, rel=1e-3)


def test_a_teacher_of_itself_is_fully_accepted(student, batch):
    student = student.bfloat16()
    found = evaluate(student, [batch], student)
    assert abs(found["val_kl"]) < 1e-7
    assert found["val_acceptance"] == pytest.approx(1, abs=1e-6)
    assert found["val_agreement"] == 1


HELD_BY_EVALUATION = """
import torch
from data.batches import Batch
from model import GPT, ModelConfig
from model.metrics import evaluate


def megabytes(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) / 1024


student, teacher = (GPT(ModelConfig(n_layer=1, block_size=256), 4096) for _ in range(2))
ids = torch.randint(4096, (8, 256))
batch = Batch(ids, ids, torch.arange(8))
before = megabytes("VmRSS")
evaluate(student, [batch] * 4, teacher)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_evaluation_keeps_sums_alone():
    """8,192 tokens, whose logits take 4 MiB a chunk of rows: no more than a few such arrays.

    Small results that are kept between them pin the heap: 450 MiB here in two runs of three (it
    depends on where the heap begins), more on longer texts. The thresholds are glibc's.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env |= {"MALLOC_MMAP_THRESHOLD_": "4210000", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", HELD_BY_EVALUATION]
    output = subprocess.run(command, env=env, capture_output=True, check=True, text=True)
    assert float(output.stdout) < 120
