"""Times the ops against bare matrix products, plain PyTorch and the peers: see __main__.py."""

from .report import facts, record

__all__ = ["facts", "record"]
