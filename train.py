"""Trains one model: by cross-entropy, or on a teacher's targets. One process, or many by torchrun.

python train.py                                                # the demo: a teacher, then a student
python train.py data=text data.path=my_texts/                  # your own text
python train.py teacher.path=runs/big loss.kl_weight=0.5       # your own teacher
python train.py -m loss=ce,topk_kl seed=0,1,2                  # a sweep
torchrun --standalone --nproc_per_node=2 train.py              # data parallel

B sequences a micro-batch, T positions each.
"""

import time
from contextlib import nullcontext, suppress
from dataclasses import replace

import torch
from torch.nn.parallel import DistributedDataParallel

from conf.schema import Config
from data import Batch, Batches, Prefetch, Tokens, held_out
from engine import UserError
from engine.cli import main
from engine.optim import Optimizers, learning_rate
from engine.prerequisites import train_baseline, train_missing_teacher
from engine.progress import print_closing
from engine.ranks import Ranks, autocast, explain_memory, start_ranks, stop_ranks
from engine.run import Run, Stopped
from engine.run_dir import find_fingerprints
from kernels import LossOutput
from model import GPT, build_student
from model.gpt import attention_kernel
from model.loss import StudentWithLoss
from model.metrics import evaluate
from sample import sample_text
from teachers import toy
from teachers.cached import CachedTeacher
from teachers.generate import prepare_tokens
from teachers.online import OnlineTeacher, open_teacher

Teacher = OnlineTeacher | CachedTeacher


def train_step(
    module: torch.nn.Module,
    optimizer: Optimizers,
    batch: Batch,
    teacher: Teacher | None,
    config: Config,
    ranks: Ranks,
    step: int,
) -> dict[str, torch.Tensor] | None:
    """One optimizer step on `batch`, this rank's share of the step's sequences.

    The gradient is the mean over the kept positions of the whole batch, however it is split over
    ranks and micro-batches. Nothing here waits for the device.

    Returns the step's metrics as scalars on the device; None where a signal came first (nothing
    has changed then).
    """
    size = config.micro_batch_size
    accumulation_steps = len(batch.ids) // size
    sums = torch.zeros(len(LossOutput._fields), device=ranks.device)

    for micro_step in range(accumulation_steps):
        if ranks.any(ranks.stop is not None):
            optimizer.zero_grad()
            return None
        micro_batch = batch.select(slice(micro_step * size, (micro_step + 1) * size))
        micro_batch = micro_batch.to(ranks.device)
        if config.model.dropout:
            # Dropout is a function of the place in training, not of what was drawn before.
            place = micro_step * ranks.world + ranks.rank
            torch.manual_seed(hash((config.seed, step, place)))

        # Forward and backward. DDP reduces gradients in the last micro-batch's backward alone.
        reduces = micro_step == accumulation_steps - 1 or ranks.world == 1
        with nullcontext() if reduces else module.no_sync():
            with autocast(ranks.device, config.dtype)():
                # A cache's targets came with the batch, which the prefetch thread made.
                targets = teacher.targets(micro_batch) if teacher else None
                output = module(
                    micro_batch.ids, micro_batch.labels, targets, micro_batch.document_ids
                )
            # DDP averages over ranks: times their number makes it a sum.
            optimizer.backward(output.loss * (ranks.world / batch.num_kept))
        sums += torch.stack([field.detach().float() for field in output])

    # Clip and update. A loss or gradient that is not finite leaves the weights as they are.
    means = ranks.sum(sums) / batch.num_kept
    grad_norm = optimizer.step(means[0])
    return dict(zip(LossOutput._fields, means, strict=True)) | {"grad_norm": grad_norm}


def train_model(
    config: Config, ranks: Ranks, tokens: Tokens, teacher: Teacher | None = None, title="student"
) -> dict:
    """One run in its own directory, up to config.max_steps, from its newest good checkpoint if any.

    Returns the summary that summary.json holds. Raises Stopped after a signal, with all saved.
    """
    run = Run(config, ranks, find_fingerprints(config, tokens, teacher), title)
    config = replace(config, micro_batch_size=find_micro_batch_size(config, ranks))
    student, module, optimizer = set_up_student(config, ranks, tokens)
    if teacher:
        teacher.fit(student)
    training_teacher = None if config.loss.name == "ce" else teacher
    batches = make_batches(config, ranks, tokens, teacher)
    run.open(student, optimizer, tokens.tokenizer)
    if run.step < config.max_steps:
        run.describe(batches.num_blocks)
        describe_attention(config, ranks, batches)

    prefetch = Prefetch(batches, run.step, config.max_steps, pin=ranks.device.type == "cuda")
    ranks.training = True
    try:
        if run.step and evaluation_is_due(run.step, config) and run.val_loss is None:
            # A signal cut this evaluation short.
            run.finish_step()
            run.log_evaluation(evaluate_model(student, config, ranks, tokens, teacher))
            if run.should_save():
                run.save()

        for step, batch in enumerate(prefetch, start=run.step):
            run.start_step()
            lr = learning_rate(config.optim, step, config.max_steps)
            optimizer.set_learning_rate(lr)
            metrics = train_step(module, optimizer, batch, training_teacher, config, ranks, step)
            if metrics is None:
                run.stop()
            run.log(step + 1, metrics, lr)  # written a step later, so that nothing waits

            if evaluation_is_due(step + 1, config):
                run.finish_step()
                run.log_evaluation(evaluate_model(student, config, ranks, tokens, teacher))
            if run.should_save():
                run.save()
    except RuntimeError as error:
        explain_memory(error, run.step + 1, config)
        raise
    finally:
        prefetch.close()
        run.close()

    if run.val_loss is None and run.step:  # the signal came in the last evaluation
        run.stop()
    teacher_measures = None
    if teacher and teacher.model:
        teacher_measures = evaluate_model(teacher.model, config, ranks, tokens)
        if not teacher_measures:
            run.stop()
    return run.finish(batches.num_blocks, prefetch.seconds_waited, teacher, teacher_measures)


def evaluation_is_due(step: int, config: Config) -> bool:
    return step % config.eval_every == 0 or step >= config.max_steps


def evaluate_model(
    model: GPT,
    config: Config,
    ranks: Ranks,
    tokens: Tokens,
    teacher: Teacher | None = None,
) -> dict:
    """Held-out measures of `model`, against `teacher` too where one is given.

    Rank 0 works and the others wait, so that they do not depend on the number of ranks. Empty
    where a signal came.
    """

    def batches():
        blocks = tokens.blocks("val", config.model.block_size)
        for batch in held_out(blocks, config.micro_batch_size, config.eval_tokens):
            if ranks.stop:
                raise Stopped
            if teacher:
                batch = batch._replace(targets=teacher.teacher_topk(batch))
            yield batch

    measures = {}
    if ranks.main:
        teacher_model = teacher.model if teacher else None
        with suppress(Stopped):
            context = autocast(ranks.device, config.dtype)
            measures = evaluate(model, batches(), teacher_model, context)
    return ranks.share(measures)


def find_micro_batch_size(config: Config, ranks: Ranks) -> int:
    size = config.micro_batch_size or max(1, config.batch_size // ranks.world)
    if config.batch_size % (size * ranks.world):
        raise UserError(
            f"batch_size={config.batch_size}: must be a multiple of"
            f" micro_batch_size x ranks = {size} x {ranks.world}; set one of the two"
        )
    return size


def set_up_student(config: Config, ranks: Ranks, tokens: Tokens):
    """The student, the module that training calls (the student with its loss), the optimizer."""
    torch.manual_seed(config.seed)
    student = build_student(config.model, tokens.vocab_size).to(ranks.device)
    vocab_size = tokens.vocab_size
    if config.model.init is not None:
        rows = student.vocab_size
        partner = config.teacher.path
        vocab_size = tokens.check_model(config.model.init, rows, "model.init", partner)
    student.limit_vocabulary(vocab_size)
    student.checkpointing = config.activation_checkpointing
    optimizer = Optimizers(student, config.optim, scaled=config.dtype == "float16")
    module = StudentWithLoss(student, config.loss)
    if compiles(config, ranks):
        # Hidden states, loss and both gradients in one graph. Under DDP torch splits it where the
        # buckets of gradients end, so that a bucket is reduced while the backward of earlier
        # layers goes on.
        module.compile()
    if ranks.world > 1:
        module = DistributedDataParallel(module, gradient_as_bucket_view=True)
    return student, module, optimizer


def compiles(config: Config, ranks: Ranks) -> bool:
    on_cuda = ranks.device.type == "cuda"
    return config.compile == "on" or (config.compile == "auto" and on_cuda)


def make_batches(
    config: Config, ranks: Ranks, tokens: Tokens, teacher: Teacher | None = None
) -> Batches:
    """The training batches, with a cache's targets where the teacher is one."""
    read_targets = None
    if teacher is not None and teacher.model is None and config.loss.name != "ce":
        read_targets = teacher.read_targets
    return Batches(
        tokens.blocks("train", config.model.block_size),
        config.batch_size,
        config.seed,
        config.data.fraction,
        local_rows=ranks.local_rows(config.batch_size, config.micro_batch_size),
        read_targets=read_targets,
        count_visits=config.access.fresh,
    )


def describe_attention(config: Config, ranks: Ranks, batches: Batches) -> None:
    """Says, on a GPU, which attention kernel PyTorch takes; of the slow one, what to change."""
    if ranks.device.type != "cuda":
        return
    first_block = batches.source.read(batches.blocks[:1])
    dtype = autocast(ranks.device, config.dtype).keywords["dtype"]
    has_mask = first_block.document_ids is not None
    kernel = attention_kernel(config.model, ranks.device, dtype, has_mask)
    ranks.say(f"attention: {kernel}")
    if kernel == "math":
        ranks.say(
            "  it holds the scores [B,H,T,T] of every layer; others want model.head_dim a multiple"
            " of 8 and, on a GPU older than Ampere, dtype=float16 and no model.n_kv_head"
        )


def find_teacher(config: Config, ranks: Ranks, tokens: Tokens) -> Teacher | None:
    """The teacher at teacher.path or, where that is unset, one trained now; None without any."""
    if config.teacher.kind == "none":
        return None
    path = config.teacher.path
    if config.loss.name != "ce":  # which learns from no teacher
        config.access.check_vocabulary(tokens.vocab_size)
        path = path or train_missing_teacher(config, ranks, tokens, train_model)
    if path is None:
        return None
    teacher = open_teacher(path, tokens, config, ranks.device, autocast(ranks.device, config.dtype))
    if compiles(config, ranks):
        teacher.compile()
    return teacher


def run(config: Config) -> None:
    """All that `python train.py` does: tokens, teacher, student, and the student without it."""
    if config.toy:
        return toy.show()
    ranks = start_ranks(config.device)
    try:
        writer = config.teacher.path if config.teacher.kind != "cache" else None
        tokens = prepare_tokens(config.data, writer, config.model.block_size, ranks)
        config.run_dir = config.run_dir or ranks.share(time.strftime("runs/%Y-%m-%d_%H-%M-%S"))
        teacher = find_teacher(config, ranks, tokens)
        student = train_model(config, ranks, tokens, teacher)
        baseline = None
        teacher_was_made = teacher is not None and config.teacher.path is None
        if config.baseline == "on" or (config.baseline == "auto" and teacher_was_made):
            baseline = train_baseline(config, ranks, tokens, train_model)
        if ranks.main:
            sample = sample_text(config.run_dir, tokens.tokenizer)
            taught = teacher is not None and config.loss.name != "ce"
            print_closing(config.run_dir, student, baseline, sample, config.data.name, taught)
    except Stopped:
        raise SystemExit(0) from None  # a sweep ends here too, instead of going on to its next job
    finally:
        stop_ranks()


if __name__ == "__main__":
    main("train", run, Config)
