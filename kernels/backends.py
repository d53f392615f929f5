"""Which code computes an op: Triton kernels, chunked PyTorch, or the plain form."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor

from .checks import check_name

try:
    import triton
    import triton.language as tl
except (
    ImportError
):  # no wheel for this platform: the kernels stay plain functions that nobody calls
    triton = None
    tl = SimpleNamespace(constexpr=lambda value: value)

BACKENDS = ("auto", "triton", "torch", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_ENTRIES = 2048  # K of the Triton kernels: a row's entries lie in one program's registers


def jit(kernel):
    """`triton.jit` where there is Triton."""
    return kernel if triton is None else triton.jit(kernel)


def why_not_triton(dtype: torch.dtype, device: torch.device, K: int) -> str | None:
    """What keeps the Triton kernels from serving; None where nothing does."""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {device}: Triton needs CUDA (or TRITON_INTERPRET=1)"
    if dtype == torch.float64:
        return "the kernels compute in fp32; float64 is for backend='torch' or 'reference'"
    if K > MAX_ENTRIES:
        return f"a row has more than {MAX_ENTRIES} entries (K)"
    return None


def choose_backend(backend: str, dtype: torch.dtype, device: torch.device, K: int = 0) -> str:
    """What `auto` means: Triton on CUDA where it can serve, else chunked PyTorch."""
    check_name("backend", backend, BACKENDS)
    if backend in ("torch", "reference"):
        return backend
    reason = why_not_triton(dtype, device, K)
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend='triton': {reason}; use backend='torch' or 'auto'")
    if reason is None and (backend == "triton" or device.type == "cuda"):
        return "triton"
    return "torch"


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, losses and sums: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def computing(like: Tensor):
    """No autocast inside, and the tensor's own device is the current one: Triton launches there."""
    with torch.autocast(like.device.type, enabled=False), torch.cuda.device_of(like):
        yield
