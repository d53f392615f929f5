"""What every op shares: its result, its refusals, its reductions.

N rows (positions), D width, V vocabulary, K teacher entries a row.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TAILS = ("ghost", "truncate", "renormalize", "renormalize_both", "smooth")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tv")
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "triton", "torch", "reference")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class LossOutput(NamedTuple):
    """A loss op's result, each field a scalar, or [N] with reduction="none". Only `loss` carries a gradient."""

    loss: Tensor  # (1-kl_weight)*ce + kl_weight*T^2*kl
    kl: Tensor  # the divergence itself, nats (tv: a fraction)
    ce: Tensor  # label cross-entropy at T=1, nats; 0 without labels
    teacher_mass: Tensor  # the teacher's probability on its K entries
    student_mass: Tensor  # the student's probability there


class Spec(NamedTuple):
    """The loss that was asked for, checked."""

    kl_weight: float = 1.0
    temperature: float = 1.0
    tail: str = "ghost"
    divergence: str = "forward_kl"
    beta: float = 0.5
    softcap: float | None = None
    ignore_index: int = -100
    reduction: str = "mean"


def refuse(broken: bool, message: str) -> None:
    if broken:
        raise ValueError(message)


def check_name(key: str, value: str, names: tuple[str, ...]) -> None:
    refuse(value not in names, f"{key}={value!r}: one of {', '.join(names)}")


def check_scalars(temperature: float, softcap: float | None) -> None:
    refuse(not (temperature > 0 and math.isfinite(temperature)), f"temperature={temperature}: must be above 0 and finite")
    refuse(softcap is not None and not softcap > 0, f"softcap={softcap}: must be above 0, or None for no cap")


def check_spec(spec: Spec, labels: Tensor | None, log_norm: Tensor | None) -> None:
    """Refuses options that are out of range or contradict each other."""
    check_scalars(spec.temperature, spec.softcap)
    check_name("tail", spec.tail, TAILS)
    check_name("divergence", spec.divergence, DIVERGENCES)
    check_name("reduction", spec.reduction, REDUCTIONS)
    refuse(not 0 <= spec.kl_weight <= 1, f"kl_weight={spec.kl_weight}: must be in 0..1")
    refuse(not 0 < spec.beta < 1, f"beta={spec.beta}: must be inside the open interval (0, 1)")
    wrong = spec.tail != "ghost" and spec.divergence != "forward_kl"
    refuse(
        wrong,
        f"divergence={spec.divergence!r} with tail={spec.tail!r}: this tail takes forward_kl only; tail='ghost' takes any",
    )
    refuse(spec.kl_weight < 1 and labels is None, f"kl_weight={spec.kl_weight}: below 1 the loss needs labels")
    needs = spec.temperature != 1 and log_norm is None and not spec.tail.startswith("renormalize")
    refuse(
        needs,
        f"temperature={spec.temperature}: needs log_norm, the teacher's normaliser at that temperature"
        " (linear_topk(..., temperatures=...) gives it), unless tail is renormalize or renormalize_both",
    )


def check_floats(name: str, tensor: Tensor, dims: int, backend: str) -> None:
    allowed = FLOATS if backend == "triton" else (*FLOATS, torch.float64)
    refuse(tensor.dim() != dims, f"{name} has shape {tuple(tensor.shape)}: must have {dims} dimensions")
    refuse(tensor.dtype not in allowed, f"{name} has dtype {tensor.dtype}: one of {', '.join(map(str, allowed))}")


def check_linear(hidden: Tensor, weight: Tensor, backend: str) -> torch.dtype:
    """hidden [N,D] and weight [V,D] checked; returns the dtype of their products (autocast's own where it is on)."""
    check_floats("hidden", hidden, 2, backend)
    check_floats("weight", weight, 2, backend)
    shapes = f"hidden [N,D]={list(hidden.shape)} and weight [V,D]={list(weight.shape)}"
    refuse(hidden.shape[1] != weight.shape[1], f"{shapes}: D must agree")
    refuse(hidden.device != weight.device, f"hidden on {hidden.device}, weight on {weight.device}: one device")
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    refuse(hidden.dtype != weight.dtype, f"hidden is {hidden.dtype}, weight {weight.dtype}: one dtype (or autocast)")
    return hidden.dtype


def check_range(name: str, values: Tensor, bad: Tensor, rule: str) -> None:
    """At once on a CPU; elsewhere a device-side assert that stalls no stream."""
    if values.device.type == "cpu":
        refuse(bool(bad.any()), f"{name} holds {values[bad][0].item() if bad.any() else ''}: {rule}")
    else:
        torch._assert_async(~bad.any(), f"{name}: {rule}")


def check_ids(ids: Tensor, N: int, V: int) -> None:
    refuse(ids.dim() != 2 or ids.shape[0] != N, f"ids has shape {tuple(ids.shape)}: must be [N,K] with N={N}")
    refuse(ids.dtype not in INTEGERS, f"ids has dtype {ids.dtype}: must be an integer type")
    check_range("ids", ids, ids >= V, f"an id must be below the vocabulary's V={V} (negative = empty slot)")


def check_targets(ids: Tensor, log_probs: Tensor, log_norm: Tensor | None, N: int, V: int) -> None:
    check_ids(ids, N, V)
    refuse(
        log_probs.shape != ids.shape,
        f"log_probs has shape {tuple(log_probs.shape)}, ids {tuple(ids.shape)}: both must be [N,K]",
    )
    refuse(not log_probs.is_floating_point(), f"log_probs has dtype {log_probs.dtype}: must be floating point")
    wrong = log_norm is not None and (log_norm.shape != (N,) or not log_norm.is_floating_point())
    refuse(wrong, f"log_norm is {log_norm is not None and (tuple(log_norm.shape), log_norm.dtype)}: must be [N] floats, N={N}")


def check_labels(labels: Tensor | None, N: int, V: int, ignore_index: int) -> None:
    if labels is None:
        return
    refuse(labels.shape != (N,), f"labels has shape {tuple(labels.shape)}: must be [N] with N={N}")
    refuse(labels.dtype not in INTEGERS, f"labels has dtype {labels.dtype}: must be an integer type")
    bad = ((labels < 0) | (labels >= V)) & (labels != ignore_index)
    check_range("labels", labels, bad, f"a label must be in 0..{V - 1}, or ignore_index={ignore_index}")


def check_backend(backend: str) -> str:
    """`auto` is the chunked torch code on every device; the Triton kernels have their own issue."""
    check_name("backend", backend, BACKENDS)
    refuse(backend == "triton", "backend='triton': this version has no Triton kernels yet; use backend='torch' or 'auto'")
    return "torch" if backend == "auto" else backend


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32: no log-sum-exp in half precision."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_weights(kept: Tensor, reduction: str) -> Tensor:
    """[N] weight of each row in the reduced loss: 0 in ignored rows; mean divides by the kept rows (1 where none is)."""
    return kept / kept.sum().clamp(min=1) if reduction == "mean" else kept


def reduce(values: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """[N] values to what `reduction` asks for; an ignored row reads 0 whatever stood there."""
    values = torch.where(weights > 0, values * weights, 0.0)
    return values if reduction == "none" else values.sum()
