"""Where the assistant's turns are in a conversation that a chat template has rendered.

A template with `{% generation %}` markers says so itself. Any other is rendered once more for each answer: up to its prompt,
with the assistant's header, and through its end. Most templates then write a prefix of the conversation. Some change the last
turn or its end (an end of text that only the last turn has, reasoning that only the last turn keeps); there an answer begins
where the two renderings part, and ends with as much as earlier and last turns end alike.
"""

from __future__ import annotations

import datetime
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
_TODAY = re.compile(r"\bstrftime_now\b")
_WINDOW = 200  # characters that are tokenized to find where a token begins
_STAND_INS = ("\u27ealead-fast\u27eb", "\u27e6lead-fast\u27e7", "\u29fclead-fast\u29fd")  # in the place of a message's text


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
        self.text = _of_one_day(template, date) if _TODAY.search(template) else template

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
            raise _refused(messages, error) from error
        text, spans = texts[0], [(start, end) for start, end in marks[0] if start < end]
        if not spans:
            raise ValueError("the chat template must mark the assistant's turns (`generation`), got no mark")
        if len(spans) != len(answers):  # of a turn in parts, who asks for which is not known
            return text, [Turn(start, start, end) for start, end in spans]
        turns = [
            Turn(self._header(messages, i, text, start), start, end) for i, (start, end) in zip(answers, spans, strict=True)
        ]
        return text, turns

    def _located(self, messages: Messages, answers: Sequence[int]) -> tuple[str, list[Turn]]:
        text, turns = self.render(messages), list[Turn]()
        for i in answers:
            prompt, is_last = self._prompt(messages[:i]), i == answers[-1]
            through = text if is_last else self.render(messages[: i + 1])
            if prompt is not None and text.startswith(prompt) and text.startswith(through.rstrip()):
                start, end = len(prompt), len(through.rstrip() if is_last else through)
            else:
                start, end = self._parted(messages, i, text, prompt, through)
            turns.append(Turn(self._header(messages, i, text, start), start, max(start, end)))
        return text, turns

    def _prompt(self, messages: Messages) -> str | None:
        """What asks for the answer after `messages`; None where the template asks for none without a message."""
        try:
            return self.render(messages, add_generation_prompt=True)
        except ValueError:
            if messages:
                raise
            return None

    def _parted(self, messages: Messages, i: int, text: str, prompt: str | None, through: str) -> tuple[int, int]:
        """Start and end of answer `i`, where renderings up to it are no prefixes of the conversation."""
        start, end = self._content(messages, i, text)
        if i:
            start = self._shared(text, prompt or "")
            if not self._content(messages, i - 1, text)[1] <= start <= end:
                raise ValueError(
                    "the chat template rewrites earlier turns, so assistant turns cannot be located; "
                    f"expected a prefix of the conversation up to turn {i}"
                )
        if through is text:
            return start, len(text.rstrip())
        if text.startswith(through):
            return start, len(through)
        closing = text[self._content(messages, len(messages) - 1, text)[1] :].rstrip()
        return start, end + self._shared(text[end:], closing)

    def _content(self, messages: Messages, i: int, text: str) -> tuple[int, int]:
        """Where the text of message `i` stands: there a rendering with another in its place differs.

        Raises:
            ValueError: the template does not write it.
        """
        content = messages[i]["content"]
        # It must part from the text at its first character, and again at its last.
        other = next((t for t in _STAND_INS if t[0] not in content and t[-1] not in content), _STAND_INS[0])
        rendered = self.render([*messages[:i], messages[i] | {"content": other}, *messages[i + 1 :]])
        if other not in rendered:
            raise ValueError(f"the chat template does not write the text of turn {i}")
        begin = _common(text, rendered)
        return begin, len(text) - _common(text[begin:][::-1], rendered[begin:][::-1])

    def _header(self, messages: Messages, i: int, text: str, start: int) -> int:
        """Where the header of answer `i`, which starts at `start`, begins: after the messages before it."""
        if not i:
            return start
        header = min(start, self._shared(text, self.render(messages[:i])))
        if header < start:
            return header
        # No header of its own ([INST] prompt [/INST] answer): what follows the prompt's text.
        return min(start, self._content(messages, i - 1, text)[1])

    def _shared(self, text: str, other: str) -> int:
        """Characters that both begin with, back to where a token of `text` begins."""
        shared = _common(text, other)
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


def _common(text: str, other: str) -> int:
    """Characters that both begin with."""
    low, high = 0, min(len(text), len(other))
    if text[:high] == other[:high]:
        return high
    while high - low > 1:  # they part at or after `low`, before `high`
        middle = (low + high) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _of_one_day(template: str, date: datetime.date) -> str:
    """A template whose `strftime_now` says `date`: a macro of that name stands before transformers' function."""
    said = "f"
    for directive in "YmdbBaAyjHMSpIZ":
        said += f"|replace('%{directive}', {date.strftime(f'%{directive}')!r})"
    # The plus keeps the newline that may follow.
    return f"{{%- macro strftime_now(f) %}}{{{{ {said} }}}}{{%- endmacro +%}}{template}"
