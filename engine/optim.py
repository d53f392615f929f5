"""AdamW as GPT-2's training uses it, Muon beside it, and learning-rate schedules.

n matrices of one shape, R rows and C columns each.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from engine import UserError, check_choice, check_ranges


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"  # adamw | muon (the blocks' matrices by Muon, the rest by AdamW, one lr)
    lr: float | None = None  # peak; unset: 3.0e-3 at width 64, 6.0e-4 at 768 (fine-tuning: 5.0e-5)
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
        check_ranges(self, "weight_decay warmup_steps", "optim.", low=0)
        check_ranges(self, "grad_clip", "optim.", low=0, high=math.inf)
        check_ranges(self, "beta1 beta2 momentum", "optim.", low=0, below=1)
        check_ranges(self, "min_lr decay_fraction", "optim.", low=0, high=1)


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of `max_steps`."""
    # 1. linear warm-up
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps

    # 2. decay: the height above the floor, from 1 to 0 at the last step
    last_step = max_steps - 1
    height = 1.0
    if config.schedule == "wsd":
        decay_steps = max(1, round(config.decay_fraction * max_steps))
        height = min(1.0, (last_step - step) / decay_steps)
    elif config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, last_step - config.warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * progress))

    # 3. the height as a fraction of the peak
    floor = config.min_lr
    fraction = floor + (1 - floor) * height
    return config.lr * fraction


class Muon(torch.optim.Muon):
    """torch's Muon, but with the Newton-Schulz iteration on all matrices of one shape at once.

    One matrix at a time, as torch does it, costs a small model as much as the rest of its step.
    `found_inf`, which torch's fused AdamW reads too (0. or 1., on the device), leaves weights and
    momentum as they are where it is 1.
    Source: Jordan et al. 2024; the size of the step is that of Liu et al. 2025 (match_rms_adamw),
    for which AdamW's learning rate and decay fit.
    """

    found_inf = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for param in group["params"]:
                by_shape[param.shape].append(param)
            for params in by_shape.values():
                self.step_same_shape(params, group)

    def step_same_shape(self, params: list[torch.Tensor], group: dict) -> None:
        """One step of n matrices [R,C]."""
        lr = group["lr"]
        momentum = group["momentum"]
        buffers = []
        for param in params:
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param)
            buffers.append(state["momentum_buffer"])
        grad = torch.stack([param.grad for param in params])  # [n,R,C]
        buffer = torch.stack(buffers)  # [n,R,C]

        # a step to skip: the buffer as gradient leaves the buffer unchanged, lr 0 the weights
        if self.found_inf is not None:
            grad = torch.where(self.found_inf > 0, buffer, grad)
            lr = lr * (1 - self.found_inf)

        # Nesterov momentum
        buffer = buffer.lerp(grad, 1 - momentum)
        torch._foreach_copy_(buffers, buffer.unbind())
        grad = grad.lerp(buffer, momentum)

        # decay and update
        size = 0.2 * max(grad.shape[1:]) ** 0.5 * lr
        update = newton_schulz(grad, group) * size
        update = update.to(params[0].dtype)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(params, update.unbind())


def newton_schulz(matrices: torch.Tensor, group: dict) -> torch.Tensor:
    """[n,R,C] towards the nearest orthogonal matrices: singular values to about 0.7..1.2.

    It works in bfloat16 except on CPUs where that is slow.
    """
    a, b, c = group["ns_coefficients"]
    bf16_is_slow = matrices.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    x = matrices if bf16_is_slow else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT  # the smaller gram matrix

    norm = x.norm(dim=(1, 2), keepdim=True)
    x = x / norm.clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT  # [n,R,R]
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def make_optimizers(model: torch.nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW, with decay on tensors of two or more dimensions; before it Muon, if asked."""
    muon_params = []
    decayed = []
    undecayed = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if config.name == "muon" and name.startswith("h.") and param.dim() == 2:
            muon_params.append(param)
        elif param.dim() >= 2:
            decayed.append(param)
        else:
            undecayed.append(param)

    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)]
    if muon_params:
        muon = Muon(
            muon_params,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.insert(0, muon)
    return optimizers


class Optimizers:
    """A run's optimizers as one: float16 loss scaling, clipping, and undoing non-finite steps.

    Nothing here waits for the device. A loss or gradient that is not finite sets `failed`, a flag
    on the device, which leaves the weights as they are in this step and in all later ones, until
    the caller reads the loss and the norm and stops.

    scaled: scale the loss, for float16. There an infinite gradient alone is no failure: that one
    step is left out and the scale lowered.
    """

    def __init__(self, model: torch.nn.Module, config: OptimConfig, scaled: bool = False):
        self.optimizers = make_optimizers(model, config)
        self.params = []
        for group in self.param_groups():
            self.params += group["params"]
        self.grad_clip = config.grad_clip or math.inf
        self.scaled = scaled
        device = self.params[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.failed = torch.zeros((), device=device)

    def param_groups(self) -> list[dict]:
        groups = []
        for optimizer in self.optimizers:
            groups.extend(optimizer.param_groups)
        return groups

    def set_learning_rate(self, lr: float) -> None:
        for group in self.param_groups():
            group["lr"] = lr

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        """Clips, updates the weights, and clears the gradients.

        loss: the whole batch's mean. Returns the gradient's norm before clipping.
        """
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.grad_clip)

        # what is not finite, as flags on the device
        must_be_finite = loss if self.scaled else loss + norm
        self.failed = torch.maximum(self.failed, 1 - must_be_finite.isfinite().float())
        overflow = 1 - norm.isfinite().float()
        skip = torch.maximum(self.failed, overflow)

        for optimizer in self.optimizers:
            optimizer.found_inf = skip
            optimizer.step()
        self.zero_grad()
        if self.scaled:
            self.scaler.update()
        return norm

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"parts": states, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        states = state["parts"]
        if len(states) != len(self.optimizers):
            other = "adamw" if len(states) == 1 else "muon"
            raise UserError(f"resume: the checkpoint has the state of optim={other}; set that")
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            # The state is the checkpoint's, the settings (decay, betas) are this run's.
            for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True):
                for key in ours.keys() - {"params"}:
                    theirs[key] = ours[key]
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
