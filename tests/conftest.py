"""Seed 0 before every test; without a GPU the Triton kernels run in Triton's interpreter."""

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before the first import of kernels: triton.jit reads it there
    )


@pytest.fixture(autouse=True)
def seed_zero():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter():
    """Triton's interpreter patches its language in every call of a jit function: once will do."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    language = interpreter.tl
    patch = interpreter._patch_lang

    def patch_once(function):
        modules = [
            part for part in function.__globals__.values() if part in (language, language.core)
        ]
        if any(language.core.is_builtin(module.load) for module in modules):
            return patch(function)
        return interpreter._LangPatchScope()

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patch_once


@pytest.fixture
def small_blocks(monkeypatch):
    """Triton blocks of 16 columns: a row of 37 has a first, an interior and a ragged last one."""
    monkeypatch.setattr(
        "kernels.triton_loss.launch_shape", lambda row_bytes, K, simple: (16, 4, 255)
    )


@pytest.fixture
def chunks_of(monkeypatch):
    """Call it with a number of rows: every chunk has as many."""

    def set_rows(rows):
        monkeypatch.setattr("kernels.chunks.chunk_rows", lambda N, row_bytes, device: rows)

    return set_rows


@pytest.fixture(autouse=True)
def own_signals():
    """A test that trains in this process leaves no handlers behind."""
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none on this machine"))
