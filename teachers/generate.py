"""Text that a teacher writes itself: whole documents from prompts or from nothing, made once and found again.

A document is drawn token by token at temperature 1, so that each next token is the teacher's own draw (access=text, unbiased).
B documents are written at once. Part p of a folder is a function of (teacher, prompts, p): a killed run goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from data.corpora import DataConfig
from data.tokenizer import Tokenizer, read_tokenizer
from data.tokens import seal_folder, write_masked
from engine import UserError, first_line
from engine.checkpoint import fingerprint, report_os_errors, resolve, write_atomic
from engine.progress import ProgressPrinter
from engine.ranks import Ranks
from model import GPT

BATCH = 64  # documents written at once


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: its lines, or each line's "prompt" where it is .jsonl."""
    file = Path(path)
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        prompts = [
            json.loads(line)["prompt"] if file.suffix == ".jsonl" else line for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"cannot be read ({first_line(error)}); give lines of text, or a .jsonl of prompts"
        raise UserError(f"data.prompts={path}: {rule}") from None
    if len(prompts) < 2 or not all(isinstance(prompt, str) for prompt in prompts):
        rule = f"{len(prompts)} prompts; at least two texts are needed, one to train on and one held out"
        raise UserError(f"data.prompts={path}: {rule}")
    return prompts


def plan(config: DataConfig, tokenizer: Tokenizer, most: int) -> list[list[list[int]]]:
    """The parts, each up to BATCH beginnings of one length in tokens; those of prompts in the order of their lengths."""
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    if config.prompts is None:
        begins = [start or [0]] * config.documents
    else:
        begins = sorted(
            (start + tokenizer.encode(prompt) for prompt in read_prompts(config.prompts)), key=len
        )
        if len(begins[-1]) >= most:
            rule = f"a prompt has {len(begins[-1])} tokens, a document {most} at most"
            raise UserError(
                f"data.prompts={config.prompts}: {rule}; shorten it, or set a larger data.max_tokens"
            )
    groups = (list(group) for _, group in groupby(begins, key=len))
    return [group[at : at + BATCH] for group in groups for at in range(0, len(group), BATCH)]


@torch.no_grad()
def write_part(
    model: GPT, tokenizer: Tokenizer, begins: list[list[int]], most: int, seed: int
) -> Iterator[tuple[list, list]]:
    """(ids, mask) of each document: 2 its first token, 0 the rest of its prompt, 1 what the teacher wrote, its end included."""
    ids = torch.tensor(begins, device=model.head_weight.device)  # [B,T]
    generator = torch.Generator().manual_seed(seed)
    drawn = model.generate(
        ids, most - ids.shape[1], temperature=1.0, generator=generator, stop=tokenizer.eot
    )
    rows = torch.stack(list(drawn), 1).tolist()  # [B,written]
    for begin, row in zip(begins, rows, strict=True):
        end = row.index(tokenizer.eot) + 1 if tokenizer.eot in row else len(row)
        yield begin + row[:end], [2] + [0] * (len(begin) - 1) + [1] * end


def write_first(config: DataConfig, path: str | None, most: int, ranks: Ranks) -> str:
    """The folder of documents that the model at `path` writes, now where it is not there yet.

    They are of `most` tokens unless data.max_tokens says otherwise.
    """
    if path is None:
        rule = (
            "data=written needs teacher.path of a model that writes, or data.path of what one wrote"
        )
        raise UserError(f"data.path=null: {rule}")
    home = resolve(path, "teacher.path")
    model, tokenizer = (
        GPT.from_pretrained(home, "teacher.path").to(ranks.device).eval(),
        read_tokenizer(home, "teacher.path"),
    )
    most = min(config.max_tokens or most, model.config.block_size)
    parts = plan(config, tokenizer, most)
    writer = fingerprint(home)
    facts = [writer, tokenizer.fingerprint, most, config.val_fraction, parts]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    folder = Path(config.cache_dir) / f"written-{digest[:12]}"
    if (folder / "meta.json").is_file():
        ranks.say(f"data: reusing {folder}")
        return str(folder)
    ranks.say(
        f"data: the teacher writes {sum(map(len, parts)):,} documents of up to {most:,} tokens first, in {folder}"
    )
    files = {
        folder / f"parts/{number:05d}.json": number
        for number in range(ranks.rank, len(parts), ranks.world)
    }
    todo = {file: number for file, number in files.items() if not file.is_file()}
    pace = ProgressPrinter(
        "data: writing", sum(len(parts[number]) for number in todo.values()), ranks.say
    )
    with report_os_errors(
        f"data.cache_dir={folder}",
        "make room and run the same command again, which keeps the finished parts",
    ):
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        for file, number in todo.items():
            documents = list(
                write_part(model, tokenizer, parts[number], most, int(digest[:12], 16) + number)
            )
            write_atomic(file, json.dumps(documents))
            pace.add(len(documents), sum(len(ids) for ids, _ in documents))
        ranks.share(None)
        if ranks.main:
            assemble_parts(folder, parts, tokenizer, config, writer, ranks.say)
    ranks.share(None)
    return str(folder)


def assemble_parts(
    folder: Path, parts: list, tokenizer: Tokenizer, config: DataConfig, writer: str, say: Callable
) -> None:
    """train.bin and val.bin of the parts: whole documents are held out, the last of a fixed shuffle."""
    documents = [
        row
        for number in range(len(parts))
        for row in json.loads((folder / f"parts/{number:05d}.json").read_text())
    ]
    order = np.random.default_rng(0).permutation(len(documents)).tolist()
    held = max(1, round(config.val_fraction * len(documents)))
    if held >= len(documents):
        raise UserError(
            f"data.documents={len(documents)}: too few to train on and hold some out; ask for more"
        )
    sides, counts = {"train": order[:-held], "val": order[-held:]}, {}
    for name, chosen in sides.items():
        counts[name] = write_masked(
            (documents[place] for place in chosen), tokenizer, folder / f"{name}.bin"
        )
    seal_folder(folder, tokenizer, counts, writer=writer)
    shutil.rmtree(folder / "parts")
    say(
        f"data: {counts['train']:,} training, {counts['val']:,} held-out tokens written by the teacher"
    )
