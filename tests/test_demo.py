"""The demo, cut short: the table and the report of every method."""

import json

import pytest

from lead_fast import demo
from lead_fast.cli import main


def test_a_short_demo_compares_all_methods(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_PRETRAIN_ROWS", 200)
    monkeypatch.setattr(demo, "_PRETRAIN_EPOCHS", 1.0)
    monkeypatch.setattr(demo, "_HELDOUT_ROWS", 40)
    out = tmp_path / "demo"
    arguments = ["demo", "--out", str(out), "--seeds", "2", "--rows", "300", "--train-tokens", "3000"]
    assert main(arguments) == 0
    printed = capfd.readouterr().out.splitlines()
    summary = json.loads(printed[-1])
    methods = {m["method"]: m for m in summary["methods"]}
    assert set(methods) == {"robust", "paper", "random", "random_in_arm"}
    for method in methods.values():
        assert method["seeds"] == len(method["heldout_loss_by_seed"]) == 2
        assert method["heldout_loss"] == pytest.approx(sum(method["heldout_loss_by_seed"]) / 2)
        assert 0.0 <= method["noisy_share"] <= 1.0
        assert 3000 <= method["trained_tokens"] < 4500  # the last round is trained whole
        assert any(method["title"] in line and f"{method['heldout_loss']:.4f}" in line for line in printed)
    one = [json.loads((out / "runs" / f"{m}-0.json").read_text())["evaluations"][0]["heldout_loss"] for m in methods]
    assert len(set(one)) == 1, "every method starts from the same model"
    html = (out / "report.html").read_text()
    assert all(m["title"] in html for m in methods.values()) and html.count("<svg") >= 10

    assert main(arguments) == 1 and "not empty" in capfd.readouterr().err
    (out / "notes.txt").write_text("mine")
    assert main([*arguments, "--overwrite"]) == 1
    assert "notes.txt" in capfd.readouterr().err and (out / "report.html").exists()
