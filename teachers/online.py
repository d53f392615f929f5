"""The teacher, beside the student or as a cache of what it said: it tells what `access` allows.

N = B*T positions, K entries a position, V vocabulary.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.batches import Batch, Blocks, evenly_spaced
from data.tokenizer import Tokenizer
from data.tokens import Tokens
from engine import UserError, check_choice, check_range
from engine.checkpoint import fingerprint, resolve
from kernels import linear_log_probs, linear_sample, linear_topk
from model import GPT, ModelConfig
from model.loss import SparseTargets, TeacherStates
from teachers.access import ACCESS_KINDS, AccessConfig, TeacherOutput, to_sparse_targets
from teachers.cache import Cache, CacheSpec

VAL = 2**40  # the position numbers of held-out text begin here, so that its draws are others
RECORD = "capture.json"  # in a cache: where its teacher was
AT_HAND = 10**9  # bytes of weights up to which a teacher is asked again before training
AGREEMENT = 0.9  # least share of the probability, or of the tokens, that must come again: bfloat16 leaves .97 or more
FULL_LIMIT = 16384  # a cache of access=full keeps V entries a position: past this that is a logit matrix by another name


@dataclass
class ShapeConfig:
    """The size of a teacher that is trained first; of the student's kind in everything else."""

    n_layer: int = 2  # transformer blocks
    n_head: int | None = None  # unset: derived like the student's
    n_embd: int | None = None  # unset: derived like the student's


@dataclass
class TeacherConfig:
    """Whom the student learns from."""

    kind: str = "online"  # none | online (the teacher runs beside the student) | cache (teachers.capture recorded it)
    path: str | None = (
        None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER | CACHE; unset: one is trained first and reused
    )
    model: ShapeConfig = field(
        default_factory=ShapeConfig
    )  # the size of the one that is trained first
    max_steps: int = 900  # its optimizer steps, on all the training text
    lr: float = 4.0e-3  # its peak learning rate

    def __post_init__(self):
        check_choice("teacher", self.kind, ("none", "online", "cache"))
        check_range("teacher.max_steps", self.max_steps, low=1)
        check_range("teacher.lr", self.lr, above=0)
        if self.kind == "cache" and self.path is None:
            rule = "teacher=cache needs the folder that `python -m teachers.capture ... out=FOLDER` wrote"
            raise UserError(f"teacher.path=null: {rule}")


class Teacher(NamedTuple):
    """A loaded teacher and where it came from."""

    model: GPT | None  # None: a cache speaks for it
    path: str
    fingerprint: str  # SHA-256 over its weights, or over a cache's spec
    cache: "CachedTeacher | None" = None


def query_teacher(
    model: GPT,
    batch: Batch,
    access: AccessConfig,
    temperatures: tuple[float, ...],
    wrote=False,
    first=0,
) -> TeacherOutput:
    """What a teacher shows at the N positions of a batch; its logits never exist whole.

    wrote: the text is this teacher's own, each next token its draw. first: the number of the split's first position.
    """
    hidden, head = (
        model.hidden(batch.ids, document_ids=batch.document_ids).flatten(0, 1),
        model.head_weight,
    )  # [N,D], [V,D]
    kind = ACCESS_KINDS[access.kind]
    ids = None
    log_probs = None
    log_norm = None
    draws = None
    if kind.entries is not None:
        k = kind.num_entries(access.k, len(head))
        ids, log_probs, log_norm = linear_topk(hidden, head, k, temperatures=temperatures)
    if kind.draws is not None:
        n = kind.num_draws(access.n)
        if wrote and n == 1 and kind.draws == "any":
            draws = (
                batch.labels.flatten()[:, None].clamp(min=-1).int()
            )  # -1: there is no next token
        else:
            T, exclude = batch.ids.shape[1], ids if kind.draws == "tail" else None
            places = torch.arange(T, device=batch.blocks.device)
            rows = batch.blocks[:, None] * T + places + first  # [B,T], which draws depend on
            draws, _ = linear_sample(
                hidden, head, n, seed=access.seed, exclude=exclude, rows=rows.flatten()
            )
    return TeacherOutput(ids, log_probs, log_norm, draws)


class OnlineTeacher:
    """A frozen model that scores the student's own tokens."""

    path, fingerprint = "", ""

    def compile(self):
        self.targets = torch.compile(self.targets)

    def teacher_topk(self, batch):
        return None

    def __init__(
        self, model: GPT, access: AccessConfig, temperature: float, autocast, wrote: bool = False
    ):
        self.model = model.eval().requires_grad_(False)
        self.access, self.temperature, self.autocast, self.wrote = (
            access,
            temperature,
            autocast,
            wrote,
        )

    @torch.no_grad()
    def targets(self, batch: Batch) -> SparseTargets | TeacherStates:
        """The teacher's entries at each of the N = B*T positions of a batch; what makes all of them under access=full."""
        with self.autocast():
            if self.access.kind == "full":
                hidden = self.model.hidden(batch.ids, document_ids=batch.document_ids)
                return TeacherStates(hidden.flatten(0, 1), self.model.head_weight)
            found = query_teacher(self.model, batch, self.access, (self.temperature,), self.wrote)
        return to_sparse_targets(self.access.kind, found, batch.labels.flatten())


def slot_blocks(split: str, n_blocks: int, spec: CacheSpec) -> np.ndarray:
    """The number of the block that each place of a cache holds: of training blocks first those of the smallest fraction."""
    if split == "train":
        return np.random.default_rng(0).permutation(n_blocks)[: spec.blocks[split]]
    return np.arange(spec.blocks[split]) * n_blocks // spec.blocks[split]


class CachedTeacher:
    """What teachers.capture recorded of a teacher, as targets of whole batches; everything that does not fit is refused at once."""

    def __init__(
        self,
        path: str,
        tokens: Tokens,
        block_size: int,
        access: AccessConfig,
        temperature: float,
        rows: int | None,
        tail=None,
    ):
        self.cache, self.access, self.temperature = Cache(path), access, temperature
        self.path, self.model, self.fingerprint = str(path), None, self.cache.spec.digest.hex()
        if access.fresh:
            raise UserError(
                "access.fresh=true: a cache holds one drawing; set access.fresh=false, or teacher=online"
            )
        cancels = (tail or "").startswith("renormalize")  # of temperature's normaliser, then
        asked = None if cancels else temperature
        prints = {"tokenizer": tokens.tokenizer.fingerprint, "tokens": tokens.identity}
        self.cache.check(
            access, **prints, vocab_size=rows, block_size=block_size, temperature=asked
        )
        self.spec, self.slots = self.cache.spec, {}
        for split in ("train", "val"):
            blocks = tokens.blocks(split, block_size)
            chosen = slot_blocks(split, len(blocks), self.spec)
            self.slots[split] = np.full(len(blocks), -1, np.int64)
            self.slots[split][chosen] = np.arange(len(chosen))
            first = f"{split}-00000.bin"
            self.cache.check_tokens(first, blocks.read(chosen[: len(self.cache.shards[first])]).ids)
        self.check_alignment(
            tokens.blocks("train", block_size), tokens.generated_by == self.spec.teacher
        )

    def compile(self):
        pass

    def check_alignment(self, blocks: Blocks, wrote: bool) -> None:
        """Where the teacher is at hand (and small), what it says of two blocks is what was recorded of them."""
        try:
            folder = resolve(json.loads((self.cache.folder / RECORD).read_text())["teacher"])
        except (OSError, ValueError, KeyError):
            return
        size, spec = sum(file.stat().st_size for file in folder.glob("*.safetensors")), self.spec
        if size > AT_HAND or fingerprint(folder) != spec.teacher:
            return
        model, slots = GPT.from_pretrained(folder).eval(), np.unique([0, spec.blocks["train"] - 1])
        batch, stored = (
            blocks.read(slot_blocks("train", len(blocks), spec)[slots]),
            self.stored("train", slots),
        )
        access = AccessConfig(spec.kind, max(1, spec.k), max(1, spec.n), spec.seed)
        with torch.no_grad():
            if (
                stored.log_probs is not None
            ):  # 1 - the total variation of the recorded entries' probabilities
                hidden = model.hidden(batch.ids, document_ids=batch.document_ids).flatten(
                    0, 1
                )  # [N,D]
                now = linear_log_probs(hidden, model.head_weight, stored.ids)[0].exp() * (
                    stored.ids >= 0
                )
                same = 1 - (now - stored.log_probs.exp()).abs().sum(1).mean().item() / 2
            else:
                found = query_teacher(model, batch, access, spec.temperatures, wrote)
                ours, theirs = (
                    part.ids if part.draws is None else part.draws for part in (found, stored)
                )
                same = (theirs[:, :, None] == ours[:, None, :]).any(2).float().mean().item()
        if same < AGREEMENT:
            rule = f"the teacher at {folder}, asked again, agrees with {same:.0%} of what was recorded of two blocks"
            raise UserError(
                f"teacher.path={self.cache.folder}: {rule}; the cache and the data are not aligned, capture again"
            )

    def check_share(self, blocks: np.ndarray) -> None:
        """UserError unless all these training blocks are recorded."""
        if (self.slots["train"][blocks] < 0).any():
            held, there = self.spec.blocks["train"], len(self.slots["train"])
            rule = f"the cache holds {held:,} of {there:,} blocks"
            raise UserError(
                f"data.fraction: {rule}; set data.fraction={held / there:.4g} or less, or capture more"
            )

    def check_held_out(self, eval_tokens: int) -> None:
        """UserError unless all held-out blocks that an evaluation reads are recorded, where val_kl is measured on them."""
        size, slots = self.spec.block_size, self.slots["val"]
        held = slots[evenly_spaced(len(slots), size, eval_tokens)] >= 0
        if self.has_topk and not held.all():
            rule = f"the cache holds {held.sum():,} of the {len(held):,} held-out blocks that are evaluated"
            fix = f"set eval_tokens={self.spec.blocks['val'] * size}, or capture again with this"
            raise UserError(f"eval_tokens={eval_tokens}: {rule}; {fix}")

    @property
    def has_topk(self) -> bool:
        """Whether it holds the teacher's top entries, to measure val_kl against."""
        return ACCESS_KINDS[self.spec.kind].entries in ("top_k", "all")

    def stored(
        self, split: str, slots: np.ndarray, k: int | None = None, n: int | None = None
    ) -> TeacherOutput:
        sort = k is not None and self.spec.kind == "full"  # it is in the vocabulary's order
        found = self.cache.read(split, slots, None if sort else k, n)
        found = TeacherOutput(
            *(part if part is None else torch.from_numpy(np.array(part)) for part in found)
        )
        return (
            found._replace(**dict(zip(("log_probs", "ids"), found.log_probs.topk(k), strict=True)))
            if sort
            else found
        )

    def read(self, split: str, batch: Batch) -> TeacherOutput:
        """What was recorded of a batch's positions, as far as `access` goes."""
        kind, known = ACCESS_KINDS[self.access.kind], self.spec.temperatures
        k = None if kind.entries == "all" else kind.num_entries(self.access.k, 0)
        found = self.stored(
            split, self.slots[split][batch.blocks.numpy()], k, kind.num_draws(self.access.n)
        )
        at = (
            known.index(self.temperature) if self.temperature in known else 0
        )  # any will do where it cancels
        return found if found.log_norm is None else found._replace(log_norm=found.log_norm[:, [at]])

    def targets(self, batch: Batch) -> SparseTargets:
        """What `read_targets` put into a micro-batch, of its N = B*T positions."""
        return batch.map(lambda tensor: tensor.flatten(0, 1)).targets

    def read_targets(self, batch: Batch) -> SparseTargets:
        """Of a training batch's sequences, each [B,T,...]."""
        found = to_sparse_targets(
            self.access.kind, self.read("train", batch), batch.labels.flatten()
        )
        if self.access.kind == "full":  # in the vocabulary's order
            found = found._replace(ids=None)
        return SparseTargets(
            *(part if part is None else part.unflatten(0, batch.ids.shape) for part in found)
        )

    def teacher_topk(self, batch: Batch) -> SparseTargets | None:
        """All the entries [B,T,K] at T=1 recorded of a held-out batch, to measure against, the likeliest first; None without.

        They are the same whatever `access` shows the student.
        """
        if not self.has_topk:
            return None
        ids, log_probs, *_ = self.stored("val", self.slots["val"][batch.blocks.numpy()])  # [N,K]
        first = log_probs.argmax(1, keepdim=True)
        for part in (ids, log_probs):  # full is in the vocabulary's order
            front = part.gather(1, first)
            part.scatter_(1, first, part[:, :1].clone())
            part[:, :1] = front
        return SparseTargets(
            ids.long().unflatten(0, batch.ids.shape), log_probs.unflatten(0, batch.ids.shape), None
        )


def load_model(path: str | Path, tokens: Tokens, key: str, fix: str | None = None) -> GPT:
    """The model at `path`, refused in one line naming `key`, and what helps, unless it reads the tokens at hand."""
    folder = resolve(path, key)
    model = GPT.from_pretrained(folder, key)
    theirs, ours, rule = Tokenizer.find(folder), tokens.tokenizer, None
    if theirs is not None and ours.name != "ids" and theirs.vocabulary != ours.vocabulary:
        said = f"it reads tokens of {theirs.name} (vocabulary {theirs.vocab_size})"
        rule = f"{said}, the data are tokens of {ours.name} (vocabulary {ours.vocab_size})"
    elif model.vocab_size < ours.vocab_size:
        rule = f"its vocabulary is {model.vocab_size}, the data's {ours.vocab_size}"
    if rule:
        raise UserError(f"{key}={path}: {rule}; {fix or f'set data.tokenizer={path}'}")
    return model


def make_student(config: ModelConfig, tokens: Tokens) -> GPT:
    """A new model, or the one at model.init in fp32; refused where it has not the rows for the tokens or not the context."""
    if config.init is None:
        rows = config.vocab_size or tokens.vocab_size
        if rows < tokens.vocab_size:
            rule = (
                f"the tokenizer has {tokens.vocab_size} tokens; set as many rows or more, or null"
            )
            raise UserError(f"model.vocab_size={rows}: {rule}")
        return GPT(config, rows)
    student = load_model(config.init, tokens, "model.init").float()
    student.set_dropout(config.dropout)
    most = student.config.block_size
    if most < config.block_size:
        raise UserError(
            f"model.block_size={config.block_size}: {config.init} reads at most {most} tokens; set that or less"
        )
    return student


def check_rows(teacher: GPT, path: str, student: GPT) -> None:
    """UserError where the teacher has tokens that the student lacks; padded rows of the student are no outcomes of its."""
    rows = teacher.vocab_size
    if rows > student.vocab_size:
        rule = f"its vocabulary is {rows}, the student's {student.vocab_size}"
        fix = f"set model.vocab_size={rows} where the rest is padding or extra tokens, else data.tokenizer to its own"
        raise UserError(f"teacher.path={path}: {rule}; {fix}")


def open_teacher(path: str, tokens: Tokens, config, device, autocast):
    """The teacher or the cache at `path`, refused unless it fits what `config` (train.py's) asks of it."""
    model, access, loss = config.model, config.access, config.loss
    if config.teacher.kind != "cache":
        found = load_teacher(path, tokens, model.block_size, access)
        wrote = tokens.generated_by == found.fingerprint
        teacher = OnlineTeacher(found.model.to(device), access, loss.temperature, autocast, wrote)
        teacher.path, teacher.fingerprint = found.path, found.fingerprint
        return teacher
    rows = None if model.init else model.vocab_size or tokens.vocab_size
    return CachedTeacher(path, tokens, model.block_size, access, loss.temperature, rows, loss.tail)


def load_teacher(
    path: str | Path, tokens: Tokens, block_size: int, access: AccessConfig, key="model.block_size"
) -> Teacher:
    """The teacher at `path`, refused unless it fits tokenizer, vocabulary, context (which `key` sets) and access."""
    model = load_model(path, tokens, "teacher.path")
    most = model.config.block_size
    if most < block_size:
        raise UserError(
            f"{key}={block_size}: the teacher at {path} reads at most {most} tokens; set {key}={most} or less"
        )
    check_access(access, model.vocab_size)
    return Teacher(model, str(path), fingerprint(resolve(path, "teacher.path")))


def check_access(access: AccessConfig, vocab_size: int) -> None:
    if ACCESS_KINDS[access.kind].uses_k and access.k > vocab_size:
        raise UserError(
            f"access.k={access.k}: the vocabulary has {vocab_size} tokens; set access.k={vocab_size} or less"
        )


def check_recorded(access: AccessConfig, vocab_size: int) -> None:
    """UserError where a cache of this access would be a whole logit matrix."""
    if access.kind == "full" and vocab_size > FULL_LIMIT:
        rule = f"a cache of {vocab_size} entries a position is a whole logit matrix (limit {FULL_LIMIT})"
        raise UserError(
            f"access=full: {rule}; set access=topk access.k=64, or train with teacher=online"
        )
