"""Chat encoding and packing."""

import datetime
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.packing import (
    IGNORE_INDEX,
    ChatEncoder,
    ConversationError,
    _mark,
    _warn_of_no_stop,
    balanced_fill,
    fill,
    pack,
    split_evenly,
)
from lead_fast.turns import Turn

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "Six.\n\nNot seven."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is the answer? It is four, or six. " * 4, "### User:\n### Assistant:\n"], 400)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("template", [None, CHATML])
def test_only_assistant_turns_are_supervised(tokenizer, template):
    tokenizer.chat_template = template
    (sample,) = ChatEncoder(tokenizer, 512).encode([CHAT])
    answers = text_of(tokenizer, sample.input_ids[sample.supervised])
    end = "</s>" if template is None else "<|im_end|>"
    assert answers.replace("\n", "").replace(end, "|") == "It is 4.|Six.Not seven.|"
    whole = text_of(tokenizer, sample.input_ids)
    assert "What is 2 + 2?" in whole and whole.rstrip().endswith(end)


def test_the_answer_alone_keeps_bos_and_headers_and_the_same_answer_tokens(tokenizer):
    tokenizer.chat_template = None
    (sample,) = ChatEncoder(tokenizer, 512).encode([CHAT])
    alone = sample.alone()
    assert text_of(tokenizer, alone.input_ids).startswith("<s>### Assistant:\nIt is 4.")
    assert "User" not in text_of(tokenizer, alone.input_ids)
    np.testing.assert_array_equal(alone.input_ids[alone.supervised], sample.input_ids[sample.supervised])


def test_long_prompts_are_cut_from_the_left_and_answers_only_after_that(tokenizer):
    tokenizer.chat_template = None
    chat = [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "four"}]
    (full,) = ChatEncoder(tokenizer, 4096).encode([chat])
    encoder = ChatEncoder(tokenizer, 40)
    (cut,) = encoder.encode([chat])
    assert len(cut) == 40 and cut.cut_prompt == len(full) - 40 and cut.cut_answer == 0
    assert cut.input_ids[0] == tokenizer.bos_token_id
    np.testing.assert_array_equal(cut.input_ids[1:], full.input_ids[-39:])
    answer = [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "word " * 100}]
    (cut,) = encoder.encode([answer])
    assert len(cut) == 40 and cut.cut_answer > 0 and cut.supervised.any()
    assert text_of(tokenizer, cut.input_ids).startswith("<s>### Assistant:\nword")
    assert (encoder.cuts.samples, encoder.cuts.prompts, encoder.cuts.answers) == (2, 2, 1)


def test_later_prompts_are_cut_before_any_answer(tokenizer):
    tokenizer.chat_template = None
    chat = [
        {"role": "user", "content": "hm"}, {"role": "assistant", "content": "It is four."},
        {"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "or six."},
    ]  # fmt: skip
    (cut,) = ChatEncoder(tokenizer, 40).encode([chat])
    assert len(cut) == 40 and cut.cut_answer == 0 and cut.cut_prompt > 60
    assert text_of(tokenizer, cut.input_ids[cut.supervised]) == "It is four.</s>or six.</s>"
    assert text_of(tokenizer, cut.input_ids).count("### Assistant:\n") == 2


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)


def test_what_ends_a_prompt_is_a_header_where_there_is_no_other(tokenizer):
    tokenizer.chat_template = MISTRAL
    (sample,) = ChatEncoder(tokenizer, 512).encode([CHAT[1:]])
    assert text_of(tokenizer, sample.alone().input_ids) == "<s> [/INST] It is 4.</s> [/INST] Six.\n\nNot seven.</s>"
    (cut,) = ChatEncoder(tokenizer, 24).encode([[{"role": "user", "content": "word " * 99 + "word"}, CHAT[2]]])
    assert text_of(tokenizer, cut.input_ids).endswith("word [/INST] It is 4.</s>") and cut.cut_prompt > 80


# What the templates of several families do that is no prefix of the conversation.
ENDS_ONCE = (  # an end of text that only the last turn has
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THINKS_LAST = (  # reasoning, be it empty, in the last turn alone
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% set parts = m['content'].split('</think>') %}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>' + (parts[0] if parts|length > 1 else '').replace('<think>', '') + '</think>' }}{% endif %}"
    "{{ parts[-1] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ASKS_TO_THINK = (  # a generation prompt that the answer does not follow
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% set parts = m['content'].split('</think>') %}{{ parts[-1] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_no_room_for_an_answer_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"max_length: expected at least (\d+), what the chat template needs") as refused:
        ChatEncoder(tokenizer, 4)
    least = int(str(refused.value).split()[4].rstrip(","))
    encoder = ChatEncoder(tokenizer, least)
    assert encoder.cuts.max_length == least and encoder.cuts.samples == 0
    (sample,) = encoder.encode([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])
    assert sample.supervised.any()


@pytest.fixture(scope="module")
def special():
    """A tokenizer for which the markers of these templates are single tokens."""
    tokenizer = train_tokenizer(["What is the answer? It is four, or six. " * 4], 400)
    names = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    return tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ENDS_ONCE, ["It is 4.<|end|>\n", "Six.\n\nNot seven.<|end|>\n</s>"]),
        (THINKS_LAST, ["It is 4.<|end|>", "<think></think>Six.\n\nNot seven.<|end|>"]),
        (ASKS_TO_THINK, ["It is 4.<|end|>", "Six.\n\nNot seven.<|end|>"]),
        (MARKED, ["It is 4.<|end|>", "Six.\n\nNot seven.<|end|>"]),
    ],
    ids=["ends once", "thinks last", "asks to think", "marked"],
)
def test_answers_are_found_where_earlier_turns_are_no_prefix(template, expected, special):
    special.chat_template = template
    (sample,) = ChatEncoder(special, 512).encode([CHAT])
    assert supervised_runs(special, sample) == expected
    alone = text_of(special, sample.alone().input_ids)
    assert alone.count("<|assistant|>") == 2 and "<|user|>" not in alone and "brief" not in alone


@pytest.mark.parametrize("answer", ["think", "end", "user", "Six. Six. Six. Six. Six. Six. Six. Six. Six. Six. Six. Six.", "b"])
@pytest.mark.parametrize("template", [ENDS_ONCE, THINKS_LAST, ASKS_TO_THINK], ids=["ends once", "thinks last", "asks to think"])
def test_an_answer_that_occurs_elsewhere_is_found_where_it_is(template, answer, special):
    special.chat_template = template
    said = {"role": "assistant", "content": answer}
    for chat in ([CHAT[1], said, *CHAT[3:]], [*CHAT[1:4], said]):
        (sample,) = ChatEncoder(special, 512).encode([chat])
        runs = [run.replace("<think></think>", "").replace("</s>", "").strip() for run in supervised_runs(special, sample)]
        assert runs == [chat[1]["content"] + "<|end|>", chat[3]["content"] + "<|end|>"]


UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_of_a_conversation_that_begins_with_an_answer_the_answer_is_supervised(template, special):
    special.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\nBe kind.<|end|>\n' }}{% endif %}" + template
    )
    (sample,) = ChatEncoder(special, 512).encode([CHAT[2:]])
    runs = [run.removesuffix("</s>").strip() for run in supervised_runs(special, sample)]
    assert runs == ["It is 4.<|end|>", "Six.\n\nNot seven.<|end|>"]


def test_long_conversations_take_time_in_proportion_to_their_renderings(special):
    """What compares renderings must not look at each character in Python; 200 turns of 200,000 characters."""
    special.chat_template = ENDS_ONCE
    chat = [{"role": role, "content": f"{n} " + "word " * 200} for n in range(100) for role in ("user", "assistant")]
    text, turns = ChatEncoder(special, 512).template.turns(chat)
    assert len(turns) == 100 and all(text[start:].startswith(f"{n} word") for n, (_, start, _) in enumerate(turns))


def test_reasoning_that_earlier_turns_lose_is_not_asked_for(special):
    special.chat_template = THINKS_LAST
    chat = [CHAT[1], {"role": "assistant", "content": "<think>2, 2</think>It is 4."}, *CHAT[3:]]
    (sample,) = ChatEncoder(special, 512).encode([chat])
    assert supervised_runs(special, sample) == ["It is 4.<|end|>", "<think></think>Six.\n\nNot seven.<|end|>"]


def supervised_runs(tokenizer, sample):
    edges = np.flatnonzero(np.diff(np.r_[False, sample.supervised, False].astype(int)))
    return [text_of(tokenizer, sample.input_ids[start:end]) for start, end in edges.reshape(-1, 2)]


def official_templates():
    trl = importlib.util.find_spec("trl")
    folder = Path(trl.submodule_search_locations[0]) / "chat_templates" if trl and trl.submodule_search_locations else None
    # Those of images take contents of another shape.
    of_images = ("idefics", "llava", "smolvlm")
    return [p for p in sorted(folder.glob("*.jinja")) if not p.name.startswith(of_images)] if folder else []


@pytest.mark.skipif(not official_templates(), reason="trl is not installed, which brings the templates of many models")
@pytest.mark.parametrize("path", official_templates(), ids=lambda path: path.stem)
def test_the_templates_of_many_models(path, special):
    special.chat_template = path.read_text(encoding="utf-8")
    (sample,) = ChatEncoder(special, 4096).encode([CHAT[1:]])
    runs = supervised_runs(special, sample)
    assert len(runs) == 2 and "It is 4." in runs[0] and "Six.\n\nNot seven." in runs[1]
    assert not any("2 + 2" in run or "3 + 3" in run for run in runs)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ messages|length ~ m['role'] ~ m['content'] }}{% endfor %}"
    with pytest.raises(ConversationError, match="the chat template rewrites earlier turns"):
        list(ChatEncoder(tokenizer, 512).encode([CHAT]))


def test_conversations_that_a_template_refuses_are_named_or_collected(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoder, errors = ChatEncoder(tokenizer, 512), []
    chats = [CHAT[1:], CHAT, CHAT[1:3], [CHAT[1], {"role": "assistant", "content": ""}]]
    with pytest.raises(ConversationError, match=r"conversation 1: the chat template refuses the .* 'You are brief"):
        list(encoder.encode(chats))
    samples = list(encoder.encode(chats, batch_size=2, errors=errors))
    assert len(samples) == 3 and [error.number for error in errors] == [1] and "no system role" in errors[0].reason
    errors.clear()
    assert not list(encoder.encode([CHAT] * 3, batch_size=2, errors=errors)) and len(errors) == 3


def test_today_is_the_day_that_is_given(tokenizer):
    tokenizer.chat_template = (
        "{% set form = '%d %b %Y' %}{{ 'Today is ' + (strftime_now(form) if strftime_now is defined else 'unknown') + '. ' }}"
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    (sample,) = ChatEncoder(tokenizer, 512, datetime.date(2024, 2, 29)).encode([CHAT[1:3]])
    assert text_of(tokenizer, sample.input_ids).startswith("Today is 29 Feb 2024. user: What")
    (sample,) = ChatEncoder(tokenizer, 512).encode([CHAT[1:3]])
    assert datetime.date.today().strftime("Today is %d %b %Y.") in text_of(tokenizer, sample.input_ids)


def test_an_answer_that_ends_with_no_special_token_is_said(tokenizer, caplog):
    _warn_of_no_stop.cache_clear()
    tokenizer.chat_template = None
    ChatEncoder(tokenizer, 512)
    assert not caplog.text
    tokenizer.chat_template = CHATML
    ChatEncoder(tokenizer, 512)
    assert "no special token: a model trained on it may not learn to stop" in caplog.text


def test_a_token_of_the_header_s_space_and_the_answer_s_first_word_is_supervised(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    (sample,) = ChatEncoder(tokenizer, 512).encode([CHAT[1:]])
    assert supervised_runs(tokenizer, sample) == [" It is 4.</s>", "Six.\n\nNot seven.</s>"]  # " It" is one token, " S" two


def test_tokens_without_width_inside_an_answer_are_its_own():
    """As of tokenizers that trim offsets: a space is a token of no width."""
    offsets = np.array([[0, 3], [3, 3], [3, 6], [6, 6], [7, 9], [9, 9], [9, 12]])
    sample = _mark(np.arange(7), offsets, [Turn(0, 3, 9)])
    assert sample.supervised.tolist() == [False, False, True, True, True, False, False]


def test_packed_labels_are_shifted_inside_each_sample(tokenizer):
    tokenizer.chat_template = None
    chats = [CHAT, CHAT[1:3], [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]]
    samples = list(ChatEncoder(tokenizer, 512).encode(chats))
    batch = pack(samples, [7, 3, 9])
    assert batch.rows.tolist() == [7, 3, 9]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *map(len, samples)]).tolist()
    assert batch.max_length == max(map(len, samples))
    for s, sample in enumerate(samples):
        start, end = batch.cu_seqlens[s], batch.cu_seqlens[s + 1]
        assert batch.position_ids[start:end].tolist() == list(range(len(sample)))
        labels = batch.labels[start:end].tolist()
        assert labels[-1] == IGNORE_INDEX
        for t in range(len(sample) - 1):
            assert labels[t] == (sample.input_ids[t + 1] if sample.supervised[t + 1] else IGNORE_INDEX)
    assert torch.equal(batch.token_index, (batch.labels != IGNORE_INDEX).nonzero().flatten())
    assert batch.num_items == len(batch.token_index) == sum(int(s.supervised[1:].sum()) for s in samples)


def test_pack_refuses_what_does_not_fit(tokenizer):
    with pytest.raises(ValueError, match="at least one sample"):
        pack([])
    samples = list(ChatEncoder(tokenizer, 512).encode([CHAT]))
    with pytest.raises(ValueError, match="`rows` must have 1 entries"):
        pack(samples, [1, 2])


@pytest.mark.parametrize("seed", range(5))
def test_bins_keep_order_and_capacity(seed):
    lengths = [*np.random.default_rng(seed).integers(1, 60, 50).tolist(), 500]
    for bins in (fill(lengths, 100), balanced_fill(lengths, 100)):
        assert [i for b in bins for i in b] == list(range(51))
        assert all(sum(lengths[i] for i in b) <= 100 or len(b) == 1 for b in bins)
    assert len(balanced_fill(lengths, 100)) == len(fill(lengths, 100))


def test_balanced_bins_leave_no_small_rest():
    assert [len(b) for b in balanced_fill([10] * 11, 100)] == [6, 5]
    assert balanced_fill([], 10) == []


def test_split_evenly_gives_every_part_its_share():
    runs = split_evenly([10] * 12, 4)
    assert [len(r) for r in runs] == [3, 3, 3, 3]
    assert [i for r in split_evenly([5, 50, 5], 2) for i in r] == [0, 1, 2]
    assert split_evenly([7], 3).count([]) == 2
