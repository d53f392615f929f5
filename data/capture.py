"""Records what a teacher reveals of a text, once, for many students. One process, or many ranks by torchrun.

python -m data.capture teacher.path=RUN access=topk access.k=64 out=CACHE          # the text that the run was trained on
python -m data.capture teacher.path=LLAMA data=text data.path=my_texts/ data.tokenizer=LLAMA access=sampled out=CACHE
torchrun --standalone --nproc_per_node=8 -m data.capture teacher.path=RUN access=topk out=CACHE
python train.py teacher=cache teacher.path=CACHE                                   # learns from it

A capture that was killed goes on when it is run again, and ends in the same bytes. N = B*T positions a batch.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from conf.cli import main
from data.batches import drawn, spread
from data.corpora import DataConfig, run_data
from data.targets import Cache, CacheWriter, Facts
from data.teacher import RECORD, VAL, AccessConfig, check_access, load_model, positions, reveal, slot_blocks
from data.tokens import Tokens, prepare
from engine import UserError, check_choice, check_range
from engine import ranks as processes
from engine.checkpoint import fingerprint, resolve, write_atomic
from engine.logger import clock
from model import GPT


@dataclass
class TeacherPath:
    path: str | None = (
        None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER; unset: the newest that train.py trained first, under runs/
    )


@dataclass
class CaptureConfig:
    """What is recorded of whom, on which text, and where."""

    teacher: TeacherPath = field(default_factory=TeacherPath)
    access: AccessConfig = field(default_factory=AccessConfig)
    data: DataConfig | None = None  # unset: the text of the run at teacher.path
    block_size: int = 128  # the student's model.block_size, in tokens
    eval_tokens: int = 65536  # held-out tokens recorded too: the student's eval_tokens
    temperatures: list[float] = field(default_factory=list)  # at which the student's loss may be taken, besides 1
    batch_size: int = 16  # sequences a forward pass
    out: str | None = None  # the cache's folder
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # autocast: auto (bfloat16 on CUDA) | float32 | bfloat16

    def __post_init__(self):
        for key in ("block_size", "eval_tokens", "batch_size"):
            check_range(key, getattr(self, key), low=1)
        for temperature in self.temperatures:
            check_range("temperatures", temperature, above=0)
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))


def make_facts(config: CaptureConfig, tokens: Tokens, model: GPT) -> Facts:
    """What the cache will hold: determined by teacher, text and access alone."""
    T, access = config.block_size, config.access
    there = {split: len(tokens.blocks(split, T)) for split in ("train", "val")}
    fraction = config.data.fraction if config.data else 1.0
    chosen = {"train": len(drawn(there["train"], fraction)), "val": len(spread(there["val"], T, config.eval_tokens))}
    return Facts(
        access.kind,
        model.vocab_size,
        T,
        chosen,
        fingerprint(resolve(config.teacher.path, "teacher.path")),
        tokens.tokenizer.fingerprint,
        tokens.identity,
        access.k,
        access.n,
        access.seed,
        tuple(config.temperatures),
    )


class Capture:
    """One rank's share of a cache."""

    def __init__(self, config: CaptureConfig, tokens: Tokens, model: GPT, ranks: processes.Ranks):
        self.config, self.tokens, self.ranks = config, tokens, ranks
        self.model = model.to(ranks.device).eval().requires_grad_(False)
        self.autocast = processes.autocast(ranks.device, config.dtype)
        self.facts = make_facts(config, tokens, model)
        if ranks.device.type == "cuda":
            self.model.hidden = torch.compile(self.model.hidden)
        self.done, self.shown = 0, time.monotonic()
        self.started = self.shown

    def run(self) -> None:
        facts, writers = self.facts, {split: CacheWriter(self.config.out, self.facts, split) for split in self.facts.blocks}
        todo = [
            (split, name) for split, writer in writers.items() for name in writer.missing(self.ranks.rank, self.ranks.world)
        ]
        total, left = sum(map(len, facts.shards().values())), sum(len(facts.shards()[name]) for _, name in todo)
        size = total * facts.block_size * facts.row.itemsize
        self.ranks.say(
            f"capture: access={facts.kind} of {total * facts.block_size:,} positions, {facts.row.itemsize} bytes each,"
            f" {size / 1e6:,.1f} MB in {len(facts.shards())} shards in {self.config.out};"
            f" {left * facts.block_size:,} positions to do" + (" on this rank" if self.ranks.world > 1 else "")
        )
        for split, name in todo:
            with writers[split].shard(name) as add:
                self.record(split, facts.shards()[name], add, left)
        self.ranks.share(None)
        if self.ranks.main:  # where the teacher was, so that training can ask it again
            record = {"teacher": str(Path(self.config.teacher.path).resolve())}
            write_atomic(Path(self.config.out) / RECORD, json.dumps(record))
        if self.ranks.main and not writers["train"].finish():
            raise UserError(f"out={self.config.out}: shards are missing; run the same command again")

    @torch.no_grad()
    def record(self, split: str, slots: range, add, left: int) -> None:
        """Adds the blocks that a shard holds, in its order."""
        blocks, T = self.tokens.blocks(split, self.facts.block_size), self.facts.block_size
        chosen = slot_blocks(split, len(blocks), self.facts)[slots.start : slots.stop]
        for start in range(0, len(chosen), self.config.batch_size):
            batch = blocks.read(chosen[start : start + self.config.batch_size])
            part = batch.part(slice(None), self.ranks.device)
            written = part.labels.flatten() if self.tokens.written else None
            with self.autocast():
                hidden = self.model.hidden(part.ids, documents=part.documents).flatten(0, 1)  # [N,D]
                rows = positions(part.blocks, T) + (VAL if split == "val" else 0)
                found = reveal(hidden, self.model.head_weight, self.config.access, self.facts.temperatures, rows, written)
            add(batch.ids, *(each if each is None else each.cpu() for each in found))
            self.done += len(batch.ids)
            if time.monotonic() - self.shown > 10:
                self.shown = time.monotonic()
                rate = self.done / (self.shown - self.started)
                line = f"capture: {self.done / left:.0%} | {rate * T:,.0f} tok/s | ETA {clock((left - self.done) / rate)}"
                self.ranks.say(line)


def run(config: CaptureConfig) -> None:
    made = sorted(Path("runs").glob("teacher-*/checkpoints"), key=lambda folder: folder.stat().st_mtime)
    config.teacher.path = config.teacher.path or (str(made[-1].parent) if made else None)
    if config.teacher.path is None or config.out is None:
        missing = "teacher.path" if config.teacher.path is None else "out"
        raise UserError(f"{missing}=null: data.capture needs teacher.path=RUN (or a model's folder) and out=FOLDER")
    ranks = processes.start(config.device)
    try:
        folder = resolve(config.teacher.path, "teacher.path")
        data = config.data or run_data(config.teacher.path, folder, "teacher.path")
        if ranks.main:
            prepare(data, say=ranks.say)
        ranks.share(None)
        tokens = prepare(data, say=lambda line: None, progress=False)
        tokens.check_length(config.block_size, ranks.say)
        model = load_model(config.teacher.path, tokens, "teacher.path")
        if model.config.block_size < config.block_size:
            raise UserError(
                f"block_size={config.block_size}: the teacher reads at most {model.config.block_size}; set that or less"
            )
        check_access(config.access, model.vocab_size)
        Capture(config, tokens, model, ranks).run()
        if ranks.main:
            print(Cache(config.out, "out").describe())
            print(f"Next: python train.py teacher=cache teacher.path={Path(config.out)} access={config.access.kind}")
    finally:
        processes.finish()


if __name__ == "__main__":
    main("capture", run, CaptureConfig)
