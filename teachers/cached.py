"""A teacher that was recorded by teachers.capture: a cache's blocks mapped to those of a text.

b sequences of T positions, N = b*T, K entries and n draws a position. A text's blocks have numbers;
the cache holds some of them, each in a slot: its place in the cache.
"""

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from data.batches import Batch, evenly_spaced, training_subset
from data.tokens import Tokens
from engine import UserError
from model.loss import SparseTargets
from teachers.access import ACCESS_KINDS, AccessConfig, TeacherOutput, to_sparse_targets
from teachers.cache import Cache, CacheSpec


def recorded_blocks(split: str, num_blocks: int, spec: CacheSpec) -> np.ndarray:
    """[slots] the number of the block in each slot, of a text of `num_blocks`.

    Training blocks are in the order in which a growing data.fraction takes them, held-out ones are
    those that an evaluation of as many tokens reads.
    """
    count = spec.blocks[split]
    if split == "train":
        return training_subset(num_blocks, count / num_blocks)
    return evenly_spaced(num_blocks, spec.block_size, count * spec.block_size)


class CachedTeacher:
    """What teachers.capture recorded of a teacher, as the targets of a student's batches."""

    model = None  # a cache speaks for it

    def __init__(
        self,
        path: str,
        tokens: Tokens,
        block_size: int,
        access: AccessConfig,
        temperature: float,
        vocab_size: int | None,
        tail: str | None = None,
    ):
        """UserError unless the cache at `path` was made of these tokens and holds what is asked.

        vocab_size: the student's, None where it is not known yet. tail: loss.tail.
        """
        if access.fresh:
            raise UserError(
                "access.fresh=true: a cache holds one drawing; set access.fresh=false,"
                " or teacher=online"
            )
        self.path = str(path)
        self.access = access
        self.cache = Cache(path)
        self.spec = self.cache.spec
        self.fingerprint = self.spec.digest.hex()

        # A tail that renormalizes cancels the temperature's normaliser: any recorded one will do.
        cancels = tail in ("renormalize", "renormalize_both")
        self.cache.check(
            access,
            tokenizer=tokens.tokenizer.fingerprint,
            tokens=tokens.identity,
            vocab_size=vocab_size,
            block_size=block_size,
            temperature=None if cancels else temperature,
        )
        self.temperature_column = 0
        if temperature in self.spec.temperatures:
            self.temperature_column = self.spec.temperatures.index(temperature)

        self.slots = {}  # of each split: [blocks] the slot of each block, -1 = not recorded
        for split in ("train", "val"):
            blocks = tokens.blocks(split, block_size)
            recorded = recorded_blocks(split, len(blocks), self.spec)
            self.slots[split] = np.full(len(blocks), -1)
            self.slots[split][recorded] = np.arange(len(recorded))
            # One shard of each split is compared token by token.
            shard = f"{split}-00000.bin"
            covered = recorded[: len(self.cache.shards[shard])]
            self.cache.check_tokens(shard, blocks.read(covered).ids)

    @property
    def has_topk(self) -> bool:
        """Whether it holds the teacher's top entries, to measure val_kl against."""
        return ACCESS_KINDS[self.spec.kind].entries in ("top_k", "all")

    def check_share(self, blocks: np.ndarray) -> None:
        """UserError unless all these training blocks are recorded."""
        slots = self.slots["train"]
        if (slots[blocks] < 0).any():
            recorded = self.spec.blocks["train"]
            raise UserError(
                f"data.fraction: the cache holds {recorded:,} of {len(slots):,} blocks;"
                f" set data.fraction={recorded / len(slots):.4g} or less, or capture more"
            )

    def check_held_out(self, eval_tokens: int) -> None:
        """UserError unless the blocks of an evaluation are recorded, where it measures val_kl."""
        slots = self.slots["val"]
        block_size = self.spec.block_size
        evaluated = evenly_spaced(len(slots), block_size, eval_tokens)
        recorded = slots[evaluated] >= 0
        if self.has_topk and not recorded.all():
            raise UserError(
                f"eval_tokens={eval_tokens}: the cache holds {recorded.sum():,} of the"
                f" {len(evaluated):,} held-out blocks that are evaluated;"
                f" set eval_tokens={self.spec.blocks['val'] * block_size}, or capture again"
            )

    def read(
        self, split: str, batch: Batch, k: int | None = None, n: int | None = None
    ) -> TeacherOutput:
        """What was recorded at a batch's N positions: the first k entries and n draws, or all."""
        slots = self.slots[split][batch.blocks.numpy()]
        return tree_map_only(np.ndarray, torch.tensor, self.cache.read(split, slots, k, n))

    def read_targets(self, batch: Batch) -> SparseTargets:
        """The targets [b,T,K] of a training batch, on the CPU; the prefetch thread calls it."""
        kind = ACCESS_KINDS[self.access.kind]
        k = kind.num_entries(self.access.k, self.spec.vocab_size)
        n = kind.num_draws(self.access.n)
        if self.spec.kind == "full":
            # Its entries are in the vocabulary's order.
            output = self.read("train", batch)
            if kind.entries != "all":
                log_probs, ids = output.log_probs.topk(k)  # [N,k]
                output = output._replace(ids=ids, log_probs=log_probs)
        else:
            output = self.read("train", batch, k, n)
        if not kind.final_weights:
            log_norm = output.log_norm[:, [self.temperature_column]]  # [N,1]
            output = output._replace(log_norm=log_norm)

        targets = to_sparse_targets(self.access.kind, output, batch.labels.flatten())
        if kind.entries == "all":  # the loss knows that log_probs are of the whole vocabulary
            targets = targets._replace(ids=None)
        return unflatten(targets, batch)

    def targets(self, batch: Batch) -> SparseTargets:
        """The targets of a batch's N positions, which `read_targets` has put into the batch."""
        return tree_map_only(torch.Tensor, lambda tensor: tensor.flatten(0, 1), batch.targets)

    def compile(self) -> None:
        """Nothing: there is no model."""

    def teacher_topk(self, batch: Batch) -> SparseTargets | None:
        """All entries [b,T,K] at T=1 of a held-out batch, the likeliest first; None without any.

        They are what val_kl is measured against, whatever `access` shows the student.
        """
        if not self.has_topk:
            return None
        output = self.read("val", batch)
        ids = output.ids.long()  # [N,K]
        log_probs = output.log_probs
        if self.spec.kind == "full":
            # In the vocabulary's order: the likeliest changes places with the first.
            top = log_probs.argmax(1, keepdim=True)  # [N,1]
            for entries in (ids, log_probs):
                likeliest = entries.gather(1, top)
                entries.scatter_(1, top, entries[:, :1].clone())
                entries[:, :1] = likeliest
        return unflatten(SparseTargets(ids, log_probs, None), batch)


def unflatten(targets: SparseTargets, batch: Batch) -> SparseTargets:
    """[N,...] -> [b,T,...]"""
    shape = batch.ids.shape
    return tree_map_only(torch.Tensor, lambda tensor: tensor.unflatten(0, shape), targets)
