"""Records what a teacher reveals of a text, once, for many students. One process, or many ranks by torchrun.

python -m teachers.capture teacher.path=RUN access=topk access.k=64 out=CACHE          # the text that the run was trained on
python -m teachers.capture teacher.path=LLAMA data=text data.path=my_texts/ data.tokenizer=LLAMA access=sampled out=CACHE
torchrun --standalone --nproc_per_node=8 -m teachers.capture teacher.path=RUN access=topk out=CACHE
python train.py teacher=cache teacher.path=CACHE                                   # learns from it

A capture that was killed goes on when it is run again, and ends in the same bytes. N = B*T positions a batch.
"""

import json
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from data.batches import evenly_spaced, training_subset
from data.corpora import DataConfig, run_block_size, run_data
from data.tokens import Tokens, prepare
from engine import UserError, check_choice, check_range, check_ranges
from engine import ranks as processes
from engine.checkpoint import resolve, write_atomic
from engine.cli import main
from engine.progress import ProgressPrinter
from model import ModelConfig
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.cache import Cache, CacheSpec, CacheWriter
from teachers.generate import write_first
from teachers.online import (
    RECORD,
    VAL,
    Teacher,
    check_recorded,
    load_teacher,
    query_teacher,
    slot_blocks,
)


@dataclass
class TeacherPath:
    path: str | None = (
        None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER; unset: the newest that train.py made under runs/
    )


@dataclass
class CaptureConfig:
    """What is recorded of whom, on which text, and where."""

    teacher: TeacherPath = field(default_factory=TeacherPath)
    access: AccessConfig = field(default_factory=AccessConfig)
    data: DataConfig | None = None  # unset: the text of the run at teacher.path
    block_size: int | None = (
        None  # the student's model.block_size, in tokens; unset: its run's, or the default
    )
    eval_tokens: int = 65536  # held-out tokens recorded too: the student's eval_tokens
    temperatures: list[float] = field(
        default_factory=list
    )  # [2.0]: of the student's loss, besides 1; 0.1..10
    batch_size: int = 16  # sequences a forward pass
    out: str | None = None  # the cache's folder
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # autocast: auto (bfloat16 on CUDA) | float32 | bfloat16

    def __post_init__(self):
        check_ranges(self, "block_size eval_tokens batch_size", low=1)
        for temperature in self.temperatures:
            check_range("temperatures", temperature, low=0.1, high=10)
        if set(self.temperatures) - {1} and ACCESS_KINDS[self.access.kind].final_weights:
            rule = f"access={self.access.kind} gives final weights, which exist at T=1 alone"
            raise UserError(
                f"temperatures={self.temperatures}: {rule}; leave temperatures unset, or set access=topk"
            )
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))


class Capture:
    """One rank's share of a cache."""

    def __init__(
        self, config: CaptureConfig, tokens: Tokens, teacher: Teacher, ranks: processes.Ranks
    ):
        self.config, self.tokens, self.ranks, self.wrote = (
            config,
            tokens,
            ranks,
            tokens.generated_by == teacher.fingerprint,
        )
        self.model = teacher.model.to(ranks.device).eval().requires_grad_(False)
        self.autocast = processes.autocast(ranks.device, config.dtype)
        T, access, data = config.block_size, config.access, config.data
        there = {split: len(tokens.blocks(split, T)) for split in ("train", "val")}
        chosen = {
            "train": len(training_subset(there["train"], data.fraction)),
            "val": len(evenly_spaced(there["val"], T, config.eval_tokens)),
        }
        prints = (teacher.fingerprint, tokens.tokenizer.fingerprint, tokens.identity)
        wanted = (access.k, access.n, access.seed, tuple(config.temperatures))
        self.spec = CacheSpec(access.kind, teacher.model.vocab_size, T, chosen, *prints, *wanted)
        text = f"data={data.name} data.path={data.path or 'null'}"
        self.names = {
            "tokenizer": f"{tokens.tokenizer.name}, {tokens.vocab_size:,} tokens",
            "tokens": text,
        }
        if ranks.device.type == "cuda":
            self.model.hidden = torch.compile(self.model.hidden)

    def run(self) -> None:
        spec, shards, ranks, out = self.spec, self.spec.shards(), self.ranks, self.config.out
        writer = CacheWriter(out, spec)
        todo = writer.missing(ranks.rank, ranks.world)
        total, left = (
            spec.block_size * sum(len(shards[name]) for name in names) for names in (shards, todo)
        )
        ranks.say(
            f"capture: access={spec.kind} of {total:,} positions, {spec.row.itemsize} bytes each,"
            f" {total * spec.row.itemsize / 1e6:,.1f} MB in {len(shards)} shards in {out}; {left:,} positions to do"
            + (" on this rank" if ranks.world > 1 else "")
        )
        pace = ProgressPrinter("capture", left, ranks.say)
        for name in todo:
            with writer.shard(name) as add:
                self.record(name.split("-")[0], shards[name], add, pace)
        ranks.share(None)
        if ranks.main:  # where the teacher was, so that training can ask it again
            record = {"teacher": str(Path(self.config.teacher.path).resolve())}
            with writer.writing(RECORD):
                write_atomic(Path(out) / RECORD, json.dumps(record))
            if not writer.finish(self.names):
                raise UserError(f"out={out}: shards are missing; run the same command again")

    @torch.no_grad()
    def record(self, split: str, slots: range, add, pace: ProgressPrinter) -> None:
        """Adds the blocks that a shard holds, in its order."""
        blocks = self.tokens.blocks(split, self.spec.block_size)
        chosen = slot_blocks(split, len(blocks), self.spec)[slots.start : slots.stop]
        access, temperatures, first = (
            self.config.access,
            self.spec.temperatures,
            VAL if split == "val" else 0,
        )
        for start in range(0, len(chosen), self.config.batch_size):
            batch = blocks.read(chosen[start : start + self.config.batch_size])
            part = batch.part(slice(None), self.ranks.device)
            with self.autocast():
                found = query_teacher(self.model, part, access, temperatures, self.wrote, first)
            add(batch.ids, *(each if each is None else each.cpu() for each in found))
            pace.add(batch.ids.numel())


def student_words(config: CaptureConfig) -> list[str]:
    """The overrides by which train.py learns from the cache all that is recorded."""
    access, kind = config.access, ACCESS_KINDS[config.access.kind]
    words = ["teacher=cache", f"teacher.path={config.out}", f"access={access.kind}"]
    words += [f"access.k={access.k}"] * kind.uses_k + [f"access.n={access.n}"] * kind.uses_n
    words += [f"loss.temperature={T}" for T in sorted(set(config.temperatures) - {1})[-1:]]
    words += (
        [f"model.block_size={config.block_size}"]
        if config.block_size != ModelConfig.block_size
        else []
    )
    words += (
        [f"eval_tokens={config.eval_tokens}"]
        if config.eval_tokens != CaptureConfig.eval_tokens
        else []
    )
    usual = asdict(DataConfig())
    changed = {key: value for key, value in asdict(config.data).items() if value != usual[key]}
    return words + [
        f"data{'' if key == 'name' else f'.{key}'}={value}" for key, value in changed.items()
    ]


def run(config: CaptureConfig) -> None:
    made = sorted(
        Path("runs").glob("teacher-*/checkpoints"), key=lambda folder: folder.stat().st_mtime
    )
    config.teacher.path = config.teacher.path or (str(made[-1].parent) if made else None)
    if config.teacher.path is None or config.out is None:
        missing = "teacher.path" if config.teacher.path is None else "out"
        raise UserError(
            f"{missing}=null: teachers.capture needs teacher.path=RUN (or a model's folder) and out=FOLDER"
        )
    ranks = processes.start(config.device)
    try:
        folder = resolve(config.teacher.path, "teacher.path")
        config.block_size = config.block_size or run_block_size(folder) or ModelConfig.block_size
        data = config.data = config.data or replace(
            run_data(config.teacher.path, folder, "teacher.path"), fraction=1.0
        )
        if data.name == "written" and data.path is None:
            data.path = write_first(data, config.teacher.path, config.block_size + 1, ranks)
        if ranks.main:
            prepare(data, say=ranks.say)
        ranks.share(None)
        tokens = prepare(data, say=lambda line: None, progress=False)
        tokens.check_length(config.block_size, ranks.say)
        teacher = load_teacher(
            config.teacher.path, tokens, config.block_size, config.access, "block_size"
        )
        check_recorded(config.access, teacher.model.vocab_size)
        Capture(config, tokens, teacher, ranks).run()
        if ranks.main:
            print(Cache(config.out, "out").describe())
            print(f"Next: python train.py {shlex.join(student_words(config))}")
    finally:
        processes.finish()


if __name__ == "__main__":
    main("capture", run, CaptureConfig)
