"""Names of SDXL's tensors in the original layout (one file, as Stability published it) for those of diffusers' folders.

A table pairs module paths of both; what comes after a module's path (`weight`, `transformer_blocks.0...`) is the same.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from shared.errors import DataError
from shared.tensor_file import LazyTensor, joined, reshaped, transposed

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",  # as older folders have them
}  # fmt: skip
BIG_G = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
BIG_G_OUTSIDE = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Module paths of a UNet of these settings: diffusers' to original."""
    depth, downs, ups = int(config["layers_per_block"]), config["down_block_types"], config["up_block_types"]
    table = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
        **_resnet("mid_block.resnets.0", "middle_block.0", _RESNET),
        **_resnet("mid_block.resnets.1", "middle_block.2", _RESNET),
    }
    for block in range(len(downs)):
        for layer in range(depth):
            place = f"input_blocks.{1 + block * (depth + 1) + layer}"
            table |= _resnet(f"down_blocks.{block}.resnets.{layer}", f"{place}.0", _RESNET)
            table[f"down_blocks.{block}.attentions.{layer}"] = f"{place}.1"
        table[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{(block + 1) * (depth + 1)}.0.op"
    for block, kind in enumerate(ups):
        for layer in range(depth + 1):
            place = f"output_blocks.{block * (depth + 1) + layer}"
            table |= _resnet(f"up_blocks.{block}.resnets.{layer}", f"{place}.0", _RESNET)
            table[f"up_blocks.{block}.attentions.{layer}"] = f"{place}.1"
        last = f"output_blocks.{block * (depth + 1) + depth}"
        table[f"up_blocks.{block}.upsamplers.0.conv"] = f"{last}.{2 if 'CrossAttn' in kind else 1}.conv"
    return table


def vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Module paths of an AutoencoderKL of these settings: diffusers' to original."""
    depth, levels = int(config.get("layers_per_block", 1)), len(config["block_out_channels"])
    table = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for index in (0, 1):
            table |= _resnet(f"{half}.mid_block.resnets.{index}", f"{half}.mid.block_{index + 1}", _VAE_RESNET)
        table |= _resnet(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
    for level in range(levels):
        for layer in range(depth + 1):
            down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
            up_there = f"decoder.up.{levels - 1 - level}"
            table |= _resnet(f"{down}.resnets.{layer}", f"encoder.down.{level}.block.{layer}", _VAE_RESNET)
            table |= _resnet(f"{up}.resnets.{layer}", f"{up_there}.block.{layer}", _VAE_RESNET)
        table[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"{up}.upsamplers.0.conv"] = f"{up_there}.upsample.conv"
    return table


def original_name(name: str, modules: Mapping[str, str]) -> str:
    """The original name of a tensor (or a module); raises DataError where the table does not know it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = modules.get(".".join(parts[:end]))
        if module is not None:
            return ".".join([module, *parts[end:]])
    raise DataError(f"{name} is no layer of SDXL's: the original layout has no name for it")


def original_unet(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """A UNet's tensors under their original names."""
    modules = unet_modules(config)
    return _unique((UNET_PREFIX + original_name(name, modules), tensor) for name, tensor in tensors.items())


def original_vae(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """A VAE's tensors under their original names; its attention is made of 1 x 1 convolutions there."""
    modules = vae_modules(config)

    def shaped(name: str, tensor: LazyTensor) -> LazyTensor:
        is_matrix = ".attentions." in name and len(tensor.shape) == 2
        return reshaped(tensor, *tensor.shape, 1, 1) if is_matrix else tensor

    return _unique((VAE_PREFIX + original_name(name, modules), shaped(name, t)) for name, t in tensors.items())


def original_clip_l(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The first text encoder's tensors under their original names: Hugging Face's, behind a prefix."""
    prefix = "conditioner.embedders.0.transformer.text_model."
    kept = ((name.removeprefix("text_model."), tensor) for name, tensor in tensors.items())
    return _unique((prefix + name, tensor) for name, tensor in kept if not name.endswith("position_ids"))


def original_big_g(tensors: Mapping[str, LazyTensor], embedder: int) -> dict[str, LazyTensor]:
    """The second text encoder's tensors in OpenCLIP's form: q, k and v in one matrix, the projection turned."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return _unique((f"conditioner.embedders.{embedder}.model.{name}", t) for name, t in _open_clip(plain))


def _open_clip(tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[str, LazyTensor]]:
    for name, tensor in tensors.items():
        if name == "text_projection.weight":
            yield "text_projection", transposed(tensor)
        elif name in BIG_G_OUTSIDE:
            yield BIG_G_OUTSIDE[name], tensor
        elif name.endswith("position_ids") or ".k_proj." in name or ".v_proj." in name:
            continue
        else:
            layer, _, rest = name.removeprefix("encoder.layers.").partition(".")
            place = f"transformer.resblocks.{layer}"
            if ".q_proj." in name:
                parts = [tensors[name.replace(".q_proj.", f".{which}_proj.")] for which in "qkv"]
                yield f"{place}.attn.in_proj_{name.rpartition('.')[2]}", joined(parts)
            else:
                yield f"{place}.{original_name(rest, BIG_G)}", tensor


def _resnet(module: str, there: str, inner: Mapping[str, str]) -> dict[str, str]:
    return {f"{module}.{own}": f"{there}.{other}" for own, other in inner.items()}


def _unique(pairs: Iterator[tuple[str, LazyTensor]]) -> dict[str, LazyTensor]:
    named: dict[str, LazyTensor] = {}
    for name, tensor in pairs:
        if name in named:
            raise DataError(f"two tensors would be called {name} in the original layout")
        named[name] = tensor
    return named
