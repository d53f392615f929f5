"""The whole configuration, assembled from the dataclasses that stand beside what they configure.

Every key of `python train.py KEY=VALUE` is a field below or of one of the classes named here.
"""

import math
from dataclasses import dataclass, field, fields

from data.corpora import DataConfig
from engine import UserError, check_choice, check_ranges
from engine.logger import WandbConfig
from engine.optim import OptimConfig
from model import ModelConfig
from model.hf import config_of_pretrained
from model.loss import LossConfig
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.online import TeacherConfig

POSITIVE_INTEGERS = "batch_size micro_batch_size max_steps eval_every eval_tokens save_every keep"


@dataclass
class Config:
    """One training run.

    Made in Python rather than by the command line, it needs a call of `resolve`.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    batch_size: int | None = None  # sequences a step over all ranks; unset: from the model's width
    micro_batch_size: int | None = None  # sequences a forward pass; unset: batch_size / ranks
    max_steps: int = 600  # optimizer steps
    eval_every: int = 100  # steps between evaluations; the last step is always evaluated
    eval_tokens: int = 65536  # held-out tokens an evaluation reads
    save_every: int = 100  # steps between checkpoints; a new best at an evaluation is saved too
    keep: int = 2  # newest checkpoints kept; the best one is kept besides
    seed: int = 0  # of initialisation, batch order and dropout
    run_dir: str | None = None  # unset: runs/<time>
    resume: str = "auto"  # auto (the newest good checkpoint of run_dir) | never | PATH
    compile: str = "auto"  # auto (on for CUDA) | on | off
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # autocast: auto (bfloat16 on CUDA) | float32 | bfloat16 | float16
    activation_checkpointing: bool = False  # recompute each block: less memory, 1.3 x the FLOPs
    experiment: str | None = None  # the file of conf/experiment/ that set the others; names an arm
    toy: bool = False  # print what each access is worth on a known teacher, and train nothing
    baseline: str = "auto"  # also train without the teacher: auto (if it is made here) | on | off

    def __post_init__(self):
        check_ranges(self, POSITIVE_INTEGERS, low=1)
        check_ranges(self, "seed", low=0)
        check_choice("compile", self.compile, ("auto", "on", "off"))
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"))
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        check_choice("baseline", self.baseline, ("auto", "on", "off"))
        self.set_tail()
        if self.loss.name == "topk_kl" and self.teacher.kind == "none":
            raise UserError(
                "teacher=none: loss=topk_kl needs a teacher; set teacher=online, or loss=ce"
            )

    def set_tail(self) -> None:
        """Sets loss.tail; UserError for a loss that final weights do not have."""
        loss = self.loss
        if not ACCESS_KINDS[self.access.kind].final_weights:
            loss.tail = loss.tail or "ghost"
            return
        allowed = {"tail": (None, "truncate"), "temperature": (1.0,), "divergence": ("forward_kl",)}
        for key, values in allowed.items():
            value = getattr(loss, key)
            if loss.name != "ce" and value not in values:
                raise UserError(
                    f"loss.{key}={value}: access={self.access.kind} gives final weights, which take"
                    f" {values[-1]} alone; leave loss.{key} out, or set access=topk"
                )
        loss.tail = "truncate"

    def resolve(self, overrides: list[str]) -> None:
        """Derives what is unset: the shape from the model at model.init, batch_size and optim.lr.

        overrides: the KEY=VALUE that the user wrote. Raises UserError where one of them contradicts
        the model at model.init, or where there is none.
        """
        if self.model.init is not None:
            asked = self.model
            self.model = config_of_pretrained(asked)
            check_shape(asked, self.model, overrides)

        # Both curves pass through the demo's and nanoGPT's GPT-2 recipes; elsewhere they are a
        # guess.
        width = self.model.resolved().n_embd
        if self.batch_size is None:
            tokens_per_step = 2048 * (width / 64) ** 2.2
            exponent = round(math.log2(tokens_per_step / self.model.block_size))
            self.batch_size = max(1, 2**exponent)
        if self.optim.lr is None and self.model.init is not None:
            self.optim.lr = 5e-5
        elif self.optim.lr is None:
            self.optim.lr = float(f"{3e-3 * (64 / width) ** 0.648:.1e}")


def check_shape(asked: ModelConfig, model: ModelConfig, overrides: list[str]) -> None:
    """UserError for an override of the shape `asked` that the model to start from does not have."""
    for override in overrides:
        key = override.split("=")[0]
        for each in fields(asked):
            value = getattr(asked, each.name)
            actual = getattr(model, each.name)
            chosen = key == f"model.{each.name}"
            if key == "model":  # what the chosen option sets; zero_init is for new weights only
                chosen = value != each.default and each.name != "zero_init"
            if chosen and value != actual:
                raise UserError(
                    f"{override}: model.init={model.init} has model.{each.name}={actual};"
                    f" leave {override} out"
                )
