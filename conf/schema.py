"""The whole configuration: this file only assembles the dataclasses that stand beside what they configure.

Every key of `python train.py KEY=VALUE` is a field below or of one of the classes named here.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from data.corpora import DataConfig
from engine import UserError, check_choice, check_ranges
from engine.logger import WandbConfig
from engine.optim import OptimConfig
from model import ModelConfig
from model.hf import config_of_pretrained
from model.loss import LossConfig
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.online import TeacherConfig


@dataclass
class Config:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    batch_size: int | None = (
        None  # sequences a step, over all ranks; unset: 2,048 tokens at width 64, 491,520 at 768
    )
    micro_batch_size: int | None = (
        None  # sequences a forward pass on one rank; unset: batch_size / ranks
    )
    max_steps: int = 600  # optimizer steps
    eval_every: int = 100  # steps between evaluations; the last step is always evaluated
    eval_tokens: int = 65536  # held-out tokens an evaluation reads
    save_every: int = 100  # steps between checkpoints; a new best at an evaluation is saved too
    keep: int = 2  # newest checkpoints kept; the best one is kept besides
    seed: int = 0  # of initialisation, batch order and dropout
    run_dir: str | None = None  # unset: runs/<time>
    resume: str = (
        "auto"  # auto (the newest good checkpoint of run_dir) | never | PATH of a checkpoint
    )
    compile: str = "auto"  # auto (on for CUDA) | on | off
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # autocast: auto (bfloat16 on CUDA) | float32 | bfloat16 | float16 (with a loss scaler)
    activation_checkpointing: bool = (
        False  # keep each block's input alone and compute it again: less memory, 1.3 x the FLOPs
    )
    toy: bool = False  # print what each access is worth on a teacher of known probabilities, and train nothing
    baseline: str = (
        "auto"  # train without the teacher too, to compare: auto (where it is made here) | on | off
    )

    def __post_init__(self):
        if (
            self.model.init and Path(self.model.init).is_dir()
        ):  # else it is refused when it is opened
            self.model = config_of_pretrained(
                self.model
            )  # the shape that is trained, recorded, and followed by batch_size
        n_embd = self.model.resolved().n_embd
        if (
            self.batch_size is None
        ):  # both through the demo's and nanoGPT's GPT-2 recipes; between and beyond a guess
            self.batch_size = max(
                1,
                2 ** round(math.log2(2048 * (n_embd / 64) ** 2.2 / self.model.block_size)),
            )
        if self.optim.lr is None:
            width = float(f"{3e-3 * (64 / n_embd) ** 0.648:.1e}")
            self.optim.lr = 5e-5 if self.model.init else width
        check_ranges(
            self,
            "batch_size micro_batch_size max_steps eval_every eval_tokens save_every keep",
            low=1,
        )
        check_ranges(self, "seed", low=0)
        check_choice("compile", self.compile, ("auto", "on", "off"))
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"))
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        check_choice("baseline", self.baseline, ("auto", "on", "off"))
        self.check_weights()
        if self.loss.name == "topk_kl" and self.teacher.kind == "none":
            raise UserError(
                "teacher=none: loss=topk_kl needs a teacher; set teacher=online, or loss=ce"
            )

    def check_weights(self) -> None:
        """Sets loss.tail where it is free; what is final takes no tail, no temperature and no other divergence."""
        loss = self.loss
        fixed = "truncate" if ACCESS_KINDS[self.access.kind].final_weights else None
        refused = {
            "tail": (
                loss.tail in (None, fixed),
                "and a tail would count the rest twice; leave loss.tail unset",
            ),
            "temperature": (loss.temperature == 1, "at 1 alone; set loss.temperature=1"),
            "divergence": (
                loss.divergence == "forward_kl",
                "for forward_kl alone; set that, or access=topk",
            ),
        }
        for key, (fits, rule) in refused.items():
            if fixed is not None and loss.name != "ce" and not fits:
                raise UserError(
                    f"loss.{key}={getattr(loss, key)}: access={self.access.kind} gives final weights, {rule}"
                )
        loss.tail = fixed or loss.tail or "ghost"
