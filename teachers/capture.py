"""Records what a teacher reveals of a text, once, for many students.

python -m teachers.capture teacher.path=RUN access=topk access.k=64 out=CACHE
    # of the text that the run was trained on
python -m teachers.capture teacher.path=LLAMA data=text data.path=texts/ data.tokenizer=LLAMA out=C
torchrun --standalone --nproc_per_node=8 -m teachers.capture teacher.path=RUN access=topk out=CACHE
python train.py teacher=cache teacher.path=CACHE

A capture that was killed goes on when it is run again, and ends in the same bytes.
N = B*T positions a batch.
"""

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from data.batches import Batch, evenly_spaced, training_subset
from data.corpora import DataConfig, run_block_size, run_data
from data.tokens import Tokens
from engine import UserError, check_choice, check_range, check_ranges
from engine.checkpoint import fingerprint, resolve
from engine.cli import main
from engine.progress import ProgressPrinter
from engine.ranks import Ranks, autocast, start_ranks, stop_ranks
from model import GPT, ModelConfig
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.cache import Cache, CacheSpec, CacheWriter
from teachers.cached import recorded_blocks
from teachers.generate import prepare_tokens
from teachers.online import load_teacher, query_teacher

# Held-out positions are numbered from here, so that their draws are not the training text's.
FIRST_HELD_OUT_POSITION = 2**40
# A cache of access=full keeps V entries a position: for more it is a logit matrix by another name.
FULL_VOCABULARY_LIMIT = 16384


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
    out: str | None = None  # the cache's folder
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # autocast: auto (bfloat16 on CUDA) | float32 | bfloat16

    def __post_init__(self):
        check_ranges(self, "block_size eval_tokens batch_size", low=1)
        for temperature in self.temperatures:
            check_range("temperatures", temperature, low=0.1, high=10)
        if set(self.temperatures) - {1} and ACCESS_KINDS[self.access.kind].final_weights:
            raise UserError(
                f"temperatures={self.temperatures}: access={self.access.kind} gives final weights,"
                " which exist at T=1 alone; leave temperatures unset, or set access=topk"
            )
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))


def run(config: CaptureConfig) -> None:
    """Everything that `python -m teachers.capture` does."""
    path = config.teacher.path = config.teacher.path or newest_teacher()
    if path is None:
        raise UserError(
            "teacher.path=null: teachers.capture needs teacher.path=RUN, or a model's folder"
        )
    if config.out is None:
        raise UserError("out=null: teachers.capture needs out=FOLDER")
    ranks = start_ranks(config.device)
    try:
        # What is not set is as in the teacher's run.
        folder = resolve(path, "teacher.path")
        if config.block_size is None:
            config.block_size = run_block_size(folder) or ModelConfig.block_size
        if config.data is None:
            config.data = replace(run_data(path, folder, "teacher.path"), fraction=1.0)

        tokens = prepare_tokens(config.data, path, config.block_size, ranks)
        model = load_teacher(path, tokens, config.block_size, config.access, "block_size")
        capture(config, tokens, model.to(ranks.device), fingerprint(folder), ranks)
        if ranks.main:
            print(Cache(config.out, "out").describe())
            print(f"Next: {student_command(config)}")
    finally:
        stop_ranks()


def newest_teacher() -> str | None:
    """The newest run of a teacher that train.py trained first."""
    checkpoints = list(Path("runs").glob("teacher-*/checkpoints"))
    if not checkpoints:
        return None
    return str(max(checkpoints, key=lambda folder: folder.stat().st_mtime).parent)


def capture(
    config: CaptureConfig,
    tokens: Tokens,
    model: GPT,
    teacher_fingerprint: str,
    ranks: Ranks,
) -> None:
    """Records this rank's shards; the last step, rank 0's, is the manifest."""
    spec = cache_spec(config, tokens, model, teacher_fingerprint)
    shards = spec.shards()
    writer = CacheWriter(config.out, spec)
    missing = writer.missing(ranks.rank, ranks.world)

    # Say how much there is to do.
    row_bytes = spec.row.itemsize
    total = spec.block_size * sum(spec.blocks.values())  # positions
    left = spec.block_size * sum(len(shards[name]) for name in missing)
    ranks.say(
        f"capture: access={spec.kind} of {total:,} positions, {row_bytes} bytes each,"
        f" {total * row_bytes / 1e6:,.1f} MB in {len(shards)} shards in {config.out};"
        f" {left:,} positions to do" + (" on this rank" if ranks.world > 1 else "")
    )

    # Record shard by shard.
    model.eval().requires_grad_(False)
    if ranks.device.type == "cuda":
        model.hidden = torch.compile(model.hidden)
    generated_by_teacher = tokens.generated_by == teacher_fingerprint
    progress = ProgressPrinter("capture", left, ranks.say)
    for name in missing:
        split = name.split("-")[0]
        first_position = FIRST_HELD_OUT_POSITION if split == "val" else 0
        with writer.shard(name) as add:
            for batch in read_batches(config, tokens, spec, split, shards[name]):
                with torch.no_grad(), autocast(ranks.device, config.dtype)():
                    output = query_teacher(
                        model,
                        batch.to(ranks.device),
                        config.access,
                        spec.temperatures,
                        generated_by_teacher,
                        first_position,
                    )
                add(batch.ids, *tree_map_only(torch.Tensor, torch.Tensor.cpu, output))
                progress.add(batch.ids.numel())

    # Finish once all ranks are done.
    ranks.share(None)
    names = {
        "tokenizer": f"{tokens.tokenizer.name}, {tokens.vocab_size:,} tokens",
        "tokens": f"data={config.data.name} data.path={config.data.path or 'null'}",
    }
    if ranks.main and not writer.finish(names):
        raise UserError(f"out={config.out}: shards are missing; run the same command again")


def cache_spec(
    config: CaptureConfig, tokens: Tokens, model: GPT, teacher_fingerprint: str
) -> CacheSpec:
    """What the cache will hold."""
    access = config.access
    if access.kind == "full" and model.vocab_size > FULL_VOCABULARY_LIMIT:
        raise UserError(
            f"access=full: a cache of {model.vocab_size} entries a position is a whole logit matrix"
            f" (limit {FULL_VOCABULARY_LIMIT}); set access=topk access.k=64, or train with"
            " teacher=online"
        )
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


def read_batches(
    config: CaptureConfig, tokens: Tokens, spec: CacheSpec, split: str, slots: range
) -> Iterator[Batch]:
    """The blocks in those slots of the cache, in their order."""
    blocks = tokens.blocks(split, spec.block_size)
    numbers = recorded_blocks(split, len(blocks), spec)[slots.start : slots.stop]
    for start in range(0, len(numbers), config.batch_size):
        yield blocks.read(numbers[start : start + config.batch_size])


def student_command(config: CaptureConfig) -> str:
    """The command of a student that learns all that the cache holds."""
    access = config.access
    overrides = {
        "teacher": "cache",
        "teacher.path": config.out,
        "access": access.kind,
        "access.k": access.k,
        "access.n": access.n,
        "model.block_size": config.block_size,
        "eval_tokens": config.eval_tokens,
        "data": config.data.name,
    }
    defaults = asdict(DataConfig())
    for key, value in asdict(config.data).items():
        if key != "name" and value != defaults[key]:
            overrides[f"data.{key}"] = value
    for temperature in config.temperatures:
        overrides["loss.temperature"] = temperature
    words = [f"{key}={value}" for key, value in overrides.items()]
    return f"python train.py {shlex.join(words)}"


if __name__ == "__main__":
    main("capture", run, CaptureConfig)
