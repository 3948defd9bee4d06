"""A model's modules without their code: names of classes, plain settings, and which weights belong where.

:func:`~fastscore.decoder.weights.read_decoder` asks no more of a model, so that one which was loaded before can be put
together again from its weights, without importing what transformers runs it with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from fastscore.types import dtype_name

PLAIN = {kind.__name__: kind for kind in (torch.nn.Linear, torch.nn.Embedding, torch.nn.ModuleList)}
"""Classes whose code is PyTorch's own: a skeleton has them as they are."""
STATIC_ROPES = {"default", "linear", "llama3", "yarn"}
"""Ways of stretching positions whose frequencies are the same for all lengths."""


class NotPlain(Exception):
    """What a skeleton cannot hold of a model, in words."""


class Skeleton(torch.nn.Module):
    """Modules without code. ``dtype``: of the model, at its top."""

    config: Any
    dtype: torch.dtype


class PlainConfig:
    """The plain settings of a Hugging Face config that is the config of its text model too."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update(values)

    def get_text_config(self) -> PlainConfig:
        """As Hugging Face's configs have it."""
        return self


class Rotary(torch.nn.Module):
    """Rotary tables by fixed frequencies, called as transformers' modules are.

    frequency_r: of each table, by its name; r is half of what turns. scaling: of each table's cosines and sines.
    """

    def __init__(self, frequency_r: Mapping[str, torch.Tensor], scaling: Mapping[str, float]) -> None:
        super().__init__()
        self.frequency_r = dict(frequency_r)
        self.scaling = dict(scaling)

    def forward(
        self, like: torch.Tensor, position_ids_1T: torch.Tensor, name: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[1, T, 2r]`` in the dtype of ``like``."""
        # Not as a matrix product, which autocast and TF32 would round: angles of distant positions would be any angle.
        angle_1Tr = position_ids_1T[:, :, None].float() * self.frequency_r[name].float()
        angle_1Ts = torch.cat([angle_1Tr, angle_1Tr], dim=-1)
        scaling = self.scaling[name]
        return (angle_1Ts.cos() * scaling).to(like.dtype), (angle_1Ts.sin() * scaling).to(like.dtype)


def plain_values(owner: object) -> dict[str, Any]:
    """Those of its attributes that JSON holds as they are."""
    return {name: value for name, value in vars(owner).items() if _is_plain(value)}


def describe(model: torch.nn.Module, rotary_emb: torch.nn.Module) -> dict[str, Any]:
    """The skeleton of a model, as plain values, without its rotary module.

    Raises:
        NotPlain: the model has what a skeleton does not hold.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def of(module: torch.nn.Module) -> dict[str, Any]:
        kind = type(module)
        if kind is not PLAIN.get(kind.__name__, kind):
            raise NotPlain(f"a class of its own called {kind.__name__}")
        if module._buffers:
            raise NotPlain(f"buffers of {kind.__name__}")
        children = {name: child for name, child in module._modules.items() if child is not None}
        return {
            "class": kind.__name__,
            "values": {name: value for name, value in plain_values(module).items() if not name.startswith("_")},
            "parameters": {
                name: None if parameter is None else [names[id(parameter)], dtype_name(parameter.dtype)]
                for name, parameter in module._parameters.items()
            },
            "modules": {name: of(child) for name, child in children.items() if child is not rotary_emb},
        }

    return of(model)


def weight_dtypes(skeleton: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """The weights of a skeleton by name, and the dtype that the model has each in."""
    found = {named[0]: getattr(torch, named[1]) for named in skeleton["parameters"].values() if named is not None}
    for child in skeleton["modules"].values():
        found |= weight_dtypes(child)
    return found


def rebuild(
    skeleton: Mapping[str, Any], weights: Mapping[str, torch.Tensor], config: PlainConfig, rotary_emb: torch.nn.Module
) -> Skeleton:
    """The modules of a skeleton around the weights. All know ``config``; the one with the layers has ``rotary_emb``."""
    kinds: dict[str, type[torch.nn.Module]] = dict(PLAIN)
    parameters = {name: torch.nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}

    def of(about: Mapping[str, Any]) -> torch.nn.Module:
        kind = kinds.setdefault(about["class"], type(about["class"], (Skeleton,), {}))
        module = kind.__new__(kind)
        torch.nn.Module.__init__(module)
        vars(module).update(about["values"], config=config)
        for name, named in about["parameters"].items():
            module.register_parameter(name, None if named is None else parameters[named[0]])
        for name, child in about["modules"].items():
            module.add_module(name, of(child))
        if "layers" in about["modules"]:
            module.add_module("rotary_emb", rotary_emb)
        return module

    top: Any = of(skeleton)
    return top


def read_rotary(rotary_emb: Any, names: tuple[str, ...], longest: int) -> Rotary:
    """The tables of transformers' module as a module of ours, which is found to give the same to the last bit, at the
    first positions and at those before ``longest``.

    Raises:
        NotPlain: it does not.
    """
    ropes = rotary_emb.rope_type
    if not set(ropes.values() if isinstance(ropes, dict) else [ropes]) <= STATIC_ROPES:
        raise NotPlain(f"rotary positions of type {ropes}")
    prefixes = {name: f"{name}_" if name else "" for name in names}
    frequency_r = {name: getattr(rotary_emb, f"{prefix}inv_freq") for name, prefix in prefixes.items()}
    scaling = {name: float(getattr(rotary_emb, f"{prefix}attention_scaling")) for name, prefix in prefixes.items()}
    ours = Rotary(frequency_r, scaling)
    device = frequency_r[names[0]].device
    like = torch.empty(0, dtype=torch.float32, device=device)
    positions_1T = torch.tensor([[*range(64), *range(max(64, longest - 64), longest)]], device=device)
    for name in names:
        tables = rotary_emb(like, positions_1T, *([name] if name else []))
        if not all(map(torch.equal, tables, ours(like, positions_1T, name))):
            raise NotPlain("rotary tables of another kind")
    return ours


def _is_plain(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
