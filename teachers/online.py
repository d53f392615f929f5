"""The teacher that runs beside the student, and everything that opens a teacher.

B sequences of T positions, N = B*T, D the teacher's width, V vocabulary, K top entries and n draws
a position.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.batches import Batch
from data.tokens import Tokens
from engine import UserError, check_choice, check_range, check_ranges
from engine.checkpoint import fingerprint, resolve
from kernels import linear_sample, linear_topk
from model import GPT
from model.loss import SparseTargets, TeacherStates
from teachers.access import ACCESS_KINDS, AccessConfig, TeacherOutput, to_sparse_targets
from teachers.cached import CachedTeacher


@dataclass
class TeacherModelConfig:
    """The size of a teacher that is trained first; in all else it is like the student."""

    n_layer: int = 2  # transformer blocks
    n_head: int | None = None  # unset: derived like the student's
    n_embd: int | None = None  # unset: derived like the student's

    def __post_init__(self):
        check_ranges(self, "n_layer n_head n_embd", "teacher.model.", low=1)


@dataclass
class TeacherConfig:
    """Whom the student learns from."""

    kind: str = "online"  # none | online (beside the student) | cache (teachers.capture made it)
    path: str | None = None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER | CACHE; unset: trained first
    model: TeacherModelConfig = field(default_factory=TeacherModelConfig)
    max_steps: int = 900  # of one that is trained first, on all the training text
    lr: float = 4.0e-3  # its peak learning rate

    def __post_init__(self):
        check_choice("teacher", self.kind, ("none", "online", "cache"))
        check_range("teacher.max_steps", self.max_steps, low=1)
        check_range("teacher.lr", self.lr, above=0)
        if self.kind == "cache" and self.path is None:
            raise UserError("teacher.path=null: teacher=cache needs what teachers.capture wrote")


def query_teacher(
    model: GPT,
    batch: Batch,
    access: AccessConfig,
    temperatures: tuple[float, ...],
    generated_by_teacher: bool = False,
    first_position: int = 0,
) -> TeacherOutput:
    """Asks a teacher about the N positions of a batch; never materialises the [N,V] logits.

    Args:
        temperatures: those whose normaliser is returned.
        generated_by_teacher: the text is this teacher's own, so each next token is its draw.
        first_position: number of the split's first position. A draw is a function of access.seed
            and the position's number, whatever the batch.
    """
    kind = ACCESS_KINDS[access.kind]
    hidden = model.hidden(batch.ids, document_ids=batch.document_ids).flatten(0, 1)  # [N,D]
    head = model.head_weight  # [V,D]
    softcap = model.config.logit_softcap

    # The top entries, the likeliest first.
    ids = log_probs = log_norm = None
    num_entries = min(kind.num_entries(access.k, len(head)), len(head))
    if num_entries:  # [N,K], [N,K], [N,temperatures]
        ids, log_probs, log_norm = linear_topk(
            hidden, head, num_entries, temperatures=temperatures, softcap=softcap
        )

    # The draws, from the whole distribution or from what lies outside the top entries.
    draws = None
    num_draws = kind.num_draws(access.n)
    if generated_by_teacher and num_draws == 1 and kind.draws == "any":
        # -1 (an empty slot) where the text has no next token.
        draws = batch.labels.flatten()[:, None].clamp(min=-1).int()  # [N,1]
    elif num_draws:
        T = batch.ids.shape[1]
        places = torch.arange(T, device=batch.blocks.device)
        positions = batch.blocks[:, None] * T + places + first_position  # [B,T]
        draws, _ = linear_sample(  # [N,n]
            hidden,
            head,
            num_draws,
            seed=access.seed or 0,
            exclude=ids if kind.draws == "tail" else None,
            softcap=softcap,
            rows=positions.flatten(),
        )
    return TeacherOutput(ids, log_probs, log_norm, draws)


@dataclass(eq=False)
class OnlineTeacher:
    """A frozen model that scores the student's own batches."""

    model: GPT
    access: AccessConfig
    temperature: float
    autocast: Callable  # makes the context in which the model runs
    generated_by_teacher: bool = False  # the text is this teacher's own
    path: str = ""
    fingerprint: str = ""  # of its weights

    def __post_init__(self):
        self.model.eval().requires_grad_(False)

    def fit(self, student: GPT) -> None:
        """Leaves the teacher those of its tokens that the student has.

        A new student ends its texts with the tokens that end the teacher's.
        """
        self.model.limit_vocabulary(student.vocab_size)
        student.eos = student.eos or self.model.eos

    def compile(self) -> None:
        self.targets = torch.compile(self.targets)

    @torch.no_grad()
    def targets(self, batch: Batch) -> SparseTargets | TeacherStates:
        """The targets of a batch's N positions; under access=full what the loss makes them from."""
        with self.autocast():
            if self.access.kind == "full":
                hidden = self.model.hidden(batch.ids, document_ids=batch.document_ids)  # [B,T,D]
                softcap = self.model.config.logit_softcap
                return TeacherStates(hidden.flatten(0, 1), self.model.head_weight, softcap)
            output = query_teacher(
                self.model, batch, self.access, (self.temperature,), self.generated_by_teacher
            )
        return to_sparse_targets(self.access.kind, output, batch.labels.flatten())

    def teacher_topk(self, batch: Batch) -> None:
        """Nothing: an evaluation asks the model itself."""


def open_teacher(
    path: str, tokens: Tokens, config, device: torch.device, autocast: Callable
) -> OnlineTeacher | CachedTeacher:
    """Opens the teacher or the cache at `path` for a run.

    Args:
        config: train.py's Config.
        autocast: makes the context in which the teacher runs.

    Raises UserError where it does not fit the run.
    """
    if config.teacher.kind == "cache":
        return CachedTeacher(tokens, config)
    block_size = config.model.block_size
    model = load_model(path, tokens, block_size=block_size, partner=config.model.init).to(device)
    weights = fingerprint(resolve(path, "teacher.path"))
    return OnlineTeacher(
        model,
        config.access,
        config.loss.temperature,
        autocast,
        tokens.generated_by == weights,
        path,
        weights,
    )


def load_model(
    path: str | Path,
    tokens: Tokens,
    key: str = "teacher.path",
    block_size: int = 1,
    partner: str | None = None,
) -> GPT:
    """The model at `path` with the tokens that it shares with the data.

    UserError naming `key` unless it reads block_size of them; partner: see Tokens.check_model.
    """
    model = GPT.from_pretrained(resolve(path, key), key)
    model.limit_vocabulary(tokens.check_model(path, model.vocab_size, key, partner))
    longest = model.config.block_size
    if longest < block_size:
        raise UserError(
            f"{key}={path}: it reads at most {longest} tokens; set model.block_size (a capture's"
            f" block_size) to {longest} or less"
        )
    return model
