"""Checkpoints whose tensors are no plain weights, told by their names where no config says so."""

from __future__ import annotations

from collections.abc import Mapping

from moac_runtime.errors import CheckpointError

# The endings of tensors that only one kind of file has, the telling ones first.
_QUANTISED = {
    "GPTQ": (".g_idx",),
    "AWQ": (".qweight", ".qzeros"),
    "bitsandbytes": (".absmax", ".quant_map", ".nested_absmax", ".SCB", ".weight_format"),
    "compressed-tensors": (".weight_packed", ".weight_shape", ".weight_zero_point"),
    "FP8": (".weight_scale_inv", ".weight_scale", ".input_scale", ".output_scale"),
    "EETQ": (".weight_scales",),
    "HQQ": (".W_q",),
    "AQLM": (".codebooks", ".codes"),
    "Quanto": (".weight._data", ".weight._scale"),
    "MXFP4": (".weight_blocks", "_proj_blocks"),
    "MLX": (".scales",),
}
_SCALED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
_LORA = (".lora_A", ".lora_B", ".lora_embedding", ".base_layer.")
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")


def check_plain_weights(dtypes: Mapping[str, str], where: str) -> None:
    """Raises CheckpointError where tensors are quantised, of an adapter, or under a wrapper.

    `dtypes`: name to safetensors' name of the dtype; `where` names the files.
    """
    method, name = _quantisation(dtypes)
    if method is not None:
        raise CheckpointError(
            f"{where} holds weights quantised by {method} ({name}), which are not served; give "
            "the model that was quantised, in float32, bfloat16 or float16, or a GGUF file of it"
        )
    lora = next((name for name in dtypes if any(part in name for part in _LORA)), None)
    if lora is not None:
        raise CheckpointError(
            f"{where} holds a LoRA adapter that was not merged ({lora}); merge it into its base "
            "(merge_and_unload in peft), save that with save_pretrained and give it"
        )
    for prefix in _WRAPPERS:
        if dtypes and all(name.startswith(prefix) for name in dtypes):
            raise CheckpointError(
                f"{where} names every tensor under {prefix!r}, as a wrapped model saves them; "
                "save the model inside the wrapper with save_pretrained"
            )


def _quantisation(dtypes: Mapping[str, str]) -> tuple[str | None, str]:
    """The method and the tensor that gives it away."""
    for method, endings in _QUANTISED.items():
        found = next((name for name in dtypes if name.endswith(endings)), None)
        if found is not None:
            return _refined(method, dtypes), found
    scaled = next((name for name, kind in dtypes.items() if kind in _SCALED_DTYPES), None)
    return (None, "") if scaled is None else (f"FP8 ({dtypes[scaled]})", scaled)


def _refined(method: str, dtypes: Mapping[str, str]) -> str:
    """Scales of a row stand for FP8 as for whole numbers: the matrices' dtype says which."""
    if method == "FP8" and "I8" in dtypes.values():
        return "compressed-tensors"
    return method
