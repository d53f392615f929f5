"""What several test files use."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data import DataConfig, Tokens
from data.tokenizer import Tokenizer
from engine.checkpoint import fingerprint
from engine.ranks import Ranks
from model import GPT, ModelConfig
from teachers.cache import CacheSpec
from teachers.capture import AccessConfig, CaptureConfig, TeacherPath, capture
from teachers.online import load_teacher


def assert_close(actual, expected, rtol=1e-5, atol=0.0):
    """Strict closeness: refuses NaN against NaN, and different dtypes or shapes."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} against {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"shape {tuple(actual.shape)} against {tuple(expected.shape)}"
    )
    assert not torch.isnan(actual).any(), "actual holds NaN"
    assert not torch.isnan(expected).any(), "expected holds NaN"
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def small_corpus(folder: Path) -> DataConfig:
    """Three files of words under `folder`, read as bytes."""
    generator = np.random.default_rng(0)
    words = [
        "the",
        "a",
        "teacher",
        "student",
        "tells",
        "learns",
        "from",
        "what",
        "is",
        "said",
        "and",
        "not",
        "more",
        "of",
        "it\n",
    ]
    (folder / "texts").mkdir()
    for number in range(3):
        text = " ".join(generator.choice(words, 600))
        (folder / f"texts/{number}.txt").write_text(text)
    return DataConfig(name="text", path="texts", tokenizer="bytes", cache_dir="tokens")


def save_teacher(folder: str, width: int = 32, block_size: int = 16, vocab_size: int = 257) -> GPT:
    """A random teacher of bytes that is sure of itself, saved with its tokenizer."""
    torch.manual_seed(width)
    config = ModelConfig(n_layer=1, n_embd=width, n_head=2, block_size=block_size)
    model = GPT(config, vocab_size)
    for param in model.parameters():
        param.data.mul_(8)
    model.save_pretrained(folder)
    Tokenizer({"kind": "bytes"}).save(Path(folder))
    return model.eval()


def record(tokens: Tokens, data: DataConfig, access: AccessConfig, ranks=None, **changes) -> None:
    """Captures the teacher at ./teacher into ./cache, or as `changes` of CaptureConfig say."""
    config = CaptureConfig(
        teacher=TeacherPath("teacher"),
        access=access,
        data=data,
        block_size=16,
        eval_tokens=256,
        batch_size=4,
        out="cache",
        device="cpu",
    )
    config = replace(config, **changes)
    folder = Path(config.teacher.path)
    model = load_teacher(folder, tokens, 16, access)
    capture(config, tokens, model, fingerprint(folder), ranks or Ranks())


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
