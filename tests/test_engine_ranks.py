"""Devices, signals, a rank's share, and what a full memory means."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import sample
import train
from conf.schema import Config
from engine import UserError
from engine import ranks as processes
from engine.ranks import Ranks, autocast, explain_memory, peak_flops, pick_device, request_stop
from model import GPT, ModelConfig
from teachers import capture

ROOT = Path(__file__).parent.parent


def test_first_signal_asks_second_ctrl_c_leaves():
    ranks = Ranks()
    with pytest.raises(KeyboardInterrupt):  # nothing to save yet
        request_stop(ranks, signal.SIGINT)
    ranks.training = True
    request_stop(ranks, signal.SIGTERM)
    assert ranks.stop == "SIGTERM"
    with pytest.raises(KeyboardInterrupt):
        request_stop(ranks, signal.SIGINT)


def test_the_ranks_rows_are_its_micro_batches():
    assert Ranks(rank=1, world=2).local_rows(8, 2) == [2, 3, 6, 7]


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("mps", [False, True])
def test_devices(monkeypatch, cuda, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    there = [name for name, is_there in (("cuda", cuda), ("mps", mps), ("cpu", True)) if is_there]
    assert pick_device("auto", 3).type == there[0]
    for name in ("cuda", "mps", "cpu"):
        if name in there:
            assert pick_device(name, 3).type == name
        else:
            with pytest.raises(UserError, match=f"device={name}: .*; device=auto takes"):
                pick_device(name, 3)
    if cuda:
        assert pick_device("cuda", 3).index == 3


class PrecisionSet(Exception):
    """An entry point chose how fp32 products are computed; the test needs no more of it."""


ENTRY_POINTS = {
    "train": lambda path: train.run(Config()),
    "capture": lambda path: capture.run(
        capture.CaptureConfig(capture.TeacherPath(path), out="cache")
    ),
    "eval": lambda path: evaluation.run(evaluation.EvalConfig(path)),
    "sample": lambda path: sample.run(sample.SampleConfig(path)),
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_entry_point_chooses_tf32_on_cuda(name, tmp_path, monkeypatch):
    def stop(precision):
        raise PrecisionSet(precision)

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(processes, "pick_device", lambda name, local_rank: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", stop)
    GPT(ModelConfig(1, 2, 16, 32), 257).save_pretrained(tmp_path)
    with pytest.raises(PrecisionSet, match="^high$"):
        ENTRY_POINTS[name](str(tmp_path))


@pytest.mark.parametrize(
    "kind, dtype, expected",
    [
        ("cuda", "auto", torch.bfloat16),
        ("cpu", "auto", torch.float32),
        ("cpu", "bfloat16", torch.bfloat16),
        ("cuda", "float32", torch.float32),
    ],
)
def test_the_dtype_of_autocast(kind, dtype, expected):
    keywords = autocast(torch.device(kind), dtype).keywords
    assert keywords == {"dtype": expected, "enabled": expected != torch.float32}


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_the_peak_of_a_card_or_nothing(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    "micro, checkpointing, advice",
    [
        (9, False, "micro_batch_size=3, which has the same gradient"),
        (1, False, "activation_checkpointing=true"),
        (1, True, "a smaller model, or a smaller model.block_size"),
    ],
)
def test_out_of_memory_says_which_key_to_change(micro, checkpointing, advice):
    config = SimpleNamespace(
        micro_batch_size=micro,
        activation_checkpointing=checkpointing,
        model=SimpleNamespace(block_size=16),
    )
    error = RuntimeError("[x] DefaultCPUAllocator: can't allocate memory")  # CUDA: test_train
    with pytest.raises(UserError) as caught:
        explain_memory(error, 7, config)
    sizes = f"micro_batch_size={micro} sequences of 16 tokens"
    assert str(caught.value) == f"out of memory at step 7 with {sizes}; set {advice}"
    # Of any other error it says nothing: the caller raises it.
    explain_memory(RuntimeError("a bug"), 7, config)
