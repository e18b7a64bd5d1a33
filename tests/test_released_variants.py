"""What is asked of the weights: which semantics they were trained with, by their loss."""

import pytest
import torch

import released_variants
from paths import ROOT

ROWS = str(ROOT / "examples" / "clips" / "clips.jsonl")


def test_the_root_says_the_papers(capsys):
    released_variants.main([str(ROOT), "--data", ROWS, "--device", "cpu"])
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [row[0].strip("| ") for row in table[2:]][0] == "paper"
    assert len(table) == 2 + len(released_variants.VARIANTS)
    losses = [float(row[1].strip(" |")) for row in table[2:]]
    assert losses == sorted(losses) and losses[0] < 0.01 < losses[1]


def test_a_variant_runs_as_its_own_checkpoint_would(model):
    """With other fields set, every part of the model reads them; then all is as it was."""
    fields = released_variants.VARIANTS["released, causal, own"]
    released_variants.set_variant(model, fields)
    configs = [layer.self_attn.config for layer in model.model.language_model.layers]
    for config in (*configs, model.config.text_config):
        assert {name: getattr(config, name) for name in fields} == fields
    released_variants.set_variant(
        model, {"nsa_semantics": "paper", "nsa_released_mask": "reversed"}
    )


def test_what_does_not_fit_is_left_out_and_said(model, capsys, monkeypatch):
    monkeypatch.setattr(released_variants, "loss_of", lambda model, batch: (1.0, 2))
    model.config.text_config.nsa_num_selected_blocks = 16
    try:
        losses, _ = released_variants.measure(model, [None], lambda rows: None)
    finally:
        model.config.text_config.nsa_num_selected_blocks = 4
    assert "released, reversed, own" in losses
    assert "released, reversed, first_and_last_two" not in losses
    assert "first_and_last_two: left out: nsa_block_size is 16" in capsys.readouterr().err


@pytest.mark.parametrize(("others", "decided"), [([1.0, 1.1, 0.9], True), ([0.0, 0.4, 0.2], False)])
def test_a_recommendation_wants_a_clear_lead(others, decided):
    losses = {
        "released, reversed, own": torch.tensor([0.1, 0.1, 0.1]),
        "paper": torch.tensor(others),
    }
    *_, line = released_variants.report(losses, torch.full((3,), 1 / 3))
    if decided:
        assert line.startswith("These weights fit 'released, reversed, own' best.")
        assert "nsa_released_mask='reversed'" in line
    else:
        assert line.startswith("Not decided: 'released, reversed, own' is lowest, but 'paper'")
