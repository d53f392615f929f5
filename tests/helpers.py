"""The one comparison that every test uses."""

import torch


def assert_close(actual, expected, rtol=1e-5, atol=0.0):
    """Strict closeness: refuses NaN against NaN, and different dtypes or shapes."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} against {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape} against {expected.shape}"
    assert not torch.isnan(actual).any(), "actual holds NaN"
    assert not torch.isnan(expected).any(), "expected holds NaN"
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
