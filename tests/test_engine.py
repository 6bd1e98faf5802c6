"""The engine: speculative = plain, batched = single, and every request ends where plain decoding ends it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from s4c import LLM, SamplingParams
from s4c.drafters.base import Drafter, Sequences
from s4c.drafters.s4c import S4CConfig, S4CModel
from s4c.engine.llm import Chunk
from s4c.engine.sequence import Detokenizer, Sequence
from s4c.errors import BadLogits
from s4c.types import DraftTree
from s4c.verify.tree import from_paths

PROMPTS = [[3, 14, 15, 9, 26, 5], [8, 2], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [1, 2, 1, 2, 1, 2, 1, 2]]
SETTINGS = {
    "greedy": SamplingParams(max_new_tokens=24, ignore_eos=True),
    "sampled": SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=1.0, seed=1),
    "hot": SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=1.7, seed=2),
    "nucleus": SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=0.9, top_p=0.8, seed=3),
    "top-k": SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=1.0, top_k=5, min_p=0.05, seed=4),
    "penalised": SamplingParams(
        max_new_tokens=24,
        ignore_eos=True,
        temperature=0.8,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        logit_bias={7: 3.0, 9: -5.0},
        bad_words=[[7, 7], [12], [3, 4, 5]],
        seed=5,
    ),
    "penalised greedy": SamplingParams(
        max_new_tokens=24, ignore_eos=True, repetition_penalty=1.5, bad_words=[[7], [3, 8]]
    ),
}


class Prophet(Drafter):
    """Drafts what plain decoding wrote, with mistakes sown in, so that rounds accept anything from 0 to all."""

    name = "prophet"
    default_tree = "chain:5"

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts
        self.random = torch.Generator().manual_seed(0)

    def propose(self, sequences: Sequences) -> DraftTree:
        paths = []
        for line in sequences.tokens:
            text = next(text for text in self.texts if text[: len(line)] == line)
            truth = text[len(line) : len(line) + 5]
            right = int(torch.randint(0, 6, (), generator=self.random))
            wrong = [(token + 1) % 64 for token in truth]
            paths.append([truth[:right] + wrong[right:], wrong])
        return from_paths(sequences.roots, paths, budget=9)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tiny_models.save(tmp_path_factory.mktemp("model"), "llama", seed=3)
    return LLM(directory, "none", max_batch=4)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tiny_models.save(tmp_path_factory.mktemp("model"), "llama", tokenizer=True)
    return LLM(str(directory), "none")


def s4c_drafter(llm: LLM) -> Drafter:
    torch.manual_seed(0)
    return S4CModel(llm.target, S4CConfig(head_dim=8), torch.arange(0, 64)).drafter(llm.target)


def write(llm: LLM, drafter: Any, params: SamplingParams, tree: str = "auto", **engine: Any) -> list[list[int]]:
    llm.rule = engine.get("rule", "coupled")
    llm.use(drafter, tree)
    return [generation.token_ids for generation in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tree", ["comb:3x4", "best:20x4", "chain:3"])
def test_speculative_is_plain(llm: LLM, setting: str, tree: str) -> None:
    plain = write(llm, "none", SETTINGS[setting])
    for drafter in (s4c_drafter(llm), "ngram"):
        assert write(llm, drafter, SETTINGS[setting], tree) == plain


@pytest.mark.parametrize("setting", SETTINGS)
def test_speculative_is_plain_when_much_is_accepted(llm: LLM, setting: str) -> None:
    plain = write(llm, "none", SETTINGS[setting])
    prophet = Prophet([prompt + text for prompt, text in zip(PROMPTS, plain, strict=True)])
    llm.use(prophet)
    generations = llm.generate(PROMPTS, SETTINGS[setting])
    assert [g.token_ids for g in generations] == plain
    assert sum(g.stats.rounds for g in generations) < sum(len(text) for text in plain)
    for generation in generations:
        stats = generation.stats
        assert sum((a + 1) * n for a, n in enumerate(stats.acceptance_histogram)) == stats.new_tokens
        assert sum(stats.acceptance_histogram) == stats.rounds
        assert stats.new_tokens == len(generation.token_ids) == len(generation.origins)


@pytest.mark.parametrize("setting", SETTINGS)
def test_batched_is_single(llm: LLM, setting: str) -> None:
    llm.rule = "coupled"
    llm.use(s4c_drafter(llm), "best:12x4")
    alone = [llm.generate(prompt, SETTINGS[setting]).token_ids for prompt in PROMPTS]
    assert write(llm, s4c_drafter(llm), SETTINGS[setting], "best:12x4") == alone


def test_more_requests_than_slots_each_with_its_own_parameters(llm: LLM) -> None:
    params = [replace(p, max_new_tokens=5 + 3 * n) for n, p in enumerate(SETTINGS.values())]
    prompts = [PROMPTS[n % len(PROMPTS)] for n in range(len(params))]
    llm.rule = "coupled"
    llm.use("none")
    alone = [llm.generate(prompt, p).token_ids for prompt, p in zip(prompts, params, strict=True)]
    for drafter in ("none", "ngram", s4c_drafter(llm)):
        llm.use(drafter)
        assert [g.token_ids for g in llm.generate(prompts, params)] == alone
        assert llm._engine.scheduler.idle


def test_rejection_is_greedy_at_temperature_zero(llm: LLM) -> None:
    plain = write(llm, "none", SETTINGS["greedy"])
    for tree in ("comb:3x4", "best:12x4"):
        assert write(llm, s4c_drafter(llm), SETTINGS["greedy"], tree, rule="rejection") == plain


def test_rejection_samples_the_same_law(llm: LLM) -> None:
    """The first two tokens over 3,000 seeds, plain and by rejection: the two counts differ by chance alone.

    A chi-square test between two samples; with the seeds fixed the outcome is fixed, and for a right rule a
    failure would have had a chance of 1 in 10,000 before the seeds were chosen.
    """
    from scipy.stats import chi2_contingency

    params = [SamplingParams(max_new_tokens=2, temperature=0.7, top_k=4, seed=seed) for seed in range(1500)]
    counts = []
    for drafter, rule in (("none", "coupled"), (s4c_drafter(llm), "rejection")):
        llm.rule, llm.max_batch = rule, 64
        llm.use(drafter, "comb:2x2")
        drawn = [tuple(g.token_ids) for g in llm.generate([PROMPTS[0]] * len(params), params)]
        counts.append(drawn)
    llm.max_batch = 4
    pairs = sorted(set(counts[0]) | set(counts[1]))
    table = [[drawn.count(pair) for pair in pairs] for drawn in counts]
    frequent = [i for i in range(len(pairs)) if table[0][i] + table[1][i] >= 10]
    assert len(frequent) >= 4
    assert chi2_contingency([[row[i] for i in frequent] for row in table]).pvalue > 1e-4


def test_a_request_ends_where_plain_decoding_ends_it(llm: LLM) -> None:
    plain = write(llm, "none", replace(SETTINGS["sampled"], max_new_tokens=40))
    prophet = Prophet([prompt + text for prompt, text in zip(PROMPTS, plain, strict=True)])
    llm.use(prophet)
    for prompt, text in zip(PROMPTS, plain, strict=True):
        for at in (1, 2, 3, 7, 20):
            params = replace(SETTINGS["sampled"], max_new_tokens=at)
            generation = llm.generate(prompt, params)
            assert (generation.token_ids, generation.finish_reason) == (text[:at], "length")
            params = replace(SETTINGS["sampled"], max_new_tokens=40, stop_token_ids=[text[at]])
            generation = llm.generate(prompt, params)
            assert generation.token_ids == text[: text.index(text[at]) + 1]
            assert generation.finish_reason == "stop"


def test_the_end_of_sequence_token_ends_a_request(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=30, temperature=1.0, logit_bias={1: 1.0}, seed=3)
    llm.use("none")
    ended = llm.generate(PROMPTS[0], params)
    assert ended.finish_reason == "eos"
    assert ended.token_ids[-1] == 1
    assert (
        llm.generate(PROMPTS[0], replace(params, ignore_eos=True)).token_ids[: len(ended.token_ids)] == ended.token_ids
    )


def test_the_context_ends_a_request(llm: LLM) -> None:
    prompt = list(range(2, 62)) * 2
    for drafter in ("none", "ngram", s4c_drafter(llm)):
        llm.use(drafter)
        generation = llm.generate(prompt, SamplingParams(max_new_tokens=500, ignore_eos=True))
        assert len(prompt) + len(generation.token_ids) == llm.target.spec.context_length
        assert generation.finish_reason == "length"


def test_logprobs_are_those_of_the_processed_law(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=0.8, top_k=6, logprobs=True, ignore_eos=True, seed=9)
    llm.use("none")
    plain = llm.generate(PROMPTS[0], params)
    assert plain.logprobs is not None
    assert all(value <= 0 for value in plain.logprobs)
    assert len(plain.logprobs) == 12
    llm.use(Prophet([PROMPTS[0] + plain.token_ids]))
    assert llm.generate(PROMPTS[0], params).logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    llm.use("none")
    first = llm.target.prefill(0, torch.tensor(PROMPTS[0]))[-1]
    logits = first @ llm.target.head_weight().T / 0.8
    kept = logits.topk(6)
    expected = kept.values.log_softmax(-1)[kept.indices.tolist().index(plain.token_ids[0])]
    assert plain.logprobs[0] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("chunk", range(1, 4))
def test_stop_strings_across_tokens(chatty: LLM, chunk: int) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=chunk, ignore_eos=True)
    chatty.use("none")
    free = chatty.generate("hello", params)
    stop = free.text[5 : 5 + chunk]
    params = replace(params, stop=[stop, "never to be seen"])
    stopped = chatty.generate("hello", params)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert chatty.generate("hello", replace(params, stop=["never to be seen"])).text == free.text
    assert stopped.finish_reason == "stop"
    ids = chatty.token_ids("hello")
    chatty.use(Prophet([ids + free.token_ids]))
    again = chatty.generate("hello", params)
    assert (again.text, again.token_ids) == (stopped.text, stopped.token_ids)
    chatty.use("none")
    assert "".join(chunk.text for chunk in chatty.stream("hello", params)) == stopped.text


def test_streaming_gives_the_same_text_and_can_be_left(chatty: LLM) -> None:
    params = SamplingParams(max_new_tokens=30, temperature=1.0, seed=4)
    for drafter in ("none", "ngram"):
        chatty.use(drafter)
        whole = chatty.generate("abcabcabc", params)
        chunks = list(chatty.stream("abcabcabc", params))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
        assert [origin for chunk in chunks for origin in chunk.origins] == whole.origins
        assert chunks[-1].generation is not None
        stream = chatty.stream("abcabcabc", params)
        next(stream)
        stream.close()
        assert chatty._engine.scheduler.idle


def test_streams_and_lists_on_one_engine_take_nothing_from_each_other(llm: LLM) -> None:
    params = SETTINGS["sampled"]
    llm.use("ngram")
    alone = [llm.generate(prompt, params).token_ids for prompt in PROMPTS]
    streams = [llm.stream(prompt, params) for prompt in PROMPTS[:2]]
    told: list[list[int]] = [[], []]
    for _ in range(2):
        for text, stream in zip(told, streams, strict=True):
            text += next(stream).token_ids
    assert [g.token_ids for g in llm.generate(PROMPTS[1:], params)] == alone[1:]
    for text, stream in zip(told, streams, strict=True):
        chunks = list(stream)
        text += [token for chunk in chunks for token in chunk.token_ids]
        assert chunks[-1].generation is not None
        assert chunks[-1].generation.token_ids == text
    assert told == alone[:2]


def test_another_drafter_waits_until_nothing_is_open(llm: LLM) -> None:
    llm.use("ngram", "chain:3")
    stream = llm.stream(PROMPTS[0], SETTINGS["greedy"])
    next(stream)
    with pytest.raises(ValueError, match="still being decoded"):
        llm.use("none")
    with pytest.raises(ValueError, match="'nobody' is not known"):
        llm.twin().use("nobody")
    assert (llm.drafter.name, llm.tree) == ("ngram", "chain:3")
    stream.close()
    with pytest.raises(ValueError, match="'star' is not known"):
        llm.use("none", "star")
    assert (llm.drafter.name, llm.tree) == ("ngram", "chain:3")
    llm.use("none")


def test_torn_characters_wait_for_their_other_half() -> None:
    detokenizer = Detokenizer(lambda tokens: bytes(tokens).decode("utf-8", errors="replace"))
    parts = [detokenizer.add(byte) for byte in "aé€b".encode()]
    assert parts == ["a", "", "é", "", "", "€", "b"]
    assert [detokenizer.add(*"a€".encode()[:3]), detokenizer.add(*"€é".encode()[2:])] == ["", "a€é"]
    detokenizer.add("é".encode()[0])
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize(("ending", "reason"), [([], "length"), ([99], "eos"), ([98], "stop")])
def test_a_torn_end_is_told_however_the_text_ends(ending: list[int], reason: str) -> None:
    def decode(tokens: list[int]) -> str:
        return bytes(token for token in tokens if token not in (98, 99)).decode(errors="replace")

    written = [*b"HI", 0xC3, *ending]
    params = SamplingParams(max_new_tokens=3 if not ending else 9, stop_token_ids=[98], seed=0)
    sequence = Sequence([1], params, decode, (99,), 100)
    streamed = ""
    for token in written:
        sequence.append([token])
        streamed += sequence.released_text()
    assert sequence.finish_reason == reason
    assert sequence.text == streamed == decode(written) == "HI\ufffd"


def test_prompts_that_nobody_can_read_are_refused(chatty: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = chatty.tokenizer
    for unreadable in (tokenizer("hello"), b"hello", None, 3, [3.5, 4], [None]):
        with pytest.raises(ValueError, match="give a text, a list of messages, or token ids"):
            chatty.generate(unreadable)
    with pytest.raises(ValueError, match="UTF-8"):
        chatty.generate("caf\udce9")
    with pytest.raises(ValueError, match="UTF-8"):
        chatty.generate([{"role": "user", "content": "\ud800"}])
    with pytest.raises(ValueError, match="must have a string `role`"):
        chatty.generate([{"role": "user", "content": "hi"}, "hello"])
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match="refuses this chat: System role not supported"):
        chatty.generate([{"role": "system", "content": "hi"}])


def test_token_ids_may_be_those_of_numpy_and_torch(llm: LLM) -> None:
    llm.use("none")
    params = SamplingParams(max_new_tokens=4, logit_bias={np.int64(7): np.float32(0.5)})
    expected = llm.generate([8, 2], params).token_ids
    for prompt in (np.array([8, 2]), torch.tensor([8, 2]), [np.int64(8), np.int64(2)]):
        assert llm.generate(prompt, params).token_ids == expected
    assert [g.token_ids for g in llm.generate(torch.tensor([[8, 2], [8, 2]]), params)] == [expected] * 2


@pytest.mark.parametrize("what", ["_prefill", "target.prefill", "target.verify", "target.commit", "drafter.commit"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_whoever_is_open_outlives_what_ends_another(llm: LLM, what: str, error: type[BaseException]) -> None:
    """A call is broken off anywhere in its rounds; a stream that was open before goes on as if nothing had happened."""
    params = SETTINGS["sampled"]
    llm.use("ngram")
    plain = llm.generate(PROMPTS[0], params).token_ids
    stream = llm.stream(PROMPTS[0], params)
    told = next(stream).token_ids
    owner: Any = llm._engine
    *path, name = what.split(".")
    for part in path:
        owner = getattr(owner, part)
    usual, calls = getattr(owner, name), iter(range(100))

    def broken(*given: Any) -> Any:
        if next(calls) == 1:
            raise error
        return usual(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, broken)
        with pytest.raises(error):
            llm.generate(PROMPTS[1:], params)
        told += [token for chunk in stream for token in chunk.token_ids]
    assert told == plain
    assert llm._engine.scheduler.idle
    assert llm.generate(PROMPTS[0], params).token_ids == plain


@pytest.mark.parametrize("step", ["propose", "verify", "commit"])
def test_a_stream_closed_in_the_midst_of_a_round_leaves_the_others_where_they_are(llm: LLM, step: str) -> None:
    """As the garbage collector may close it, anywhere in Python code."""
    params = SETTINGS["sampled"]
    llm.use("ngram")
    plain = llm.generate(PROMPTS[1], params).token_ids
    closed = llm.stream(PROMPTS[0], params)
    next(closed)
    stream = llm.stream(PROMPTS[1], params)
    told = next(stream).token_ids
    owner: Any = llm.drafter if step == "propose" else llm.target
    usual = getattr(owner, step)

    def closing(*given: Any) -> Any:
        closed.close()
        return usual(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, step, closing)
        told += [token for chunk in stream for token in chunk.token_ids]
    assert told == plain
    assert llm._engine.scheduler.idle


def test_an_interrupt_while_sequences_move_loses_none(llm: LLM) -> None:
    params = SETTINGS["sampled"]
    llm.use("ngram")
    plain = llm.generate(PROMPTS[2], params).token_ids
    outcomes = llm.complete(PROMPTS[:2], [replace(params, max_new_tokens=2), params])
    next(outcomes)
    stream = llm.stream(PROMPTS[2], params)
    move, calls = llm.target.move, iter(range(100))

    def interrupted(source: int, destination: int) -> None:
        if next(calls) == 0:
            raise KeyboardInterrupt
        move(source, destination)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.target, "move", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(outcomes)
        assert [token for chunk in stream for token in chunk.token_ids] == plain
    assert llm._engine.scheduler.idle


def test_a_prompt_that_cannot_be_cached_ends_its_own_call_whoever_takes_the_step(llm: LLM) -> None:
    llm.use("none")
    params = SETTINGS["greedy"]
    plain = llm.generate(PROMPTS[0], params).token_ids
    narrow = LLM(llm.target, "none", max_batch=1)
    outcomes = narrow.complete(PROMPTS[1:3], [params] * 2)
    next(outcomes)
    prefill = narrow.target.prefill

    def without_room(slot: int, tokens: torch.Tensor, taps: Any) -> torch.Tensor:
        if tokens.tolist() == PROMPTS[2][:-1]:
            raise MemoryError("no room")
        return prefill(slot, tokens, taps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow.target, "prefill", without_room)
        assert narrow.generate(PROMPTS[0], params).token_ids == plain
        with pytest.raises(MemoryError, match="no room"):
            next(outcomes)
    assert narrow._engine.scheduler.idle


def test_chats_go_through_the_models_own_template(chatty: LLM) -> None:
    chat = [{"role": "user", "content": "hi"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chatty.token_ids(chat) == chatty.token_ids(text)
    params = SamplingParams(max_new_tokens=4)
    chatty.use("none")
    assert chatty.generate(chat, params).token_ids == chatty.generate([chat], params)[0].token_ids


def test_a_missing_seed_is_drawn_and_reported(llm: LLM) -> None:
    llm.use("none")
    first = llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=20, temperature=1.5, seed=None))
    again = llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=20, temperature=1.5, seed=first.seed))
    assert first.token_ids == again.token_ids


def test_unusable_logits_end_their_own_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.use("none")
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    expected = [g.token_ids for g in llm.generate(PROMPTS[:3], params)]
    verify, passes = llm.target.verify, iter(range(100))

    def broken(tree: DraftTree, taps: Any) -> Any:
        output = verify(tree, taps)
        if next(passes) == 2:
            output.logits[1] = torch.nan
        return output

    monkeypatch.setattr(llm.target, "verify", broken)
    generations = llm.generate(PROMPTS[:3], params)
    assert [g.token_ids for g in generations] == [expected[0], expected[1][:2], expected[2]]
    assert [g.finish_reason for g in generations] == ["length", "error", "length"]
    assert "NaN" in str(generations[1].error)
    monkeypatch.setattr(llm.target, "verify", unusable(verify))
    with pytest.raises(BadLogits, match="NaN"):
        llm.generate(PROMPTS[0], params)
    assert llm._engine.scheduler.idle


@pytest.mark.parametrize("rule", ["coupled", "rejection", "typical"])
def test_what_was_accepted_before_the_law_ended_is_kept(llm: LLM, rule: str) -> None:
    """Plain decoding would have written it, and may have ended there."""
    only = dict.fromkeys(range(64), float("-inf")) | {3: 0.0, 4: 5.0}
    written = SamplingParams(ignore_eos=True, logit_bias=only, bad_words=[[4, 3], [4, 4]])
    llm.rule = rule
    llm.use(Prophet([[9, 4]]))
    for seed in range(10):
        ended = llm.generate([9], replace(written, max_new_tokens=1, seed=seed))
        failed = llm.generate([[9]], replace(written, max_new_tokens=9, seed=seed, logprobs=True))[0]
        assert (ended.token_ids, ended.finish_reason) == ([4], "length")
        assert (failed.token_ids, failed.finish_reason, len(failed.logprobs or [])) == ([4], "error", 1)
        stream = llm.stream([9], replace(written, seed=seed))
        assert next(stream).token_ids == [4]
        with pytest.raises(BadLogits, match="exclude every token"):
            next(stream)
    llm.rule = "coupled"


def test_a_request_that_excludes_every_token_fails_alone(llm: LLM) -> None:
    llm.use("none")
    impossible = SamplingParams(max_new_tokens=4, logit_bias=dict.fromkeys(range(64), float("-inf")))
    possible = SamplingParams(max_new_tokens=4, ignore_eos=True)
    failed, fine = llm.generate(PROMPTS[:2], [impossible, possible])
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    assert (fine.finish_reason, len(fine.token_ids)) == ("length", 4)


def unusable(verify: Any) -> Any:
    def broken(tree: DraftTree, taps: Any) -> Any:
        output = verify(tree, taps)
        output.logits[:] = torch.nan
        return output

    return broken


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([5, 64], SamplingParams(), "token 64 in the prompt is out of range"),
        ([5, -1], SamplingParams(), "out of range"),
        (list(range(64)) * 2, SamplingParams(), "context"),
        ([5], SamplingParams(logit_bias={99: 1.0}), "logit_bias"),
        ([5], SamplingParams(bad_words=[[3, 99]]), "bad_words"),
        ([5], SamplingParams(stop_token_ids=[64]), "stop_token_ids"),
        ([5], SamplingParams(stop=["x"]), "tokenizer"),
        ("text", SamplingParams(), "tokenizer"),
        ([{"role": "user", "content": "x"}], SamplingParams(), "tokenizer"),
    ],
)
def test_bad_requests_are_refused_and_the_others_live(
    llm: LLM, prompt: Any, params: SamplingParams, message: str
) -> None:
    llm.use("none")
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, params)
    with pytest.raises(ValueError, match=message):
        llm.generate([PROMPTS[0], prompt], [SamplingParams(), params])
    assert llm._engine.scheduler.idle
    assert len(llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=3, ignore_eos=True)).token_ids) == 3


def test_a_stream_tells_all_its_text_before_its_error(chatty: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chatty.use("none")
    plain = chatty.generate("hello", SamplingParams(max_new_tokens=3))
    verify, passes = chatty.target.verify, iter(range(100))
    params = SamplingParams(stop=[plain.text + " and what never comes"])  # so all text is held back

    def broken(tree: DraftTree, taps: Any) -> Any:
        output = verify(tree, taps)
        if next(passes) == 3:
            output.logits[:] = torch.nan
        return output

    monkeypatch.setattr(chatty.target, "verify", broken)
    chunks: list[Chunk] = []
    with pytest.raises(BadLogits, match="NaN"):
        chunks.extend(chatty.stream("hello", params))
    assert "".join(chunk.text for chunk in chunks) == plain.text != ""
    assert all(chunk.generation is None for chunk in chunks)


def test_an_empty_prompt_is_refused(chatty: LLM) -> None:
    for prompt in ("", [[]]):
        with pytest.raises(ValueError, match="empty"):
            chatty.generate(prompt)
    assert chatty.generate([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drafter": "nobody"}, "auto, none, shipped, ngram"),
        ({"tree": "star:3"}, "comb:K"),
        ({"rule": "majority"}, "coupled, rejection"),
        ({"max_batch": 0}, "max_batch"),
        ({"threads": 0}, "threads is 0; it must be from 1 to"),
        ({"threads": 100_000}, "threads is 100000; it must be from 1 to"),
    ],
)
def test_bad_settings_name_what_there_is(llm: LLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(llm.target, **{"drafter": "none", **arguments})
