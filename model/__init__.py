"""The transformer, and its weights in and out."""

from model.gpt import GPT, ModelConfig

__all__ = ["GPT", "ModelConfig"]
