"""A plan attached to transformers' own models, against the oracle and against the package."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, ROPES, VOCAB, tiny_model, tiny_tokenizer
from oracle import ORACLE, oracle_logits, span_masks
from tiny import Compiled
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaModel,
    PreTrainedModel,
    StaticCache,
    pipeline,
)

from moac.checkpoint.families import model_spec
from moac.integrations.transformers import Attached, attach
from moac.integrations.transformers.attention import NAME
from moac.pipeline.plan_file import SHAPE, sealed
from moac_runtime import load
from moac_runtime.errors import ArtifactError, CheckpointError, MoacError, UsageError
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule

ATOL = 2e-4
LENGTH = 64
# at 64 tokens: spans 16, 64 / 8 (the least), 32
RULES = ((Rule(0, 0.25), DENSE), (Rule(-8, 0.125), Rule(0, 0.5)))
WIDTHS = ((Rule(0, 0.25, 4), DENSE), (Rule(-8, 0.125, 8), Rule(0, 0.5, 4)))
# what this release of transformers calls a cache in calls and results
NAMES = inspect.signature(LlamaModel.forward).parameters
RECOMPUTING = "activation_checkpointing_enable"
KEYWORD = "cache" if "cache" in NAMES else "past_key_values"


def text(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


@cache
def oracle_model(family: str, **options: Any) -> PreTrainedModel:
    """A second model of the same numbers, whose attention the oracle replaces for good."""
    return tiny_model(family, **options)


def plan_for(model: PreTrainedModel) -> Plan:
    windows = model_spec(model.config).windows
    return Plan(RULES, sink=4, block=8, min_span=8, windows=windows)


def written(model: PreTrainedModel, folder: Path, plan: Plan | None = None, **made: Any) -> Path:
    """The plan as a plan.json made for `model`; `made` says otherwise of the model."""
    spec, plan = model_spec(model.config), plan or plan_for(model)
    record = {"model": {**{name: getattr(spec, name) for name in SHAPE}, **made}}
    path = folder / "plan.json"
    path.write_text(json.dumps({**sealed(plan, record), **plan.to_json()}))
    return path


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[Callable[..., tuple[Any, Attached]]]:
    """`attached(family, capacity=N, **options)`: a model and its plan, detached at the end."""
    made = []

    def make(
        family: str = "llama", capacity: int = LENGTH, **options: Any
    ) -> tuple[Any, Attached]:
        model = tiny_model(family, **options)
        made.append(attach(model, written(model, tmp_path), capacity=capacity))
        return model, made[-1]

    yield make
    for plan in made:
        plan.detach()
    assert NAME not in AttentionInterface()


@torch.no_grad()
def fed(model: Any, tokens: Sequence[int], cuts: Sequence[int]) -> Tensor:
    """The logits `[T, V]` of tokens fed in pieces that end at `cuts`."""
    cache, first, parts = None, 0, []
    for stop in cuts:
        out = model(torch.tensor([tokens[first:stop]]), **{KEYWORD: cache}, use_cache=True)
        cache, first = out[KEYWORD], stop
        assert cache.get_seq_length() == stop
        parts.append(out.logits[0])
    return torch.cat(parts)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=ATOL)


# ---- what is computed


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_oracle(family: str, attached: Any) -> None:
    model, plan = attached(family)
    tokens = text(LENGTH)
    wanted = oracle_logits(oracle_model(family), tokens, plan.plan, LENGTH)
    close(fed(model, tokens, [LENGTH]), wanted)
    close(fed(model, tokens, [20, 41, 48, LENGTH]), wanted)
    close(fed(model, tokens, [5, *range(6, LENGTH + 1)]), wanted)
    plan.detach()
    dense = fed(model, tokens, [LENGTH])
    assert (dense - wanted)[LENGTH // 2 :].abs().max() > 10 * ATOL


@pytest.mark.parametrize("family", ["llama", "cohere2", "phi3"])
def test_widths_round_as_the_oracle_does(family: str, tmp_path: Path) -> None:
    model, tokens = tiny_model(family), text(LENGTH)
    plan = replace(plan_for(model), rules=WIDTHS)
    wanted = oracle_logits(oracle_model(family), tokens, plan, LENGTH)
    full = oracle_logits(oracle_model(family), tokens, plan.unrounded(), LENGTH)
    with attach(model, written(model, tmp_path, plan), capacity=LENGTH) as attached:
        for cuts in ([LENGTH], [20, *range(21, LENGTH + 1)]):
            off = (fed(model, tokens, cuts) - wanted).abs()
            # what lies halfway between two codes may go either way, and moves its token a little
            assert (off.amax(-1) < ATOL).float().mean() > 0.5
            assert off.norm() < 0.1 * (full - wanted).norm()
        with torch.no_grad():
            held = model(torch.tensor([tokens]), use_cache=True)[KEYWORD]
        shape = model_spec(model.config).kv_shape(4)
        assert attached.kv_bytes(held) == plan.held_bytes(LENGTH, shape)
        embedded = model.get_input_embeddings()(torch.tensor([tokens])).detach()
        with pytest.raises(UsageError, match=r"have no gradient; run the model under torch\.no_"):
            model(inputs_embeds=embedded.requires_grad_())


@pytest.mark.parametrize(
    ("family", "rope", "capacity"),
    [
        *(("llama", rope, 144) for rope in ROPES),
        *(("llama", rope, 48) for rope in ("dynamic", "longrope")),
        ("phi3", "longrope", 144),
        ("cohere2", "dynamic", 144),
        ("gemma3_text", "dynamic", 48),
    ],
)
def test_frequencies_follow_the_capacity(
    family: str, rope: str, capacity: int, attached: Any
) -> None:
    model, plan = attached(family, capacity, rope=rope)
    tokens = text(capacity)
    wanted = oracle_logits(oracle_model(family, rope=rope), tokens, plan.plan, capacity)
    close(fed(model, tokens, [capacity]), wanted)
    close(fed(model, tokens, [9, *range(10, capacity + 1)]), wanted)


def test_a_pass_without_a_cache_computes_the_same(attached: Any) -> None:
    model, plan = attached()
    tokens = text(LENGTH)
    with torch.no_grad():
        out = model(torch.tensor([tokens]), use_cache=False)
    assert out.get(KEYWORD) is None
    close(out.logits[0], oracle_logits(oracle_model("llama"), tokens, plan.plan, LENGTH))


def test_gradients_are_those_of_the_oracle(attached: Any) -> None:
    model, plan = attached()
    wanted, tokens = oracle_model("llama"), text(LENGTH)
    masks = [span_masks(heads, LENGTH) for heads in plan.plan.spans(LENGTH)]
    wanted.set_attn_implementation(ORACLE)
    found = []
    for one, options in ((model, {}), (wanted, {"oracle_masks": masks})):
        embedded = one.get_input_embeddings()(torch.tensor([tokens])).detach().requires_grad_()
        one(inputs_embeds=embedded, use_cache=False, **options).logits.float().sum().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


# ---- batches


@pytest.mark.parametrize("positions", [True, False])
@torch.no_grad()
def test_padding_is_neither_stored_nor_seen(positions: bool, attached: Any) -> None:
    model, plan = attached()
    rows = [text(LENGTH, seed) for seed in range(3)]
    prompts, steps = [50, 33, 7], 14
    width = max(prompts)
    tokens = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros(3, width + steps, dtype=torch.long)
    for row, count in enumerate(prompts):
        tokens[row, width - count :] = torch.tensor(rows[row][:count])
        mask[row, width - count :] = 1
    wanted = [
        oracle_logits(oracle_model("llama"), row, plan.plan, LENGTH)[: count + steps]
        for row, count in zip(rows, prompts, strict=True)
    ]
    # which of the library's positions a row has does not matter: rotation is relative
    given = mask.cumsum(1).sub(1).clamp(min=0) if positions else None
    cache, logits = None, []
    for first, stop in ((0, 20), (20, width), *((i, i + 1) for i in range(width, width + steps))):
        new = tokens[:, first:stop]
        if first >= width:
            at = first - width
            new = torch.tensor([[r[c + at]] for r, c in zip(rows, prompts, strict=True)])
        out = model(
            new,
            attention_mask=mask[:, :stop],
            position_ids=None if given is None else given[:, first:stop],
            use_cache=True,
            **{KEYWORD: cache},
        )
        cache = out[KEYWORD]
        assert cache.get_seq_length() == stop
        logits.append(out.logits)
    found = torch.cat(logits, dim=1)
    for row, count in enumerate(prompts):
        close(found[row, width - count :], wanted[row])
    assert plan.kv_bytes(cache) == 3 * planned_bytes(plan, model)
    lengths = [row.length for row in cache.layers[0].rows.rows]
    assert lengths == [count + steps for count in prompts]


def planned_bytes(plan: Attached, model: Any, itemsize: int = 4) -> int:
    spec = model_spec(model.config)
    return plan.plan.held_tokens(plan.capacity) * spec.kv_token_bytes(itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bytes_are_those_of_the_plan(dtype: torch.dtype, attached: Any) -> None:
    model, plan = attached()
    out = model.to(dtype)(torch.tensor([text(9)]), use_cache=True)
    held = out[KEYWORD]
    assert plan.kv_bytes(held) == planned_bytes(plan, model, dtype.itemsize)
    assert plan.kv_bytes(held) < 2 * 2 * LENGTH * model_spec(model.config).kv_token_bytes(
        dtype.itemsize
    )
    sizes = [[c.keys[0].shape[1] for c in layer.caches[0]] for layer in held.layers]
    assert sizes == [[16, 64], [8, 32]]
    assert [layer.get_max_length() for layer in held.layers] == [LENGTH, LENGTH]
    held.reset()
    assert (plan.kv_bytes(held), held.get_seq_length()) == (0, 0)


@torch.no_grad()
def test_a_cache_that_was_reset_begins_anew(attached: Any) -> None:
    model, _ = attached()
    one, other = torch.tensor([text(30, 1)]), torch.tensor([text(30, 2), text(30, 3)])
    held = model(one, use_cache=True)[KEYWORD]
    wanted = model(other, use_cache=True).logits
    held.reset()
    assert torch.equal(model(other, **{KEYWORD: held}).logits, wanted)


# ---- where people work


@torch.no_grad()
def test_the_caller_s_own_cache_stays_the_same_object(attached: Any) -> None:
    model, plan = attached()
    tokens, held = text(LENGTH), DynamicCache(config=model.config)
    parts = [
        model(torch.tensor([tokens[first : first + 16]]), **{KEYWORD: held}).logits[0]
        for first in range(0, LENGTH, 16)
    ]
    wanted = oracle_logits(oracle_model("llama"), tokens, plan.plan, LENGTH)
    close(torch.cat(parts), wanted)
    assert held.get_seq_length() == LENGTH


@torch.no_grad()
def test_a_copied_prefix_goes_on_twice(attached: Any) -> None:
    model, plan = attached()
    head, tails = text(30), [text(20, 1), text(20, 2)]
    held = model(torch.tensor([head]), use_cache=True)[KEYWORD]
    for tail in tails:
        out = model(torch.tensor([tail]), **{KEYWORD: copy.deepcopy(held)})
        wanted = oracle_logits(oracle_model("llama"), head + tail, plan.plan, LENGTH)
        close(out.logits[0], wanted[30:])
    assert held.get_seq_length() == 30


def test_inference_mode_may_come_and_go(attached: Any) -> None:
    model, plan = attached()
    tokens = text(40)
    with torch.inference_mode():
        held = model(torch.tensor([tokens[:20]]), use_cache=True)[KEYWORD]
    with torch.no_grad():
        out = model(torch.tensor([tokens[20:]]), **{KEYWORD: held})
    wanted = oracle_logits(oracle_model("llama"), tokens, plan.plan, LENGTH)
    close(out.logits[0], wanted[20:])


@pytest.mark.parametrize("source", ["package", "plan.json"])
def test_generate_gives_the_tokens_of_the_package(source: str, tiny_package: Compiled) -> None:
    packaged = load(tiny_package.package, backend="torch", dtype="float32")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_package.checkpoint)
    path = tiny_package.package / ("" if source == "package" else "plan.json")
    prompts = ["The pass key is hidden. " * 20, "Remember the key, then answer. " * 9]
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "capacity": 512}
    rows = [packaged.tokenizer.encode(prompt, special=True) for prompt in prompts]
    assert min(map(len, rows)) > 64  # past the short spans
    with attach(model, path, capacity=512) as plan:
        for chosen in (rows[:1], rows[1:], rows):
            width = max(map(len, chosen))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in chosen])
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in chosen])
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=12,
                do_sample=False,
                return_dict_in_generate=True,
            )
            texts = [prompts[rows.index(row)] for row in chosen]
            wanted = packaged.generate(texts, raw=True, **asked)
            for found, answer in zip(out.sequences[:, width:].tolist(), wanted, strict=True):
                tokens = list(answer.token_ids)
                assert found[: len(tokens)] == tokens
            held = out[KEYWORD]
            assert plan.kv_bytes(held) == len(chosen) * planned_bytes(plan, model)
            assert held.get_seq_length() == out.sequences.shape[1] - 1


def test_chunked_prefill_and_sampling_generate(attached: Any) -> None:
    model, _ = attached(capacity=96)
    ids = torch.tensor([text(60)])
    asked: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    whole = model.generate(ids, do_sample=False, **asked)
    assert torch.equal(model.generate(ids, do_sample=False, prefill_chunk_size=16, **asked), whole)
    assert torch.equal(model.generate(ids, do_sample=False, use_cache=False, **asked), whole)
    torch.manual_seed(0)
    sampled = model.generate(ids, do_sample=True, num_return_sequences=3, **asked)
    assert sampled.shape == (3, 68)


def test_pipelines_run(attached: Any) -> None:
    model, _ = attached(capacity=256)
    speak: Any = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    speak.tokenizer.padding_side = "left"
    asked: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "batch_size": 2}
    prompts = ["The pass key is " * 8, "Remember"]
    found = speak(prompts, **asked)
    assert [row[0]["generated_text"].startswith(p) for row, p in zip(found, prompts, strict=True)]
    alone = [speak([prompt], **asked)[0] for prompt in prompts]
    assert found == alone


# ---- without a trace


def trace(model: Any) -> dict[str, Any]:
    """All that an attached plan might leave on a model or in the library."""
    return {
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "config": copy.deepcopy(vars(model.config)),
        "hooks": [
            len(hooks)
            for module in model.modules()
            for hooks in (
                module._forward_pre_hooks,
                module._forward_hooks,
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
            )
        ],
        "functions": sorted(AttentionInterface()),
        "buffers": {name: buffer.tolist() for name, buffer in model.named_buffers()},
        "kind": copy.copy(model.base_model.rotary_emb.rope_type),
    }


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "rope"), [("llama", "dynamic"), ("gemma3_text", "default"), ("phi3", "longrope")]
)
def test_detach_leaves_no_trace(family: str, rope: str, own: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family, rope=rope)
    model.set_attn_implementation(own)
    before, tokens = trace(model), torch.tensor([text(50)])
    with torch.no_grad():
        logits = model(tokens).logits
        before_again = trace(model)
        with attach(model, written(model, tmp_path), capacity=256) as plan:
            assert model.config._attn_implementation == NAME
            assert (model(tokens).logits - logits).abs().max() > 10 * ATOL
        assert trace(model) == before_again
        assert torch.equal(model(tokens).logits, logits)
    assert before["hooks"] == before_again["hooks"]
    plan.detach()  # a second time does nothing
    assert trace(model) == before_again


def test_an_error_in_the_block_detaches(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), attach(model, written(model, tmp_path), capacity=64):
        raise ZeroDivisionError
    assert NAME not in AttentionInterface()


@torch.no_grad()
def test_other_models_are_left_alone(attached: Any, tmp_path: Path) -> None:
    tokens = text(LENGTH)
    free: Any = tiny_model("llama")
    dense = free(torch.tensor([tokens])).logits
    short, first = attached()
    long, second = attached(capacity=256, seed=1)
    assert torch.equal(free(torch.tensor([tokens])).logits, dense)
    for model, plan, seed in ((short, first, 0), (long, second, 1), (short, first, 0)):
        wanted = oracle_logits(oracle_model("llama", seed=seed), tokens, plan.plan, plan.capacity)
        close(fed(model, tokens, [30, LENGTH]), wanted)
    first.detach()
    assert NAME in AttentionInterface()
    wanted = oracle_logits(oracle_model("llama", seed=1), tokens, second.plan, 256)
    close(fed(long, tokens, [30, LENGTH]), wanted)


# ---- what is refused


def refused(error: type[MoacError], words: str, run: Callable[[], object]) -> None:
    with pytest.raises(error, match=words) as told:
        run()
    sentence = str(told.value)
    assert "\n" not in sentence
    assert not sentence.endswith(".")


@torch.no_grad()
def test_the_capacity_is_the_end(attached: Any) -> None:
    model, _ = attached()
    refused(
        MoacError,
        "would have 65 tokens.*capacity of 64",
        lambda: model(torch.tensor([text(65)])),
    )
    held = model(torch.tensor([text(60)]), use_cache=True)[KEYWORD]
    refused(
        MoacError,
        "would have 65 tokens.*capacity of 64",
        lambda: model(torch.tensor([text(5)]), **{KEYWORD: held}),
    )
    assert held.get_seq_length() == 60
    model(torch.tensor([text(4)]), **{KEYWORD: held})  # nothing was lost


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("beam search", {"num_beams": 2}),
        ("a StaticCache of another kind", {"cache_implementation": "static"}),
    ],
)
def test_generate_refuses_what_a_ring_cannot(
    words: str, options: dict[str, Any], attached: Any
) -> None:
    model, _ = attached()
    ids = torch.tensor([text(20)])
    refused(
        UsageError, words, lambda: model.generate(ids, max_new_tokens=4, pad_token_id=0, **options)
    )


def test_the_library_refuses_assisted_generation(attached: Any) -> None:
    model, _ = attached()
    with pytest.raises(ValueError, match="can be cropped"):
        model.generate(
            torch.tensor([text(20)]), max_new_tokens=4, pad_token_id=0, prompt_lookup_num_tokens=3
        )


def test_recomputed_layers_see_the_same(attached: Any) -> None:
    model, _ = attached()
    model.train()
    found = []
    for recompute in (False, True):
        if recompute:
            older = "gradient_checkpointing_enable"
            getattr(model, RECOMPUTING if hasattr(model, RECOMPUTING) else older)()
        embedded = model.get_input_embeddings()(torch.tensor([text(40)])).requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(*found)
    ids, held = torch.tensor([text(9)]), DynamicCache()
    refused(UsageError, "gradient checkpointing", lambda: model(ids, **{KEYWORD: held}))


@torch.no_grad()
def test_caches_refuse_what_a_ring_cannot(attached: Any) -> None:
    model, plan = attached()
    held = model(torch.tensor([text(20)]), use_cache=True)[KEYWORD]
    first = torch.tensor([0])
    for run in (
        lambda: held.crop(-1),
        lambda: held.reorder_cache(first),
        lambda: held.batch_repeat_interleave(2),
        lambda: held.batch_select_indices(first),
        lambda: held.layers[0].offload(),
        lambda: held.layers[0].prefetch(),
    ):
        refused(UsageError, "not to be had of a cache that holds each head's ring", run)
    assert held.get_seq_length() == 20
    refused(UsageError, "not one that this plan holds", lambda: plan.kv_bytes(DynamicCache()))


@torch.no_grad()
def test_calls_that_a_plan_cannot_run(attached: Any) -> None:
    model, plan = attached()
    other, _ = attached(seed=1)
    ids = torch.tensor([text(20)])

    def call(**options: Any) -> Callable[[], object]:
        return lambda: model(ids, **options)

    def held() -> Any:
        return model(ids, use_cache=True)[KEYWORD]

    two = torch.cat([ids, ids])
    static = StaticCache(config=model.config, max_cache_len=32)
    offloaded: Any = DynamicCache()
    offloaded.offloading = True
    refused(UsageError, "attention weights", call(output_attentions=True))
    refused(UsageError, r"shape \[1, 1, 20, 20\]", call(attention_mask=torch.ones(1, 1, 20, 20)))
    refused(UsageError, r"shape \[1, 3\]", call(attention_mask=torch.ones(1, 3)))
    refused(UsageError, "mask is a dict", call(attention_mask={}))
    positions = torch.cat([ahead(0, 10), ahead(0, 10)], dim=1)
    refused(UsageError, "do not go up by one", call(position_ids=positions))
    refused(UsageError, r"position_ids has the shape \[1, 19\]", call(position_ids=ahead(0, 19)))
    refused(UsageError, "StaticCache of another kind", call(**{KEYWORD: static}))
    refused(UsageError, "DynamicCache of another kind", call(**{KEYWORD: offloaded}))
    refused(UsageError, "holds 1 sequences and is fed 2", lambda: model(two, **{KEYWORD: held()}))
    refused(UsageError, "another attached plan", lambda: other(ids, **{KEYWORD: held()}))
    gap = ahead(30, 50)
    refused(UsageError, "go up by one", call(**{KEYWORD: held()}, position_ids=gap))
    hiding = torch.ones(1, 40)
    hiding[:, 3] = 0
    refused(UsageError, "hides other tokens", call(**{KEYWORD: held()}, attention_mask=hiding))
    padded = model(
        ids, attention_mask=hiding[:, :20], use_cache=True, position_ids=counted(hiding)
    )
    refused(UsageError, "mask is missing now", call(**{KEYWORD: padded[KEYWORD]}))
    refused(
        UsageError,
        "runs without the model",
        lambda: model.model.layers[0].self_attn(
            torch.zeros(1, 2, 64), position_embeddings=(torch.ones(1, 2, 16), torch.ones(1, 2, 16))
        ),
    )
    kept = held()
    plan.detach()
    refused(UsageError, "no plan is attached", call(**{KEYWORD: kept}))


def ahead(first: int, stop: int) -> Tensor:
    """Positions `[1, T]`."""
    return torch.arange(first, stop)[None]


def counted(mask: Tensor) -> Tensor:
    return mask[:, :20].long().cumsum(1) - 1


@torch.no_grad()
def test_a_pass_that_broke_off_spoils_its_cache_alone(attached: Any) -> None:
    model, _ = attached()
    ids = torch.tensor([text(20)])
    held = model(ids, use_cache=True)[KEYWORD]
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, **{KEYWORD: held})
    hook.remove()
    refused(UsageError, "did not end", lambda: model(ids, **{KEYWORD: held}))
    held.reset()
    model(ids, **{KEYWORD: held})


def test_training_with_dropout_is_refused(attached: Any) -> None:
    model, _ = attached(attention_dropout=0.1)
    model.train()
    refused(UsageError, "dropout 0.1", lambda: model(torch.tensor([text(9)])))


@torch.no_grad()
def test_another_attention_is_refused_while_attached(attached: Any) -> None:
    model, _ = attached()
    model.set_attn_implementation("eager")
    refused(UsageError, "set to eager", lambda: model(torch.tensor([text(9)])))


def test_models_that_take_no_plan(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = written(model, tmp_path)
    wrong: Any = torch.nn.Linear(2, 2)
    refused(UsageError, "a Linear", lambda: attach(wrong, path, capacity=64))
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    refused(CheckpointError, "bert", lambda: attach(bert, path, capacity=64))
    for capacity in (0, 513):
        refused(
            UsageError,
            f"1 to 512 tokens.*got {capacity}",
            lambda n=capacity: attach(model, path, capacity=n),  # type: ignore[misc]
        )
    with attach(model, path, capacity=64):
        refused(UsageError, "attached already", lambda: attach(model, path, capacity=64))
    spread: Any = tiny_model("llama")
    spread.lm_head.to("meta")
    refused(UsageError, "cpu and meta", lambda: attach(spread, path, capacity=64))
    assert NAME not in AttentionInterface()


def test_plans_of_other_models(tmp_path: Path) -> None:
    model = tiny_model("llama")

    def taking(path: Path) -> Callable[[], object]:
        return lambda: attach(model, path, capacity=64)

    other = tiny_model("llama", num_key_value_heads=4)
    four = Plan(((DENSE,) * 4,) * 2, sink=4, block=8, min_span=8, windows=(None, None))
    refused(UsageError, "num_kv_heads 4", taking(written(other, tmp_path, four)))
    refused(UsageError, "with family qwen2", taking(written(model, tmp_path, family="qwen2")))
    windowed = Plan(RULES, sink=4, block=8, min_span=8, windows=(32, None))
    refused(UsageError, "sliding windows", taking(written(model, tmp_path, windowed)))
    refused(ArtifactError, "cannot be read", taking(tmp_path / "none.json"))
    path = written(model, tmp_path)
    path.write_text(path.read_text().replace('"sink": 4', '"sink": 5'))
    refused(ArtifactError, "was changed", taking(path))


def test_the_weights_of_a_folder_are_those_of_the_plan(
    tiny_package: Compiled, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_checkpoint("llama", max_position_embeddings=2048, seed=1)
    model: Any = AutoModelForCausalLM.from_pretrained(other)
    for path in (tiny_package.package, tiny_package.package / "plan.json"):
        refused(UsageError, "another model than", lambda p=path: attach(model, p, capacity=64))  # type: ignore[misc]
    model.config._name_or_path = "somebody/a-model-on-a-hub"
    attach(model, tiny_package.package, capacity=64).detach()  # the shape is all there is
    smaller: Any = tiny_model("llama", num_hidden_layers=1)
    refused(
        UsageError,
        "num_layers 2, but this one has 1",
        lambda: attach(smaller, tiny_package.package, capacity=64),
    )
