"""Typical acceptance: what its definition says, in batches as alone, and never without the word lossy."""

from __future__ import annotations

import ast
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from test_rules import random_tree
from typer.testing import CliRunner
from verify_oracles import (
    Text,
    committed,
    distance,
    output_of,
    path_to,
    plain_law,
    processed_by,
    random_request,
    scores_of,
    slow_plain,
    speculate,
    tiny_model,
)

from s4c import LLM, SamplingParams
from s4c.cli.main import app
from s4c.types import DraftTree
from s4c.verify import rules
from s4c.verify.noise import gumbel
from s4c.verify.rules import coupled
from s4c.verify.tree import from_paths
from s4c.verify.typical import DELTA, EPSILON, any_rule, title, typical

VOCAB = 5


def slow(tree: DraftTree, text: Text, request: SamplingParams, seed: int) -> list[int]:
    """The definition for one sequence: every path, node by node."""
    law_of = processed_by(request, tiny_model(seed, VOCAB), VOCAB)
    tokens, parents, candidate = (x[0].tolist() for x in (tree.tokens, tree.parents, tree.candidate))
    best: tuple[int, float, list[int]] = (0, 0.0, [])
    for node in range(1, tree.size):
        path, total, stands = path_to(parents, node), 0.0, True
        for at in path:
            above = tuple(tokens[step] for step in path_to(parents, parents[at]))
            law = law_of(text + above).double().softmax(-1)
            entropy = -sum(float(p) * math.log(p) for p in law if p > 0)
            p = float(law[tokens[at]])
            stands &= candidate[at] and p > min(EPSILON, DELTA * math.exp(-entropy))
            total += math.log(p) if p > 0 else -math.inf
        if stands and (len(path), total) > best[:2]:
            best = (len(path), total, [tokens[at] for at in path])
    return best[2]


@pytest.mark.parametrize("seed", range(60))
def test_the_longest_path_of_typical_tokens_stands(seed: int) -> None:
    rng = random.Random(seed)
    request = replace(random_request(rng, VOCAB, temperature=rng.choice([0.7, 1.5])), bad_words=(), logit_bias={})
    text: Text = (1, 2)
    tree = random_tree([list(text)], 9, VOCAB, rng)
    tree = from_paths(tree.tokens[:, 0].tolist(), [[[rng.randrange(VOCAB) for _ in range(3)] for _ in range(4)]], 12)
    expected = slow(tree, text, request, seed)
    verdict = typical(
        tree, output_of(tree, [text], [tiny_model(seed, VOCAB)]), scores_of([request], [text], [1], VOCAB)
    )
    found = list(committed(verdict))
    assert found[: len(expected)] == expected
    law = processed_by(request, tiny_model(seed, VOCAB), VOCAB)(text + tuple(found[:-1]))
    noise = gumbel(request.seed or 0, 0, len(text) + len(found) - 1, VOCAB)
    assert found[-1] == int((law + noise).argmax())


def test_batched_equals_single() -> None:
    rng = random.Random(1)
    requests = [replace(random_request(rng, VOCAB), bad_words=(), logit_bias={}) for _ in range(12)]
    texts = [(rng.randrange(VOCAB),) for _ in requests]
    models = [tiny_model(seed, VOCAB) for seed in range(12)]
    tree = random_tree([list(text) for text in texts], 9, VOCAB, rng)

    def judged(rows: list[int]) -> list[Text]:
        part = DraftTree(tree.tokens[rows], tree.parents[rows], tree.candidate[rows], tree.sampled[rows])
        chosen = [[x[row] for row in rows] for x in (texts, models, requests)]
        scores = scores_of(chosen[2], chosen[0], [1] * len(rows), VOCAB)
        verdict = typical(part, output_of(part, chosen[0], chosen[1]), scores)
        return [committed(verdict, row) for row in range(len(rows))]

    together = judged(list(range(12)))
    assert together == [judged([row])[0] for row in range(12)]
    assert max(map(len, together)) > 2


def test_at_temperature_zero_it_is_greedy_decoding() -> None:
    rng = random.Random(2)
    models = [tiny_model(seed, VOCAB) for seed in range(8)]
    outputs, _ = speculate(
        typical,
        models,
        [SamplingParams()] * 8,
        [(0,)] * 8,
        9,
        lambda texts, scores: random_tree(texts, 9, VOCAB, rng),
        VOCAB,
    )
    assert outputs == [slow_plain(model, SamplingParams(), (0,), 9) for model in models]


def test_its_law_is_another_and_it_accepts_more() -> None:
    """One drafted token that is typical stands in every run: what makes it fast is what makes it lossy."""
    model, seeds = tiny_model(3, 4, 0.3), 400
    requests = [SamplingParams(temperature=1.0, seed=seed) for seed in range(seeds)]
    likely = int(model((0,)).argmax())
    accepted = {}
    for name in ("typical", "coupled"):
        tree = from_paths([0] * seeds, [[[likely]]] * seeds, 2)
        output = output_of(tree, [(0,)] * seeds, [model] * seeds)
        verdict = any_rule(name)(tree, output, scores_of(requests, [(0,)] * seeds, [1] * seeds, 4))
        accepted[name] = int(verdict.accepted.sum())
        if name == "typical":
            law = {
                (token,): sum(committed(verdict, row)[0] == token for row in range(seeds)) / seeds for token in range(4)
            }
            assert distance(law, plain_law(model, requests[0], (0,), 1, 4)) > 0.5
    assert accepted["typical"] == seeds > 2 * accepted["coupled"]


def test_it_is_marked_and_the_lossless_rules_do_not_know_it(tmp_path: Path) -> None:
    assert (title("typical"), title("coupled")) == ("typical (lossy)", "coupled")
    assert any_rule("coupled") is coupled
    assert "typical" not in rules.RULES
    imports = [
        ast.unparse(n) for n in ast.walk(ast.parse(Path(rules.__file__).read_text())) if "import" in ast.unparse(n)
    ]
    assert not any("typical" in line for line in imports)
    with pytest.raises(ValueError, match=r"one of coupled, rejection, typical \(lossy\)"):
        any_rule("typically")
    llm = LLM(str(tiny_models.save(tmp_path, "llama")), "ngram", rule="typical", threads=1)
    params = SamplingParams(max_new_tokens=20, temperature=2.0, ignore_eos=True)
    stats = llm.generate([4, 5, 6, 4, 5], params).stats
    assert stats.rule == stats.as_dict()["rule"] == "typical (lossy)"


def test_the_commands_show_the_mark(tmp_path: Path) -> None:
    target = tiny_models.save(tmp_path, "llama", tokenizer=True)
    common = ["--target", str(target), "--threads", "1", "--rule", "typical", "--max-new-tokens", "24"]
    asked = ["generate", "abab", *common, "--drafter", "ngram", "--temperature", "3", "--seed", "3"]
    done = CliRunner().invoke(app, asked)
    assert "rule typical (lossy)" in done.stderr
    compared = CliRunner().invoke(app, [*asked, "--compare"])
    assert compared.exit_code == 0
    assert "the rule typical (lossy) is lossy and promises nothing" in compared.stdout
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "category": "qa", "turns": ["abab"]}\n')
    bench = CliRunner().invoke(app, ["bench", *common, "--questions", str(questions), "--methods", "ngram"])
    assert "ngram@rule=typical (lossy)" in bench.stdout
    assert "LOSSY" in CliRunner().invoke(app, ["generate", "--help"]).stdout
