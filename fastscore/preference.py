"""Preference rows: a prompt, a chosen and a rejected answer, tokenised as TRL's DPO trainer tokenises them.

Plain text gets EOS at the end of each answer; conversations go through the tokenizer's chat template. Prompt, and
prompt with each answer, are tokenised by themselves, and the answers begin where these stop agreeing: not by
characters, as in the other tasks, but by tokens, so that the sums belong to the very tokens that TRL trains on
(``DPOTrainer._prepare_dataset`` and ``extract_prompt`` of TRL 1.16).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from fastscore.chat import ChatTemplate
from fastscore.fields import Message, checked_messages, checked_text, mistyped
from fastscore.tokenization import common_length
from fastscore.types import InputError, Pair, Row

OUTPUTS = ("ref_chosen_logps", "ref_rejected_logps")
"""What the sums are called: columns of TRL's."""
NOT_FROM_ROWS = {
    *("chat_template", "conversation", "messages", "tools", "tokenize", "add_generation_prompt"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""Arguments of ``apply_chat_template`` that are not the template's own: a row is data, and brings no program."""
_EITHER = "a string or a list of messages"


@dataclass(frozen=True, slots=True)
class Preference:
    """A checked row: texts, or conversations and what else the row hands to the chat template."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    template_options: dict[str, Any] = field(default_factory=dict)


def read_preference(row: Row) -> Preference:
    """The row's three texts or conversations. Without ``prompt``, it is what the two others begin with.

    Raises:
        InputError: naming the row and the field.
    """
    given = {name: row.data.get(name) for name in ("prompt", "chosen", "rejected")}
    for name, value in given.items():
        if not isinstance(value, str | list) and not (name == "prompt" and value is None):
            raise mistyped(row, name, _EITHER, value)
    if isinstance(given["chosen"], list):
        if isinstance(given["prompt"], str):
            raise row.error(
                "expected a list of messages, as in 'chosen', found a string; leave it out where 'chosen' and "
                "'rejected' begin with it",
                "prompt",
            )
        chosen, rejected = (checked_messages(row, given[name], name) for name in ("chosen", "rejected"))
        prompt = None if given["prompt"] is None else checked_messages(row, given["prompt"], "prompt")
        if prompt is None:
            prompt, chosen, rejected = _split(row, chosen, rejected)
        return Preference(prompt, chosen, rejected, _template_options(row))
    good, bad = (checked_text(row, given[name], name) for name in ("chosen", "rejected"))
    if given["prompt"] is None:
        return Preference(*_split(row, good, bad))
    return Preference(checked_text(row, given["prompt"], "prompt"), good, bad)


def _split(row: Row, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What both begin with as the prompt: of two texts without the space before they part, and of two of which one is
    the other's beginning, all but the last character or message."""
    length = common_length(chosen, rejected)
    if length == min(len(chosen), len(rejected)) or chosen[length - 1] == " ":
        length -= 1
    if length < 1:
        raise row.error("missing, and 'chosen' and 'rejected' have no beginning in common", "prompt")
    return chosen[:length], chosen[length:], rejected[length:]


def _template_options(row: Row) -> dict[str, Any]:
    """``tools`` and ``chat_template_kwargs``, as TRL hands them to the template."""
    tools, options = row.data.get("tools"), row.data.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise row.error(f"not valid JSON: {error}", "tools") from error
    if tools is not None and not isinstance(tools, list):
        raise mistyped(row, "tools", "a list", tools)
    if options is not None and not isinstance(options, dict):
        raise mistyped(row, "chat_template_kwargs", "an object", options)
    if taken := sorted(NOT_FROM_ROWS.intersection(options or {})):
        message = f"{taken[0]!r} is no variable of a chat template, and not for a row to say"
        raise row.error(message, "chat_template_kwargs")
    return {"tools": tools, **(options or {})}


def preference_pairs(preference: Preference, chat: ChatTemplate, max_length: int | None = None) -> tuple[Pair, Pair]:
    """Prompt and chosen answer, prompt and rejected answer, as token ids; cut at their end to ``max_length`` tokens.

    Raises:
        InputError: naming the field.
    """
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    if isinstance(prompt, list):
        options = preference.template_options
        texts = [chat.render(prompt, add_generation_prompt=True, **options)]
        texts += [chat.render([*prompt, *answer], **options) for answer in (chosen, rejected)]
    else:
        eos = chat.tokenizer.eos_token
        if eos is None:
            raise InputError("the model's tokenizer has no EOS token, which ends an answer in plain text")
        texts = [prompt, *(f"{prompt}{str(answer).removesuffix(eos)}{eos}" for answer in (chosen, rejected))]
    encoded = chat.tokenizer(texts, add_special_tokens=not isinstance(prompt, list), verbose=False)["input_ids"]
    prompt_ids, *answers = (tuple(ids) for ids in encoded)
    start = min(common_length(prompt_ids, ids) for ids in answers)
    if start == 0:
        raise InputError(
            "makes no token that the answers could follow (this tokenizer adds no BOS token)", field="prompt"
        )
    if max_length is not None and start >= max_length:
        raise InputError(f"has {start} tokens: max_length {max_length} leaves none of the answers", field="prompt")
    for name, ids in zip(("chosen", "rejected"), answers, strict=True):
        if len(ids) == start:
            raise InputError("makes no token after the prompt", field=name)
    first, second = (Pair(prompt_ids[:start], ids[start:max_length]) for ids in answers)
    return first, second
