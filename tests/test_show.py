"""`lead-fast train --show-batch`: what it prints is what the first step trains on."""

import json
import re
from itertools import pairwise

import pytest
from same_run import rounds_of

from lead_fast.cli import main
from lead_fast.config import LeadConfig, TrainConfig
from lead_fast.loading import load_tokenizer
from lead_fast.pool import Pool
from lead_fast.show import show_batch


def test_a_prepared_pool_shows_the_batch_of_round_1(reference, capsys):
    options, out = reference("lora")
    assert main([*options, "--show-batch"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    shown, rnd = json.loads(last), rounds_of(out)[0]
    assert shown["rows"] == rnd["rows"][: len(shown["rows"])]
    assert shown["supervised_tokens"] == rnd["step_items"][0] and not any("\x1b" in line for line in lines)
    heads = [line for line in lines if line.startswith("sample ")]
    assert [int(re.search(r"row (\d+)", head)[1]) for head in heads] == shown["rows"]
    assert lines[0].startswith("first batch of round 1: ")


def test_a_raw_pool_shows_its_first_rows_token_by_token(reference, tmp_path):
    reference("lora")
    model, pool = reference.folder / "prepared-lora" / "model", reference.folder / "pool.jsonl"
    config = TrainConfig(pool=str(pool), model=str(model), max_length=128, step_tokens=128)
    text, summary = show_batch(config, LeadConfig(), color=False)
    assert summary["rows"] == list(range(len(summary["rows"]))) and len(summary["rows"]) >= 2
    messages = list(Pool.open(pool).iter_messages(summary["rows"]))
    supervised = 0
    for sample, (user, assistant) in zip(text.split("\n\n")[1:], messages, strict=True):
        _, *runs = sample.splitlines()
        marked = [run for run in runs if re.match(r" *\d+-\d+ *\* ", run)]
        shown = [re.sub(r"^ *\d+-\d+ *\*? ", "", run).replace("|", "").replace("\\n", "\n") for run in runs]
        assert user["content"] in shown[0] and len(marked) == 1 and runs[0] not in marked
        assert shown[runs.index(marked[0])] == assistant["content"] + "</s>"
        supervised += marked[0].count("|") + 1 - assistant["content"].count("|")
        ranges = [tuple(map(int, re.match(r" *(\d+)-(\d+)", run).groups())) for run in runs]
        # Position ids begin at 0 and go on without a gap.
        assert ranges[0][0] == 0 and all(b[0] == a[1] + 1 for a, b in pairwise(ranges))
    assert supervised == summary["supervised_tokens"]


def test_bad_rows_are_left_out_where_training_leaves_them_out(reference, tmp_path):
    reference("lora")
    model, pool = reference.folder / "prepared-lora" / "model", reference.folder / "pool.jsonl"
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lines = pool.read_text().splitlines()
    refused = json.dumps({"messages": [{"role": "system", "content": "x"}, *json.loads(lines[0])["messages"]]})
    (tmp_path / "bad.jsonl").write_text("\n".join([lines[0], refused, *lines[1:]]) + "\n")
    options = {"pool": str(tmp_path / "bad.jsonl"), "model": str(tmp_path / "tokenizer"), "max_length": 128, "step_tokens": 128}
    with pytest.raises(ValueError, match="no system role"):
        show_batch(TrainConfig(**options), LeadConfig(), color=False)
    (tmp_path / "bad.jsonl").write_text("\n".join(["{not json", lines[0], refused, *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        show_batch(TrainConfig(**options), LeadConfig(), color=False)
    text, _ = show_batch(TrainConfig(**options, on_bad_row="skip"), LeadConfig(), color=False)
    expected, _ = show_batch(TrainConfig(**{**options, "pool": str(pool)}), LeadConfig(), color=False)

    def tokens(shown):
        return [line for line in shown.splitlines() if not line.startswith("sample ")]

    assert tokens(text) == tokens(expected)


def test_cuts_are_said_and_colour_is_asked_for(reference):
    reference("lora")
    model, pool = reference.folder / "prepared-lora" / "model", reference.folder / "pool.jsonl"
    config = TrainConfig(pool=str(pool), model=str(model), max_length=32, step_tokens=128)
    plain, _ = show_batch(config, LeadConfig(), color=False)
    assert "tokens of the prompt's start cut" in plain
    colored, _ = show_batch(config, LeadConfig(), color=True)
    assert "\x1b[32m" in colored and re.sub(r"\x1b\[\d+m", "", colored) == plain


@pytest.mark.parametrize(
    ("options", "message"), [([], "pool: required"), (["--pool", "x.jsonl"], "a prepared pool or --model")]
)
def test_what_it_needs_is_named(options, message, capsys):
    assert main(["train", *options, "--show-batch"]) == 1
    assert message in capsys.readouterr().err
