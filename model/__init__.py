"""The transformer, and its weights in and out."""

from model.config import ModelConfig
from model.gpt import GPT, build_student

__all__ = ["GPT", "ModelConfig", "build_student"]
