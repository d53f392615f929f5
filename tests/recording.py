"""What the tests of teachers/ share: a text, a teacher of it, and captures of what it says."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from conf.schema import Config
from data import DataConfig, prepare
from data.tokenizer import make_tokenizer
from engine.checkpoint import fingerprint
from engine.ranks import Ranks
from model import GPT, ModelConfig
from teachers.access import AccessConfig
from teachers.cache import VERSION, CacheSpec, hash_json
from teachers.cached import CachedTeacher
from teachers.capture import CaptureConfig, TeacherPath, capture
from teachers.online import TeacherConfig, load_model

T = 16
SHAPE = ModelConfig(
    n_layer=1,
    n_embd=16,
    n_head=2,
    block_size=T,
)
TOPK = AccessConfig("topk", k=8, n=5, seed=3)

SPECIAL = ["<|end|>", "<|user|>", "<|tool|>"]  # tokens 256 to 258; the first is the end of text


def write_tokenizer(folder, special=SPECIAL):
    """A byte-level tokenizer of 256 + len(special) tokens."""
    alphabet = {char: byte for byte, char in bytes_to_unicode().items()}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    Path(folder).mkdir(exist_ok=True)
    backend.save(f"{folder}/tokenizer.json")
    Path(folder, "tokenizer_config.json").write_text(json.dumps({"eos_token": special[0]}))


def save_teacher(folder: str, vocab_size: int = 257, **shape) -> GPT:
    """A random teacher of bytes that is sure of itself, saved with its tokenizer."""
    model = GPT(replace(SHAPE, **shape), vocab_size)
    for param in model.parameters():
        param.data.mul_(8)
    model.save_pretrained(folder)
    make_tokenizer("bytes").save(Path(folder))
    return model.eval()


def read_tokens(data: DataConfig):
    return prepare(data, say=lambda line: None)


def contents(folder) -> dict[str, bytes]:
    files = sorted(Path(folder).iterdir())
    return {file.name: file.read_bytes() for file in files}


class Recording:
    """Files of letters in ./texts, read as bytes, and a teacher in ./teacher."""

    def __init__(self):
        generator = np.random.default_rng(0)
        Path("texts").mkdir()
        for number in range(3):
            letters = generator.integers(97, 123, 3000, np.uint8)
            Path(f"texts/{number}.txt").write_bytes(letters.tobytes())
        self.data = DataConfig(
            name="text",
            path="texts",
            tokenizer="bytes",
            cache_dir="tokens",
        )
        self.tokens = read_tokens(self.data)
        self.teacher = save_teacher("teacher", n_embd=32)

    def batch(self, blocks: list[int], split: str = "train"):
        numbers = np.array(blocks)
        return self.tokens.blocks(split, T).read(numbers)

    def record(self, access: AccessConfig = TOPK, **changes) -> None:
        record(self.tokens, self.data, access, **changes)


def record(tokens, data, access=TOPK, ranks=None, **changes) -> None:
    """Captures the teacher at ./teacher into ./cache, or as `changes` of CaptureConfig say."""
    config = CaptureConfig(
        teacher=TeacherPath("teacher"),
        access=access,
        data=data,
        block_size=T,
        eval_tokens=256,
        batch_size=4,
        out="cache",
        device="cpu",
    )
    config = replace(config, **changes)
    folder = Path(config.teacher.path)
    model = load_model(folder, tokens, block_size=T)
    capture(config, tokens, model, fingerprint(folder), ranks or Ranks())


def open_cache(tokens, access=TOPK, path="cache", **changes) -> CachedTeacher:
    """The cache, for a run that `changes` of train.py's Config describe."""
    fields = {
        "model": SHAPE,
        "teacher": TeacherConfig(kind="cache", path=path),
        "access": access,
        "eval_tokens": 256,
    }
    return CachedTeacher(tokens, Config(**fields | changes))


def cache_spec(kind="topk", **changes):
    """A small cache of a teacher with many tokens."""
    fields = {
        "vocab_size": 151_936,
        "block_size": 8,
        "blocks": {"train": 11, "val": 3},
        "teacher": "a" * 64,
        "tokenizer": "b" * 64,
        "tokens": "c" * 64,
        "k": 6,
        "n": 4,
        "blocks_per_shard": 4,
    }
    return CacheSpec(kind, **(fields | changes))


def save_manifest(folder, spec: CacheSpec) -> None:
    """What a run reads of a cache before it opens it."""
    content = {"version": VERSION, "spec": asdict(spec)}
    content["seal"] = hash_json(content)
    Path(folder).mkdir()
    Path(folder, "manifest.json").write_text(json.dumps(content))
