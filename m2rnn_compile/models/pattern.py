# SPDX-License-Identifier: Apache-2.0
"""Which mixer stands in which layer, as a rule: "24G, A every 8 from 4, M before A"."""

from __future__ import annotations

import re


def _every(layers: int, period: int, first: int) -> range:
    if period < 1:
        raise ValueError(f'"every {period}": the period must be at least 1')
    return range(first, max(layers, first + 1), period)  # the first one always, so that one too far is noticed


_RULES = (
    (re.compile(r"(\w) every (\d+) from (\d+)"), lambda n, s, m: _every(n, int(m[2]), int(m[3]))),
    (re.compile(r"(\w) at ([\d ]+)"), lambda n, s, m: [int(i) for i in m[2].split()]),
    (re.compile(r"(\w) before (\w)"), lambda n, s, m: [i - 1 for i in range(1, n) if s[i] == m[2]]),
)


def expand(rule: str) -> str:
    """The pattern string, one letter a layer, that a rule stands for.

    A rule is a base "<layers><letter>" and any number of changes to it, applied in order and separated by commas:
    "A every 8 from 4", "M at 0" (or "M at 0 7 12"), "M before A". A plain pattern string is returned as it is.

    Raises:
        ValueError: a part that is not understood, or a layer that does not exist.
    """
    base, *changes = (part.strip() for part in rule.split(","))
    counted = re.fullmatch(r"(\d+)([A-Za-z])", base) or re.fullmatch(r"(\d+)\*(\w)", base)
    if counted is None and changes:
        raise ValueError(f'pattern rule {rule!r}: must start with layers and a letter such as "24G", got {base!r}')
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
