"""The online teacher: it reads the same tokens as the student and tells what `access` allows.

N = B*T positions, K entries a position, V vocabulary.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from data.tokenizer import FILE_NAME, HF_NAME, Tokenizer
from data.tokens import Tokens
from engine import UserError, check_choice, check_range
from engine.checkpoint import fingerprint, resolve
from kernels import linear_topk
from model import GPT, ModelConfig
from model.objective import Targets

FULL_LIMIT = 16384  # access=full keeps V entries a position: past this vocabulary that is a logit matrix by another name


@dataclass
class ShapeConfig:
    """The size of a teacher that is trained first; of the student's kind in everything else."""

    n_layer: int = 2  # transformer blocks
    n_head: int | None = None  # unset: derived like the student's
    n_embd: int | None = None  # unset: derived like the student's


@dataclass
class TeacherConfig:
    """Whom the student learns from."""

    kind: str = "online"  # none | online (the teacher runs beside the student)
    path: str | None = None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER; unset: one is trained first, under runs/, and reused
    model: ShapeConfig = field(default_factory=ShapeConfig)  # the size of the one that is trained first
    max_steps: int = 900  # its optimizer steps, on all the training text
    lr: float = 4.0e-3  # its peak learning rate

    def __post_init__(self):
        check_choice("teacher", self.kind, ("none", "online"))
        check_range("teacher.max_steps", self.max_steps, low=1)
        check_range("teacher.lr", self.lr, above=0)


@dataclass
class AccessConfig:
    """What the teacher reveals at each position."""

    kind: str = "topk"  # topk (its k likeliest tokens with their log-probabilities) | full (every token)
    k: int = 32  # entries a position

    def __post_init__(self):
        check_choice("access", self.kind, ("topk", "full"))
        check_range("access.k", self.k, low=1)


class Teacher(NamedTuple):
    """A loaded teacher and where it came from."""

    model: GPT
    path: str
    fingerprint: str  # SHA-256 over its weights


class OnlineTeacher:
    """A frozen model that scores the student's own tokens."""

    def __init__(self, model: GPT, access: AccessConfig, temperature: float, autocast):
        self.model = model.eval().requires_grad_(False)
        self.k = model.vocab_size if access.kind == "full" else access.k
        self.temperature = temperature
        self.autocast = autocast

    @torch.no_grad()
    def targets(self, ids: torch.Tensor, documents: torch.Tensor | None = None) -> Targets:
        """ids [B,T] -> the teacher's K entries at each of the N positions, and its normaliser at the loss's temperature."""
        with self.autocast():
            hidden = self.model.hidden(ids, documents=documents).flatten(0, 1)  # [N,D]
            top, log_probs, log_norm = linear_topk(hidden, self.model.head_weight, self.k, temperatures=(self.temperature,))
        return Targets(top, log_probs, log_norm[:, 0])


def load_model(path: str | Path, tokens: Tokens, key: str) -> GPT:
    """The model at `path`, refused in one line naming `key` unless it reads the tokens at hand."""
    folder = resolve(path, key)
    model = GPT.from_pretrained(folder, key)
    theirs = Tokenizer.load(folder) if any((folder / name).is_file() for name in (FILE_NAME, HF_NAME)) else None
    ours, rule = tokens.tokenizer, f"set data.tokenizer={path}"
    if theirs is not None and ours.name != "ids" and theirs.vocabulary != ours.vocabulary:
        raise UserError(
            f"{key}={path}: it reads tokens of {theirs.name} (vocabulary {theirs.vocab_size}), the data are tokens of"
            f" {ours.name} (vocabulary {ours.vocab_size}); {rule}"
        )
    if model.vocab_size < ours.vocab_size:
        raise UserError(f"{key}={path}: its vocabulary is {model.vocab_size}, the data's {ours.vocab_size}; {rule}")
    return model


def make_student(config: ModelConfig, tokens: Tokens) -> GPT:
    """A new model, or the one at model.init in fp32; refused where it has not the rows for the tokens or not the context."""
    if config.init is None:
        rows = config.vocab_size or tokens.vocab_size
        if rows < tokens.vocab_size:
            rule = f"the tokenizer has {tokens.vocab_size} tokens; set as many rows or more, or null"
            raise UserError(f"model.vocab_size={rows}: {rule}")
        return GPT(config, rows)
    student = load_model(config.init, tokens, "model.init").float()
    student.set_dropout(config.dropout)
    if student.config.block_size < config.block_size:
        most = student.config.block_size
        raise UserError(f"model.block_size={config.block_size}: {config.init} reads at most {most} tokens; set that or less")
    return student


def check_rows(teacher: GPT, path: str, student: GPT) -> None:
    """UserError where the teacher has tokens that the student lacks; padded rows of the student are no outcomes of its."""
    if teacher.vocab_size > student.vocab_size:
        raise UserError(
            f"teacher.path={path}: its vocabulary is {teacher.vocab_size}, the student's {student.vocab_size}; set"
            f" model.vocab_size={teacher.vocab_size} where the rest is padding or extra tokens, else data.tokenizer to its own"
        )


def load_teacher(path: str | Path, tokens: Tokens, block_size: int, access: AccessConfig) -> Teacher:
    """The teacher at `path`, refused unless it fits tokenizer, vocabulary, context and access."""
    model = load_model(path, tokens, "teacher.path")
    if model.config.block_size < block_size:
        raise UserError(
            f"model.block_size={block_size}: the teacher at {path} reads at most {model.config.block_size} tokens; set"
            f" model.block_size={model.config.block_size} or less"
        )
    check_access(access, tokens.vocab_size)
    return Teacher(model, str(path), fingerprint(resolve(path, "teacher.path")))


def check_access(access: AccessConfig, vocab_size: int) -> None:
    if access.kind == "topk" and access.k > vocab_size:
        raise UserError(f"access.k={access.k}: the vocabulary has {vocab_size} tokens; set access.k={vocab_size} or less")
    if access.kind == "full" and vocab_size > FULL_LIMIT:
        raise UserError(
            f"access=full: {vocab_size} entries a position are a whole logit matrix (limit {FULL_LIMIT}); set access=topk"
            " access.k=64"
        )
