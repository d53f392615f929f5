"""Text that a teacher writes itself (data=written): whole documents from prompts or from nothing.

Documents are drawn at temperature 1, so each next token is the teacher's own draw (access=text,
unbiased). They are written in parts of B documents at once. A part is a function of teacher,
prompts and the part's number, so a killed run goes on and ranks share the parts.
"""

import hashlib
import json
import shutil
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import torch

from data.corpora import DataConfig
from data.documents import JSON_LINES, decode, json_entries, suffixes
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokens import Tokens, prepare, seal_folder, write_masked
from engine import UserError, first_line
from engine.checkpoint import fingerprint, resolve, write_atomic
from engine.progress import ProgressPrinter
from engine.ranks import Ranks
from model import GPT

PART_DOCUMENTS = 64  # B at most


def prepare_tokens(
    data: DataConfig,
    teacher_path: str | None,
    block_size: int,
    ranks: Ranks,
) -> Tokens:
    """The tokens of a run, on every rank; the teacher writes them first where it has to.

    Sets data.path of such text. Raises UserError where a split does not fill a block.
    """
    if data.name == "written" and data.path is None and teacher_path is not None:
        data.path = generate_documents(data, teacher_path, block_size + 1, ranks)
    if ranks.main:
        prepare(data, say=ranks.say)
    ranks.share(None)
    tokens = prepare(data, say=lambda line: None)
    tokens.check_length(block_size, ranks.say)
    return tokens


def generate_documents(
    config: DataConfig,
    teacher_path: str,
    max_tokens: int,
    ranks: Ranks,
) -> str:
    """The folder of documents that the teacher writes, now where it is not there yet.

    max_tokens: of a document, unless data.max_tokens is set.
    """
    teacher_folder = resolve(teacher_path, "teacher.path")
    tokenizer = load_tokenizer(teacher_folder)
    model = GPT.from_pretrained(teacher_folder, "teacher.path").to(ranks.device).eval()
    model.limit_vocabulary(tokenizer.vocab_size)
    max_tokens = min(config.max_tokens or max_tokens, model.config.block_size)
    parts = plan_parts(config, tokenizer, max_tokens)
    for prompt in chain.from_iterable(parts):
        tokenizer.check_prompt(prompt, model.vocab_size, f"data.prompts={config.prompts}")

    # The folder is named by everything that the documents depend on.
    teacher = fingerprint(teacher_folder)
    made_from = [teacher, tokenizer.fingerprint, max_tokens, config.val_fraction, parts]
    ends = tokenizer.end_tokens(model.eos)
    if len(ends) > 1:
        made_from.append(ends)
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    folder = Path(config.cache_dir) / f"written-{digest}"
    if (folder / "meta.json").is_file():
        ranks.say(f"data: reusing {folder}")
        return str(folder)
    ranks.say(
        f"data: the teacher writes {sum(map(len, parts)):,} documents of up to {max_tokens:,}"
        f" tokens first, in {folder}"
    )

    # Each rank writes those of its parts that are not there yet, each whole or not at all.
    files = [folder / f"parts/{number:05d}.json" for number in range(len(parts))]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    own = range(ranks.rank, len(parts), ranks.world)
    missing = [number for number in own if not files[number].is_file()]
    progress = ProgressPrinter("data: writing", len(missing), ranks.say)
    for number in missing:
        seed = int(digest, 16) + number
        documents = write_documents(model, tokenizer, parts[number], max_tokens, seed)
        write_atomic(files[number], json.dumps(documents))
        progress.add(1, sum(len(ids) for ids, _ in documents))

    # Rank 0 puts all of them together; whole documents, the last of a shuffle, are held out.
    ranks.share(None)
    if ranks.main:
        documents = []
        for file in files:
            documents += json.loads(file.read_text())
        order = np.random.default_rng(0).permutation(len(documents))
        shuffled = [documents[place] for place in order]
        held_out = max(1, round(config.val_fraction * len(documents)))
        num_train = max(1, len(documents) - held_out)
        write_masked(shuffled[:num_train], tokenizer, folder / "train.bin")
        write_masked(shuffled[num_train:], tokenizer, folder / "val.bin")
        seal_folder(folder, tokenizer, writer=teacher)
        shutil.rmtree(folder / "parts")
    ranks.share(None)
    return str(folder)


def plan_parts(config: DataConfig, tokenizer: Tokenizer, max_tokens: int) -> list[list[list[int]]]:
    """The beginnings [parts][B][tokens] of all documents; those of a part are of one length."""
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    beginnings = [start or [0]] * config.documents
    if config.prompts is not None:
        prompts = [start + tokenizer.encode(prompt) for prompt in read_prompts(config.prompts)]
        beginnings = sorted(prompts, key=len)
    longest = len(beginnings[-1])
    if longest >= max_tokens:
        raise UserError(
            f"data.prompts={config.prompts}: one has {longest} tokens, a document"
            f" {max_tokens} at most; shorten it, or set a larger data.max_tokens"
        )
    parts = []
    for _, group in groupby(beginnings, key=len):
        same_length = list(group)
        for place in range(0, len(same_length), PART_DOCUMENTS):
            parts.append(same_length[place : place + PART_DOCUMENTS])
    return parts


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: its lines, or each entry's "prompt" where it is JSON."""
    file = Path(path)
    try:
        text = decode(file.read_bytes())
        if text is None:
            raise ValueError("it is not UTF-8 text")
        prompts = [line for line in text.splitlines() if line.strip()]
        if suffixes(file)[0] in (".json", *JSON_LINES):
            prompts = [entry["prompt"] for entry, _ in json_entries(file, text)]
        "".join(prompts)  # TypeError unless all are strings
        if len(prompts) < 2:
            raise ValueError("one to train on and one to hold out")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data.prompts={path}: give two or more lines of text, or of JSON with a prompt"
            f" ({first_line(error)})"
        ) from None
    return prompts


@torch.no_grad()
def write_documents(
    model: GPT,
    tokenizer: Tokenizer,
    beginnings: list[list[int]],
    max_tokens: int,
    seed: int,
) -> list[tuple[list[int], list[int]]]:
    """The (ids, mask) of B documents, each up to and with an end token or max_tokens long.

    The mask is 2 at the first token, 0 at the rest of the prompt, 1 at what the teacher wrote.
    """
    ids = torch.tensor(beginnings, device=model.head_weight.device)  # [B,T]
    generator = torch.Generator().manual_seed(seed)
    num_new = max_tokens - ids.shape[1]
    stop = tokenizer.end_tokens(model.eos)
    draws = model.generate(ids, num_new, temperature=1.0, generator=generator, stop=stop)
    rows = torch.stack(list(draws), 1).tolist()  # [B,new tokens]

    documents = []
    for beginning, row in zip(beginnings, rows, strict=True):
        ends = [place for place, token in enumerate(row, start=1) if token in stop]
        row = row[: min(ends, default=len(row))]
        mask = [2] + [0] * (len(beginning) - 1) + [1] * len(row)
        documents.append((beginning + row, mask))
    return documents
