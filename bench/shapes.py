# SPDX-License-Identifier: Apache-2.0
"""Problem sizes: named presets and the `B4,T512,N8,K32,V16` notation."""

from __future__ import annotations

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of one scan. `N` is the number of heads of the result; `Nq` ... `Nw` are the heads of each input."""

    name: str
    B: int
    T: int
    N: int
    K: int
    V: int
    Nq: int = 1
    Nk: int = 1
    Nv: int = 0  # 0 stands for N
    Nf: int = 0
    Nw: int = 0

    def __post_init__(self) -> None:
        for field in ("Nv", "Nf", "Nw"):
            if getattr(self, field) == 0:
                object.__setattr__(self, field, self.N)
        for field in ("B", "T", "N", "K", "V"):
            if getattr(self, field) < 1:
                raise ValueError(f"shape {self.name!r}: {field} must be at least 1, got {getattr(self, field)}")
        for field in ("Nq", "Nk", "Nv", "Nf", "Nw"):
            heads = getattr(self, field)
            if heads < 1 or self.N % heads:
                raise ValueError(f"shape {self.name!r}: {field} must divide N = {self.N}, got {heads}")

    def __str__(self) -> str:
        heads = {field: getattr(self, field) for field in ("Nq", "Nk", "Nv", "Nf", "Nw")}
        usual = {"Nq": 1, "Nk": 1, "Nv": self.N, "Nf": self.N, "Nw": self.N}
        unusual = "".join(f" {field}{heads[field]}" for field in heads if heads[field] != usual[field])
        return f"B{self.B} T{self.T} N{self.N} K{self.K} V{self.V}{unusual}"

    def make_inputs_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `m2rnn_compile.testing.make_inputs`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "name"}

    @property
    def width(self) -> int:
        """Width of the residual stream that a model of this shape has: what peers of another kind are sized by."""
        return WIDTHS.get(self.name, max(64, 64 * round(self.N * self.V / 64)))

    def with_length(self, T: int) -> Shape:
        """The same problem over T steps."""
        return dataclasses.replace(self, T=T)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


PRESETS = {
    shape.name: shape
    for shape in (
        Shape("A", B=8, T=4096, N=84, K=64, V=16),  # training, 410M
        Shape("B", B=4, T=4096, N=132, K=64, V=16),  # training, 7B
        Shape("C", B=1, T=16384, N=132, K=64, V=16),  # long context
        Shape("D", B=8, T=4096, N=16, K=64, V=64),  # wide values
        Shape("cpu", B=4, T=512, N=8, K=32, V=16),
    )
}

WIDTHS = {"A": 1024, "B": 1536, "C": 1536, "D": 1024}
GPU_PRESETS = ("A", "B", "C", "D")

# Small and awkward on purpose: odd sizes, shared heads, lengths around a chunk of 64.
CHECK_SHAPES = (
    Shape("tiny", B=2, T=7, N=2, K=3, V=5),
    Shape("odd", B=1, T=67, N=4, K=24, V=17, Nq=2, Nk=4, Nv=2, Nf=1, Nw=2),
    Shape("paper", B=2, T=130, N=6, K=64, V=16),
)

_TOKEN = re.compile(r"(Nq|Nk|Nv|Nf|Nw|B|T|N|K|V)=?(\d+)")


def parse_shape(text: str) -> Shape:
    """A preset's name, or sizes such as ``B4,T512,N8,K32,V16`` (with ``Nq2`` and so on for other head counts).

    Raises:
        ValueError: neither a preset nor a complete list of sizes.
    """
    if text in PRESETS:
        return PRESETS[text]
    sizes: dict[str, int] = {}
    for token in text.replace(" ", ",").split(","):
        match = _TOKEN.fullmatch(token)
        if match is None or match[1] in sizes:
            problem = "is given twice" if match else "is not a size"
            raise ValueError(
                f"--shape {text!r}: {token!r} {problem}; "
                f"expected a preset ({', '.join(PRESETS)}) or sizes such as B4,T512,N8,K32,V16"
            )
        sizes[match[1]] = int(match[2])
    missing = [name for name in ("B", "T", "N", "K", "V") if name not in sizes]
    if missing:
        raise ValueError(f"--shape {text!r}: {', '.join(missing)} missing; expected sizes such as B4,T512,N8,K32,V16")
    return Shape(text, **sizes)
