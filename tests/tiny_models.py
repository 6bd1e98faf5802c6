"""Tiny random models of the families, made offline: `save(tmp_path, "llama")` is a Hugging Face directory.

All weights are random and large enough that attention, biases, norms and positions change the output; biases and
norm weights too, which a fresh model leaves at 0 and 1, so that a test notices a missing one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB, CONTEXT, HIDDEN = 64, 128, 32

_LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GPT2 = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "llama3": ("Llama", {**_LLAMA, "rope_parameters": _LLAMA3_ROPE}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 16}),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": ("GPTNeoX", {**_NEOX, "rotary_pct": 0.5}),
    "gemma": ("Gemma", {**_LLAMA, "head_dim": 8}),
    "cohere": ("Cohere", {**_LLAMA, "logit_scale": 0.3}),
    "granite": ("Granite", {**_LLAMA, "logits_scaling": 3.0}),
    "phi": ("Phi", {**_NEOX, "partial_rotary_factor": 0.5}),
    "gemma2": ("Gemma2", {**_LLAMA, "head_dim": 8, "sliding_window": CONTEXT, "query_pre_attn_scalar": 8}),
}
"""Name to the transformers prefix and the arguments of its configuration. Llama 3's rope scaling is "llama3"."""

LLAMA_LIKE = ("llama", "llama3", "mistral", "qwen2", "qwen3")


def tiny(family: str, *, tied: bool | None = None, seed: int = 0, **overrides: Any) -> Any:
    """A random model of a family: 2 layers, hidden size 32, 64 tokens, a context of 128.

    Args:
        family: a key of `FAMILIES`.
        tied: whether the LM head is the embedding; None for the family's habit.
        seed: of the weights.
        overrides: arguments of the configuration.
    """
    prefix, arguments = FAMILIES[family]
    arguments = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, **arguments}
    if tied is not None:
        arguments["tie_word_embeddings"] = tied
    config = getattr(transformers, f"{prefix}Config")(**{**arguments, **overrides})
    return randomised(AutoModelForCausalLM.from_config(config), seed)


def randomised(model: Any, seed: int = 0) -> Any:
    """Give every weight of a model a random value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_(0.2 * noise)
    return model.eval()


def save(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool | None = None,
    tokenizer: bool = False,
    seed: int = 0,
    **more: Any,
) -> Path:
    """A tiny model as a directory below `folder`.

    Args:
        tokenizer: add a byte-level tokenizer; the vocabulary grows to its 258 tokens.
        more: arguments of the configuration.
    """
    directory = folder / f"{family}-{'default' if tied is None else 'tied' if tied else 'untied'}-{seed}"
    if tokenizer:
        coder = byte_tokenizer()
        more = {"vocab_size": len(coder), "bos_token_id": 256, "eos_token_id": 257, **more}
        coder.save_pretrained(directory)
    tiny(family, tied=tied, seed=seed, **more).save_pretrained(directory)
    return directory


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, then `<|im_start|>` (256) and `<|im_end|>` (257), with a chat template of these."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    coder = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    coder.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=coder, bos_token="<|im_start|>", eos_token="<|im_end|>")
    wrapped.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return wrapped


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The oracle: what transformers itself writes after a prompt, greedily, whatever the end-of-sequence token."""
    tokens = torch.tensor([prompt])
    mask = torch.ones_like(tokens)
    written = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return written[0, len(prompt) :].tolist()
