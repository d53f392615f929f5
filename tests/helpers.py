"""The one comparison that every test uses."""

import torch


def assert_close(actual, expected, rtol=1e-5, atol=0.0):
    """Strict closeness: refuses NaN against NaN, and different dtypes or shapes."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    assert not expected.isnan().any()
    torch.testing.assert_close(
        actual,
        expected,
        rtol=rtol,
        atol=atol,
    )
