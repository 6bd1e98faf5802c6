"""The target that runs any causal language model of Hugging Face, and the oracle of the fast one.

The tree goes through the model's own forward pass: positions are given, and a four-dimensional additive mask says
which node sees which. Clear beats fast here: one cache and one pass for each sequence. A model of a kind that cannot
do this (no key-value cache, positions taken from the mask, ...) would give wrong numbers without a word; so the first
thing that a target does is to check a small tree against plain passes, and to refuse the model if they differ.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from s4c.errors import CorruptCheckpoint, UnsupportedModel
from s4c.models.base import Target, TargetSpec, soft_capped
from s4c.models.builtin import quiet_transformers
from s4c.models.sampling import judge_kernel
from s4c.types import DraftTree, TargetOutput, Verdict
from s4c.verify import tree as trees

PREFILL_CHUNK = 512
NEEDED_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values")
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.15}
"""How far the logits of a tree may be from those of plain passes: mean difference over standard deviation."""

HEAD_TEXT, SMALL, LARGE = (0, 1), 2.0**-10, 2.0**15
"""What is read, and the outputs that are put in place of the LM head's, to see what becomes of them."""

CHECKED_TREE = (-1, 0, 0, 1, 2, 1)
"""Parents of the tree of the check: siblings of the root's and of a node's, nodes between parent and child."""


@dataclass
class _Slot:
    """The cache of one sequence: its first `length` rows are committed, what follows is the last tree."""

    cache: Any = field(default_factory=DynamicCache)
    length: int = 0

    def keep(self, rows: Tensor) -> None:
        """Keep these rows of every layer, in this order."""
        for layer in self.cache.layers:
            layer.keys = layer.keys.index_select(-2, rows.to(layer.keys.device))
            layer.values = layer.values.index_select(-2, rows.to(layer.values.device))
        self.length = rows.shape[0]

    def empty_last(self) -> None:
        """Zero the last row of every layer."""
        for layer in self.cache.layers:
            layer.keys[..., -1:, :] = 0
            layer.values[..., -1:, :] = 0

    def drop_tree(self) -> None:
        """Drop what no verdict committed."""
        if self.cache.get_seq_length() > self.length:
            self.keep(torch.arange(self.length))


class HFTarget(Target):
    """Any Hugging Face causal language model that takes a tree.

    Args:
        model: with eager attention, in its dtype and on its device.
        spec: what the other rooms may know; the sizes are corrected to those of the LM head.

    Raises:
        UnsupportedModel: the model cannot verify a tree.
    """

    runtime = "hf"

    def __init__(self, model: Any, spec: TargetSpec) -> None:
        self._model = model.eval().requires_grad_(False)
        self._head: nn.Module = _head_of(model, spec.name)
        self._scale = 1.0
        vocab_size, hidden_size = self.head_weight().shape
        self.spec = replace(spec, vocab_size=vocab_size, hidden_size=hidden_size)
        self.device = model.device
        self.judge = judge_kernel(self.device)
        self.dtype = model.dtype
        self.layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
        self.weight_bytes = sum(p.nbytes for p in model.parameters())
        self._slots: list[_Slot] = []
        self._check()
        self._read_head()

    @classmethod
    def from_directory(cls, directory: Path, spec: TargetSpec, dtype: torch.dtype, device: torch.device) -> HFTarget:
        """Load a model directory.

        Raises:
            UnsupportedModel: it is no causal language model that transformers knows, or cannot verify a tree.
            CorruptCheckpoint: a weight is missing, damaged or of another shape.
        """
        options = {"dtype": dtype, "attn_implementation": "eager", "use_safetensors": True, "local_files_only": True}
        try:
            with quiet_transformers():
                model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
        except SafetensorError as error:
            raise CorruptCheckpoint(f"the safetensors in {directory} cannot be read: {error}") from error
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except RuntimeError as error:
            raise CorruptCheckpoint(f"the weights in {directory} do not fit config.json: {error}") from error
        except Exception as error:  # of any class: it builds the model from whatever the configuration says
            raise UnsupportedModel(
                f"transformers finds no causal language model in {directory}: {type(error).__name__}: {error}"
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise CorruptCheckpoint(f"the weights in {directory} lack {', '.join(missing[:5])} ({len(missing)} in all)")
        return cls(model.to(device), spec)

    def reserve(self, slots: int, length: int) -> None:
        self._slots += [_Slot() for _ in range(slots - len(self._slots))]

    def prefill(self, slot: int, tokens: Tensor, taps: Sequence[int] = ()) -> Tensor:
        state = self._slots[slot] = _Slot()
        features = [torch.empty(0, self.spec.hidden_size * (1 + len(taps)), dtype=self.dtype, device=self.device)]
        for first in range(0, tokens.shape[0], PREFILL_CHUNK):
            chunk = tokens[first : first + PREFILL_CHUNK].to(self.device)
            positions = first + torch.arange(chunk.shape[0], device=self.device)
            features.append(self._pass(chunk, positions, None, state.cache, taps, last=True)[1])
            state.length += chunk.shape[0]
        return torch.cat(features)

    def verify(self, tree: DraftTree, taps: Sequence[int] = ()) -> TargetOutput:
        visible = trees.ancestors(tree.parents)
        rows, given = [], []
        for slot, (tokens, sees) in enumerate(zip(tree.tokens, visible, strict=True)):
            state = self._slots[slot]
            state.drop_tree()
            # A node past the context is cut by the engine whatever it holds; it only needs a position that exists.
            positions = (state.length + sees.sum(-1) - 1).clamp(max=self.spec.context_length - 1)
            seen = torch.cat([sees.new_ones(tree.size, state.length), sees], 1)
            rows.append(self._pass(tokens, positions, seen, state.cache, taps))
            given.append((tokens, positions, seen, state, taps))
        sound = torch.stack([features.isfinite().all() for _, features in rows]).tolist()  # a device is waited for once
        for slot, whole in enumerate(sound):
            if not whole:
                rows[slot] = self._node_by_node(*given[slot])
        logits, features = zip(*rows, strict=True)
        return TargetOutput(torch.stack(logits), torch.stack(features))

    def _node_by_node(
        self, tokens: Tensor, positions: Tensor, seen: Tensor, state: _Slot, taps: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """A pass over a tree in which a node is not finite: its keys and values would spoil also who does not see it.

        They are emptied before the next node is computed; what sees it is NaN.
        """
        state.drop_tree()
        rows: list[tuple[Tensor, Tensor]] = []
        spoilt = torch.zeros_like(seen[0])
        for node, sees in enumerate(seen):
            here = slice(node, node + 1)
            end = state.length + node + 1
            logits, features = self._pass(tokens[here], positions[here], sees[None, :end], state.cache, taps)
            spoilt[end - 1] = not features.isfinite().all() or bool((sees & spoilt).any())
            if spoilt[end - 1]:
                state.empty_last()
                logits, features = torch.full_like(logits, torch.nan), torch.full_like(features, torch.nan)
            rows.append((logits, features))
        logits, features = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return logits, features

    def commit(self, verdict: Verdict) -> None:
        for slot, (path, accepted) in enumerate(zip(verdict.path, verdict.accepted.tolist(), strict=True)):
            state = self._slots[slot]
            committed = torch.arange(state.length, device=path.device)
            state.keep(torch.cat([committed, state.length + path[: accepted + 1]]))

    def move(self, source: int, destination: int) -> None:
        self._slots[destination] = self._slots[source]
        self._slots[source] = _Slot()

    def length(self, slot: int) -> int:
        return self._slots[slot].length

    def twin(self) -> HFTarget:
        twin = copy.copy(self)
        twin._slots = []
        weights: dict[int, Any] = {id(parameter): parameter for parameter in self._model.parameters()}
        twin._model = copy.deepcopy(self._model, weights)
        twin._head = twin._model.get_output_embeddings()
        return twin

    def embedding_weight(self) -> Tensor:
        weight: Tensor = self._model.get_input_embeddings().weight
        return weight

    def head_weight(self, rows: Tensor | None = None) -> Tensor:
        weight = self._head.weight
        assert isinstance(weight, Tensor)
        weight = weight if rows is None else weight[rows]
        return weight if self._scale == 1 else self._scale * weight

    def final_norm_weight(self) -> Tensor | None:
        base = self._model.base_model
        for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f"):
            norm = getattr(base, name, None)
            if norm is not None and "RMSNorm" in type(norm).__name__:
                # Some families store w and multiply by 1 + w; a constant row comes out as what they multiply by.
                constant = torch.full((self.spec.hidden_size,), 1000.0, dtype=self.dtype, device=self.device)
                with torch.no_grad():
                    weight: Tensor = norm(constant)
                return weight
        return None

    @torch.no_grad()
    def _pass(
        self,
        tokens: Tensor,
        positions: Tensor,
        seen: Tensor | None,
        cache: Any,
        taps: Sequence[int] = (),
        last: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One forward pass of one sequence.

        Args:
            tokens: [n] int64.
            positions: [n] int64.
            seen: [n, m] bool, which of the cached and the new rows a token sees; None for the usual causal mask.
            cache: takes in n rows; None for none.
            taps: numbers of layers behind which the hidden states are wanted too.
            last: whether the logits of the last token are enough.

        Returns:
            logits [n or 1, V] float32 and features [n, d (1 + taps)].
        """
        mask = None
        if seen is not None:
            hidden = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
            mask = hidden.masked_fill(~seen.to(self.device), torch.finfo(self.dtype).min)[None, None]
        read: list[Tensor] = []

        def before_head(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            read.append(arguments[0])
            return (arguments[0][:, -1:], *arguments[1:]) if last else arguments

        with self._head.register_forward_pre_hook(before_head):
            output = self._model(
                input_ids=tokens[None].to(self.device),
                position_ids=positions[None].to(self.device),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
                **({"output_hidden_states": True} if taps else {}),
            )
        if not read or read[-1].shape[:2] != (1, tokens.shape[0]):
            raise UnsupportedModel(f"{self.spec.name} does not put its hidden states through its LM head")
        return output.logits[0].float(), torch.cat([read[-1][0], *(output.hidden_states[t][0] for t in taps)], -1)

    def _check(self) -> None:
        """Hold a small tree, and what follows its commit, against plain passes.

        Raises:
            UnsupportedModel: they differ, or the model cannot run them.
        """
        refused = f"{self.spec.name} ({type(self._model).__name__}) cannot verify a tree of drafts: "
        try:
            error = self._tree_error()
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as fault:
            raise UnsupportedModel(f"{refused}its forward pass fails on one ({fault})") from fault
        if not error <= TOLERANCE[self.dtype]:
            raise UnsupportedModel(
                f"{refused}its logits differ from those of plain passes by {error:.2g} standard deviations, so it does "
                "not take the mask, the positions or the cache at their word"
            )
        self._slots = []

    def _tree_error(self) -> float:
        """Largest distance of a node's logits from those of a plain pass over its path, in standard deviations."""
        generator = torch.Generator().manual_seed(0)
        prefix = min(3, self.spec.context_length - 5)
        tokens = torch.randint(self.spec.vocab_size, (prefix + len(CHECKED_TREE) + 1,), generator=generator)
        prompt, drafted, bonus = tokens[:prefix], tokens[prefix:-1], tokens[-1:]
        none, accepted = torch.zeros(1, dtype=torch.bool), [0, 1, 5]
        tree = DraftTree(drafted[None], torch.tensor([CHECKED_TREE]), none.expand(1, len(CHECKED_TREE)), none)
        self.reserve(1, self.spec.context_length)
        self.prefill(0, prompt)
        logits = self.verify(tree).logits[0]
        errors = [
            self._distance(logits[node], [*prompt.tolist(), *drafted[sees].tolist()])
            for node, sees in enumerate(trees.ancestors(tree.parents)[0])
        ]
        path = torch.tensor([accepted])
        self.commit(Verdict(path, torch.tensor([2]), bonus, drafted[path]))
        after = self.verify(trees.root_only(bonus.tolist(), self.device)).logits[0, 0]
        errors.append(self._distance(after, [*prompt.tolist(), *drafted[accepted].tolist(), int(bonus)]))
        return max(errors)

    def _distance(self, logits: Tensor, text: Sequence[int]) -> float:
        """`_apart` from the logits that a plain pass gives after a text."""
        return _apart(logits, self._plain_pass(text)[0][-1])

    def _plain_pass(self, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor(text, device=self.device)
        return self._pass(tokens, torch.arange(len(text), device=self.device), None, None)

    def _read_head(self) -> None:
        """Find out what the model makes of its LM head's outputs: it may scale them, and bend them towards a cap.

        Families name this differently or do it without a name, so the model is asked: what do a small and a large
        output become? Whether there is more to it (a bias, say) its own logits tell.
        """
        self._scale = self._after_head(SMALL) / SMALL
        most = self._after_head(LARGE)
        self.softcap = most if most < 0.5 * self._scale * LARGE else 0.0
        logits, features = self._plain_pass(HEAD_TEXT)
        made = soft_capped(F.linear(features, self.head_weight()).float(), self.softcap)
        self.readable = _apart(made, logits) <= TOLERANCE[self.dtype]
        if not self.readable:
            self._scale, self.softcap = 1.0, 0.0

    def _after_head(self, output: float) -> float:
        """The logit that an output of the LM head becomes."""
        hook = self._head.register_forward_hook(lambda module, arguments, given: torch.full_like(given, output))
        try:
            return float(self._plain_pass(HEAD_TEXT)[0][0, 0])
        finally:
            hook.remove()


def _apart(logits: Tensor, expected: Tensor) -> float:
    """Mean distance of logits from those expected, over their standard deviation; infinite where that is no number."""
    distance = float((logits - expected).abs().mean() / expected.std())
    return math.inf if math.isnan(distance) else distance


def _head_of(model: Any, name: str) -> nn.Module:
    """The LM head, once it is clear that the model has what a tree needs.

    Raises:
        UnsupportedModel: it does not.
    """
    lacking = [argument for argument in NEEDED_ARGUMENTS if argument not in inspect.signature(model.forward).parameters]
    if lacking:
        raise UnsupportedModel(
            f"{name} ({type(model).__name__}) cannot verify a tree of drafts: its forward pass takes no "
            f"{', '.join(lacking)}. It has no key-value cache, or positions that cannot be set"
        )
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UnsupportedModel(f"{name} ({type(model).__name__}) has no LM head that can be read")
    assert isinstance(head, nn.Module)
    return head
