"""From what a user calls a model to a target that runs.

    name  ->  resolve: a directory  ->  load_target: configuration, limits, runtime  ->  Target

A name is a built-in alias, a local Hugging Face directory, a local GGUF file or a hub id. What a runtime would
compute wrongly (a window or a rope that changes inside the context, say) is refused here, before a weight is read.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from s4c.errors import CorruptCheckpoint, UnsupportedModel
from s4c.models import weights
from s4c.models.base import Target, TargetSpec
from s4c.models.builtin import BUILTIN, builtin_directory, gguf_directory, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUNTIMES = ("auto", "native", "torch", "hf")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
SHORTEST_CONTEXT = 8

SIZES = """
    vocab_size hidden_size intermediate_size head_dim
    num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings
    d_model n_embd n_layer n_head n_positions num_layers num_heads
    """
LARGEST_SIZE = 1 << 24
"""What counts something in a config.json, and the most that it may count."""

HUB_FILES = [*weights.COMPANIONS, "model*.safetensors"]
"""What is fetched of a hub repository."""


def resolve(name: str | Path) -> Path:
    """The directory of a model: config.json, safetensors, and tokenizer files if it has them.

    Args:
        name: a built-in alias, a Hugging Face directory, a .gguf file or a hub id; a path is taken for its text.

    Raises:
        ValueError: the name leads nowhere; the message says what can be given.
        CorruptCheckpoint: the directory lacks config.json or safetensors.
        UnsupportedModel: the GGUF file cannot be converted.
    """
    name = str(name)
    path = Path(name).expanduser()
    if name in BUILTIN:
        directory = builtin_directory(name)
    elif not name.strip():
        raise _unknown(name, "names nothing")
    elif path.is_dir():
        directory = path.resolve()
    elif path.is_file() and path.suffix.lower() == ".gguf":
        directory = gguf_directory(path)
    elif path.exists():
        raise _unknown(name, "is a file, but not a .gguf file")
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.endswith(".gguf") and not name.startswith("."):
        directory = _from_hub(name)
    else:
        raise _unknown(name, "does not exist, and is no hub id either")
    weights.read_config(directory)
    weights.shards(directory)
    return directory


def _unknown(name: str, problem: str) -> ValueError:
    return ValueError(
        f"target {name!r} {problem}. A target is one of: a built-in model ({', '.join(sorted(BUILTIN))}); a local "
        "Hugging Face directory (config.json, safetensors, tokenizer); a local .gguf file; a hub id (owner/name)"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except LocalEntryNotFoundError as error:
        cause = _first_line(error.__cause__ or error)
        raise _unknown(name, f"is not on this machine, and the hub cannot be reached ({cause})") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise _unknown(name, f"is not on this machine, and the hub does not give it ({_first_line(error)})") from error
    except OSError as error:
        raise _unknown(name, f"could not be fetched from the hub ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def load_target(
    name: str | Path,
    *,
    runtime: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    context_length: int | None = None,
) -> Target:
    """Load a target.

    Args:
        name: as `resolve` takes it.
        runtime: `native` runs the Llama family on C++ kernels (CPU; float32, bfloat16, int8), `torch` runs the
            same models in torch, `hf` any causal model that takes a tree; `auto` takes the first that can.
        dtype: `float32`, `bfloat16`, `float16` or `int8`; `auto` is float32 on a CPU and bfloat16 on a GPU.
        device: `cpu`, `cuda` or `cuda:N`; `auto` is a GPU where there is one, and the CPU for what runs on no other.
        context_length: most tokens of one sequence; None for what the model was made for.

    Raises:
        ValueError: an argument is none of these, or the name leads nowhere.
        UnsupportedModel: the model cannot be computed rightly, by this runtime or within this context.
        CorruptCheckpoint: the files are damaged.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime {runtime!r} is not known; it must be one of {', '.join(RUNTIMES)}")
    only_on_cpu = runtime == "native" or str(dtype).removeprefix("torch.") == "int8"
    place = choose_device("cpu" if only_on_cpu and device == "auto" else device)
    number = choose_dtype(dtype, place)
    directory = resolve(name)
    config = load_config(directory)
    spec = TargetSpec(
        name=str(name),
        fingerprint=weights.fingerprint(directory),
        vocab_size=config.get_text_config().vocab_size,
        hidden_size=config.get_text_config().hidden_size,
        context_length=choose_context(config, context_length),
        eos_token_ids=eos_token_ids(directory),
    )
    chosen, why = choose_runtime(runtime, config, number, place)
    if chosen != "hf":
        from s4c.models.llama import LlamaTarget, count_weights

        wanted, held = count_weights(config), sum(shard.stat().st_size for shard in weights.shards(directory))
        if wanted > held:
            raise CorruptCheckpoint(
                f"the config.json in {directory} describes {wanted} weights; its safetensors hold {held} bytes"
            )
        return LlamaTarget(config, _with_progress(directory), spec, number, place, chosen == "native")
    from s4c.models.hf import HFTarget

    try:
        return HFTarget.from_directory(directory, spec, number, place)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error} (the runtime was hf: {why})") from error


def choose_device(name: str | torch.device) -> torch.device:
    """The device of that name: `auto`, `cpu`, `cuda`, `cuda:N`.

    Raises:
        ValueError: it is not known, or not there.
    """
    name = str(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    here = ["auto", "cpu"] + (["cuda"] if count else []) + [f"cuda:{index}" for index in range(count)]
    if name not in here:
        reason = "there is no CUDA device that torch can use" if name.startswith("cuda") and not count else "not known"
        raise ValueError(f"device {name!r}: {reason}; on this machine it must be one of {', '.join(here)}")
    return torch.device(name)


def choose_runtime(wanted: str, config: Any, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The runtime for a model, and why that one.

    Raises:
        ValueError: the native runtime, or a dtype that only it knows, was asked for and cannot run here.
        UnsupportedModel: the torch runtime was asked for, and would compute the model wrongly.
    """
    from s4c.models.llama import unsupported
    from s4c.models.native import library
    from s4c.models.native.linear import DTYPES as NATIVE

    other = unsupported(config)
    if wanted == "torch" and other is not None:
        raise UnsupportedModel(f"the fast runtimes cannot run this model: {other}; use runtime hf")
    if wanted in ("torch", "hf"):
        problem: str | None = f"runtime {wanted} was asked for"
    elif other is not None:
        problem = other
    elif device.type != "cpu":
        problem = f"the C++ kernels run on a CPU, not on {device.type}"
    elif dtype not in NATIVE:
        problem = f"the C++ kernels know no {str(dtype).removeprefix('torch.')}"
    else:
        problem = library.problem()
    if problem is None:
        return "native", f"the fastest; C++ kernels for {library.instruction_set()}"
    if wanted == "native" or dtype == torch.int8:
        what = "runtime native" if wanted == "native" else "dtype int8"
        advice = "use runtime auto with float32 or bfloat16" + (" or device cpu" if device.type != "cpu" else "")
        raise ValueError(f"{what} cannot be used here: {problem}; {advice}")
    if wanted == "auto":
        return ("hf" if other is not None else "torch"), problem
    return wanted, problem


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of that name; `auto` is float32 on a CPU and bfloat16 on a GPU.

    Raises:
        ValueError: it is none of `DTYPES`.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype {str(dtype)!r} is not known; it must be one of auto, {', '.join(DTYPES)}")
    return found


def load_config(directory: Path) -> Any:
    """The transformers configuration of a model directory.

    Raises:
        UnsupportedModel: a field makes no sense, transformers does not know this type of model without running
            code that comes with it, or it is an encoder-decoder model.
    """
    from transformers import AutoConfig, PreTrainedConfig

    raw = weights.read_config(directory)
    for part in (raw, raw.get("text_config")):
        for name, value in part.items() if isinstance(part, dict) else ():
            if name in SIZES.split() and not isinstance(value, list):  # of some families one for each layer
                _size(name, value)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of any class, for it computes with the fields before it looks at them
        raise UnsupportedModel(
            f"transformers cannot read the configuration of {directory} (model type {raw.get('model_type')!r}; code "
            f"that comes with a model is never run): {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{directory} is an encoder-decoder model; a target must be a causal language model")
    if not isinstance(config.get_text_config(), PreTrainedConfig):
        raise UnsupportedModel(
            f"the text_config in the config.json of {directory} is {config.get_text_config()!r}; a model of type "
            f"{config.model_type!r} has none"
        )
    return config


def _size(name: str, value: Any) -> int | None:
    """What a field that counts something says; None where it says nothing.

    Raises:
        UnsupportedModel: it is no such number.
    """
    if value is not None and not (type(value) is int and 1 <= value <= LARGEST_SIZE):
        raise UnsupportedModel(f"{name} in config.json is {value!r}; it must be an integer from 1 to {LARGEST_SIZE}")
    return value


def choose_context(config: Any, wanted: int | None) -> int:
    """The context length to run a model with.

    Raises:
        ValueError: `wanted` is too short, or longer than the model's.
        UnsupportedModel: attention or rope would change inside the context, or the model names no length.
    """
    config = config.get_text_config()
    most = _size("max_position_embeddings", getattr(config, "max_position_embeddings", None))
    length = most if wanted is None else wanted
    if length is None:
        raise UnsupportedModel(
            f"the configuration (model type {config.model_type!r}) names no context length; "
            "give one: context_length=N (--context-length N)"
        )
    if not (isinstance(length, Integral) and SHORTEST_CONTEXT <= length <= (most or length)):
        allowed = f"an integer from {SHORTEST_CONTEXT} to {most or 'what you need'}"
        raise ValueError(f"context_length is {length!r}; it must be {allowed}")
    for limit, reason in _limits(config):
        if length > limit:
            raise UnsupportedModel(
                f"{reason}, and a context of {length} tokens exceeds that; "
                f"give context_length={limit} (--context-length {limit}) or less"
            )
    return int(length)


def _limits(config: Any) -> Iterator[tuple[int, str]]:
    """Context lengths up to which a model is what both runtimes compute: full attention under a fixed rope."""
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or [])
    sliding = getattr(config, "use_sliding_window", True)
    window = _size("sliding_window", getattr(config, "sliding_window", None)) if sliding else None
    if window is not None and (not kinds or "sliding_attention" in kinds):
        yield window, f"the model attends over a sliding window of {window} tokens"
    if "chunked_attention" in kinds:
        chunk = config.attention_chunk_size
        yield chunk, f"the model attends within chunks of {chunk} tokens"
    if "local" in kinds:
        yield config.window_size, f"the model attends over a local window of {config.window_size} tokens"
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = part.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            fixed = _size("original_max_position_embeddings", part.get("original_max_position_embeddings"))
            fixed = fixed or config.max_position_embeddings
            yield fixed, f"the model's rope ({kind}) changes with the length of the text after {fixed} tokens"


def eos_token_ids(directory: Path) -> tuple[int, ...]:
    """The tokens that end a text: by generation_config.json, else by config.json, else the tokenizer's."""
    generation = directory / "generation_config.json"
    config = weights.read_config(directory)
    found = None
    if generation.exists():
        try:
            found = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise CorruptCheckpoint(f"{generation} cannot be read as a JSON object ({error})") from error
    if found is None:
        found = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    if found is None and has_tokenizer(directory):
        found = load_tokenizer(directory).eos_token_id
    if found is None:
        return ()
    tokens = found if isinstance(found, list) else [found]
    if not all(type(token) is int for token in tokens):
        raise CorruptCheckpoint(f"eos_token_id of {directory} is {found!r}; it must be a token id or a list of them")
    return tuple(tokens)


def has_tokenizer(directory: Path) -> bool:
    """Whether there is anything to read a tokenizer from."""
    return any((directory / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def _tokenizer_class(directory: Path) -> Any:
    """The class that reads a tokenizer: the general one directly where it is named, for AutoTokenizer is slow."""
    import transformers

    config = directory / "tokenizer_config.json"
    named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") if config.exists() else None
    general = named in ("TokenizersBackend", "PreTrainedTokenizerFast") and (directory / "tokenizer.json").exists()
    return transformers.PreTrainedTokenizerFast if general else transformers.AutoTokenizer


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises:
        ValueError: there is none, or transformers cannot read it.
    """
    files = "tokenizer.json, or the files of its family, and tokenizer_config.json"
    if not has_tokenizer(directory):
        raise ValueError(f"{directory} holds no tokenizer ({files}); give token ids instead of text, or add them")
    try:
        with quiet_transformers():
            tokenizer = _tokenizer_class(directory).from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(
            f"the tokenizer in {directory} cannot be read ({_first_line(error)}); it needs {files}"
        ) from error
    return tokenizer


def _with_progress(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a directory, with a bar on a terminal while they are read."""
    total = sum(shard.stat().st_size for shard in weights.shards(directory))
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading weights", total=total)
        for name, tensor in weights.tensors(directory):
            yield name, tensor
            progress.advance(task, tensor.nbytes)
