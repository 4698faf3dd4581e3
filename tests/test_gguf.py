"""GGUF files: the model is the original's, and a field that would be dropped is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import checkpoint_tensors
from gguf_files import byte_level_fields, gguf_name, tiny_original, with_stacks, write_gguf

from moac.checkpoint import open_checkpoint
from moac.checkpoint.families import family_of
from moac.checkpoint.gguf import open_gguf
from moac_runtime.errors import CheckpointError

FAMILIES = (
    *("llama", "qwen2", "qwen3", "gemma3_text", "gemma2", "olmo2", "phi3", "cohere2"),
    *("granite", "smollm3", "stablelm", "olmoe", "qwen3_moe", "mixtral", "gpt_oss"),
)
LOCAL = ["sliding_attention"]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
TOKENS = torch.arange(3, 43)[None]


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_same(path: Path, family: str, **overrides: Any) -> None:
    checkpoint = open_checkpoint(str(path))
    model = tiny_original(family, **overrides)
    state = checkpoint_tensors(model)
    assert set(checkpoint.names()) <= set(state)
    shifted = family_of(family).gguf.norms_plus_one
    for name in checkpoint.names():
        found, original = checkpoint.tensor(name), state[name]
        if shifted and name.endswith("norm.weight"):  # the sum has lost some of its last bits
            original = (original + 1) - 1
        assert torch.equal(found, original), name
    loaded = checkpoint.load_model()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_original(tmp_path: Path, family: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", family=family)
    check_same(tmp_path / "tiny.gguf", family)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"head_dim": 32}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"head_dim": 16}),
        ("gemma2", {"head_dim": 32}),
        ("gemma2", {"num_hidden_layers": 3, "layer_types": [*LOCAL, "full_attention", *LOCAL]}),
        ("olmo2", {"tie_word_embeddings": True}),
        ("phi3", {"rope": "longrope"}),
        ("phi3", {"rope": "longrope", "original_max_position_embeddings": 30}),
        ("phi3", {"partial_rotary_factor": 1.0}),
        ("phi3", {"sliding_window": 24}),
        ("cohere2", {"logit_scale": 2.0}),
        ("stablelm", {"use_parallel_residual": True}),
        ("stablelm", {"use_qkv_bias": False, "partial_rotary_factor": 0.5}),
        ("granite", {"residual_multiplier": 1.0}),
        ("olmoe", {"num_experts_per_tok": 3}),
        ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}),
        ("mixtral", {"tie_word_embeddings": True}),
        ("gpt_oss", {"num_local_experts": 5, "intermediate_size": 32}),
        ("gpt_oss", {"rope_parameters": YARN}),
        ("gpt_oss", {"sliding_window": 8, "layer_types": [*LOCAL, "full_attention"]}),
        ("qwen3_moe", {"num_experts": 5, "moe_intermediate_size": 32}),
        ("gemma3_text", {"head_dim": 32}),
        ("gemma3_text", {"final_logit_softcapping": None}),
        ("gemma3_text", {"tie_word_embeddings": False}),
        ("gemma3_text", {"rope": "linear"}),
        ("gemma3_text", {"num_hidden_layers": 3, "layer_types": [*LOCAL * 2, "full_attention"]}),
    ],
)
def test_what_the_fields_say_of_the_shape(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", family=family, overrides=overrides)
    check_same(tmp_path / "tiny.gguf", family, **overrides)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_have_the_names_that_the_format_gives_them(family: str) -> None:
    """As its own library lists them for the architecture."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = family_of(family)
    (arch,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == kind.gguf.architecture)
    listed, checked = get_tensor_name_map(arch, 4), 0
    for name in with_stacks(checkpoint_tensors(tiny_original(family))):
        theirs = listed.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is not None:
            # transformers' sinks are a tensor of no suffix; the file's converter gives them one
            assert gguf_name(name, kind) == theirs + ".weight" * name.endswith(".sinks")
            checked += 1
    assert checked >= 10


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    """Blocks of 4 bits as gpt-oss is published with; the file's own library widens them alike."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    path = tmp_path / "tiny.gguf"
    write_gguf(path, family="gpt_oss", stored_as=GGMLQuantizationType.MXFP4)
    checkpoint = open_checkpoint(str(path))
    state = checkpoint_tensors(tiny_original("gpt_oss"))
    kind, name = GGMLQuantizationType.MXFP4, "model.layers.1.mlp.experts.gate_up_proj"
    found, original = checkpoint.tensor(name), state[name]
    for first in (0, 1):  # gates and ups are beside each other
        rows = original.mT[:, first::2].contiguous().numpy()
        wanted = torch.from_numpy(dequantize(quantize(rows, kind), kind)).reshape(rows.shape)
        assert torch.equal(found.mT[:, first::2], wanted)
    assert not torch.equal(found, original)
    assert torch.equal(checkpoint.tensor(f"{name}_bias"), state[f"{name}_bias"])
    assert checkpoint.load_model().dtype == torch.bfloat16


def test_a_gate_without_its_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf_files

    whole = gguf_files.with_stacks

    def lacking(state: Any) -> Any:
        return {n: x for n, x in whole(state).items() if n != "blk.1.ffn_up_exps.weight"}

    monkeypatch.setattr(gguf_files, "with_stacks", lacking)
    write_gguf(tmp_path / "tiny.gguf", family="gpt_oss")
    assert "but no blk.1.ffn_up_exps.weight of that shape; convert" in refusal(
        tmp_path / "tiny.gguf"
    )


def test_fields_left_out_are_what_llama_cpp_takes_them_for(tmp_path: Path) -> None:
    """As many KV heads as heads, theta 10000, the width shared out over the heads."""
    absent = dict.fromkeys(
        [
            *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
            *("rope.dimension_count", "rope.freq_base"),
        ]
    )
    for family in ("llama", "qwen2", "qwen3"):
        overrides = {"num_key_value_heads": 4, "head_dim": 16}
        fields = {f"{family}.{name}": None for name in absent}
        write_gguf(tmp_path / "tiny.gguf", family=family, overrides=overrides, fields=fields)
        check_same(tmp_path / "tiny.gguf", family, **overrides)


@pytest.mark.parametrize(
    ("absent", "overrides"),
    [
        ("attention.sliding_window", {"sliding_window": 4096}),
        ("attn_logit_softcapping", {"attn_logit_softcapping": 50.0}),
        ("final_logit_softcapping", {"final_logit_softcapping": 30.0}),
    ],
)
def test_what_llama_cpp_takes_gemma_2_for(
    tmp_path: Path, absent: str, overrides: dict[str, Any]
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, family="gemma2", overrides=overrides, fields={f"gemma2.{absent}": None})
    check_same(path, "gemma2", **overrides)


def test_the_27b_of_gemma_2_has_a_query_scale_of_its_own(tmp_path: Path) -> None:
    overrides = {
        "num_hidden_layers": 46,
        "layer_types": [*LOCAL, "full_attention"] * 23,
        "head_dim": 32,
        "query_pre_attn_scalar": 16,
    }
    write_gguf(tmp_path / "tiny.gguf", family="gemma2", overrides=overrides)
    check_same(tmp_path / "tiny.gguf", "gemma2", **overrides)


def test_factors_of_longrope_in_another_family_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, family="phi3", overrides={"rope": "longrope"})
    found = open_gguf(path)
    assert found.fields.numbers("rope_factors_short.weight")[:2] == [1.0, pytest.approx(1.1)]
    assert not any("factors" in name for name in found.shapes)
    write_gguf(path, overrides={"rope": "longrope"})
    assert "holds the tensor rope_factors_short.weight and 1 more" in refusal(path)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("cohere2", {"logit_scale": None}, "lacks the field cohere2.logit_scale"),
        ("cohere2", {"attention.sliding_window_pattern": 0}, "= 0 where a positive number was"),
        ("granite", {"residual_scale": -1.0}, "residual_multiplier -1.0 where a positive number"),
        ("phi3", {"rope.dimension_count": 5}, "partial_rotary_factor 0.3125 is not served"),
        ("phi3", {"rope.scaling.attn_factor": "x"}, "attn_factor = 'x' where a number was"),
        ("mixtral", {"expert_used_count": 9}, "9 of 8 experts a token"),
        ("gpt_oss", {"rope.scaling.type": "linear"}, "type = 'linear' is not served"),
        ("olmo2", {"rope.scaling.type": "yarn"}, "olmo2.rope.scaling.type = 'yarn' is not"),
    ],
)
def test_a_field_of_a_family_that_is_refused(
    tmp_path: Path, family: str, fields: dict[str, Any], words: str
) -> None:
    overrides = {"rope": "longrope"} if "rope.scaling.attn_factor" in fields else {}
    arch = family_of(family).gguf.architecture
    named = {f"{arch}.{name}": value for name, value in fields.items()}
    write_gguf(tmp_path / "tiny.gguf", family=family, fields=named, overrides=overrides)
    assert words in refusal(tmp_path / "tiny.gguf")


PERIOD = [*LOCAL * 5, "full_attention"]
WHOLE = ["full_attention"]


@pytest.mark.parametrize(
    ("absent", "overrides"),
    [
        ("attention.sliding_window_pattern", {"layer_types": [*PERIOD, *LOCAL]}),
        ("attention.sliding_window", {"layer_types": WHOLE * 7}),
        ("rope.freq_base_swa", {"layer_types": [*PERIOD, *LOCAL]}),
        ("rope.freq_base", {"layer_types": [*PERIOD, *LOCAL]}),
    ],
)
def test_what_llama_cpp_takes_gemma_3_for(
    tmp_path: Path, absent: str, overrides: dict[str, Any]
) -> None:
    """Five layers of six under the window, with theta 10000."""
    ropes = {
        f"{kind}_attention": {"rope_type": "default", "rope_theta": 10000.0}
        for kind in ("sliding", "full")
    }
    overrides = {"num_hidden_layers": 7, "rope_parameters": ropes, **overrides}
    fields = {f"gemma3.{absent}": None, "gemma3.attention.sliding_window_pattern": None}
    path = tmp_path / "tiny.gguf"
    write_gguf(path, family="gemma3_text", overrides=overrides, fields=fields)
    check_same(path, "gemma3_text", **overrides)


def test_the_27b_of_gemma_3_has_a_query_scale_of_its_own(tmp_path: Path) -> None:
    overrides = {
        "num_hidden_layers": 62,
        "layer_types": WHOLE * 62,
        "head_dim": 32,
        "query_pre_attn_scalar": 16,
    }
    write_gguf(tmp_path / "tiny.gguf", family="gemma3_text", overrides=overrides)
    check_same(tmp_path / "tiny.gguf", "gemma3_text", **overrides)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention.sliding_window_pattern": 0}, "pattern = 0 where a positive number was"),
        ({"attention.sliding_window": "x"}, "window = 'x' where a whole number was expected"),
        ({"rope.scaling.type": "yarn"}, "gemma3.rope.scaling.type = 'yarn' is not served"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.5}, "RoPE factor 0.5 is not"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not served"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping -1.0 where a positive"),
    ],
)
def test_a_field_of_gemma_3_that_is_refused(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    named = {f"gemma3.{name}": value for name, value in fields.items()}
    write_gguf(tmp_path / "tiny.gguf", family="gemma3_text", fields=named)
    assert words in refusal(tmp_path / "tiny.gguf")


def test_scaling_that_gemma_3_names_and_does_not_use(tmp_path: Path) -> None:
    for fields in (
        {"rope.scaling.type": "none", "rope.scaling.factor": 8.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0},
    ):
        named = {f"gemma3.{name}": value for name, value in fields.items()}
        write_gguf(tmp_path / "tiny.gguf", family="gemma3_text", fields=named)
        check_same(tmp_path / "tiny.gguf", "gemma3_text")


@pytest.mark.parametrize("name", ["mistral", "Mistral 7B", ""])
def test_the_name_of_a_model_does_not_change_its_family(tmp_path: Path, name: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", fields={"general.name": name})
    check_same(tmp_path / "tiny.gguf", "llama")


@pytest.mark.parametrize(("kind", "steps"), [("Q8_0", 127), ("Q4_0", 8), ("BF16", 256)])
def test_quantised_tensors_are_widened(tmp_path: Path, kind: str, steps: int) -> None:
    from gguf import GGMLQuantizationType

    path = tmp_path / "tiny.gguf"
    state = write_gguf(path, stored_as=GGMLQuantizationType[kind])
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.dtype == "bfloat16"
    changed = 0
    for name, tensor in state.items():
        found = checkpoint.tensor(name)
        assert (found - tensor).abs().max() <= tensor.abs().max() / steps, name
        changed += not torch.equal(found, tensor)
    assert changed == sum(tensor.dim() == 2 for tensor in state.values())
    assert checkpoint.load_model().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"llama.attention.sliding_window": 32}, "llama.attention.sliding_window = 32 is not"),
        ({"llama.expert_count": 4}, "lacks the field llama.expert_used_count"),
        ({"llama.expert_used_count": 2}, "llama.expert_used_count = 2 is not served"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn' is not served"),
        ({"llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.factor = 4.0 is not served"),
        ({"llama.rope.scale_linear": 2.0}, "llama.rope.scale_linear = 2.0 is not served"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale = 0.5 is not served"),
        ({"llama.logit_scale": 16.0}, "llama.logit_scale = 16.0 is not served"),
        ({"llama.embedding_scale": 12.0}, "llama.embedding_scale = 12.0 is not served"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not served"),
        ({"llama.attention.causal": False}, "llama.attention.causal = False is not served"),
        ({"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv = 8.0 is not served"),
        ({"llama.unheard_of": 3}, "llama.unheard_of = 3 is not served"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length 8 is not served"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count 8 is not served"),
        ({"llama.attention.head_count": [4, 4]}, "head_count = [4, 4] where a whole number"),
        ({"llama.attention.head_count": 0}, "head_count = 0 where a positive number was expected"),
        ({"llama.attention.head_count": 65}, "head_count = 65 where 1 to 64 heads was expected"),
        ({"llama.block_count": 3}, "lacks the tensor model.layers.2.input_layernorm.weight and"),
        ({"llama.feed_forward_length": 80}, "where its header calls for [80, 64]; its header"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks the field llama.attention.l"),
        ({"llama.block_count": None}, "lacks the field llama.block_count"),
        ({"llama.vocab_size": 7}, "lists 320 tokens for a vocabulary of 7"),
        ({"general.type": "adapter"}, "GGUF file of type 'adapter' is not served"),
        ({"split.count": 3, "split.no": 0}, "is one of 3 parts of a GGUF file; join them with"),
        ({"tokenizer.ggml.tokens": None}, "lacks the field tokenizer.ggml.tokens"),
    ],
)
def test_a_field_that_would_be_dropped(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", fields=fields)
    assert words in refusal(tmp_path / "tiny.gguf")


def test_fields_that_say_nothing(tmp_path: Path) -> None:
    fields = {
        "llama.expert_count": 0,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.attention.causal": True,
        "llama.logit_scale": 0.0,
        "llama.tensor_data_layout": "Meta AI original pth",
        "split.count": 1,
        "general.type": "model",
    }
    write_gguf(tmp_path / "tiny.gguf", fields=fields)
    check_same(tmp_path / "tiny.gguf", "llama")


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, big_endian=True)
    assert "a big-endian GGUF file, 'tiny.gguf' is not served" in refusal(path)
    write_gguf(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\1\0\0\0" + whole[8:])
    assert "GGUF version 1 is not served; served is 2 and 3" in refusal(path)
    path.write_bytes(whole[:4] + b"\2\0\0\0" + whole[8:])
    check_same(path, "llama")


def test_a_tensor_type_that_cannot_be_widened(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType

    write_gguf(tmp_path / "tiny.gguf", stored_as=GGMLQuantizationType.F64)
    assert "GGUF tensor type 'F64' is not served" in refusal(tmp_path / "tiny.gguf")


def test_without_an_end_token_none_is_made_up(tmp_path: Path) -> None:
    absent = dict.fromkeys(["ggml.bos_token_id", "ggml.eos_token_id", "ggml.eot_token_id"])
    write_gguf(tmp_path / "tiny.gguf", tokenizer={**byte_level_fields("smollm"), **absent})
    assert open_checkpoint(str(tmp_path / "tiny.gguf")).eos_token_ids == ()
