"""Text that a teacher writes itself: whole documents from prompts or from nothing, made once and found again.

A document is drawn token by token at temperature 1, so that each next token is the teacher's own draw (access=text, unbiased).
B documents are written at once. Part p of a folder is a function of (teacher, prompts, p): a killed run goes on.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from data.corpora import DataConfig
from data.tokenizer import Tokenizer, read_tokenizer
from data.tokens import id_dtype, seal_folder
from engine import UserError
from engine.checkpoint import fingerprint, resolve, write_atomic
from engine.logger import clock, first_line
from engine.ranks import Ranks
from model import GPT

BATCH = 64  # documents written at once


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: its lines, or each line's "prompt" where it is .jsonl."""
    file = Path(path)
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        prompts = [json.loads(line)["prompt"] if file.suffix == ".jsonl" else line for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data.prompts={path}: cannot be read ({first_line(error)}); give lines of text, or a .jsonl of prompts"
        ) from None
    if len(prompts) < 2 or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(
            f"data.prompts={path}: {len(prompts)} prompts; at least two texts are needed, one to train on and one held out"
        )
    return prompts


def plan(config: DataConfig, tokenizer: Tokenizer, most: int) -> list[list[list[int]]]:
    """The parts, each up to BATCH beginnings of one length in tokens; those of prompts in the order of their lengths."""
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    if config.prompts is None:
        begins = [start or [0]] * config.documents
    else:
        begins = sorted((start + tokenizer.encode(prompt) for prompt in read_prompts(config.prompts)), key=len)
        if len(begins[-1]) >= most:
            rule = f"a prompt has {len(begins[-1])} tokens, a document {most} at most"
            raise UserError(f"data.prompts={config.prompts}: {rule}; shorten it, or set a larger data.max_tokens")
    groups = (list(group) for _, group in groupby(begins, key=len))
    return [group[at : at + BATCH] for group in groups for at in range(0, len(group), BATCH)]


@torch.no_grad()
def write_part(model: GPT, tokenizer: Tokenizer, begins: list[list[int]], most: int, seed: int) -> Iterator[tuple[list, list]]:
    """(ids, mask) of each document: 2 its first token, 0 the rest of its prompt, 1 what the teacher wrote, its end included."""
    ids = torch.tensor(begins, device=model.head_weight.device)  # [B,T]
    generator = torch.Generator().manual_seed(seed)
    drawn = model.generate(ids, most - ids.shape[1], temperature=1.0, generator=generator, stop=tokenizer.eot)
    rows = torch.stack(list(drawn), 1).tolist()  # [B,written]
    for begin, row in zip(begins, rows, strict=True):
        end = row.index(tokenizer.eot) + 1 if tokenizer.eot in row else len(row)
        yield begin + row[:end], [2] + [0] * (len(begin) - 1) + [1] * end


def write_documents(
    model: GPT, identity: str, tokenizer: Tokenizer, config: DataConfig, ranks: Ranks, say: Callable[[str], object] = print
) -> Path:
    """The folder of documents that `config` asks of this teacher, written now where it is not there yet."""
    most = min(config.max_tokens or 1024, model.config.block_size)
    parts = plan(config, tokenizer, most)
    facts = [identity, tokenizer.fingerprint, most, config.val_fraction, parts]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    folder = Path(config.cache_dir) / f"written-{digest[:12]}"
    if (folder / "meta.json").is_file():
        say(f"data: reusing {folder}")
        return folder
    say(f"data: the teacher writes {sum(map(len, parts)):,} documents of up to {most:,} tokens first, in {folder}")
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    model, started, made, written = model.eval(), time.monotonic(), 0, 0
    mine = [number for number in range(len(parts)) if number % ranks.world == ranks.rank]
    todo = [number for number in mine if not (folder / f"parts/{number:05d}.json").is_file()]
    for number in todo:
        seed = int(digest[:12], 16) + number
        documents = list(write_part(model, tokenizer, parts[number], most, seed))
        write_atomic(folder / f"parts/{number:05d}.json", json.dumps(documents))
        made, written = made + 1, written + sum(len(ids) for ids, _ in documents)
        spent = time.monotonic() - started
        if made % max(1, len(todo) // 10) == 0:
            eta = clock(spent / made * (len(todo) - made))
            say(f"data: {made}/{len(todo)} parts | {written / spent:,.0f} tok/s | ETA {eta}")
    ranks.share(None)
    if ranks.main:
        assemble_parts(folder, parts, tokenizer, config, say)
    ranks.share(None)
    return folder


def write_first(config: DataConfig, path: str | None, most: int, ranks: Ranks) -> str:
    """The folder of documents that the model at `path` writes, of `most` tokens unless data.max_tokens says otherwise."""
    if path is None:
        raise UserError(
            "data.path=null: data=written needs teacher.path of a model that writes, or data.path of what one wrote"
        )
    folder = resolve(path, "teacher.path")
    config = replace(config, max_tokens=config.max_tokens or most)
    model = GPT.from_pretrained(folder, "teacher.path").to(ranks.device)
    tokenizer = read_tokenizer(folder, "teacher.path")
    return str(write_documents(model, fingerprint(folder), tokenizer, config, ranks, ranks.say))


def assemble_parts(folder: Path, parts: list, tokenizer: Tokenizer, config: DataConfig, say) -> None:
    """train.bin and val.bin of the parts: whole documents are held out, the last of a fixed shuffle."""
    documents = [row for number in range(len(parts)) for row in json.loads((folder / f"parts/{number:05d}.json").read_text())]
    order = np.random.default_rng(0).permutation(len(documents))
    held = max(1, round(config.val_fraction * len(documents)))
    if held >= len(documents):
        raise UserError(f"data.documents={len(documents)}: too few to train on and hold some out; ask for more")
    dtype, counts = id_dtype(tokenizer.vocab_size), {}
    for name, chosen in (("train", order[:-held]), ("val", order[-held:])):
        ids, mask = zip(*(documents[place] for place in chosen.tolist()), strict=True)
        ids, mask = np.concatenate(ids).astype(dtype), np.concatenate(mask).astype(np.uint8)
        ids.tofile(folder / f"{name}.bin")
        mask.tofile(folder / f"{name}.mask.bin")
        counts[name] = len(ids)
    shutil.rmtree(folder / "parts")
    seal_folder(folder, tokenizer, counts, None, None)
    say(f"data: {counts['train']:,} training, {counts['val']:,} held-out tokens written by the teacher")
