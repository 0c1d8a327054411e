# SPDX-License-Identifier: Apache-2.0
"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

from torch import nn

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: decayed and not.

    Not decayed are biases, norm weights, and what a module names in its class attribute ``no_weight_decay`` (A_log,
    dt_bias and D here). The state weight W and the conv weight *are* decayed. The rule goes by module and name, not by
    an attribute of the parameter, which deepcopy and meta-device initialisation lose. Tied parameters count once;
    frozen ones are left out.

    Returns:
        Groups ``{"name", "params", "param_names", "weight_decay"}``, ready for any torch optimizer.
    """
    groups: dict[bool, dict[str, Any]] = {
        True: dict(name="decay", params=[], param_names=[], weight_decay=weight_decay),
        False: dict(name="no_decay", params=[], param_names=[], weight_decay=0.0),
    }
    owners = dict(model.named_modules())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        owner_name, _, local = name.rpartition(".")
        owner = owners[owner_name]
        exempt = local == "bias" or isinstance(owner, _NORMS) or local in getattr(owner, "no_weight_decay", ())
        groups[not exempt]["params"].append(p)
        groups[not exempt]["param_names"].append(name)
    return [g for g in groups.values() if g["params"]]
