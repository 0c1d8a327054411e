# SPDX-License-Identifier: Apache-2.0
"""Model configurations: frozen dataclasses, a pattern string saying which mixer stands in which layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from .pattern import resolve


@dataclasses.dataclass(frozen=True)
class M2RNNConfig:
    """Arguments of `layers.M2RNN` (letter M); None means `num_heads`."""

    num_heads: int = 84
    key_dim: int = 64
    value_dim: int = 16
    num_q_heads: int = 1
    num_k_heads: int = 1
    num_v_heads: int | None = None
    num_f_heads: int | None = None
    num_g_heads: int | None = None
    num_w_heads: int | None = None
    conv_size: int | None = 4
    state_weight_init: str = "identity"
    state_grad_clip: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Arguments of `layers.GatedDeltaNet` (letter G)."""

    num_heads: int = 2
    key_dim: int = 256
    value_dim: int = 512
    use_gate: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Arguments of `layers.Attention` (letter A). Hybrids use no positions; the transformer baseline RoPE, θ 10,000."""

    num_heads: int = 16
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Arguments of `layers.Mamba2` (letter 2)."""

    num_heads: int = 64
    state_size: int = 216
    intermediate_size: int | None = 1216
    num_groups: int = 1
    conv_size: int = 4


@dataclasses.dataclass(frozen=True)
class VectorRNNConfig:
    """Arguments of `layers.VectorRNN` (letter R)."""

    num_heads: int = 85
    head_dim: int = 16
    conv_size: int = 4
    state_grad_clip: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class GRUConfig:
    """Arguments of `layers.GRU` (letter U)."""

    num_heads: int = 85
    head_dim: int = 16
    conv_size: int = 4


MixerConfig = M2RNNConfig | GatedDeltaNetConfig | AttentionConfig | Mamba2Config | VectorRNNConfig | GRUConfig


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Arguments of `layers.MoE`, and the weight of its auxiliary loss (summed over layers) in the training loss."""

    num_experts: int = 128
    top_k: int = 8
    expert_size: int = 256
    shared_size: int = 1024
    normalize_top_k: bool = True
    aux_loss_weight: float = 1e-3


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A language model.

    Attributes:
        vocab_size: 256 for bytes.
        hidden_size: width of the residual stream.
        pattern: one letter a layer, e.g. "MMMMAMMM" (see `models.MIXERS`); or a rule with a comma or a star, such as
            "24G, A every 8 from 4, M at 0" or "24*G" (see `pattern.expand`), which is expanded at once.
        mlp_size: width of each half of the SwiGLU; not used (0) with `moe`.
        moe: a mixture of experts instead of the SwiGLU, in every layer.
        m2rnn, attention, gated_deltanet, mamba2, vector_rnn, gru: of every layer with that letter.
        norm_eps: of all RMSNorms.
        sized: letters of kinds that stood in the model before `swap_layer` took the last one out, if their sizes above
            are the defaults, which else stand for nobody's choice. Says nothing about the model as it is, so configs
            that differ in it are equal.
    """

    vocab_size: int
    hidden_size: int
    pattern: str
    mlp_size: int = 0
    m2rnn: M2RNNConfig = M2RNNConfig()
    attention: AttentionConfig = AttentionConfig()
    norm_eps: float = 1e-5
    gated_deltanet: GatedDeltaNetConfig = GatedDeltaNetConfig()
    mamba2: Mamba2Config = Mamba2Config()
    vector_rnn: VectorRNNConfig = VectorRNNConfig()
    gru: GRUConfig = GRUConfig()
    moe: MoEConfig | None = None
    sized: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        needed = ("vocab_size", "hidden_size") + (("mlp_size",) if self.moe is None else ())
        for name in needed:
            if getattr(self, name) < 1:
                raise ValueError(f"LMConfig: `{name}` must be at least 1, got {getattr(self, name)}")
        if not self.pattern:
            raise ValueError('LMConfig: `pattern` must name at least one layer, got ""; for example "MMMA"')
        object.__setattr__(self, "pattern", resolve(self.pattern))  # the dataclass is frozen

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, for JSON."""
        values = dataclasses.asdict(self)
        if not self.sized:  # a file that older versions read too
            del values["sized"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LMConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: naming the keys that are unknown or missing.
        """
        nested = dict(
            m2rnn=M2RNNConfig,
            attention=AttentionConfig,
            gated_deltanet=GatedDeltaNetConfig,
            mamba2=Mamba2Config,
            vector_rnn=VectorRNNConfig,
            gru=GRUConfig,
            moe=MoEConfig,
        )
        values = dict(values) if isinstance(values, dict) else values
        for name, kind in nested.items():
            if isinstance(values, dict) and name in values and not (name == "moe" and values[name] is None):
                values[name] = _build(kind, values[name], f"LMConfig.{name}")
        return _build(cls, values, "LMConfig")


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping of fields, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown field(s) {unknown}; known are {sorted(fields)}")
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise ValueError(f"{where}: missing field(s) {missing}")
    return kind(**values)
