# SPDX-License-Identifier: Apache-2.0
"""Which of an optimizer's groups the parameters of a swapped layer join, and in which place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import param_groups

_BY_NAME = {"decay": True, "no_decay": False}  # what `layers.param_groups` calls its groups, at any weight decay


class Entry(NamedTuple):
    """A new parameter: `decayed` is what `layers.param_groups` says."""

    name: str
    param: Tensor
    decayed: bool


class Group(NamedTuple):
    """One of an optimizer's groups; `title` is for people."""

    optimizer: torch.optim.Optimizer
    options: dict[str, Any]
    title: str

    def holds(self, wanted: set[int]) -> bool:
        return any(id(p) in wanted for p in self.options["params"])

    @property
    def decays(self) -> bool:
        said = _BY_NAME.get(self.options.get("name", ""))
        return self.options.get("weight_decay", 0) > 0 if said is None else said

    def takes(self, new: Entry) -> bool:
        """Muon takes weight matrices only."""
        matrix = new.param.dim() == 2 and new.decayed
        return matrix or not isinstance(self.optimizer, getattr(torch.optim, "Muon", ()))


class Exchange:
    """The parameters of `new` for those of `old` in `optimizers`; made before the model changes, carried out after.

    Raises:
        ValueError: no group, or not one alone, is the place of a new parameter.
    """

    def __init__(
        self, model: nn.Module, block: nn.Module, old: nn.Module, new: nn.Module, optimizers: Any | Sequence[Any] | None
    ) -> None:
        optimizers = [optimizers] if hasattr(optimizers, "param_groups") else list(optimizers or ())
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "swap_layer: LBFGS keeps one vector of all parameters, which no layer can leave; swap without "
                    "`optimizer`, and make a new LBFGS of the model"
                )
        self._model, self._old = model, list(old.parameters())
        self._groups = [
            Group(o, options, f"{i}" if len(optimizers) == 1 else f"{i} of {type(o).__name__}")
            for o in optimizers
            for i, options in enumerate(o.param_groups)
        ]
        order = {id(p): i for i, p in enumerate(model.parameters())}
        self._ordered = [_ascends(g.options["params"], order) for g in self._groups]
        self._moves = [(_place(e, self._groups, old, block), e.param) for e in _entries(new)] if self._groups else []

    def carry_out(self) -> None:
        """Once `new` is in the model. In a group that stood in the model's order the new parameters take their places;
        else they come last. Names are those that the model gives.
        """
        names, gone = {id(p): n for n, p in self._model.named_parameters()}, {id(p) for p in self._old}
        for group in self._groups:
            _keep(group.options, [i for i, p in enumerate(group.options["params"]) if id(p) not in gone])
            for p in self._old:
                group.optimizer.state.pop(p, None)
        for group, param in self._moves:
            group.options["params"].append(param)
            if "param_names" in group.options:
                group.options["param_names"].append(names[id(param)])
        order = {id(p): i for i, p in enumerate(self._model.parameters())}
        for group in (g for g, was in zip(self._groups, self._ordered, strict=True) if was):
            places = [order[id(p)] for p in group.options["params"]]
            _keep(group.options, sorted(range(len(places)), key=places.__getitem__))


def _entries(module: nn.Module) -> list[Entry]:
    return [
        Entry(name, p, group["weight_decay"] > 0)
        for group in param_groups(module, weight_decay=1.0)
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]


def _place(new: Entry, groups: list[Group], old: nn.Module, block: nn.Module) -> Group:
    """The group of those with the same say about weight decay that held the old mixer's parameters; where none did
    (attention has nothing that is not decayed), the rest of its block's; else the first."""
    decay = any(g.decays for g in groups)
    fitting = [g for g in groups if g.takes(new) and (not decay or g.decays == new.decayed)]
    if not fitting:
        kind = f" {'with' if new.decayed else 'without'} weight decay" if decay else ""
        raise ValueError(
            f"swap_layer: the optimizer has no group{kind} that takes {new.name!r} ({new.param.dim()} dimensions); "
            "make its groups with layers.param_groups, and where the model has several optimizers give all of them"
        )
    for module in (old, block):
        likes = _entries(module)
        held = [g for g in fitting if g.holds({id(e.param) for e in likes})]
        # Of several, those of parameters like the new one, in one respect more each time.
        same: tuple[Callable[[Entry], bool], ...] = (
            lambda e: e.decayed == new.decayed,
            lambda e: e.decayed == new.decayed and e.param.dim() == new.param.dim(),
            lambda e: e.name == new.name,
        )
        for like in same:
            if len(held) > 1:
                held = [g for g in held if g.holds({id(e.param) for e in likes if like(e)})] or held
        if len(held) > 1:
            raise ValueError(
                f"swap_layer: groups {', '.join(g.title for g in held)} of the optimizer hold parameters like "
                f"{new.name!r} of the layer that it replaces, so its place is not known; swap without `optimizer`, and "
                "make a new one of the model"
            )
        if held:
            return held[0]
    return fitting[0]


def _ascends(params: Iterable[Tensor], order: dict[int, int]) -> bool:
    """Whether all are of the model and stand in its order."""
    places = [order.get(id(p), -1) for p in params]
    return -1 not in places and places == sorted(places)


def _keep(options: dict[str, Any], places: list[int]) -> None:
    """Those at `places`, in this order; in place, since optimizers may hold the lists."""
    for key in ("params", "param_names"):
        if key in options:
            options[key][:] = [options[key][i] for i in places]
