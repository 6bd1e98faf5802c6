"""s4c: the same text from your language model, faster, by tree speculative decoding."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s4c.engine.llm import LLM
    from s4c.types import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # What needs torch is imported when it is first asked for, so that `s4c --help` does not wait for it.
    if name == "LLM":
        from s4c.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from s4c.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
