"""The one comparison that every test uses."""

from types import SimpleNamespace

import torch

from engine.checkpoint import fingerprint, resolve
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


def loaded_teacher(path, *arguments):
    """What the old Trainer takes as its teacher; goes with it."""
    return SimpleNamespace(
        model=load_teacher(path, *arguments),
        path=str(path),
        fingerprint=fingerprint(resolve(path)),
        teacher_topk=lambda batch: None,
    )
