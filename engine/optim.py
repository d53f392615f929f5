"""AdamW as GPT-2's training uses it, and learning-rate schedules as pure functions of the step."""

import math
from dataclasses import dataclass

import torch

from engine import check_choice, check_range


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    lr: float = 1.0e-3  # peak learning rate
    min_lr: float = 0.1  # the last step's learning rate, as a fraction of lr
    weight_decay: float = 0.1  # decoupled, on matrices and embeddings only
    beta1: float = 0.9  # decay of the mean gradient, a step
    beta2: float = 0.95  # decay of the mean squared gradient, a step
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, linear decay) | constant
    warmup_steps: int = 50  # steps of linear warm-up
    decay_fraction: float = 0.2  # wsd: the last part of max_steps that decays

    def __post_init__(self):
        check_range("optim.lr", self.lr, above=0)
        check_range("optim.min_lr", self.min_lr, low=0, high=1)
        check_range("optim.weight_decay", self.weight_decay, low=0)
        check_range("optim.beta1", self.beta1, low=0, below=1)
        check_range("optim.beta2", self.beta2, low=0, below=1)
        check_range("optim.grad_clip", self.grad_clip, low=0)
        check_choice("optim.schedule", self.schedule, ("cosine", "wsd", "constant"))
        check_range("optim.warmup_steps", self.warmup_steps, low=0)
        check_range("optim.decay_fraction", self.decay_fraction, low=0, high=1)


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The rate of update number `step` (0 is the first) of `max_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.min_lr
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * max_steps))
        left = (max_steps - 1 - step) / decay
        return config.lr * (floor + (1 - floor) * min(1.0, left))
    done = (step - config.warmup_steps) / max(1, max_steps - 1 - config.warmup_steps)
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def make_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with decay on tensors of two or more dimensions; the fused update where the device has one."""
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in params if param.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [param for param in params if param.dim() < 2], "weight_decay": 0.0},
    ]
    fused = params[0].device.type in ("cuda", "cpu", "mps")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)
