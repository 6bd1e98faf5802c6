"""A copy of a target whose weights are trained, in float32; the target itself stays as it is."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from s4c.models import weights
from s4c.models.layers import DecoderLayer
from s4c.models.llama import HEAD, LlamaTarget, OpenModel, layer_places
from s4c.models.loading import resolve
from s4c.models.stack import OpenLayers


class TunedModel(nn.Module):
    """All weights of a target: embeddings, layers, norms and LM head, the last tied to the first as in the target.

    Args:
        target: where they start; its directory gives the configuration and the tokenizer of what is saved.

    Raises:
        UnsupportedModel: its runtime is not torch.
        ValueError: its directory is not there any more.
    """

    def __init__(self, target: LlamaTarget) -> None:
        super().__init__()
        opened = target.open()
        self.embedding = _trained(opened.embedding)
        self.layers = nn.ModuleList(deepcopy(opened.stack.layers)).float().requires_grad_(True)
        self.norm = deepcopy(opened.stack.norm).float().requires_grad_(True)
        self.head = None if opened.head is opened.embedding else _trained(opened.head)
        self._rope = opened.stack.rope
        self._target = target
        self._directory = resolve(target.spec.name)

    def open(self) -> OpenModel:
        """The present weights, to train through."""
        stack = OpenLayers(cast("list[DecoderLayer]", [*self.layers]), self._rope, self.norm)
        return OpenModel(self.embedding, stack, self.embedding if self.head is None else self.head)

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the present weights by their Hugging Face names, in the dtype of the target."""
        opened = self.open()
        places = {"model.embed_tokens.weight": opened.embedding, "model.norm.weight": opened.stack.norm.weight}
        if self.head is not None:
            places[HEAD] = self.head
        for index, layer in enumerate(opened.stack.layers):
            places |= layer_places(index, layer)
        return {name: place.detach().to("cpu", self._target.dtype, copy=True) for name, place in places.items()}

    def target(self) -> LlamaTarget:
        """A target that runs a copy of the present weights."""
        base = self._target
        spec = replace(base.spec, name=f"{base.spec.name}, tuned", fingerprint="not saved yet")
        return LlamaTarget(base.config, self.tensors().items(), spec, base.dtype, base.device)

    def save(self, directory: Path) -> str:
        """Write the present weights as a Hugging Face directory.

        Returns:
            Its fingerprint.

        Raises:
            OSError: it cannot be written.
        """
        weights.write_model(directory, self._directory, self.tensors())
        return weights.fingerprint(directory)


def _trained(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(torch.float32, copy=True))
