"""Where the assistant's turns are in a conversation that a chat template has rendered.

A template with `{% generation %}` markers says so itself. Any other is rendered once more for each answer: up to its prompt,
with the assistant's header, and through its end. Most templates then write a prefix of the conversation. Some change the last
turn or its end (an end of text that only the last turn has, reasoning that only the last turn keeps); there an answer begins
where the two renderings part, and ends with as much as earlier and last turns end alike.
"""

from __future__ import annotations

import datetime
import os.path
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Messages = list[dict[str, str]]

# It returns the texts and their marks with `return_assistant_tokens_mask`; its annotation knows the texts alone.
_render_marked: Any = render_jinja_template

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_THOUGHT = "</think>"  # what templates may leave out of earlier turns ends with it
_NOWHERE = (-1, -1)
_WINDOW = 200  # characters that are tokenized to find where a token begins


class Turn(NamedTuple):
    """Characters of one answer, and where the header that asks for it begins."""

    header: int
    start: int
    end: int


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        date: what the template takes for today; a template that writes the date would render a run that is resumed
            tomorrow otherwise than it began.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: datetime.date) -> None:
        template = tokenizer.get_chat_template()
        self.tokenizer, self.is_marked = tokenizer, _MARKER.search(template) is not None
        self.text = _TODAY.sub(lambda call: repr(date.strftime(call[2])), template)

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            ValueError: the template refuses it.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.text, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise _refused(messages, error) from error
        assert isinstance(text, str)
        return text

    def turns(self, messages: Messages) -> tuple[str, list[Turn]]:
        """The text up to the end of the last answer, and the assistant's turns in it.

        Raises:
            ValueError: there is no assistant turn, or one that cannot be located.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ValueError("`messages` must have an assistant turn, got none")
        messages = messages[: answers[-1] + 1]
        text, turns = self._marked(messages, answers) if self.is_marked else self._located(messages, answers)
        return text[: turns[-1].end], turns

    def _marked(self, messages: Messages, answers: Sequence[int]) -> tuple[str, list[Turn]]:
        try:
            texts, marks = _render_marked(
                [messages], chat_template=self.text, return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map
            )
        except TemplateError as error:
            raise ValueError(
                f"the chat template refuses the conversation {messages[0]['content'][:60]!r}...: {error}"
            ) from error
        text, spans = texts[0], [(start, end) for start, end in marks[0] if start < end]
        if not spans:
            raise ValueError("the chat template must mark the assistant's turns (`generation`), got no mark")
        if len(spans) != len(answers):  # of a turn in parts, who asks for which is not known
            return text, [Turn(start, start, end) for start, end in spans]
        turns = list[Turn]()
        for i, (start, end) in zip(answers, spans, strict=True):
            turns.append(Turn(self._header(messages[:i], text, start, turns), start, end))
        return text, turns

    def _located(self, messages: Messages, answers: Sequence[int]) -> tuple[str, list[Turn]]:
        text, turns = self.render(messages), list[Turn]()
        for i in answers:
            prompt = self.render(messages[:i], add_generation_prompt=True) if i else ""
            is_last = i == answers[-1]
            through = text if is_last else self.render(messages[: i + 1])
            if text.startswith(prompt) and text.startswith(through.rstrip()):
                start, end = len(prompt), len(through.rstrip() if is_last else through)
            else:
                start, end = self._parted(messages, i, text, prompt, through)
            turns.append(Turn(self._header(messages[:i], text, start, turns), start, max(start, end)))
        return text, turns

    def _parted(self, messages: Messages, i: int, text: str, prompt: str, through: str) -> tuple[int, int]:
        """Start and end of answer `i`, where renderings up to it are no prefixes of the conversation."""
        start = self._shared(text, prompt)
        begin, end = _find(messages[i]["content"], text, start)
        asked = messages[i - 1]["content"] if i else ""
        begins_too_early = _find(asked, text[:start], 0) == _NOWHERE and _find(asked, prompt, 0) != _NOWHERE
        if begin < 0 or begins_too_early or text[start:begin] not in through:
            raise ValueError(
                "the chat template rewrites earlier turns, so assistant turns cannot be located; "
                f"expected a prefix of the conversation up to turn {i}"
            )
        if through is text:
            return start, len(text.rstrip())
        last_begin, last_end = _find(messages[-1]["content"], text, text.rfind(messages[-1]["content"].strip()[:40]))
        closing = text[last_end:].rstrip() if last_begin >= 0 else ""
        return start, end + self._shared(text[end:], closing)

    def _header(self, before: Messages, text: str, start: int, turns: Sequence[Turn]) -> int:
        """Where the header of the answer at `start` begins: after the messages before it."""
        header = min(start, self._shared(text, self.render(before))) if before else 0
        if header < start or not before:
            return header
        # No header of its own ([INST] prompt [/INST] answer): what follows the prompt's text.
        found = text.rfind(before[-1]["content"].strip(), turns[-1].end if turns else 0, start)
        return start if found < 0 else found + len(before[-1]["content"].strip())

    def _shared(self, text: str, other: str) -> int:
        """Characters that both begin with, back to where a token of `text` begins."""
        shared = len(os.path.commonprefix([text, other]))  # noqa: RUF071  of characters, as is meant
        if shared in (len(text), len(other)):
            return shared
        low = max(0, shared - _WINDOW)
        offsets = self.tokenizer(
            text[low : shared + _WINDOW], add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
        )["offset_mapping"]
        return low + max((begin for begin, _ in offsets if low + begin <= shared), default=0)


def _refused(messages: Messages, error: TemplateError) -> ValueError:
    start = messages[0]["content"][:60] if messages else ""
    return ValueError(f"the chat template refuses the conversation {start!r}...: {error}")


def _find(content: str, text: str, start: int) -> tuple[int, int]:
    """Where a message's text, or what of it follows the reasoning, stands in `text` from `start` on."""
    for part in (content, content.strip(), content.split(_THOUGHT)[-1].strip()):
        found = text.find(part, start) if part and start >= 0 else -1
        if found >= 0:
            return found, found + len(part)
    return _NOWHERE
