# SPDX-License-Identifier: Apache-2.0
"""Model configurations: frozen dataclasses, a pattern string saying which mixer stands in which layer."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class M2RNNConfig:
    """Arguments of `layers.M2RNN`; None means `num_heads`."""

    num_heads: int = 84
    key_dim: int = 64
    value_dim: int = 16
    num_q_heads: int = 1
    num_k_heads: int = 1
    num_v_heads: int | None = None
    num_f_heads: int | None = None
    num_g_heads: int | None = None
    num_w_heads: int | None = None
    conv_size: int = 4
    state_grad_clip: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Arguments of `layers.Attention`. Hybrids use no positions; the transformer baseline uses RoPE, theta 10,000."""

    num_heads: int = 16
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A language model.

    Attributes:
        vocab_size: 256 for bytes.
        hidden_size: width of the residual stream.
        pattern: one letter a layer: M (M²RNN) or A (softmax attention), e.g. "MMMMAMMM".
        mlp_size: width of each half of the SwiGLU.
        m2rnn, attention: of every layer with that letter.
        norm_eps: of all RMSNorms.
    """

    vocab_size: int
    hidden_size: int
    pattern: str
    mlp_size: int
    m2rnn: M2RNNConfig = M2RNNConfig()
    attention: AttentionConfig = AttentionConfig()
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "mlp_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"LMConfig: `{name}` must be at least 1, got {getattr(self, name)}")
        if not self.pattern:
            raise ValueError('LMConfig: `pattern` must name at least one layer, got ""; for example "MMMA"')

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LMConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: naming the keys that are unknown or missing.
        """
        nested = {"m2rnn": M2RNNConfig, "attention": AttentionConfig}
        values = dict(values)
        for name, kind in nested.items():
            if name in values:
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
