# SPDX-License-Identifier: Apache-2.0
"""Released checkpoints: to and from the layout of lm-engine, the library that the paper's models were trained with.

Parameter names are the same here and there; three tensors order their rows differently:

- a dense MLP's ``c_fc``: here always ``[up; gate]`` halves. There halves too, or, where the block says
  ``use_interleaved_weights``, rows that alternate (gate 0, up 0, gate 1, up 1, ...);
- a mixture's ``c_fc`` (per expert): there alternating unless the block says ``use_interleaved_weights: false``. The
  shared expert has a flag of its own, ``use_interleaved_weights_for_shared_experts``, and is in halves without it;
- attention's ``c_attn``: here q of all heads, then k, then v. There key/value head by key/value head: its queries, its
  key, its value.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import CheckpointError
from .config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    GRUConfig,
    LMConfig,
    M2RNNConfig,
    Mamba2Config,
    MoEConfig,
    VectorRNNConfig,
)
from .lm import HybridLM
from .weights import CONFIG, MODEL_TYPE, WeightFiles, load_weights, read_config, save_weights, write_config

# Ours -> theirs, by letter; what has no counterpart here must have the value in _FIXED (written too) or _DEFAULT, the
# number of heads (_SAME), or say nothing about what a trained model computes (_FREE). Other options are not known.
_MIXER_TYPES = {"M": "m2rnn", "G": "gated_deltanet", "A": "softmax_attention", "2": "mamba2", "R": "rnn", "U": "gru"}
_FIELDS: dict[str, dict[str, str]] = {
    "M": dict(
        key_dim="k_head_dim",
        value_dim="v_head_dim",
        num_q_heads="num_q_heads",
        num_k_heads="num_k_heads",
        num_v_heads="num_v_heads",
        num_f_heads="num_f_heads",
        num_g_heads="num_g_heads",
        num_w_heads="num_weight_heads",
        conv_size="kernel_size",
        state_grad_clip="gradient_clipping",
    ),
    "G": dict(
        num_heads="num_v_heads",
        key_dim="k_head_dim",
        value_dim="v_head_dim",
        use_gate="use_gate",
        allow_neg_eigval="allow_neg_eigval",
        conv_size="kernel_size",
    ),
    "A": dict(num_heads="num_attention_heads", num_kv_heads="num_key_value_heads", head_dim="head_dim"),
    "2": dict(
        num_heads="num_heads",
        state_size="state_size",
        intermediate_size="intermediate_size",
        num_groups="num_groups",
        conv_size="conv_kernel_size",
    ),
    "R": dict(
        num_heads="num_weight_heads",
        head_dim="state_head_dim",
        conv_size="kernel_size",
        state_grad_clip="gradient_clipping",
    ),
    "U": dict(num_heads="num_weight_heads", head_dim="state_head_dim", conv_size="kernel_size"),
}
_FIXED: dict[str, dict[str, Any]] = {
    "M": dict(use_residual=True, activation_function="silu", normalization_function="rmsnorm", add_bias=False),
    "G": dict(attention_multiplier=None),
    "A": dict(
        add_bias=False,
        attention_gate=False,
        exclusive_self_attention=False,
        sliding_window=None,
        attention_multiplier=None,
        softmax_dropout=0,
        dropout=0,
    ),
    "2": dict(activation_function="silu", add_bias=False, use_conv_bias=True, normalization_function="rmsnorm"),
    "R": dict(activation_function="silu", add_bias=False, normalization_function="rmsnorm"),
    "U": dict(activation_function="silu", add_bias=False, normalization_function="rmsnorm", gradient_clipping=None),
}
_DEFAULT: dict[str, dict[str, Any]] = {
    "A": dict(attention_multiplier_method="1 / sqrt(head_dim)"),
    "2": dict(time_step_limit=[0, float("inf")]),
}
_SAME: dict[str, tuple[str, ...]] = {
    "G": ("num_k_heads",),
    "R": ("num_input_heads",),
    "U": (
        *(f"num_{kind}_heads" for kind in ("input", "forget_input", "reset_input")),
        *(f"num_{kind}_heads" for kind in ("forget_weight", "reset_weight")),
    ),
}
_DECAY_STARTS = ("A_init_min", "A_init_max", "dt_init_min", "dt_init_max", "dt_init_floor")
_FREE = {"M": _DECAY_STARTS, "G": _DECAY_STARTS, "2": (*_DECAY_STARTS, "chunk_size")}
_MLP_FIXED: dict[str, dict[str, Any]] = {
    "MLP": dict(activation_function="swiglu", add_bias=False, dropout=0),
    "MoE": dict(activation_function="swiglu", add_bias=False, dropout=0, shared_expert_gating=False),
}
_MLP_FIELDS = {
    "MLP": {"mlp_type", "intermediate_size", "use_interleaved_weights"},
    "MoE": {"num_experts", "num_experts_per_tok", "shared_intermediate_size", "normalized_topk"}
    | {"mlp_type", "intermediate_size", "use_interleaved_weights", "use_interleaved_weights_for_shared_experts"},
}
_OF_MODEL: dict[str, Any] = dict(
    model_type="gpt_base",
    normalization_function="rmsnorm",
    embedding_dropout=0,
    m_emb=(None, 1),
    m_width=(None, 1),
    m_residual=(None, 1),
    tie_word_embeddings=True,
    position_embedding_type=("rope", "nope"),
)
_KINDS: dict[str, Any] = {
    "M": ("m2rnn", M2RNNConfig),
    "G": ("gated_deltanet", GatedDeltaNetConfig),
    "A": ("attention", AttentionConfig),
    "2": ("mamba2", Mamba2Config),
    "R": ("vector_rnn", VectorRNNConfig),
    "U": ("gru", GRUConfig),
}


class RowOrders(NamedTuple):
    """Whether rows of up and gate alternate, in each of the three kinds of ``c_fc``."""

    dense: bool = False
    experts: bool = True
    shared: bool = False


# -- models ------------------------------------------------------------------------------------------------------------


def load_released(
    folder: str | Path,
    *,
    orders: RowOrders | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> HybridLM:
    """Build the model of a released checkpoint folder (config.json and safetensors) and load its weights.

    Args:
        orders: override what config.json says or leaves unsaid about MLP rows (checkpoints of lm-engine from June 2026
            on alternate everywhere and no longer say so: ``RowOrders(True, True, True)``).

    Raises:
        CheckpointError: the config asks for what this library does not have, or weights are missing, unexpected or
            mis-shaped.
    """
    record = read_config(folder)
    where = str(Path(folder) / CONFIG)
    if record.get("model_type") == MODEL_TYPE:
        raise CheckpointError(f"{where!r} was written by this library; read it by models.weights.load_model")
    config = config_from_released(record, where=where)
    try:
        model = HybridLM(config, device=device, dtype=dtype)
    except (TypeError, ValueError) as error:  # sizes that no layer can have
        raise CheckpointError(f"{where!r}: {error}") from error
    files = WeightFiles(folder)
    if "lm_head.weight" in files.shapes:
        raise CheckpointError(
            f"weights at {str(folder)!r} have a separate lm_head.weight, but the models here tie the head to the "
            "embedding: not supported"
        )
    told = orders or orders_of(record)
    load_weights(
        model,
        files,
        convert=lambda name, x: _to_ours(name, x, config, told),
        way_out="check that config.json belongs to these weights",
    )
    return model.eval()


def save_released(
    model: HybridLM, folder: str | Path, *, orders: RowOrders | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write `model` in the released layout: config.json and (sharded) safetensors.

    Args:
        orders: of MLP rows; written into config.json.
    """
    told = orders or RowOrders()
    tensors = ((n, _to_theirs(n, p.detach(), model.config, told)) for n, p in model.named_parameters())
    save_weights(tensors, folder, max_shard_bytes=max_shard_bytes)
    write_config(folder, config_to_released(model.config, told))


# -- configs -----------------------------------------------------------------------------------------------------------


def config_from_released(record: dict[str, Any], *, where: str = "config.json") -> LMConfig:
    """Our config of a released ``config.json``.

    Raises:
        CheckpointError: fields are missing, or ask for what this library does not have.
    """
    try:
        mixers, mlps = record["sequence_mixer_blocks"], record["mlp_blocks"]
        letters = {theirs: ours for ours, theirs in _MIXER_TYPES.items()}
        _require(record, _OF_MODEL, where)
        position = record["position_embedding_type"]
        if record.get("num_layers", len(mixers)) != len(mixers):
            raise CheckpointError(
                f"{where}: `num_layers` is {record['num_layers']!r}, but there are {len(mixers)} sequence_mixer_blocks"
            )
        pattern, fields = "", dict[str, Any]()
        for i, block in enumerate(mixers):
            here = f"{where}, sequence_mixer_blocks[{i}]"
            name = block.get("sequence_mixer_type")
            _require(dict(sequence_mixer_type=name), dict(sequence_mixer_type=tuple(letters)), here)
            letter = letters[name]
            pattern += letter
            fixed = _fixed(letter, block.get("kernel_size", 0)) | _DEFAULT.get(letter, {})
            if letter in _SAME:
                fixed |= dict.fromkeys(_SAME[letter], block[_FIELDS[letter]["num_heads"]])
            _require(block, fixed, here)
            known = {"sequence_mixer_type", *_FIELDS[letter].values(), *fixed, *_FREE.get(letter, ())}
            _refuse_unknown(block, known, name, here)
            field, kind = _KINDS[letter]
            built = _mixer_from_released(letter, block, kind)
            if letter == "A" and position == "rope":
                dim = built.head_dim or record["hidden_size"] // max(1, built.num_heads)
                _require(record, dict(rope_scaling=None, rope_dim=(None, dim)), where)
                built = dataclasses.replace(built, rope_theta=float(record["rope_theta"]))
            if fields.setdefault(field, built) != built:
                raise CheckpointError(
                    f"{here}: differs from an earlier {name} block; here all layers of one kind are alike"
                )
        first = mlps[0]
        if len(mlps) != len(pattern) or any(block != first for block in mlps):
            raise CheckpointError(f"{where}: mlp_blocks must be alike, one a layer; here all layers share one")
        here, name = f"{where}, mlp_blocks", first["mlp_type"]
        _require(dict(mlp_type=name), dict(mlp_type=tuple(_MLP_FIXED)), here)
        _require(first, _MLP_FIXED[name], here)
        _refuse_unknown(first, _MLP_FIELDS[name] | set(_MLP_FIXED[name]), name, here)
        if name == "MLP":
            fields["mlp_size"] = first["intermediate_size"]
        else:
            fields["moe"] = MoEConfig(
                num_experts=first["num_experts"],
                top_k=first["num_experts_per_tok"],
                expert_size=first["intermediate_size"],
                shared_size=first.get("shared_intermediate_size") or 0,
                normalize_top_k=first.get("normalized_topk", True),
                aux_loss_weight=record.get("router_aux_loss_coef", 1e-3),
            )
        return LMConfig(
            vocab_size=record["vocab_size"],
            hidden_size=record["hidden_size"],
            pattern=pattern,
            norm_eps=record.get("layer_norm_epsilon", 1e-5),
            **fields,
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{where} is not a config of lm-engine that can be read here: {error!r}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: {error}") from error


def _mixer_from_released(letter: str, block: dict[str, Any], kind: Any) -> Any:
    options = {ours: block[theirs] for ours, theirs in _FIELDS[letter].items() if theirs in block}
    if letter == "M":
        heads = ("num_q_heads", "num_k_heads", "num_v_heads", "num_f_heads", "num_w_heads")
        options["num_heads"] = max(options[name] for name in heads)
    for name in ("num_v_heads", "num_f_heads", "num_g_heads", "num_w_heads", "num_kv_heads"):
        if name in options and options[name] == options["num_heads"]:
            options[name] = None  # our way to say so
    return kind(**options)


def config_to_released(config: LMConfig, orders: RowOrders) -> dict[str, Any]:
    """A ``config.json`` as lm-engine writes it (what it needs to build the model)."""
    rope = config.attention.rope_theta if "A" in config.pattern else None
    blocks = []
    for letter in config.pattern:
        options = dataclasses.asdict(getattr(config, _KINDS[letter][0]))
        heads = options["num_heads"]
        block: dict[str, Any] = dict(sequence_mixer_type=_MIXER_TYPES[letter])
        block |= _fixed(letter, options.get("conv_size", 0))
        for ours, theirs in _FIELDS[letter].items():
            value = options[ours]
            block[theirs] = heads if value is None and "heads" in ours else value
        block |= dict.fromkeys(_SAME.get(letter, ()), heads)
        blocks.append(block)
    mlp: dict[str, Any] = dict(activation_function="swiglu", add_bias=False, dropout=0)
    if config.moe is None:
        mlp |= dict(mlp_type="MLP", intermediate_size=config.mlp_size, use_interleaved_weights=orders.dense)
    else:
        mlp |= dict(
            mlp_type="MoE",
            num_experts=config.moe.num_experts,
            num_experts_per_tok=config.moe.top_k,
            intermediate_size=config.moe.expert_size,
            shared_intermediate_size=config.moe.shared_size or None,
            shared_expert_gating=False,
            normalized_topk=config.moe.normalize_top_k,
            use_interleaved_weights=orders.experts,
            use_interleaved_weights_for_shared_experts=orders.shared,
        )
    return dict(
        model_type="gpt_base",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        layer_norm_epsilon=config.norm_eps,
        normalization_function="rmsnorm",
        position_embedding_type="nope" if rope is None else "rope",
        rope_theta=10_000 if rope is None else rope,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.001 if config.moe is None else config.moe.aux_loss_weight,
        sequence_mixer_blocks=blocks,
        mlp_blocks=[mlp] * config.num_layers,
    )


def orders_of(record: dict[str, Any]) -> RowOrders:
    """Row orders that a released config says its weights have."""
    block = record["mlp_blocks"][0]
    told = block.get("use_interleaved_weights")
    return RowOrders(
        dense=bool(told),
        experts=True if told is None else bool(told),
        shared=bool(block.get("use_interleaved_weights_for_shared_experts")),
    )


def _fixed(letter: str, conv_size: int | None) -> dict[str, Any]:
    """An M²RNN block without a conv has no activation after it either."""
    return _FIXED[letter] | (dict(activation_function=None) if letter == "M" and conv_size is None else {})


def _require(block: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Refuse options with another value than the expected one, or than all of a tuple; absent ones are fine."""
    for name, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if name in block and block[name] not in allowed:
            raise CheckpointError(
                f"{where}: `{name}` is {block[name]!r}, and this library has {' or '.join(map(repr, allowed))} only"
            )


def _refuse_unknown(block: dict[str, Any], known: set[str], kind: str, where: str) -> None:
    """Refuse options that ask for something (are not null) and that nothing here would heed."""
    for name, value in block.items():
        if name not in known and value is not None:
            raise CheckpointError(
                f"{where}: `{name}` is {value!r}, which this library does not know; of {kind} blocks it knows "
                f"{sorted(known)}"
            )


# -- tensors -----------------------------------------------------------------------------------------------------------


def _alternates(name: str, config: LMConfig, orders: RowOrders) -> bool:
    """Whether this tensor of theirs has alternating rows of gate and up."""
    if name.endswith(".mlp_block.c_fc.weight"):
        return orders.dense if config.moe is None else orders.experts
    return name.endswith(".mlp_block.c_fc_shared.weight") and orders.shared


def _attention_rows(config: LMConfig) -> Tensor:
    """Row of our c_attn for each row of theirs."""
    a = config.attention
    heads, kv = a.num_heads, a.num_kv_heads or a.num_heads
    dim = a.head_dim or config.hidden_size // heads
    rows = torch.arange((heads + 2 * kv) * dim)
    q, k, v = rows.split([heads * dim, kv * dim, kv * dim])
    return torch.cat([q.view(kv, -1), k.view(kv, -1), v.view(kv, -1)], 1).flatten()


def _to_ours(name: str, x: Tensor, config: LMConfig, orders: RowOrders) -> Tensor:
    if _alternates(name, config, orders):
        return torch.cat([x[..., 1::2, :], x[..., ::2, :]], -2)
    if name.endswith(".c_attn.weight"):
        return torch.empty_like(x).index_copy_(0, _attention_rows(config), x)
    return x


def _to_theirs(name: str, x: Tensor, config: LMConfig, orders: RowOrders) -> Tensor:
    if _alternates(name, config, orders):
        up, gate = x.chunk(2, -2)
        return torch.stack([gate, up], -2).flatten(-3, -2)
    if name.endswith(".c_attn.weight"):
        return x[_attention_rows(config).to(x.device)]
    return x
