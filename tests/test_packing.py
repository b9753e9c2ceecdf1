"""Chat encoding and packing."""

import numpy as np
import pytest
import torch

from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.packing import IGNORE_INDEX, ChatEncoder, balanced_fill, fill, pack, split_evenly

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


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ messages|length ~ m['role'] ~ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        list(ChatEncoder(tokenizer, 512).encode([CHAT]))


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
