# SPDX-License-Identifier: Apache-2.0
"""Which mixer stands in which layer, as a rule: "24G, A every 8 from 4, M before A"."""

from __future__ import annotations

import re


def _every(layers: int, period: int, first: int) -> range:
    if period < 1:
        raise ValueError(f'"every {period}": the period must be at least 1')
    return range(first, max(layers, first + 1), period)  # the first one always, so that one too far is noticed


def _before(letters: list[str], new: str, old: str) -> list[int]:
    found = [i - 1 for i in range(1, len(letters)) if letters[i] == old]
    if not found:
        raise ValueError(f'"{new} before {old}" changes nothing: no layer {old} comes after another')
    return found


_RULES = (
    (re.compile(r"(\w) every (\d+) from (\d+)"), lambda n, s, m: _every(n, int(m[2]), int(m[3]))),
    (re.compile(r"(\w) at ([\d ]+)"), lambda n, s, m: [int(i) for i in m[2].split()]),
    (re.compile(r"(\w) before (\w)"), lambda n, s, m: _before(s, m[1], m[2])),
)


def expand(rule: str) -> str:
    """The pattern string, one letter a layer, that a rule stands for.

    A rule is a base "<layers><letter>" and any number of changes to it, applied in order and separated by commas:
    "A every 8 from 4", "M at 0" (or "M at 0 7 12"), "M before A". A plain pattern string is returned as it is.

    Raises:
        ValueError: a part that is not understood or changes nothing, or a layer that does not exist.
    """
    base, *changes = (part.strip() for part in rule.split(","))
    counted = re.fullmatch(r"(\d+)([A-Za-z])", base) or re.fullmatch(r"(\d+)\*(\w)", base)
    if counted is None and changes:
        raise ValueError(f'pattern rule {rule!r}: must start with layers and a letter such as "24G", got {base!r}')
    if counted is None and not re.fullmatch(r"\w+", base):
        raise ValueError(
            f'pattern {rule!r} is neither layers and a letter, such as "24G", nor one letter a layer, such as "GGMA"'
        )
    if counted is not None and int(counted[1]) == 0:
        raise ValueError(f"pattern rule {rule!r}: {base!r} names 0 layers, need at least 1")
    letters = list(base if counted is None else counted[2] * int(counted[1]))
    for change in changes:
        found = [(m, layers) for form, layers in _RULES if (m := form.fullmatch(change))]
        if not found:
            raise ValueError(
                f'pattern rule {rule!r}: {change!r} is not understood; write "A every 8 from 4", "M at 0" or '
                '"M before A"'
            )
        match, layers = found[0]
        try:
            chosen = layers(len(letters), letters, match)
        except ValueError as error:
            raise ValueError(f"pattern rule {rule!r}: {error}") from None
        for i in chosen:
            if i >= len(letters):
                raise ValueError(f"pattern rule {rule!r}: there is no layer {i}, the model has {len(letters)} layers")
            letters[i] = match[1]
    return "".join(letters)


def resolve(pattern: str) -> str:
    """What `LMConfig` makes of its pattern: a rule is expanded, and one letter a layer stays as it is.

    A rule is known by its comma or its star. A count alone is not one, since digits can be letters: "2A" is Mamba-2,
    then attention; two layers of attention are "2*A".

    Raises:
        ValueError: see `expand`; or a count alone that was surely meant as a rule.
    """
    if "," in pattern or "*" in pattern:
        return expand(pattern)
    counted = re.fullmatch(r"(\d+)([A-Za-z])", pattern)
    if counted and set(counted[1]) != {"2"}:  # the only digit that is a mixer
        raise ValueError(
            f'LMConfig: pattern "{pattern}" has no comma or star and so one letter a layer; write '
            f'"{counted[1]}*{counted[2]}" for {counted[1]} layers'
        )
    return pattern
