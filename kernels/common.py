"""What every op shares: its result, its refusals, its reductions.

N rows (positions), D width, V vocabulary, K teacher entries a row.
"""

import math
import os
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the torch backend serves it, and the kernels stay plain functions
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=lambda value: value)

TAILS = ("ghost", "truncate", "renormalize", "renormalize_both", "smooth")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tv")
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "triton", "torch", "reference")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_SLOTS = 16_384  # a row's entries lie in one program's registers
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


class LossOutput(NamedTuple):
    """A loss op's result, each field a scalar, or [N] with reduction="none". Only `loss` carries a gradient."""

    loss: Tensor  # (1-kl_weight)*ce + kl_weight*T^2*kl
    kl: Tensor  # the divergence itself, nats (tv: a fraction)
    ce: Tensor  # label cross-entropy at T=1, nats; 0 without labels
    teacher_mass: Tensor  # the teacher's probability on its K entries
    student_mass: Tensor  # the student's probability there


class Spec(NamedTuple):
    """The loss that was asked for."""

    kl_weight: float = 1.0
    temperature: float = 1.0
    tail: str = "ghost"
    divergence: str = "forward_kl"
    beta: float = 0.5
    softcap: float | None = None
    ignore_index: int = -100
    reduction: str = "mean"


def check_name(key: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{key}={value!r}: one of {', '.join(names)}")


def check_scalars(softcap: float | None, *temperatures: float) -> None:
    for key, value in (("softcap", 1.0 if softcap is None else softcap), *(("temperature", T) for T in temperatures)):
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{key}={value!r}: must be a finite number above 0")


def check_spec(spec: Spec, labels: Tensor | None, log_norm: Tensor | None) -> None:
    """Refuses options that are out of range or contradict each other."""
    check_scalars(spec.softcap, spec.temperature)
    check_name("tail", spec.tail, TAILS)
    check_name("divergence", spec.divergence, DIVERGENCES)
    check_name("reduction", spec.reduction, REDUCTIONS)
    if not 0 <= spec.kl_weight <= 1:
        raise ValueError(f"kl_weight={spec.kl_weight}: must be in 0..1")
    if not 0 < spec.beta < 1:
        raise ValueError(f"beta={spec.beta}: must be inside the open interval (0, 1)")
    if spec.tail != "ghost" and spec.divergence != "forward_kl":
        rule = "this tail takes forward_kl only; tail='ghost' takes any"
        raise ValueError(f"divergence={spec.divergence!r} with tail={spec.tail!r}: {rule}")
    if spec.kl_weight < 1 and labels is None:
        raise ValueError(f"kl_weight={spec.kl_weight}: below 1 the loss needs labels")
    if spec.temperature != 1 and log_norm is None and not spec.tail.startswith("renormalize"):
        rule = "the teacher's normaliser there (linear_topk's temperatures), unless tail is renormalize or renormalize_both"
        raise ValueError(f"temperature={spec.temperature}: needs log_norm, {rule}")


def check_tensor(name: str, tensor: Tensor, form: str, kinds=FLOATS, like: Tensor | None = None) -> None:
    """Dimensions as in `form` ("[N,K]"), a type among `kinds`, the device of `like` and, if the form has an N, its length."""
    rows = None if like is None or form[1] != "N" else len(like)
    if tensor.dim() != form.count(",") + 1 or (rows is not None and len(tensor) != rows):
        rule = form if rows is None else f"{form} with N={rows}"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {rule}")
    if tensor.dtype not in kinds:
        raise ValueError(f"{name} has dtype {tensor.dtype}: one of {', '.join(map(str, kinds))}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {like.device} like the other inputs")


def check_linear(hidden: Tensor, weight: Tensor, softcap: float | None = None, *temperatures: float) -> torch.dtype:
    """hidden [N,D], weight [V,D], scalars checked; returns the dtype that enters the products (under autocast, its own)."""
    check_scalars(softcap, *temperatures)
    check_tensor("hidden", hidden, "[N,D]")
    check_tensor("weight", weight, "[V,D]", FLOATS, hidden)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N,D]={list(hidden.shape)} and weight [V,D]={list(weight.shape)}: D must agree")
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: one dtype (or autocast)")
    return hidden.dtype


def integers(name: str, values: Tensor, form: str, like: Tensor) -> Tensor:
    """Checked, contiguous; int32 and int64 as they are, others as int64: in a narrow type V and -1 themselves would wrap."""
    check_tensor(name, values, form, INTEGERS, like)
    return (values if values.dtype in (torch.int32, torch.int64) else values.long()).contiguous()


def checked_targets(spec: Spec, ids, log_probs, labels, log_norm, like: Tensor, wide: torch.dtype):
    """ids, log_probs and labels for the ops. Those log-probabilities over T are the teacher's at T: log_norm is in them."""
    check_spec(spec, labels, log_norm)
    ids, labels = integers("ids", ids, "[N,K]", like), None if labels is None else integers("labels", labels, "[N]", like)
    if log_probs.shape != ids.shape:
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}, ids {tuple(ids.shape)}: both must be [N,K]")
    check_tensor("log_probs", log_probs, "[N,K]", like=like)
    log_probs = log_probs.detach().contiguous()
    if log_norm is not None:
        check_tensor("log_norm", log_norm, "[N]", like=like)
        log_probs = log_probs.to(wide) - spec.temperature * log_norm.detach().to(wide)[:, None]
    return ids, log_probs, labels


def check_range(name: str, values: Tensor, bad: Tensor, rule: str) -> None:
    """At once, but on CUDA by a device-side assert that stalls no stream."""
    if values.device.type == "cuda":
        torch._assert_async(~bad.any(), f"{name}: {rule}")
    elif bad.any():
        raise ValueError(f"{name} holds {values[bad][0].item()}: {rule}")


def check_ids(ids: Tensor, V: int, name: str = "ids") -> None:
    check_range(name, ids, ids >= V, f"an id must be below the vocabulary's V={V} (negative = empty slot)")


def counted(source: Tensor, weight: Tensor | None, ids: Tensor, labels: Tensor | None, spec: Spec, wide: torch.dtype):
    """Checks the ranges of ids and labels; which rows count (None = all) and each one's share of the loss [N]."""
    V, kept = source.shape[1] if weight is None else len(weight), None
    check_ids(ids, V)
    if labels is not None:
        kept = labels != spec.ignore_index
        rule = f"a label must be in 0..{V - 1}, or ignore_index={spec.ignore_index}"
        check_range("labels", labels, ((labels < 0) | (labels >= V)) & kept, rule)
        if kept.device.type == "cpu" and kept.all():
            kept = None
    weights = source.new_ones(len(source), dtype=wide) if kept is None else kept.to(wide)
    return kept, weights / weights.sum().clamp(min=1) if spec.reduction == "mean" else weights


def check_backend(backend: str, dtype: torch.dtype, device: torch.device, K: int = 0) -> str:
    """The backend that `auto` means: the Triton kernels on CUDA where they can serve, else the chunked torch code."""
    check_name("backend", backend, BACKENDS)
    if backend not in ("auto", "triton"):
        return backend
    reason = None
    if isinstance(triton, SimpleNamespace):
        reason = "Triton is not installed"
    elif device.type != "cuda" and not INTERPRETED:
        reason = f"the tensors are on {device}: Triton needs CUDA (or TRITON_INTERPRET=1)"
    elif dtype == torch.float64:
        reason = "the kernels compute in fp32; float64 is for backend='torch' or 'reference'"
    elif K > MOST_SLOTS:
        reason = f"a row has more than {MOST_SLOTS} entries (K)"
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend='triton': {reason}; use backend='torch' or 'auto'")
    return "triton" if reason is None and (backend == "triton" or device.type == "cuda") else "torch"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: no log-sum-exp in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def whole_logits(source: Tensor, weight: Tensor | None, dtype: torch.dtype, softcap: float | None) -> Tensor:
    """[N,V], capped, of inputs rounded to `dtype` and widened (of logits where there is no weight): for the references."""
    source, weight = (None if part is None else part.to(dtype).to(compute_dtype(dtype)) for part in (source, weight))
    z = source if weight is None else F.linear(source, weight)
    return z if softcap is None else softcap * (z / softcap).tanh()


@contextmanager
def computing(like: Tensor):
    """No autocast inside, and the tensor's own device is the current one: Triton launches there."""
    with torch.autocast(like.device.type, enabled=False), torch.cuda.device_of(like):
        yield


def scaled(gradient: Tensor, by: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gradient * by in `dtype`: one pass into a narrower copy, else in place (which a second backward finds, and raises)."""
    if type(gradient) is not Tensor and by is not None:  # traced: no values, and the compiler sees to the memory
        return (gradient.to(by.dtype) * by).to(dtype)
    if by is None or (by.device.type == "cpu" and by.item() == 1):
        return gradient.to(dtype)
    by = by if by.device.type == "cpu" else by[None]  # there a 0-dim factor is first rounded to the gradient's type
    return torch.mul(gradient, by, out=gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype))
