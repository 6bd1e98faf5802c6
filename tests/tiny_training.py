"""A target and a draft model small enough to train in a test.

The target is a Markov chain in disguise: its feature is a function of the last two tokens, so a drafter
can learn it whole, and greedy text is a function of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4c.drafters.base import Drafter, DraftModel, Method, Prediction, Sequences, TrainingBatch
from s4c.models.base import Target, TargetSpec
from s4c.training.data import Row
from s4c.types import DraftTree, TargetOutput, Verdict

VOCAB, HIDDEN, EOS = 23, 8, 2


class TinyTarget(Target):
    """f_t = tanh(E x_t + A E x_{t-1}), logits W f_t, i E x_t behind layer i. It only knows how to read a text."""

    runtime = "torch"
    layers = 9

    def __init__(self, seed: int = 0, name: str = "tiny") -> None:
        random = torch.Generator().manual_seed(seed)
        self.spec = TargetSpec(name, f"hash-of-{seed}", VOCAB, HIDDEN, 256, (EOS,))
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=random)
        self.mix = torch.randn(HIDDEN, HIDDEN, generator=random) / HIDDEN**0.5
        self.head = torch.randn(VOCAB, HIDDEN, generator=random) * 3
        self.prefills = 0

    def prefill(self, slot: int, tokens: Tensor, taps: Sequence[int] = ()) -> Tensor:
        self.prefills += 1
        embedded = self.embedding[tokens]
        feature = torch.tanh(embedded + F.pad(embedded, (0, 0, 1, 0))[:-1] @ self.mix)
        return torch.cat([feature, *(tap * embedded for tap in taps)], -1)

    def answer(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            logits = self.prefill(0, torch.tensor(tokens[-2:]))[-1] @ self.head.T
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]

    def reserve(self, slots: int, length: int) -> None: ...

    def verify(self, tree: DraftTree, taps: Sequence[int] = ()) -> TargetOutput:
        raise NotImplementedError

    def commit(self, verdict: Verdict) -> None:
        raise NotImplementedError

    def twin(self) -> TinyTarget:
        raise NotImplementedError

    def move(self, source: int, destination: int) -> None:
        raise NotImplementedError

    def length(self, slot: int) -> int:
        raise NotImplementedError

    def embedding_weight(self) -> Tensor:
        return self.embedding

    def head_weight(self, rows: Tensor | None = None) -> Tensor:
        return self.head if rows is None else self.head[rows]

    def final_norm_weight(self) -> Tensor | None:
        return None


@dataclass(frozen=True)
class TinyConfig:
    heads: int = 2
    width: int = 32


class TinyModel(DraftModel):
    """Head i predicts token t + 1 + i from the target's feature at t and token t + 1."""

    def __init__(self, target: Target, config: TinyConfig, token_ids: Tensor) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("token_ids", token_ids)
        self.register_buffer("embedding", target.embedding_weight(), persistent=False)
        self.register_buffer("rows", target.head_weight(token_ids), persistent=False)
        size = target.spec.hidden_size
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * size, config.width), nn.Tanh(), nn.Linear(config.width, size))
            for _ in range(config.heads)
        )

    def outputs(self, feature: Tensor, next_token: Tensor) -> list[Tensor]:
        pair = torch.cat([feature, self.embedding[next_token]], -1)
        return [head(pair) for head in self.heads]

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.rows)

    def predictions(self, batch: TrainingBatch) -> list[Prediction]:
        following = F.pad(batch.tokens, (0, 1))[:, 1:]
        outputs = self.outputs(batch.features, following)
        return [Prediction(h, self.rows, h, offset=i) for i, h in enumerate(outputs, 2)]

    def drafter(self, target: Target, dtype: torch.dtype | None = None) -> Drafter:
        return TinyDrafter(self)


class TinyDrafter(Drafter):
    name = "tiny"
    default_tree = "comb:2"

    def __init__(self, model: TinyModel) -> None:
        self.model = model
        self.last: dict[int, Tensor] = {}

    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        self.last[slot] = features[-1] if len(features) else torch.zeros(HIDDEN)

    def propose(self, sequences: Sequences) -> DraftTree:
        builder = sequences.plan.deepened(self.model.config.heads).grow(sequences.root_tokens)
        feature = torch.stack([self.last[slot] for slot in range(len(sequences.tokens))])
        outputs = self.model.outputs(feature, sequences.root_tokens)
        while builder.open:
            law = self.model.logits(outputs[builder.level]).log_softmax(-1)
            builder.extend(law[:, None].expand(-1, builder.frontier.shape[1], -1), self.model.token_ids)
        return builder.finish()

    def commit(self, tree: DraftTree, verdict: Verdict, output: TargetOutput) -> None:
        for slot, (path, _) in enumerate(verdict.lines):
            self.last[slot] = output.features[slot, path[-1]]

    def move(self, source: int, destination: int) -> None:
        self.last[destination] = self.last.pop(source)


METHODS = {
    "tiny": Method("tiny", config=TinyConfig, model=TinyModel),
    "untrained": Method("untrained", create=lambda target, argument: None),
}


def tiny_rows(target: TinyTarget, count: int, answer: int = 12, seed: int = 0) -> list[Row]:
    """Rows of greedy answers to different random prompts of 2 to 9 tokens."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        prompt = torch.randint(0, VOCAB, (2 + i % 8,), generator=random).tolist()
        rows.append(Row(tuple(prompt), tuple(target.answer(prompt, answer - i % 5)), 0.0, "test"))
    return rows


def tiny_model(target: TinyTarget, seed: int = 0, token_ids: Tensor | None = None, heads: int = 2) -> TinyModel:
    torch.manual_seed(seed)
    return TinyModel(target, TinyConfig(heads), torch.arange(VOCAB) if token_ids is None else token_ids)
