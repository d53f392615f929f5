"""The one comparison that every test uses, and a cache for the tests that need one."""

import torch

from teachers.cache import CacheSpec


def assert_close(actual, expected, rtol=1e-5, atol=0.0):
    """Strict closeness: refuses NaN against NaN, and different dtypes or shapes."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} against {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"shape {tuple(actual.shape)} against {tuple(expected.shape)}"
    )
    assert not torch.isnan(actual).any(), "actual holds NaN"
    assert not torch.isnan(expected).any(), "expected holds NaN"
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


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
