"""s4c: the same text from your language model, faster, by tree speculative decoding."""

from s4c.engine.llm import LLM
from s4c.types import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]
