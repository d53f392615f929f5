"""The bins of the calibration error."""

import pytest
import torch

from data.batches import Batch
from model import GPT, ModelConfig
from model.metrics import BINS, evaluate, reliability


def test_the_recorded_bins_are_the_definitions_and_give_the_calibration_error():
    torch.manual_seed(0)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8)
    student = GPT(config, vocab_size=31)
    student.head_weight.data.mul_(40)  # confidences in many bins
    ids = torch.randint(31, (9, 8))
    labels = torch.randint(31, (9, 8))
    measures = evaluate(student, [Batch(ids, labels, None)])

    bins = measures["val_reliability"]
    assert len(bins) == BINS == 15
    error = 0.0
    for share, confidence, accuracy in bins:
        error += share * abs(accuracy - confidence)
    assert error == measures["val_ece"]
    assert error > 0.01

    student.eval()
    probabilities = student(ids).detach().double().softmax(dim=-1)  # [B,T,V]
    confidence, top = probabilities.max(dim=-1)
    correct = (top == labels).double()
    for place, values in enumerate(bins):
        low = place / 15
        high = (place + 1) / 15
        inside = (confidence > low) & (confidence <= high)
        expected = torch.zeros(3)
        if inside.any():
            expected[0] = inside.double().mean()
            expected[1] = confidence[inside].mean()
            expected[2] = correct[inside].mean()
        assert values == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bin_holds_its_upper_edge_and_not_its_lower(dtype):
    one = torch.ones(1, dtype=dtype)
    for place in range(BINS):
        edge = torch.tensor([place + 1], dtype=dtype)
        bins = reliability(edge / BINS, one)
        filled = [index for index, (share, *_) in enumerate(bins) if share == 1]
        assert filled == [place]
    lowest, *_ = reliability(0 * one, one)
    assert lowest == [1.0, 0.0, 1.0]
