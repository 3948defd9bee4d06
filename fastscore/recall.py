"""Load a model again by what was noted when it was loaded before: weights and fastscore's own forward pass, without the
seconds that transformers' code for models takes to import.

What the first load found out stays true of files that have not changed: that the model is causal, that packs work with
it, and what its head does. Whether the forward pass gives what the model's own layers gave is found out every time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open

from fastscore.attention import AttentionNeeds, choose_provider
from fastscore.config import ScorerConfig
from fastscore.context import max_context
from fastscore.decoder import Decoder, OwnForward, read_decoder
from fastscore.decoder.skeleton import (
    NotPlain,
    PlainConfig,
    Rotary,
    describe,
    plain_values,
    read_rotary,
    rebuild,
    weight_dtypes,
)
from fastscore.devices import choose_device, choose_dtype
from fastscore.error_text import error_text
from fastscore.known_models import KnownModel, LoadedNote, Place, find_loaded, place_at, write_notes
from fastscore.language_model import LanguageModel
from fastscore.lm_head import LMHead, check_lm_head
from fastscore.model_source import ModelSource
from fastscore.own_forward import broken, own_forward
from fastscore.pretrained import load_tokenizer
from fastscore.probes import Truth
from fastscore.ready_model import ready_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fastscore")

HEAD_ROWS = 2
"""The first of the truth, whose logits are noted."""
LARGEST = 4 << 30
"""Bytes of weights. They are read once more to see that they are what their files hold, and a larger model takes so
long to read that what is saved does not show."""
LONGEST = 8192
"""Positions up to which rotary tables are compared, where a model has no limit."""


def recall(known: KnownModel, config: ScorerConfig) -> LanguageModel | None:
    """The model as it was loaded before, ready for scoring; or None where it must be loaded anew: in another dtype than
    before, on another kind of device, or because the forward pass does not give what it should (said in the log).

    Raises:
        InputError: the device is not there.
        torch.OutOfMemoryError: the weights do not fit on it.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    note = find_loaded(known, device, dtype)
    if note is None or place_at(known.place.folder) != known.place:
        return None
    try:
        found = _put_together(known, note, config, device, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever is wrong with notes or files, loading anew does not need them
        found = error_text(error)
    if isinstance(found, str):
        logger.info("%s is loaded anew: %s", config.model, found)
        return None
    return found


def remember(
    place: Place,
    source: ModelSource,
    config: ScorerConfig,
    hf_config: Any,
    loaded: LanguageModel,
    needs: AttentionNeeds,
    truth: Truth,
) -> None:
    """Note what was found out about a model that runs in fastscore's own forward pass, so that :func:`recall` can put
    it together from its files. All that the notes claim is compared with the model first, to the last bit; what does
    not agree, or cannot be noted, is left for the next load to find out. Raises nothing.

    Args:
        place: of the model's notes, from before its files were read.
        needs: what the model asks of attention. truth: what it gives.
    """
    try:
        if not place.settled:
            raise NotPlain("its files have only just been written")
        settings = plain_values(hf_config)
        note = _note(place.folder, settings, hf_config, loaded, needs, truth)
        known = KnownModel(place, settings, _tokenizer_kind(source, config))
    except Exception as error:  # noqa: BLE001 - of foreign models and tokenizers; the model is loaded all the same
        logger.debug("%s is loaded anew next time: %s", config.model, error_text(error))
        return
    if place_at(place.folder) == place:
        write_notes(known, loaded.device, loaded.dtype, note)


def _put_together(
    known: KnownModel, note: LoadedNote, config: ScorerConfig, device: torch.device, dtype: torch.dtype
) -> LanguageModel | str:
    """The model; or why the notes are of no use."""
    about, tensors = note.about, note.tensors
    rotary_emb = Rotary({name: tensors[f"frequency {name}"] for name in about["rotary"]}, about["rotary"])
    weights = dict(_read_weights(known.place.folder, weight_dtypes(about["model"]), device))
    head = LMHead(weights[about["head"]], None, about["logit_scale"], about["logit_softcap"], about["vocab_size"])
    model = rebuild(about["model"], weights, PlainConfig(known.config), rotary_emb)
    model.dtype = dtype
    del weights  # merging them frees the parts
    decoder = read_decoder(model, getattr(model, about["body"]))
    if isinstance(decoder, str):
        return decoder
    check_lm_head(head, tensors["truth"][:HEAD_ROWS], tensors["head logits"])
    provider = choose_provider(
        config.attention, replace(AttentionNeeds(**about["needs"]), deterministic=config.deterministic)
    )
    if reason := broken(provider):
        return f"attention by {provider.name}: {reason}"
    chosen = own_forward(decoder, device, config, provider)
    truth = Truth(tensors["truth"], about["vocab_size"], about["tolerance"])
    if reason := truth.difference(chosen.forward):
        return f"its forward pass is not what it was: {reason}"
    return ready_model(model, head, device, config, chosen)


def _note(
    folder: Path,
    settings: Mapping[str, Any],
    hf_config: Any,
    loaded: LanguageModel,
    needs: AttentionNeeds,
    truth: Truth,
) -> LoadedNote:
    from fastscore.packed_forward import body_of

    model, head = cast("PreTrainedModel", loaded.model), loaded.head
    if not isinstance(loaded.forward, OwnForward) or loaded.longest_packed is not None:
        raise NotPlain("its own layers run")
    if hf_config.get_text_config() is not hf_config:
        raise NotPlain("a language model inside another model")
    if head.bias_V is not None:
        raise NotPlain("an LM head with a bias")
    if sum(parameter.nbytes for parameter in model.parameters()) > LARGEST:
        raise NotPlain("so large that reading its weights is most of what loading takes")
    body: Any = body_of(model)
    path = next((name for name, child in model.named_children() if child is body), None)
    decoder = read_decoder(model, body)
    if path is None or not isinstance(decoder, Decoder):
        raise NotPlain("layers in an unusual place")
    if type(decoder.embedding) is not torch.nn.Embedding:
        raise NotPlain("embeddings with code of their own")
    rotary_emb = read_rotary(body.rotary_emb, decoder.rotary_types, max_context(hf_config) or LONGEST)
    skeleton = describe(model, body.rotary_emb)
    _compare_weights(folder, model, skeleton, loaded.device)
    meta = {name: parameter.to("meta") for name, parameter in model.named_parameters()}
    bare = rebuild(skeleton, meta, PlainConfig(settings), rotary_emb)
    bare.dtype = loaded.dtype
    if _without_values(read_decoder(bare, getattr(bare, path))) != _without_values(decoder):
        raise NotPlain("settings that are not plain")
    weight: Any = model.get_output_embeddings().weight
    about = {
        "model": skeleton,
        "body": path,
        "rotary": rotary_emb.scaling,
        "head": next(name for name, parameter in model.named_parameters() if parameter is weight),
        "logit_scale": head.logit_scale,
        "logit_softcap": head.logit_softcap,
        "vocab_size": head.vocab_size,
        "needs": asdict(needs),
        "tolerance": truth.tolerance,
    }
    tensors = {"truth": truth.hidden_ND, "head logits": head.logits(truth.hidden_ND[:HEAD_ROWS])}
    return LoadedNote(about, tensors | {f"frequency {name}": part for name, part in rotary_emb.frequency_r.items()})


def _tokenizer_kind(source: ModelSource, config: ScorerConfig) -> tuple[str, str]:
    """Module and class that read the tokenizer just as transformers' automatic choice does."""
    chosen = load_tokenizer(source, config)
    kind = type(chosen).__module__, type(chosen).__name__
    if not kind[0].startswith("transformers.") or not getattr(chosen, "is_fast", False):
        raise NotPlain("a tokenizer with code of its own")
    again = load_tokenizer(source, config, kind)
    settings, same = ({**vars(each), "_tokenizer": each.backend_tokenizer.to_str()} for each in (chosen, again))
    if settings != same:
        raise NotPlain("a tokenizer with settings of its own")
    return kind


def _read_weights(
    folder: Path, dtypes: Mapping[str, torch.dtype], device: torch.device
) -> Iterable[tuple[str, torch.Tensor]]:
    """By name, each in its dtype on the device.

    Raises:
        NotPlain: the folder's safetensors have no weight of that name.
    """
    by_file: dict[str, list[str]] = {}
    if (folder / "model.safetensors").is_file():
        by_file["model.safetensors"] = list(dtypes)
    else:
        files = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        for name in dtypes:
            by_file.setdefault(files.get(name, ""), []).append(name)
    for file_name, names in by_file.items():
        if not (folder / file_name).is_file() or Path(file_name).name != file_name:
            raise NotPlain(f"{names[0]} is not among its weights")
        with safe_open(folder / file_name, framework="pt") as file:
            if missing := sorted(set(names) - set(file.keys())):
                raise NotPlain(f"{missing[0]} is not among its weights")
            for name in names:
                # A copy: the file's own pages change where it is written to.
                yield name, file.get_tensor(name).to(device=device, dtype=dtypes[name], copy=True)


def _compare_weights(folder: Path, model: torch.nn.Module, skeleton: Mapping[str, Any], device: torch.device) -> None:
    parameters = dict(model.named_parameters())
    try:
        for name, weight in _read_weights(folder, weight_dtypes(skeleton), device):
            if not torch.equal(weight, parameters[name]):
                raise NotPlain(f"{name} is not as its file has it")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise NotPlain(f"its weights are read in another way ({error_text(error)})") from error


def _without_values(part: Any) -> Any:
    """A decoder with every tensor as its shape and dtype, and without its modules, so that two can be compared."""
    if isinstance(part, torch.Tensor):
        return part.shape, part.dtype
    if isinstance(part, torch.nn.Module):
        return None
    if isinstance(part, tuple):
        return tuple(map(_without_values, part))
    if is_dataclass(part) and not isinstance(part, type):
        return tuple(_without_values(getattr(part, each.name)) for each in fields(part))
    return part
