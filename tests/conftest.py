"""Seed 0 before every test; without a GPU the Triton kernels run in Triton's interpreter, and a clear line says what cannot."""

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of kernels: triton.jit reads it there


@pytest.fixture(autouse=True)
def seed_zero():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_signals():
    """A test that trains in this process leaves no handlers behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none on this machine"))
