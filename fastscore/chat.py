"""Prompts through the tokenizer's chat template, as transformers renders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastscore.config import TaskConfig
from fastscore.fields import Message
from fastscore.types import InputError, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The template of a tokenizer, and the system message that is put before every prompt."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The text of a conversation; ``options`` go to ``apply_chat_template``.

        Raises:
            InputError: there is no template, or it refuses these messages.
        """
        try:
            self.tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
        except ValueError as error:
            raise InputError("the model's tokenizer has no chat template") from error
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except Exception as error:  # a template is a program of the model's
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(f"the model's chat template refuses these messages: {reason}") from error
        assert isinstance(text, str), "one conversation, not tokenised"
        return text

    def pairs(self, pairs: Sequence[Pair], conversation: Sequence[Message] | None = None) -> list[Pair]:
        """The same answers, each as the assistant's next message after its prompt, or after the ``conversation``.

        The space that joins an answer to its prompt is left out: after the template's beginning of a message it would
        be part of what the assistant says.

        Raises:
            InputError: as for :meth:`render`.
        """
        before = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        prompts: dict[Any, str] = {}
        for pair in pairs:
            if pair.prompt not in prompts:
                messages = [{"role": "user", "content": pair.prompt}] if conversation is None else conversation
                prompts[pair.prompt] = self.render([*before, *messages], add_generation_prompt=True)
        return [
            replace(pair, prompt=prompts[pair.prompt], answer=str(pair.answer).removeprefix(" "), is_chat=True)
            for pair in pairs
        ]


def check_chat_template(tokenizer: PreTrainedTokenizerBase, config: TaskConfig) -> None:
    """See that the tokenizer has the template that the prompts need, before any weights are loaded.

    Raises:
        InputError: it has none, or one without a system message where there is a system prompt.
    """
    if not config.chat_template:
        return
    text = "?"
    ChatTemplate(tokenizer).pairs([Pair(text, text)])
    if config.system_prompt is None:
        return
    try:
        (pair,) = ChatTemplate(tokenizer, config.system_prompt).pairs([Pair(text, text)])
    except InputError as error:
        raise InputError(error.message, field="system_prompt") from error
    if config.system_prompt.strip() not in str(pair.prompt):
        raise InputError("the model's chat template leaves the system message out", field="system_prompt")
