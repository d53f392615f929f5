"""AdamW as GPT-2's training uses it, Muon for matrices beside it, and learning-rate schedules as pure functions of the step."""

import math
from dataclasses import dataclass

import torch

from engine import check_choice, check_ranges


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"  # adamw | muon (the blocks' matrices by Muon, the rest by AdamW, both at the same lr)
    lr: float | None = (
        None  # peak learning rate; unset: 3.0e-3 at width 64, 6.0e-4 at 768 (fine-tuning: 5.0e-5)
    )
    min_lr: float = 0.1  # the last step's learning rate, as a fraction of lr
    weight_decay: float = 0.1  # decoupled, on matrices and embeddings only
    beta1: float = 0.9  # decay of the mean gradient, a step
    beta2: float = 0.95  # decay of the mean squared gradient, a step
    momentum: float = 0.95  # Muon's, a step
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, linear decay) | constant
    warmup_steps: int = 50  # steps of linear warm-up
    decay_fraction: float = 0.2  # wsd: the last part of max_steps that decays

    def __post_init__(self):
        check_choice("optim", self.name, ("adamw", "muon"))
        check_choice("optim.schedule", self.schedule, ("cosine", "wsd", "constant"))
        check_ranges(self, "lr", "optim.", above=0)
        check_ranges(self, "weight_decay grad_clip warmup_steps", "optim.", low=0)
        check_ranges(self, "beta1 beta2 momentum", "optim.", low=0, below=1)
        check_ranges(self, "min_lr decay_fraction", "optim.", low=0, high=1)


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The rate of update number `step` (0 is the first) of `max_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    height, left = (
        1.0,
        max_steps - 1 - step,
    )  # height above the floor, 0..1; steps left after this one
    if config.schedule == "wsd":
        height = min(1.0, left / max(1, round(config.decay_fraction * max_steps)))
    elif config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, max_steps - 1 - config.warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.min_lr + (1 - config.min_lr) * height)


class Muon(torch.optim.Muon):
    """torch's Muon with its Newton-Schulz iteration run on all matrices of one shape at once.

    One matrix at a time, as torch does it, costs a small model as much as the rest of its step. `found_inf`, set on the
    optimizer as torch's fused AdamW reads it (0. or 1., on the device), leaves weights and momentum as they are.
    Source: Jordan et al. 2024; the step's size as in Liu et al. 2025, so that AdamW's learning rate and decay fit.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for shape in dict.fromkeys(param.shape for param in params):
                self.step_together([param for param in params if param.shape == shape], group)

    def step_together(self, params: list[torch.Tensor], group: dict) -> None:
        """One step of n matrices [R,C] of one shape."""
        buffers = [
            self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
            for param in params
        ]
        grad, buffer = (
            torch.stack([param.grad for param in params]),
            torch.stack(buffers),
        )  # [n,R,C]
        rate, skip = group["lr"], getattr(self, "found_inf", None)
        if skip is not None:
            grad, rate = torch.where(skip > 0, buffer, grad), rate * (1 - skip)
        buffer = buffer.lerp(grad, 1 - group["momentum"])
        torch._foreach_copy_(buffers, list(buffer.unbind()))
        update = newton_schulz(grad.lerp(buffer, group["momentum"]), group) * (
            0.2 * max(grad.shape[1:]) ** 0.5 * rate
        )
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(params, list(update.to(params[0].dtype).unbind()))


def newton_schulz(update: torch.Tensor, group: dict) -> torch.Tensor:
    """[n,R,C] matrices towards their nearest orthogonal ones: singular values to about .7..1.2; bf16 where that is fast."""
    a, b, c = group["ns_coefficients"]
    slow = update.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    x = update if slow else update.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizers(model: torch.nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW with decay on tensors of two or more dimensions, its fused update; before it Muon for the blocks' matrices."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    muon = [
        param
        for name, param in named
        if config.name == "muon" and name.startswith("h.") and param.dim() == 2
    ]
    params = [param for _, param in named if not any(param is matrix for matrix in muon)]
    groups = [
        {
            "params": [param for param in params if param.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [param for param in params if param.dim() < 2], "weight_decay": 0.0},
    ]
    fused = params[0].device.type in ("cuda", "cpu", "mps")
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    return [Muon(muon, adjust_lr_fn="match_rms_adamw", **options), adamw] if muon else [adamw]


class Optimizers:
    """A run's optimizers as one: loss scaling for float16, clipping, steps that a non-finite loss or gradient leaves undone.

    Nothing here waits for the device: what would stop a run is a flag there, which undoes this step and all later ones until
    the caller reads it. Under float16 an infinite gradient alone is no failure: that step is left out and the scale lowered.
    """

    def __init__(self, model: torch.nn.Module, config: OptimConfig, scaled: bool = False):
        self.parts, self.clip, self.scaled = (
            make_optimizers(model, config),
            config.grad_clip or math.inf,
            scaled,
        )
        self.params = [
            param for part in self.parts for group in part.param_groups for param in group["params"]
        ]
        self.scaler = torch.amp.GradScaler(self.params[0].device.type, enabled=scaled)
        self.failed = torch.zeros((), device=self.params[0].device)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def set_learning_rate(self, rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        """One update at that learning rate; `loss` is the whole batch's. Returns the gradient's norm before clipping."""
        for part in self.parts:
            self.scaler.unscale_(part)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        fatal = loss if self.scaled else loss + norm
        self.failed = torch.maximum(self.failed, 1 - fatal.isfinite().float())
        skip = torch.maximum(self.failed, 1 - norm.isfinite().float())
        for part in self.parts:
            part.found_inf = skip
            part.step()
        self.zero_grad()
        if self.scaled:
            self.scaler.update()
        return norm

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> dict:
        return {
            "parts": [part.state_dict() for part in self.parts],
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
