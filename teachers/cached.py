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
from model import GPT
from model.loss import SparseTargets
from teachers.access import ACCESS_KINDS, TeacherOutput, to_sparse_targets
from teachers.cache import Cache, CacheSpec, hash_tokens, shard_name


def recorded_blocks(split: str, num_blocks: int, spec: CacheSpec) -> np.ndarray:
    """[slots] the number of the block in each slot, of a text of `num_blocks`.

    Training blocks are in the order in which a growing data.fraction takes them, held-out ones are
    those that an evaluation of as many tokens reads.
    """
    count = spec.blocks[split]
    if split == "train":
        return training_subset(num_blocks, count / num_blocks)
    return evenly_spaced(num_blocks, spec.block_size, count * spec.block_size)


def check_served(cache: Cache, tokens: Tokens, config) -> None:
    """UserError for the first setting of a run (train.py's Config) that the cache cannot serve."""
    spec = cache.spec
    access = config.access
    block_size = config.model.block_size
    temperature = config.loss.temperature

    recorded = ACCESS_KINDS[spec.kind]
    served = [name for name, kind in ACCESS_KINDS.items() if recorded.includes(kind)]
    kind = ACCESS_KINDS[access.kind]
    k = kind.num_entries(access.k, spec.vocab_size)
    n = kind.num_draws(access.n)
    # Draws from the tail lie outside exactly the recorded entries.
    same_k = k == spec.k or kind.draws != "tail"
    most_k = f"up to {spec.k}" if kind.draws != "tail" else spec.k
    # A tail that renormalizes cancels the temperature's normaliser: any recorded one will do.
    cancels = config.loss.tail in ("renormalize", "renormalize_both")

    temperatures = " or ".join(map(str, spec.temperatures))
    temperatures += f" (captured with temperatures=[{temperature}] it has that too)"

    settings = (  # the run's, whether it is served, the capture's
        (
            "data.tokenizer",
            tokens.tokenizer.fingerprint == spec.tokenizer,
            cache.names["tokenizer"],
        ),
        ("data", tokens.identity == spec.tokens, cache.names["tokens"]),
        (f"model.block_size={block_size}", block_size == spec.block_size, spec.block_size),
        (f"access={access.kind}", access.kind in served, " or ".join(served)),
        (f"access.k={access.k}", same_k and k <= spec.k, most_k),
        (f"access.n={access.n}", n <= spec.n, f"up to {spec.n}"),
        (
            f"access.seed={access.seed}",
            kind.draws is None or access.seed in (None, spec.seed),
            spec.seed,
        ),
        (f"access.fresh={access.fresh}", not access.fresh, False),
        (
            f"loss.temperature={temperature}",
            cancels or temperature in spec.temperatures,
            temperatures,
        ),
    )
    for setting, is_served, captured in settings:
        if not is_served:
            raise UserError(
                f"{setting}: the cache {cache.folder} has {captured}; set that, or capture again"
            )


class CachedTeacher:
    """What teachers.capture recorded of a teacher, as the targets of a student's batches."""

    model = None  # a cache speaks for it

    def __init__(self, tokens: Tokens, config):
        """UserError unless the cache at teacher.path was made of these tokens and serves the run.

        config: train.py's Config.
        """
        self.path = config.teacher.path
        self.access = config.access
        self.cache = Cache(self.path)
        self.spec = self.cache.spec
        self.fingerprint = self.spec.digest
        check_served(self.cache, tokens, config)
        self.temperature_column = 0
        if config.loss.temperature in self.spec.temperatures:
            self.temperature_column = self.spec.temperatures.index(config.loss.temperature)

        self.slots = {}  # of each split: [blocks] the slot of each block, -1 = not recorded
        for split in ("train", "val"):
            blocks = tokens.blocks(split, self.spec.block_size)
            recorded = recorded_blocks(split, len(blocks), self.spec)
            self.slots[split] = np.full(len(blocks), -1)
            self.slots[split][recorded] = np.arange(len(recorded))
            # One shard of each split is compared token by token.
            shard = shard_name(split, 0)
            covered = recorded[: len(self.cache.shards[shard])]
            covered_hash = hash_tokens(blocks.read(covered).ids)
            if covered_hash != self.cache.records[shard]["tokens"]:
                raise UserError(
                    f"data: the cache's {shard} covers other tokens; set data as in the capture,"
                    " or capture again"
                )

        # The blocks that the run reads are recorded, of held-out ones those that val_kl needs.
        needed = {}
        if config.loss.name != "ce":
            num_blocks = len(self.slots["train"])
            needed["train"] = training_subset(num_blocks, config.data.fraction)
        if self.has_topk:
            num_blocks = len(self.slots["val"])
            needed["val"] = evenly_spaced(num_blocks, self.spec.block_size, config.eval_tokens)
        for split, blocks in needed.items():
            recorded = self.slots[split][blocks] >= 0
            if not recorded.all():
                raise UserError(
                    f"data.fraction={config.data.fraction} eval_tokens={config.eval_tokens}:"
                    f" the cache has {recorded.sum():,} of these {len(blocks):,} {split} blocks;"
                    " set both as in the capture, or capture again"
                )

    def fit(self, student: GPT) -> None:
        """UserError where a token of the cache's is none of the student's."""
        recorded = self.spec.vocab_size
        if recorded > student.vocab_size:
            raise UserError(
                f"teacher.path={self.path}: the cache has {recorded} tokens, {student.vocab_size}"
                " of them are possible here (older captures recorded a model's padding rows too);"
                " capture again, or set teacher=online with the teacher's own path"
            )

    @property
    def has_topk(self) -> bool:
        """Whether it holds the teacher's top entries, to measure val_kl against."""
        return ACCESS_KINDS[self.spec.kind].entries in ("top_k", "all")

    def read(
        self,
        split: str,
        batch: Batch,
        k: int | None = None,
        n: int | None = None,
    ) -> TeacherOutput:
        """What was recorded at a batch's N positions: the first k entries and n draws, or all.

        Of whole distributions, in the vocabulary's order, there are no ids.
        """
        slots = self.slots[split][batch.blocks.numpy()]
        output = self.cache.read(split, slots, k, n)
        if self.spec.kind == "full":
            output = output._replace(ids=None)
        return tree_map_only(np.ndarray, torch.from_numpy, output)

    def read_likeliest(self, batch: Batch, k: int) -> TeacherOutput:
        """The k likeliest entries [N,k] of whole distributions, a sequence at a time."""
        outputs = []
        for row in range(len(batch.blocks)):
            whole = self.read("train", batch.select([row]))  # [T,V]
            log_probs, ids = whole.log_probs.topk(k)  # [T,k]
            outputs.append((ids, log_probs, whole.log_norm))
        ids, log_probs, log_norm = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return TeacherOutput(ids, log_probs, log_norm)

    def read_targets(self, batch: Batch) -> SparseTargets:
        """The targets [b,T,K] of a training batch, on the CPU; the prefetch thread calls it."""
        kind = ACCESS_KINDS[self.access.kind]
        k = kind.num_entries(self.access.k, self.spec.vocab_size)
        n = kind.num_draws(self.access.n)
        if self.spec.kind == "full" and kind.entries != "all":
            output = self.read_likeliest(batch, k)
        else:
            output = self.read("train", batch, k, n)
        if not kind.final_weights:
            log_norm = output.log_norm[:, [self.temperature_column]]  # [N,1]
            output = output._replace(log_norm=log_norm)

        targets = to_sparse_targets(self.access.kind, output, batch.labels.flatten())
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
        log_probs = output.log_probs  # [N,K]
        if self.spec.kind == "full":
            # The likeliest changes places with the first.
            ids = torch.arange(self.spec.k).repeat(len(log_probs), 1)
            rows = torch.arange(len(ids))
            top = log_probs.argmax(1)  # [N]
            for entries in (ids, log_probs):
                first = entries[:, 0].clone()
                entries[:, 0] = entries[rows, top]
                entries[rows, top] = first
        else:
            ids = output.ids.long()
        return unflatten(SparseTargets(ids, log_probs, None), batch)


def unflatten(targets: SparseTargets, batch: Batch) -> SparseTargets:
    """[N,...] -> [b,T,...]"""
    shape = batch.ids.shape
    return tree_map_only(torch.Tensor, lambda tensor: tensor.unflatten(0, shape), targets)
