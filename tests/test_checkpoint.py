"""Checkpoints: what is read is what transformers reads; what is wrong is said in a sentence."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    CHAT_TEMPLATE,
    FAMILIES,
    ONE_ROPE,
    ROPES,
    checkpoint_tensors,
    ropes_of,
    save_checkpoint,
    tiny_model,
)
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moac.checkpoint import open_checkpoint
from moac.checkpoint.families import model_spec, parse_config
from moac_runtime.errors import CheckpointError, UsageError
from moac_runtime.package.spec import ModelSpec

Make = Callable[..., Path]


def edit_json(path: Path, **changes: Any) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "DROP"}))


@pytest.fixture
def copy(tiny_checkpoint: Make, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint directory of one's own, with changes made to its config.json."""

    def make(family: str = "llama", /, **changes: Any) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny_checkpoint(family), folder)
        edit_json(folder / "config.json", **changes)
        return folder

    return make


def refusal(source: Path | str, **options: Any) -> str:
    """The one sentence that opening `source` ends in."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(source), **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# ---- what is read


@pytest.mark.parametrize(
    ("family", "rope"), [(family, rope) for family in ONE_ROPE for rope in ropes_of(family)]
)
def test_rope_is_the_librarys_own(tiny_checkpoint: Make, family: str, rope: str) -> None:
    folder = tiny_checkpoint(family, rope=rope)
    spec = open_checkpoint(str(folder)).spec
    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    assert spec.ropes[0].kind == rope
    assert torch.equal(torch.tensor(spec.ropes[0].inv_freq), rotary.inv_freq)
    assert spec.ropes[0].scaling == rotary.attention_scaling
    assert len(spec.ropes[0].inv_freq) == (spec.ropes[0].rotated or spec.head_dim) // 2
    assert (spec.ropes[0].rotated is not None) == (family in ("phi3", "stablelm"))
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_each_kind_of_layer_has_the_librarys_own_rope(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("gemma3_text", rope="linear")
    spec = open_checkpoint(str(folder)).spec
    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    for index, kind in enumerate(("sliding_attention", "full_attention")):
        rope = spec.ropes[spec.layer(index).rope or 0]
        assert torch.equal(torch.tensor(rope.inv_freq), getattr(rotary, f"{kind}_inv_freq"))
    assert [rope.kind for rope in spec.ropes] == ["default", "linear"]
    assert spec.ropes[0] != spec.ropes[1]


def test_yarn_scales_cos_and_sin(tiny_checkpoint: Make) -> None:
    spec = open_checkpoint(str(tiny_checkpoint("llama", rope="yarn"))).spec
    assert spec.ropes[0].scaling == pytest.approx(1.1386, abs=1e-4)


def test_dynamic_rope_carries_what_a_session_needs(tiny_checkpoint: Make) -> None:
    rope = open_checkpoint(str(tiny_checkpoint("qwen2", rope="dynamic"))).spec.ropes[0]
    assert (rope.theta, rope.factor, rope.original_context) == (10000.0, 4.0, 64)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_longrope_carries_both_of_its_tables(tiny_checkpoint: Make, family: str) -> None:
    folder = tiny_checkpoint(family, rope="longrope")
    (rope,) = open_checkpoint(str(folder)).spec.ropes
    config = AutoModelForCausalLM.from_pretrained(folder).config
    for length, found in ((128, rope.inv_freq), (129, rope.long_inv_freq)):
        wanted, scaling = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=length)
        assert torch.equal(torch.tensor(found), wanted)
        assert rope.scaling == scaling == pytest.approx(1.1339, abs=1e-4)
    assert rope.original_context == 128
    assert rope.inv_freq != rope.long_inv_freq


def test_what_phi_3_first_called_longrope(copy: Callable[..., Path]) -> None:
    folder = copy("phi3")
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    found = []
    for name in ("longrope", "yarn"):
        edit_json(
            folder / "config.json",
            rope_parameters="DROP",
            rope_theta=10000.0,
            rope_scaling={"type": name, **factors},
        )
        found.append(open_checkpoint(str(folder)).spec)
    assert found[0] == found[1]
    assert found[0].ropes[0].kind == "longrope"


@pytest.mark.parametrize(
    ("rope", "context"),
    [("default", 512), ("llama3", 512), ("linear", 2048), ("dynamic", 256), ("yarn", 512)],
)
def test_context_is_what_the_scaling_stretches_to(
    tiny_checkpoint: Make, rope: str, context: int
) -> None:
    assert open_checkpoint(str(tiny_checkpoint("llama", rope=rope))).spec.context == context


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_the_models_own(tiny_checkpoint: Make, family: str) -> None:
    folder = tiny_checkpoint(family)
    checkpoint = open_checkpoint(str(folder))
    state = checkpoint_tensors(AutoModelForCausalLM.from_pretrained(folder))
    tied = {"lm_head.weight"} if checkpoint.spec.tied_embeddings else set()
    assert set(checkpoint.names()) == set(state) - tied
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), state[name])


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {}, (False, False, False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False, False, False)),
        ("llama", {"mlp_bias": True}, (False, False, True, False, False)),
        ("llama", {"tie_word_embeddings": True}, (False, False, False, False, True)),
        ("mistral", {}, (False, False, False, False, False)),
        ("qwen2", {}, (True, False, False, False, True)),
        ("qwen2", {"tie_word_embeddings": False}, (True, False, False, False, False)),
        ("qwen3", {}, (False, False, False, True, False)),
        ("qwen3", {"attention_bias": True}, (True, True, False, True, False)),
    ],
)
def test_biases_norms_and_ties(
    tiny_checkpoint: Make, family: str, options: dict[str, Any], expected: tuple[bool, ...]
) -> None:
    spec = open_checkpoint(str(tiny_checkpoint(family, **options))).spec
    (own,) = spec.kinds
    assert own.qk_norm in (None, "head")
    found = (own.qkv_bias, own.o_bias, own.mlp_bias, bool(own.qk_norm), spec.tied_embeddings)
    assert found == expected
    assert spec.family == family


@pytest.mark.parametrize(
    ("family", "options", "windows"),
    [
        ("llama", {}, (None, None)),
        ("mistral", {}, (None, None)),
        ("mistral", {"sliding_window": 48}, (48, 48)),
        ("qwen2", {"sliding_window": 48, "max_window_layers": 1}, (None, None)),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1},
            (None, 48),
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (32, None),
        ),
    ],
)
def test_windows(
    tiny_checkpoint: Make, family: str, options: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert open_checkpoint(str(tiny_checkpoint(family, **options))).spec.windows == windows


def test_head_dim_given_or_derived(tiny_checkpoint: Make) -> None:
    assert open_checkpoint(str(tiny_checkpoint("llama"))).spec.head_dim == 16
    assert open_checkpoint(str(tiny_checkpoint("llama", head_dim=24))).spec.head_dim == 24
    assert open_checkpoint(str(tiny_checkpoint("qwen2"))).spec.head_dim == 16


def test_an_older_config_means_the_same(copy: Callable[..., Path], tiny_checkpoint: Make) -> None:
    llama3 = dict(ROPES["llama3"])
    scaling = {"type": llama3.pop("rope_type"), **llama3}
    folder = copy(
        rope_parameters="DROP",
        head_dim="DROP",
        dtype="DROP",
        rope_scaling=scaling,
        rope_theta=10000.0,
        torch_dtype="float16",
    )
    older = open_checkpoint(str(folder))
    newer = open_checkpoint(str(tiny_checkpoint("llama", rope="llama3")))
    assert older.spec == newer.spec
    assert (older.dtype, newer.dtype) == ("float16", "float32")


def test_dtype_without_a_word_in_the_config_is_the_stored_one(copy: Callable[..., Path]) -> None:
    folder = copy(dtype="DROP")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.tensor("model.norm.weight").dtype == torch.bfloat16


def test_shards_read_as_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = save_checkpoint(model, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    checkpoint = open_checkpoint(str(folder))
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_an_unknown_tensor_is_named(tiny_checkpoint: Make) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama")))
    with pytest.raises(CheckpointError, match=r"holds no tensor named model\.nothing"):
        checkpoint.tensor("model.nothing")


def test_load_model_is_ready_to_answer(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("qwen3")
    model = open_checkpoint(str(folder)).load_model(torch.bfloat16)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"
    assert open_checkpoint(str(folder)).load_model().dtype == torch.float32


def test_nothing_is_printed(tiny_checkpoint: Make, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_checkpoint("llama")
    capfd.readouterr()
    open_checkpoint(str(folder)).load_model()
    assert capfd.readouterr() == ("", "")


def test_importing_loads_no_library() -> None:
    code = "import sys, moac.checkpoint as c; print(*{'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


# ---- tokenizer


def test_tokenizer_files_read_as_the_library_does(tiny_checkpoint: Make, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = tiny_checkpoint("llama")
    checkpoint = open_checkpoint(str(folder))
    checkpoint.save_tokenizer(tmp_path / "tokenizer")
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    text = "Remember the key: 12  \u6f22 <|im_end|>\n"
    assert saved.encode(text).ids == AutoTokenizer.from_pretrained(folder)(text).input_ids
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    assert template.read_bytes() == CHAT_TEMPLATE.encode()
    assert json.loads((tmp_path / "tokenizer" / "generation.json").read_text()) == {
        "eos_token_ids": [2, 0],
        "bos_token_id": 1,
        "pad_token_id": 0,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "defaults": {},
    }


def test_every_end_token_is_kept_and_defaults_recorded(copy: Callable[..., Path]) -> None:
    folder = copy(eos_token_id=[5, 0])
    edit_json(folder / "generation_config.json", eos_token_id=7, temperature=0.6, top_k=20)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.eos_token_ids == (7, 5, 0, 2)
    settings = json.loads(checkpoint.tokenizer_files["generation.json"])
    assert settings["defaults"] == {"temperature": 0.6, "top_k": 20}


def test_no_template_and_no_generation_config(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    checkpoint = open_checkpoint(str(folder))
    assert "chat_template.jinja" not in checkpoint.tokenizer_files
    assert checkpoint.eos_token_ids == (2,)


def test_truncation_left_in_the_file_is_undone(copy: Callable[..., Path]) -> None:
    folder = copy()
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit_json(folder / "tokenizer.json", truncation=cut)
    saved = json.loads(open_checkpoint(str(folder)).tokenizer_files["tokenizer.json"])
    assert saved["truncation"] is None


def test_several_templates_use_the_default_one(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    files = open_checkpoint(str(folder)).tokenizer_files
    assert files["chat_template.jinja"] == "plain"
    edit_json(folder / "tokenizer_config.json", chat_template=named[1:])
    assert "chat templates named tool_use and none named default" in refusal(folder)


# ---- what is not served

SERVED = (
    "cohere2, gemma2, gemma3_text, gpt_oss, granite, llama, mistral, mixtral, olmo2, olmoe, phi3, "
    "qwen2, qwen3, qwen3_moe, smollm3, stablelm"
)
ROPES_SERVED = "default, linear, dynamic, llama3, yarn, longrope"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model_type": "falcon"},
            f"model_type 'falcon' is not served; served is {SERVED}",
        ),
        (
            {"model_type": "DROP"},
            f"model_type None is not served; served is {SERVED}",
        ),
        (
            {"hidden_act": "gelu_fast"},
            "hidden_act 'gelu_fast' is not served; served is "
            "silu, gelu, gelu_new, gelu_pytorch_tanh, relu",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config with quant_method 'gptq' is not served; served is "
            "float32, bfloat16 or float16 weights, or a GGUF file",
        ),
        (
            {"num_local_experts": 8},
            "num_local_experts 8 is not served; served is a dense MLP (no mixture of experts)",
        ),
        (
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping 50.0 is not served; served is "
            "attention and logits without a cap",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor 0.5 is not served; served is 1 (the whole head rotates)",
        ),
        (
            {"pretraining_tp": 2},
            "pretraining_tp 2 is not served; served is 1 (undivided projections)",
        ),
        (
            {"is_encoder_decoder": True},
            "model_type 'llama' has an encoder (is_encoder_decoder) and is not served; served is "
            "decoder-only models",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architecture 'LlamaForSequenceClassification' is not served; served is "
            "a causal language model (...ForCausalLM)",
        ),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            f"RoPE type 'proportional' is not served; served is {ROPES_SERVED}",
        ),
        (
            {"rope_parameters": "DROP", "rope_scaling": {"type": "su", "factor": 2.0}},
            f"RoPE type 'su' is not served; served is {ROPES_SERVED}",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "RoPE per layer type, for ['full_attention'] is not served; "
            "served is one RoPE for all layers",
        ),
        (
            {"dtype": "float64"},
            "dtype 'float64' is not served; served is float32, bfloat16, float16",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            "RoPE factor 0.5 is not served; served is a number of at least 1",
        ),
        ({"head_dim": 15}, None),
        ({"head_dim": 10**9}, None),
    ],
)
def test_options_not_served(
    copy: Callable[..., Path], changes: dict[str, Any], sentence: str | None
) -> None:
    found = refusal(copy(**changes))
    assert found == sentence if sentence else "head_dim" in found


def test_what_a_family_never_had_is_not_refused(copy: Callable[..., Path]) -> None:
    assert open_checkpoint(str(copy("smollm3", pretraining_tp=2))).spec.num_layers == 2


def test_a_family_reads_one_cap_and_refuses_the_other(copy: Callable[..., Path]) -> None:
    folder = copy("gemma3_text")
    assert open_checkpoint(str(folder)).spec.logit_cap == 8.0
    for name, value in (("attn_logit_softcapping", 50.0), ("use_bidirectional_attention", True)):
        edit_json(folder / "config.json", **{name: value})
        assert f"{name} {value} is not served" in refusal(folder)
        edit_json(folder / "config.json", **{name: None})


def partial(factor: float) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return {**rope, "partial_rotary_factor": factor}


def longrope(short: list[float], long: list[float]) -> dict[str, Any]:
    context = {"original_max_position_embeddings": 128, "partial_rotary_factor": 0.75}
    if len(short) > 6 or len(long) > 6:
        del context["partial_rotary_factor"]
    factors = {"short_factor": short, "long_factor": long}
    return {"rope_type": "longrope", "rope_theta": 10000.0, **context, **factors}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("smollm3", {"no_rope_layers": [1]}, "lists 1 no_rope_layers for 2 layers"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier 0 where a positive number"),
        ("granite", {"logits_scaling": -1.0}, "logits_scaling -1.0 where a positive number"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping 0.0 where a positive"),
        ("cohere2", {"logit_scale": 0.0}, "logit_scale 0.0 where a positive number"),
        ("cohere2", {"layer_norm_eps": -1.0}, "layer_norm_eps -1.0 where a small positive number"),
        ("stablelm", {"head_dim": 32}, "head_dim 32 is not served; served is the width's share"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm True is not served"),
        ("stablelm", {"layer_norm_eps": -1.0}, "layer_norm_eps -1.0 where a small positive"),
        ("phi3", {"rope_parameters": partial(0.0)}, "partial_rotary_factor 0.0 is not served"),
        ("phi3", {"rope_parameters": partial(1.5)}, "partial_rotary_factor 1.5 is not served"),
        (
            "phi3",
            {"rope_parameters": partial(0.2)},
            "0.2 is not served; served is the share of 16",
        ),
        ("phi3", {"rope_parameters": longrope([1.0] * 5, [1.0] * 6)}, "must have length 6, got 5"),
        ("llama", {"rope_parameters": longrope([1.0] * 5, [1.0] * 8)}, "incomplete or impossible"),
        ("llama", {"rope_parameters": longrope([1.0] * 8, [1.0] * 5)}, "incomplete or impossible"),
        ("llama", {"rope_parameters": longrope([1.0] * 8, [0.0] * 8)}, "that are not finite"),
    ],
)
def test_wrong_values_of_a_family_s_own_fields(
    copy: Callable[..., Path], family: str, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(copy(family, **changes))


def test_layer_kinds_not_served(copy: Callable[..., Path]) -> None:
    folder = copy("qwen3", layer_types=["chunked_attention", "full_attention"])
    assert refusal(folder).startswith("layer type 'chunked_attention' is not served")
    edit_json(folder / "config.json", layer_types=["sliding_attention", "full_attention"])
    assert "sliding_attention layers without a sliding_window" in refusal(folder)


# ---- what is wrong


def test_nothing_at_the_path(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert refusal(missing) == (
        f"there is no checkpoint at {missing}; give a directory with config.json, a .gguf file "
        "or a hub id such as org/name"
    )


def test_a_hub_id_offline() -> None:
    found = refusal("no-such-org/no-such-model", revision="v1")
    assert "no directory no-such-org/no-such-model here" in found
    assert "revision v1" in found


def test_a_revision_of_a_local_path(tiny_checkpoint: Make) -> None:
    with pytest.raises(UsageError, match=r"a revision \('main'\) belongs to a hub id"):
        open_checkpoint(str(tiny_checkpoint("llama")), revision="main")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x")
    assert f"{path} is a file but no .gguf" in refusal(path)


def test_an_empty_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no config.json; give the directory that save_pretrained wrote"
    )


@pytest.mark.parametrize("text", ["{", "[1]", "\xff\xfe"])
def test_a_config_that_is_no_json_object(copy: Callable[..., Path], text: str) -> None:
    folder = copy()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert re.search(r"config\.json (is not readable JSON|holds a JSON list)", refusal(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "many"}, "is not a valid llama config"),
        ({"hidden_size": 65}, "is not a valid llama config"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 where 1 to 10000"),
        ({"num_attention_heads": 0}, "is not a valid llama config"),
        ({"num_key_value_heads": 3}, "4 attention heads over 3 key-value heads"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
        ({"eos_token_id": 5000}, "eos_token_id 5000, but its vocabulary has the ids 0 to 319"),
    ],
)
def test_config_values_that_cannot_be(
    copy: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(copy(**changes))


JUNK: tuple[Any, ...] = (
    None,
    "x",
    "",
    -1,
    0,
    1.5,
    10**30,
    float("nan"),
    True,
    [],
    ["x"],
    {},
    {"x": 1},
)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        *(
            (family, rope)
            for family in FAMILIES
            for rope in ("yarn", "linear", "dynamic")
            if family != "phi3"
        ),
        *(("phi3", rope) for rope in ropes_of("phi3")),
        ("llama", "longrope"),
    ],
)
def test_no_config_value_ends_in_a_traceback(
    tiny_checkpoint: Make, family: str, rope: str
) -> None:
    folder = tiny_checkpoint(family, rope=rope)
    values = json.loads((folder / "config.json").read_text())
    extra = ("quantization_config", "pretraining_tp", "partial_rotary_factor", "rope_scaling")
    ropes = [
        {"rope_parameters": {**values["rope_parameters"], key: junk}}
        for key, junk in itertools.product(values["rope_parameters"], JUNK)
    ]
    plain = [{key: junk} for key, junk in itertools.product([*values, *extra], JUNK)]
    refused = 0
    for changed in plain + ropes:
        try:
            spec = model_spec(parse_config({**values, **changed}, "config.json"))
        except CheckpointError:
            refused += 1
            continue
        assert spec.num_layers >= 1, changed
        assert spec.context >= 1, changed
        values_of = (v for rope in spec.ropes for v in (*rope.inv_freq, *rope.long_inv_freq))
        assert all(math.isfinite(value) for value in values_of), changed
        assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert refused > 100


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"vocab_size": 400}, "embed_tokens.weight with shape [320, 64] where"),
        ("llama", {"intermediate_size": 80}, "gate_proj.weight with shape [96, 64] where"),
        ("llama", {"num_key_value_heads": 1}, "k_proj.weight with shape [32, 64] where"),
        ("llama", {"head_dim": 32}, "q_proj.weight with shape [64, 64] where"),
        ("llama", {"num_hidden_layers": 3}, "lacks the tensor model.layers.2."),
        ("llama", {"num_hidden_layers": 1}, "holds the tensor model.layers.1."),
        ("llama", {"attention_bias": True}, "q_proj.bias and 7 more tensors"),
        ("llama", {"mlp_bias": True}, "gate_proj.bias and 5 more tensors"),
        ("llama", {"model_type": "qwen2"}, "q_proj.bias and 5 more tensors"),
        ("llama", {"tie_word_embeddings": True}, "but lm_head.weight differs from"),
        ("qwen2", {"tie_word_embeddings": False}, "lacks the tensor lm_head.weight"),
        ("qwen2", {"model_type": "mistral"}, "that its config.json has no place for"),
        ("qwen3", {"model_type": "llama"}, "k_norm.weight and 3 more tensors"),
    ],
)
def test_config_and_tensors_that_contradict(
    copy: Callable[..., Path], family: str, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(copy(family, **changes))


def test_a_second_copy_of_the_embedding_is_harmless(copy: Callable[..., Path]) -> None:
    folder = copy("qwen2")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(str(folder)).spec.tied_embeddings


def test_only_pickled_weights(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "holds only pickled weights (pytorch_model.bin)" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_a_cut_shard(copy: Callable[..., Path], keep: int) -> None:
    path = copy() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is damaged or cut short" in refusal(path.parent)


def test_weights_of_a_quantised_kind(copy: Callable[..., Path]) -> None:
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    assert "model.norm.weight of dtype 'I8' is not served" in refusal(folder)


def test_an_index_that_lies(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model("llama"), tmp_path / "c", max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = weight_map["model.norm.weight"]
    other = next(shard for shard in weight_map.values() if shard != first)
    for shard, words in [
        ("nowhere.safetensors", "names the shard nowhere.safetensors, which is missing"),
        ("../x.safetensors", "'../x.safetensors', which is not a plain file name"),
        (other, f"places model.norm.weight in {other}, which does not hold it"),
    ]:
        edit_json(index, weight_map={**weight_map, "model.norm.weight": shard})
        assert words in refusal(folder)
    edit_json(index, weight_map={})
    assert "holds no weight_map" in refusal(folder)


def test_tokenizer_missing_or_damaged(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "tokenizer.json").write_text("{}")
    assert f"the tokenizer of {folder} is not readable" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer (tokenizer.json or tokenizer.model)" in refusal(folder)


# ---- GGUF


def test_a_gguf_is_the_same_checkpoint(tiny_checkpoint: Make, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    state = write_gguf(path)
    checkpoint = open_checkpoint(str(path))
    directory = open_checkpoint(str(tiny_checkpoint("llama")))
    assert checkpoint.spec.ropes == directory.spec.ropes
    assert checkpoint.spec.norm.eps == pytest.approx(directory.spec.norm.eps)
    assert (checkpoint.dtype, checkpoint.eos_token_ids) == ("float32", (2, 0))
    assert checkpoint.tokenizer_files["chat_template.jinja"] == CHAT_TEMPLATE
    assert set(checkpoint.names()) == set(state)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
    tokens = torch.arange(3, 43)[None]
    expected = tiny_model("llama")(tokens).logits
    torch.testing.assert_close(checkpoint.load_model()(tokens).logits, expected)


def test_gguf_options_that_would_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, add_sliding_window=32)
    assert refusal(path).startswith("llama.attention.sliding_window = 32 is not served")
    write_gguf(path, add_expert_count=4)
    assert "lacks the field llama.expert_used_count" in refusal(path)
    write_gguf(path, pre="tekken")
    assert refusal(path).startswith("GGUF pre-tokenizer 'tekken' is not served")


@pytest.mark.parametrize("keep", [0, 3, 100, 20000, -64])
def test_a_cut_gguf(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is not a whole GGUF file" in refusal(path)


def test_no_damaged_gguf_header_ends_in_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole, chance = path.read_bytes(), random.Random(0)
    sentences = []
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(11_000)] = chance.randrange(256)
        damaged[chance.randrange(1_200)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            open_checkpoint(str(path))
        except CheckpointError as error:
            sentences.append(str(error))
    assert len(sentences) > 20
    assert not any("\n" in sentence for sentence in sentences)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_factor_of_an_embedding_is_the_librarys_in_every_dtype(
    tmp_path: Path, dtype: str
) -> None:
    """Gemma's is a number of the weights' dtype; the root of 96 is none of them."""
    checkpoint = open_checkpoint(
        str(save_checkpoint(tiny_model("gemma3_text", hidden_size=96), tmp_path))
    )
    model: Any = checkpoint.load_model(dtype)
    expected = float(model.model.embed_tokens.embed_scale)
    assert checkpoint.spec_in(dtype).embedding_scale == expected
    assert (abs(expected - 96**0.5) > 1e-4) == (dtype != "float32")


def test_a_factor_that_is_not_rounded_stays(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("granite")))
    assert checkpoint.spec_in("bfloat16") == checkpoint.spec
