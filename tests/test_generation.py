"""Generation with a scripted model: batches, ends, capacity, streams, interrupts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from specs import plain_spec
from test_text import byte_tokenizer

from moac_runtime.backends.open import choose_backend
from moac_runtime.backends.session import Feed, Snapshot
from moac_runtime.engine.model import Model, load
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.package.spec import ModelSpec, RopeSpec

VOCAB = 260
EOS, OTHER_EOS = 257, 258
LAYERS, KV_HEADS, HEAD_DIM = 2, 3, 4


def tiny_spec(**changes: Any) -> ModelSpec:
    values: dict[str, Any] = dict(
        num_layers=LAYERS,
        hidden_size=8,
        intermediate_size=8,
        num_heads=KV_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        context=1000,
        norm_eps=1e-5,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        tied_embeddings=True,
        rope=RopeSpec("default", 10000.0, (1.0, 0.1)),
    )
    return plain_spec(**values | changes)


Script = Callable[[list[int]], list[int]]


class ScriptedSession:
    """Rows whose next token is what `script` makes of the prompt; a session as generation uses it.

    `batch`: rows that were fed in all, the last one of `room` tokens; `held`: what each was fed;
    `steps`: rows of each step that reads no prompt; `most`: rows present at once.
    """

    fixed_batch = False

    def __init__(self, script: Script, *, interrupt_at: int | None = None) -> None:
        self.script, self.interrupt_at = script, interrupt_at
        self.room, self.most = 0, 0
        self.steps: list[int] = []
        self.held: list[list[int]] = []
        self._rows: dict[int, tuple[list[int], list[int]]] = {}
        self._capacity: dict[int, int] = {}
        self._next = 0

    @property
    def batch(self) -> int:
        return len(self.held)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(self._rows)

    def admit(self, capacity: int) -> int:
        self.room = capacity
        self._next += 1
        self._capacity[self._next] = capacity
        self._rows[self._next] = [], []
        self.most = max(self.most, len(self._rows))
        return self._next

    def release(self, row: int) -> None:
        del self._rows[row]

    def step(self, feeds: Sequence[Feed]) -> torch.Tensor:
        if all(self._rows[feed.row][0] for feed in feeds):
            self.steps.append(len(feeds))
            if len(self.steps) == self.interrupt_at:
                raise KeyboardInterrupt
        return torch.cat([self._fed(feed) for feed in feeds])

    def kv_bytes(self, row: int | None = None) -> int:
        return 7 if row is not None else 7 * len(self._rows)

    def length(self, row: int) -> int:
        return len(self._rows[row][0])

    def capacity(self, row: int) -> int:
        return self._capacity[row]

    def snapshot(self, row: int) -> Snapshot:
        raise NotImplementedError

    def restore(self, snapshot: Snapshot) -> int:
        raise NotImplementedError

    def grow(self, row: int, capacity: int) -> None:
        raise NotImplementedError

    def _fed(self, feed: Feed) -> torch.Tensor:
        fed, answer = self._rows[feed.row]
        if not fed:
            self.held.append(fed)
            answer += self.script(list(feed.tokens))
        fed += feed.tokens
        assert self.length(feed.row) <= self.capacity(feed.row)
        if feed.wanted == ():
            return torch.empty(0, VOCAB)
        wanted = answer.pop(0) if answer else EOS
        return torch.nn.functional.one_hot(torch.tensor([wanted]), VOCAB).float() * 50


def scripted_model(
    script: Script | str, *, capacity: int = 500, interrupt_at: int | None = None, **spec: Any
) -> tuple[Model, list[ScriptedSession]]:
    """A model that answers with `script`, and the sessions it opened."""
    sessions: list[ScriptedSession] = []
    answer = (lambda _: encode(script)) if isinstance(script, str) else script

    def open_session(capacity: int) -> ScriptedSession:
        sessions.append(ScriptedSession(answer, interrupt_at=interrupt_at))
        return sessions[-1]

    model = Model(
        tokenizer=byte_tokenizer(),
        spec=tiny_spec(**spec),
        capacity=capacity,
        dtype="bfloat16",
        backend="torch",
        open_session=open_session,
    )
    return model, sessions


def encode(text: str) -> list[int]:
    return byte_tokenizer().encode(text, special=False)


def echo(prompt: list[int]) -> list[int]:
    """Answers a raw prompt with its own text; the first token is the prompt's `<s>`."""
    return prompt[1:]


@pytest.mark.parametrize("eos", [EOS, OTHER_EOS])
def test_every_eos_token_ends_the_answer(eos: int) -> None:
    model, _ = scripted_model(lambda _: [*encode("yes"), eos, *encode("no")])
    (result,) = model.generate("go?")
    assert (result.text, result.finish_reason) == ("yes", "stop")
    assert result.token_ids == (*encode("yes"), eos)


def test_max_tokens_ends_the_answer() -> None:
    model, sessions = scripted_model("abcdef")
    (result,) = model.generate("go", raw=True, max_tokens=3)
    assert (result.text, result.finish_reason) == ("abc", "length")
    assert result.prompt_tokens == 3
    assert sessions[0].room == result.capacity == 6


def test_one_token() -> None:
    model, sessions = scripted_model("abc")
    (result,) = model.generate("go", max_tokens=1)
    assert result.token_ids == tuple(encode("a"))
    assert sessions[0].steps == []
    assert result.stats.decode_tokens_per_s is None


def test_chat_is_the_default_and_system_goes_first() -> None:
    model, sessions = scripted_model("x")
    model.generate("hi", system="be brief", max_tokens=1)
    text = byte_tokenizer().backend.decode(sessions[0].held[0], skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    model.generate([messages], max_tokens=1)
    assert sessions[1].held == sessions[0].held


def test_control_tokens_of_a_prompt_are_text_unless_asked() -> None:
    model, sessions = scripted_model("x")
    injected = "hi<|im_end|>"
    template_ends = 2  # of the system message and of the user's
    for options in ({}, {"parse_special": True}, {"raw": True}):
        model.generate(injected, max_tokens=1, **options)  # type: ignore[arg-type]
    text, acting, raw = (session.held[0].count(OTHER_EOS) for session in sessions)
    assert (text, acting, raw) == (template_ends, template_ends + 1, 1)
    model.generate("hi", system=injected, max_tokens=1)
    assert sessions[-1].held[0].count(OTHER_EOS) == template_ends


def test_parts_of_text_give_the_tokens_of_the_text() -> None:
    model, sessions = scripted_model("x")
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    for content in ("hi", parts):
        model.generate([[{"role": "user", "content": content}]], max_tokens=1)
    assert sessions[0].held == sessions[1].held


def test_a_raw_prompt_may_be_blank() -> None:
    model, sessions = scripted_model("x")
    model.generate("\n", raw=True, max_tokens=1)
    assert sessions[0].held == [[256, *encode("\n")]]


def test_an_empty_system_message_takes_the_place_of_the_template_s_own() -> None:
    model, sessions = scripted_model("x")
    model.generate("hi", system="", max_tokens=1)
    text = byte_tokenizer().backend.decode(sessions[0].held[0], skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi<|im_end|>")


def test_control_characters_are_text() -> None:
    model, sessions = scripted_model("x")
    prompt = "a\x00b\x07\x1b[0m\x7f\u0085\u2028\ufffe\U0010ffff"
    model.generate(prompt, raw=True, max_tokens=1)
    assert byte_tokenizer().decode(sessions[0].held[0]) == prompt
    model.generate(prompt, max_tokens=1)
    assert f"user\n{prompt}<|im_end|>" in byte_tokenizer().backend.decode(
        sessions[1].held[0], skip_special_tokens=False
    )


def test_a_ragged_batch_answers_in_order_and_shrinks() -> None:
    model, sessions = scripted_model(echo)
    prompts = ["four", "a", "the longest", "é😀"]
    results = model.generate(prompts, raw=True)
    assert [r.text for r in results] == prompts
    assert [r.prompt_tokens for r in results] == [5, 2, 12, 7]
    assert {r.finish_reason for r in results} == {"stop"}
    # Answers end after 2, 5, 7 and 12 tokens, their EOS counted; the first comes from prefill.
    assert sessions[0].steps == [4, *[3] * 3, *[2] * 2, *[1] * 5]
    assert sessions[0].room == 12 + 256


def test_rows_of_one_batch_answer_as_alone() -> None:
    model, _ = scripted_model(echo)
    prompts = ["first one", "b", "third"]
    options: Any = dict(raw=True, temperature=30.0, seed=4, max_tokens=20)
    together = model.generate(prompts, **options)
    alone = [model.generate(prompt, **options)[0] for prompt in prompts]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert len({r.token_ids[1:] for r in together}) > 1


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("END", "some ENtext "),
        (["zz", "END"], "some ENtext "),
        (("N", "END"), "some E"),
        (["t E", "ext"], "some ENt"),
    ],
)
def test_stop_strings_over_token_boundaries(stop: Any, text: str) -> None:
    model, _ = scripted_model("some ENtext END more")
    (result,) = model.generate("go", stop=stop)
    assert (result.text, result.finish_reason) == (text, "stop")


@pytest.mark.parametrize(
    ("answer", "stop", "text", "reason"),
    [
        ("Paris<|im_end|>", "<|im_end|>", "Paris", "stop"),
        ("Paris<|im_end|>", "Paris<|im_end|>", "", "stop"),
        ("Paris<|im_end|>", "ris<|im_", "Pa", "stop"),
        ("Paris<|im_end|>", "<|im_end|>\n", "Paris", "stop"),
        ("Paris<s>x", "<s>", "Paris", "stop"),
        ("Paris<s>x", "is<s>x", "Par", "stop"),
        ("Paris<s>xyz", "<s>y", "Parisxyz", "stop"),
        ("a<s>b<s>c", "b<s>c", "a", "stop"),
        ("é<s>\U0001f600", "s>\U0001f600", "é", "stop"),
        ("Paris<s>", "no<s>", "Paris", "length"),
    ],
)
def test_stop_strings_may_hold_control_tokens(
    answer: str, stop: str, text: str, reason: str
) -> None:
    model, _ = scripted_model(answer)
    # Cut where the scripted answer ends, so that no end token comes behind it.
    limit = len(encode(answer)) if reason == "length" else 50
    (result,) = model.generate("go", stop=stop, max_tokens=limit)
    assert (result.text, result.finish_reason) == (text, reason)
    stream = model.stream("go", stop=stop, max_tokens=limit)
    assert "".join(stream) == stream.generation.text == text


def test_no_part_of_a_stop_string_with_a_control_token_is_sent() -> None:
    model, _ = scripted_model("Go to Paris<s>!")
    pieces = list(model.stream("go", stop="Paris<s>"))
    assert "".join(pieces) == "Go to "
    model, _ = scripted_model("Go to Paris<s>!")
    assert "".join(model.stream("go", stop="Paris<s>?")) == "Go to Paris!"


def test_text_held_back_for_a_stop_string_is_given_at_the_end() -> None:
    model, _ = scripted_model("abEN")
    (by_eos,) = model.generate("go", stop="END")
    (by_length,) = model.generate("go", stop="END", max_tokens=4)
    assert by_eos.text == by_length.text == "abEN"
    assert (by_eos.finish_reason, by_length.finish_reason) == ("stop", "length")


def test_an_answer_cut_inside_a_character_leaves_it_out() -> None:
    tokens = encode("x\U0001f600")[:-1]
    model, _ = scripted_model(lambda _: tokens)
    (result,) = model.generate("go", max_tokens=len(tokens))
    assert (result.text, result.token_ids) == ("x", tuple(tokens))


def test_streamed_pieces_make_the_text() -> None:
    answer = "caf\u00e9 \U0001f600 END"
    model, _ = scripted_model(answer + " no")
    stream = model.stream("go", stop=[" END"])
    with pytest.raises(MoacError, match="not complete"):
        _ = stream.generation
    pieces = list(stream)
    assert len(pieces) > 3
    assert all(piece and "\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == stream.generation.text == "caf\u00e9 \U0001f600"


def test_the_stream_is_not_read_ahead() -> None:
    model, sessions = scripted_model("abcdef")
    stream = model.stream("go")
    assert sessions == []
    assert (next(stream), next(stream)) == ("a", "b")
    assert len(sessions[0].steps) == 1


@pytest.mark.parametrize("limit", [{"max_batch": 2}, {"max_kv_bytes": 7 * 3 - 1}])
def test_prompts_beyond_what_may_run_at_once_wait(limit: dict[str, int]) -> None:
    model, sessions = scripted_model(echo)
    prompts = ["first one", "b", "third", "the fourth", "e"]
    together = model.generate(prompts, raw=True, max_tokens=20)
    apart = model.generate(prompts, raw=True, max_tokens=20, **limit)  # type: ignore[arg-type]
    assert [r.text for r in apart] == prompts
    assert [session.most for session in sessions] == [5, 2]
    # the third begins when "b" has ended, while the first goes on
    assert sessions[1].steps[:2] == [2, 2]
    assert {session.room for session in sessions} == {len("the fourth") + 1 + 20}
    whole, parts = together[0].stats, apart[0].stats
    assert {result.stats for result in apart} == {parts}
    assert parts.prompt_tokens == whole.prompt_tokens
    assert parts.decoded_tokens == whole.decoded_tokens
    assert (whole.kv_held_bytes, parts.kv_held_bytes) == (7 * 5, 7 * 2)
    assert parts.kv_dense_bytes * 5 == whole.kv_dense_bytes * 2
    with pytest.raises(UsageError, match="max_batch must be >= 1, got 0"):
        model.generate(prompts, max_batch=0)


def test_a_limit_that_one_prompt_passes_is_refused() -> None:
    model, _ = scripted_model(echo)
    with pytest.raises(UsageError, match="takes 7 bytes of keys and values, and the limit is 6"):
        model.generate(["a", "b"], raw=True, max_kv_bytes=6)


def test_an_interrupt_keeps_waiting_prompts_from_starting() -> None:
    model, sessions = scripted_model(echo, interrupt_at=2)
    results = model.generate(["abcdef", "b", "c"], raw=True, max_batch=1)
    assert [r.finish_reason for r in results] == ["interrupted"] * 3
    assert [r.text for r in results] == ["ab", "", ""]
    assert len(sessions) == 1


@pytest.mark.parametrize("interrupt_at", [1, 3])
def test_an_interrupt_keeps_what_was_generated(interrupt_at: int) -> None:
    model, _ = scripted_model(echo, interrupt_at=interrupt_at)
    one, two = model.generate(["a long prompt", "b"], raw=True)
    assert (one.finish_reason, one.text) == ("interrupted", "a long prompt"[:interrupt_at])
    assert two.finish_reason == ("interrupted" if interrupt_at == 1 else "stop")
    assert two.text == "b"


def test_an_interrupt_of_the_stream_gives_the_text_held_back() -> None:
    model, _ = scripted_model("abEN and so on", interrupt_at=4)
    stream = model.stream("go", stop="END")
    assert list(stream) == ["a", "b", "EN"]
    assert stream.generation.finish_reason == "interrupted"


def test_a_reader_may_interrupt_the_stream() -> None:
    model, _ = scripted_model("abcdef")
    stream = model.stream("go")
    assert next(stream) == "a"
    result = stream.interrupt()
    assert (result.text, result.finish_reason) == ("a", "interrupted")


def test_an_interrupt_of_the_prefill_gives_an_empty_answer() -> None:
    def interrupted(_: list[int]) -> list[int]:
        raise KeyboardInterrupt

    model, _ = scripted_model(interrupted)
    (result,) = model.generate("go")
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "interrupted")
    assert result.stats.prompt_tokens_per_s is None


def test_stats() -> None:
    model, _ = scripted_model(echo)
    results = model.generate(["abc", "d"], raw=True, capacity=40)
    stats = results[0].stats
    assert results[1].stats is stats
    assert (stats.prompt_tokens, stats.decoded_tokens) == (4 + 2, 3 + 1)
    assert stats.kv_held_bytes == 14
    # Two rows of 40 tokens, keys and values, two bytes each.
    assert stats.kv_dense_bytes == 2 * 40 * LAYERS * KV_HEADS * HEAD_DIM * 2 * 2
    assert stats.prompt_tokens_per_s == pytest.approx(6 / stats.prefill_s)
    assert stats.decode_tokens_per_s == pytest.approx(4 / stats.decode_s)
    # An interpreter that holds torch needs tens of megabytes and not a terabyte.
    assert stats.peak_memory_bytes is not None
    assert 2**25 < stats.peak_memory_bytes < 2**40


@pytest.mark.parametrize(("capacity", "context"), [(20, 1000), (1000, 20)])
def test_capacity_stops_at_package_and_context(capacity: int, context: int) -> None:
    model, sessions = scripted_model("a" * 50, capacity=capacity, context=context)
    (result,) = model.generate("123456789", raw=True)
    assert sessions[0].room == 20
    assert (result.finish_reason, len(result.token_ids)) == ("length", 10)


def test_a_given_capacity_is_kept() -> None:
    model, sessions = scripted_model("a" * 50)
    model.generate("hi", raw=True, capacity=100, max_tokens=5)
    assert sessions[0].room == 100


@pytest.mark.parametrize("capacity", [0, -1, 501])
def test_an_impossible_capacity_is_refused(capacity: int) -> None:
    model, _ = scripted_model("a")
    with pytest.raises(UsageError, match=f"1 to 500 tokens .* got {capacity}"):
        model.generate("hi", capacity=capacity)


@pytest.mark.parametrize(("length", "capacity"), [(10, 10), (11, 10)])
def test_a_prompt_past_the_capacity_names_both_numbers(length: int, capacity: int) -> None:
    model, _ = scripted_model("a")
    with pytest.raises(MoacError, match=f"prompt has {length} tokens.* holds {capacity}"):
        model.generate("x" * (length - 1), raw=True, capacity=capacity)


@pytest.mark.parametrize(
    ("lengths", "capacity", "most", "words"),
    [
        (
            [3, 30, 4],
            20,
            500,
            "prompt 2 of 3 has 30 tokens, but the session holds 20 for prompt and answer together "
            "(this package at most 500), so none of the 3 was run; shorten it or give a capacity "
            "of 31 to 500",
        ),
        (
            [3, 600, 4],
            None,
            500,
            "prompt 2 of 3 has 600 tokens, but the session holds 500 for prompt and answer "
            "together (this package at most 500), so none of the 3 was run; shorten it",
        ),
        (
            [30, 3, 500],
            20,
            500,
            "prompt 1 of 3 and prompt 3 of 3 have 30 and 500 tokens, but the session holds 20 for "
            "prompt and answer together (this package at most 500), so none of the 3 was run; "
            "shorten them",
        ),
        (
            [500],
            None,
            500,
            "the prompt has 500 tokens, but the session holds 500 for prompt and answer together "
            "(this package at most 500); shorten it",
        ),
        (
            [20] * 5,
            20,
            500,
            "prompt 1 of 5 and prompt 2 of 5 and prompt 3 of 5 (and 2 others) have 20 and 20 and "
            "20 tokens, but the session holds 20 for prompt and answer together (this package at "
            "most 500), so none of the 5 was run; shorten them or give a capacity of 21 to 500",
        ),
    ],
)
@pytest.mark.parametrize("max_batch", [None, 1])
def test_a_batch_that_is_refused_names_its_rows(
    lengths: list[int], capacity: int | None, most: int, words: str, max_batch: int | None
) -> None:
    model, sessions = scripted_model("a", capacity=most)
    prompts = ["x" * (length - 1) for length in lengths]
    with pytest.raises(MoacError) as caught:
        model.generate(prompts, raw=True, capacity=capacity, max_batch=max_batch)
    assert str(caught.value) == words
    assert sessions == []


@pytest.mark.parametrize(
    ("prompts", "options", "match"),
    [
        ([], {}, "no prompt"),
        ([[]], {}, "conversation is empty"),
        ([{"role": "user", "content": "hi"}], {}, "list of messages"),
        ([[{"role": "system", "content": "hi"}]], {"system": "x"}, "system message already"),
        ([["hi"]], {"system": "x"}, "message 1 must be a mapping with role and content"),
        ("", {}, "the prompt is empty; give some text"),
        ("", {"raw": True}, "the prompt is empty; give some text"),
        (" \n\ufeff\u200b\x00", {}, "the prompt is blank; give some text"),
        (["hi", ""], {}, "prompt 2 of 2: the prompt is empty"),
        (["hi", [{"role": "user", "content": 7}]], {}, "prompt 2 of 2: content of message 1 is"),
        ([[{"role": "user", "content": "a"}, {"role": "user", "content": ""}]], {}, "message 2"),
        ("hi", {"system": b"x"}, "the system message must be text, got a value of type bytes"),
        ("hi", {"system": "\ud800"}, "the system message holds bytes that are not UTF-8"),
        (["hi", "\udcff"], {}, "prompt 2 of 2: the prompt holds bytes that are not UTF-8"),
        ({"role": "user", "content": "hi"}, {}, "prompts are a text, or a list"),
        (7, {}, "prompts are a text, or a list"),
        (b"hi", {}, "prompts are a text, or a list"),
        ([b"hi"], {}, "a prompt is text or a list of messages, got a value of type bytes"),
        ([None], {}, "a prompt is text or a list of messages, got a value of type NoneType"),
        ([[{"role": "user", "content": "hi"}]], {"raw": True}, "plain text with raw"),
        ("hi", {"raw": True, "system": "x"}, "needs the chat template"),
        ("hi", {"max_tokens": 0}, "max_tokens must be >= 1"),
    ],
)
def test_wrong_requests(prompts: Any, options: dict[str, Any], match: str) -> None:
    model, sessions = scripted_model("a")
    with pytest.raises(UsageError, match=match):
        model.generate(prompts, **options)
    assert sessions == []


def test_a_prompt_of_no_token_is_refused() -> None:
    model, _ = scripted_model("a")
    model.tokenizer.backend.post_processor = None
    with pytest.raises(UsageError, match="prompt is empty"):
        model.generate("", raw=True)


def test_a_token_the_model_lacks_is_an_error() -> None:
    model, _ = scripted_model("a", vocab_size=200)
    with pytest.raises(MoacError, match="token 256, but the model knows 200"):
        model.generate("hi", raw=True)


def test_backends() -> None:
    assert choose_backend(None, ["torch"]) == "torch"
    assert choose_backend("torch", ["cuda", "torch"]) == "torch"
    with pytest.raises(UsageError, match="no backend 'tpu'; choose from cpu, cuda, onnx, torch"):
        choose_backend("tpu", ["torch"])
    with pytest.raises(MoacError, match="backend cuda cannot run here") as caught:
        choose_backend("cuda", ["torch"])
    assert not isinstance(caught.value, UsageError)
    with pytest.raises(MoacError, match="of this package cannot run here"):
        choose_backend(None, ["tpu"])


def test_cuda_is_chosen_where_there_is_a_device_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ["torch", "cuda:80", "cuda:90"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_backend(None, targets) == "torch"
    for asked, built in (("cuda", targets), (None, ["cuda"])):
        with pytest.raises(MoacError, match="cuda needs an NVIDIA GPU that torch can use"):
            choose_backend(asked, built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_backend(None, targets) == "cuda"
    assert choose_backend(None, ["torch"]) == "torch"
    assert choose_backend("torch", targets) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose_backend(None, targets) == "torch"
    with pytest.raises(MoacError, match="sm_75, but the package is built for cuda:80, cuda:90"):
        choose_backend("cuda", targets)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"backend": "tpu"}, "no backend 'tpu'"),
        ({"dtype": "int8"}, "no dtype 'int8'; choose from float32, bfloat16, float16"),
        ({"threads": 0}, "threads must be 1 to 1024, got 0"),
        ({"threads": 1025}, "threads must be 1 to 1024, got 1025"),
    ],
)
def test_load_refuses_a_wrong_request_before_it_looks(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        load("nowhere", **options)


def test_torch_is_not_imported_until_a_package_is_loaded() -> None:
    code = (
        "import sys, moac_runtime, moac_runtime.command, moac_runtime.engine.model as g;"
        "assert moac_runtime.load is g.load;"
        "heavy = {'torch', 'jinja2', 'numpy', 'transformers', 'safetensors'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
