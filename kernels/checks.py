"""What every op shares: its result, the loss that was asked for, and the checks of its arguments.

N rows (positions), D model width, V vocabulary, K teacher entries a row.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TAILS = ("ghost", "truncate", "renormalize", "renormalize_both", "smooth")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tv")
REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
)  # fmt: skip


class LossOutput(NamedTuple):
    """A loss op's result: scalars, or [N] with reduction="none". Only `loss` carries a gradient."""

    loss: Tensor  # (1-kl_weight)*ce + kl_weight*T^2*kl
    kl: Tensor  # the divergence itself, nats (tv: a fraction)
    ce: Tensor  # the label's cross-entropy at T=1, nats; 0 without labels
    teacher_mass: Tensor  # the teacher's probability on its K entries
    student_mass: Tensor  # the student's probability on them


class LossSpec(NamedTuple):
    """The loss that was asked for."""

    kl_weight: float = 1.0
    temperature: float = 1.0
    tail: str = "ghost"
    divergence: str = "forward_kl"
    beta: float = 0.5
    softcap: float | None = None
    teacher_softcap: float | None = None
    ignore_index: int = -100
    reduction: str = "mean"

    @property
    def renormalizes(self) -> bool:
        """Whether the teacher's normaliser cancels."""
        return self.tail in ("renormalize", "renormalize_both")


def check_name(key: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{key}={value!r}: one of {', '.join(names)}")


def check_positive(key: str, value: float | None) -> None:
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"{key}={value!r}: must be a finite number above 0")


def check_softcap(softcap: float | None, key: str = "softcap") -> None:
    if softcap is not None:
        check_positive(key, softcap)


def check_spec(spec: LossSpec, labels: Tensor | None) -> None:
    """Refuses options that are out of range or contradict each other."""
    check_softcap(spec.softcap)
    check_softcap(spec.teacher_softcap, "teacher_softcap")
    check_positive("temperature", spec.temperature)
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


def check_tensor(
    name: str, tensor: Tensor, form: str, dtypes=FLOATS, like: Tensor | None = None
) -> None:
    """Refuses a tensor that has not the dimensions of `form` ("[N,K]") or no dtype of `dtypes`.

    It must be on the device of `like`, another input, and have as many rows if the form has an N.
    """
    rows = len(like) if like is not None and form.startswith("[N") else None
    if tensor.dim() != form.count(",") + 1 or (rows is not None and len(tensor) != rows):
        rule = form if rows is None else f"{form} with N={rows}"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {rule}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}: one of {', '.join(map(str, dtypes))}")
    if like is not None and tensor.device != like.device:
        rule = f"must be on {like.device} like the other inputs"
        raise ValueError(f"{name} is on {tensor.device}: {rule}")


def check_linear(hidden: Tensor, weight: Tensor, prefix: str = "") -> torch.dtype:
    """Checks hidden [N,D] and weight [V,D]; returns the dtype of their products."""
    check_tensor(f"{prefix}hidden", hidden, "[N,D]")
    check_tensor(f"{prefix}weight", weight, "[V,D]", FLOATS, hidden)
    if hidden.shape[1] != weight.shape[1]:
        shapes = (
            f"{prefix}hidden [N,D]={list(hidden.shape)}, {prefix}weight [V,D]={list(weight.shape)}"
        )
        raise ValueError(f"{shapes}: D must agree")
    if 0 in weight.shape:
        raise ValueError(f"{prefix}weight [V,D]={list(weight.shape)}: V and D must be at least 1")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        dtypes = f"{prefix}hidden is {hidden.dtype}, {prefix}weight {weight.dtype}"
        raise ValueError(f"{dtypes}: one dtype (or autocast)")
    return hidden.dtype


def as_indices(name: str, values: Tensor, form: str, like: Tensor) -> Tensor:
    """Checked and contiguous. Narrow types become int64: V and -1 themselves would wrap in them."""
    check_tensor(name, values, form, INTEGERS, like)
    if values.dtype not in (torch.int32, torch.int64):
        values = values.long()
    return values.contiguous()


def check_range(name: str, values: Tensor, bad: Tensor, rule: str) -> None:
    """Raises at once, but on CUDA by a device-side assert, which stalls no stream."""
    if values.device.type == "cuda":
        torch._assert_async(~bad.any(), f"{name}: {rule}")
    elif bad.any():
        raise ValueError(f"{name} holds {values[bad][0].item()}: {rule}")


def check_ids(ids: Tensor, V: int, name: str = "ids") -> None:
    rule = f"an id must be below the vocabulary's V={V} (negative = empty slot)"
    check_range(name, ids, ids >= V, rule)


def check_labels(labels: Tensor, V: int, ignore_index: int) -> None:
    outside = ((labels < 0) | (labels >= V)) & (labels != ignore_index)
    rule = f"a label must be in 0..{V - 1}, or ignore_index={ignore_index}"
    check_range("labels", labels, outside, rule)
