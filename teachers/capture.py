"""Records what a teacher reveals of a text, once, for many students.

python -m teachers.capture teacher.path=RUN access=topk access.k=64 out=CACHE
    # of the text that the run was trained on
python -m teachers.capture teacher.path=LLAMA data=text data.path=texts/ data.tokenizer=LLAMA out=C
torchrun --standalone --nproc_per_node=8 -m teachers.capture teacher.path=RUN access=topk out=CACHE
python train.py teacher=cache teacher.path=CACHE

A capture that was killed goes on when it is run again, and ends in the same bytes.
N = B*T positions a batch.
"""

import os
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from omegaconf import MISSING
from torch.utils._pytree import tree_map_only

from data.batches import evenly_spaced, training_subset
from data.corpora import DataConfig, run_block_size, run_data
from data.tokenizer import read_by_model
from data.tokens import Tokens
from engine import UserError, check_choice, check_range, check_ranges
from engine.checkpoint import fingerprint, resolve
from engine.cli import main
from engine.progress import ProgressPrinter
from engine.ranks import Ranks, autocast, start_ranks, stop_ranks
from model import GPT, ModelConfig
from teachers.access import AccessConfig
from teachers.cache import Cache, CacheSpec, CacheWriter
from teachers.cached import recorded_blocks
from teachers.generate import prepare_tokens
from teachers.online import load_model, query_teacher

# Held-out positions are numbered from here, so that their draws are not the training text's.
FIRST_HELD_OUT_POSITION = 2**40


@dataclass
class TeacherPath:
    path: str | None = None  # RUN | CHECKPOINT | HUGGING_FACE_FOLDER; unset: train.py's newest one


@dataclass
class CaptureConfig:
    """What is recorded of whom, on which text, and where."""

    teacher: TeacherPath = field(default_factory=TeacherPath)
    access: AccessConfig = field(default_factory=AccessConfig)
    data: DataConfig | None = None  # unset: the text of the run at teacher.path
    block_size: int | None = None  # the student's, in tokens; unset: the teacher's run's
    eval_tokens: int = 65536  # held-out tokens recorded too: the student's eval_tokens
    # [2.0]: temperatures of the student's loss besides 1, each 0.1..10.
    temperatures: list[float] = field(default_factory=list)
    batch_size: int = 16  # sequences a forward pass
    out: str = MISSING  # the cache's folder
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # autocast: auto (bfloat16 on CUDA) | float32 | bfloat16

    def __post_init__(self):
        self.access.set_unset()
        check_ranges(self, "block_size eval_tokens batch_size", low=1)
        for temperature in self.temperatures:
            check_range("temperatures", temperature, low=0.1, high=10)
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))


def run(config: CaptureConfig) -> None:
    """Everything that `python -m teachers.capture` does."""
    path = config.teacher.path = config.teacher.path or newest_teacher(config.data)
    ranks = start_ranks(config.device)
    try:
        # What is not set is as in the teacher's run.
        folder = resolve(path, "teacher.path")
        if config.block_size is None:
            config.block_size = run_block_size(folder) or ModelConfig.block_size
        if config.data is None:
            config.data = replace(run_data(path, folder, "teacher.path"), fraction=1.0)
        elif config.data.name == "text":
            config.data = read_by_model(config.data, path, "teacher.path")

        tokens = prepare_tokens(config.data, path, config.block_size, ranks)
        model = load_model(path, tokens, block_size=config.block_size)
        capture(config, tokens, model.to(ranks.device), fingerprint(folder), ranks)
        if ranks.main:
            print(Cache(config.out).describe())
            print(f"Next: {student_command(config)}")
    finally:
        stop_ranks()


def newest_teacher(data: DataConfig | None) -> str:
    """The newest run of a teacher that train.py trained first; with `data`, on that text."""
    models = Path("runs").glob("teacher-*/checkpoints/step-*/config.json")
    for file in sorted(models, key=os.path.getmtime, reverse=True):
        checkpoint = file.parent
        run = checkpoint.parent.parent
        if data is None or same_text(data, run_data(run, checkpoint, "teacher.path")):
            return str(run)
    text = "" if data is None else f" of data={data.name} data.path={data.path}"
    raise UserError(f"teacher.path=null: no runs/teacher-*{text} is here; give a run or a model")


def same_text(data: DataConfig, other: DataConfig) -> bool:
    """Whether both read the same corpus by the same tokenizer."""
    keys = ("name", "path", "tokenizer", "vocab_size")
    return all(getattr(data, key) == getattr(other, key) for key in keys)


def capture(
    config: CaptureConfig,
    tokens: Tokens,
    model: GPT,
    teacher_fingerprint: str,
    ranks: Ranks,
) -> None:
    """Records this rank's shards; the last step, rank 0's, is the manifest."""
    spec = cache_spec(config, tokens, model, teacher_fingerprint)
    writer = CacheWriter(config.out, spec)
    missing = writer.missing(ranks.rank, ranks.world)

    # Say how much there is to do.
    total = spec.block_size * sum(spec.blocks.values())  # positions
    left = spec.block_size * sum(len(writer.shards[name]) for name in missing)
    ranks.say(
        f"capture: access={spec.kind} of {total:,} positions,"
        f" {total * spec.row.itemsize / 1e6:,.1f} MB, in {config.out};"
        f" {left:,} to do on each of {ranks.world} ranks"
    )

    # Record shard by shard.
    model.eval().requires_grad_(False)
    if ranks.device.type == "cuda":
        model.hidden = torch.compile(model.hidden)
    generated_by_teacher = tokens.generated_by == teacher_fingerprint
    progress = ProgressPrinter("capture", left, ranks.say)
    for name in missing:
        split = name.split("-")[0]
        blocks = tokens.blocks(split, spec.block_size)
        shard = writer.shards[name]
        numbers = recorded_blocks(split, len(blocks), spec)[shard.start : shard.stop]
        with writer.shard(name) as add:
            for start in range(0, len(numbers), config.batch_size):
                batch = blocks.read(numbers[start : start + config.batch_size])
                with torch.no_grad(), autocast(ranks.device, config.dtype)():
                    output = query_teacher(
                        model,
                        batch.to(ranks.device),
                        config.access,
                        spec.temperatures,
                        generated_by_teacher,
                        FIRST_HELD_OUT_POSITION if split == "val" else 0,
                    )
                add(batch.ids, *tree_map_only(torch.Tensor, torch.Tensor.cpu, output))
                progress.add(batch.ids.numel())

    # Finish once all ranks are done.
    ranks.share(None)
    if ranks.main:
        data = config.data
        names = {
            "tokenizer": f"data.tokenizer={data.tokenizer}, {tokens.vocab_size:,} tokens",
            "tokens": f"data={data.name} data.path={data.path}"
            f" data.val_fraction={data.val_fraction} data.document_mask={data.document_mask}",
        }
        writer.finish(names)


def cache_spec(
    config: CaptureConfig,
    tokens: Tokens,
    model: GPT,
    teacher_fingerprint: str,
) -> CacheSpec:
    """What the cache will hold."""
    access = config.access
    access.check_vocabulary(model.vocab_size)
    block_size = config.block_size
    train_blocks = len(tokens.blocks("train", block_size))
    val_blocks = len(tokens.blocks("val", block_size))
    return CacheSpec(
        kind=access.kind,
        vocab_size=model.vocab_size,
        block_size=block_size,
        blocks={
            "train": len(training_subset(train_blocks, config.data.fraction)),
            "val": len(evenly_spaced(val_blocks, block_size, config.eval_tokens)),
        },
        teacher=teacher_fingerprint,
        tokenizer=tokens.tokenizer.fingerprint,
        tokens=tokens.identity,
        k=access.k,
        n=access.n,
        seed=access.seed,
        temperatures=tuple(config.temperatures),
    )


def student_command(config: CaptureConfig) -> str:
    """The command of a student that learns all that the cache holds."""
    words = ["teacher=cache", f"teacher.path={config.out}", f"data={config.data.name}"]
    for key, value in asdict(config.data).items():
        if key != "name" and value != getattr(DataConfig, key):
            words.append(f"data.{key}={value}")
    return f"python train.py {shlex.join(words)}"


if __name__ == "__main__":
    main("capture", run, CaptureConfig)
