"""The recorder counts what the sparse attention computes, not what a configuration promises."""

import pytest
import torch

from commands.evaluation_attention import AttentionRecorder, WrongAttention, check
from nsa_rules import BRANCHES
from tiny import Prompts, make_model

VISION = [24, 15, 0]  # vision tokens of the rows below


def answer(model, recorder, **settings):
    prompts = Prompts()
    rows = [
        prompts.row(3, ("video", 4, 2, 3), 4),
        prompts.row(2, ("image", 3, 3), 1, ("video", 1, 2, 3), 3),
        prompts.row(7),
    ]
    recorder.clear()
    with recorder, torch.no_grad():
        output = model.generate(
            **prompts.batch(*rows), do_sample=False, max_new_tokens=3, pad_token_id=0, **settings
        )
    return output[:, -3:], recorder.reports(VISION)


def test_every_vision_token_of_every_layer_is_counted_for_its_row():
    model = make_model()
    _, reports = answer(model, AttentionRecorder(model))
    assert [report["sparse_tokens_by_layer"] for report in reports] == [[n, n] for n in VISION]
    assert reports[0]["functions"] == ["nsa_reference"]
    sizes = {"block_size": 4, "num_selected": 2, "window_size": 5}
    assert reports[0]["settings"] == {"semantics": "paper", **sizes}
    for report in reports:
        check(report, "sparse")
    with pytest.raises(WrongAttention, match="dense attention was asked for, but of 24"):
        check(reports[0], "dense")


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"prefill_chunk_size": 7}], ids=str)
def test_beams_and_chunks_do_not_confuse_the_count(settings):
    model = make_model()
    _, reports = answer(model, AttentionRecorder(model), **settings)
    for report in reports:
        check(report, "sparse")


def test_the_beam_with_the_fewest_counts_for_its_sample():
    recorder = AttentionRecorder(make_model())
    recorder.tokens = [torch.tensor([24, 24, 15, 3]), torch.tensor([0, 24, 15, 15])]
    counts = [report["sparse_tokens_by_layer"] for report in recorder.reports([24, 15])]
    assert counts == [[24, 0], [3, 15]]


def test_mean_gates_are_means_over_tokens_and_heads():
    model = make_model()
    logits = torch.tensor([-0.3, 0.0, 0.6])  # of the branches of every head; the temperature is 0.3
    for layer in model.model.language_model.layers:
        layer.self_attn.g_proj_2.weight.data.zero_()
        layer.self_attn.g_proj_2.bias.data.view(-1, 3).copy_(logits)
    _, reports = answer(model, AttentionRecorder(model))
    wanted = [round(x, 4) for x in (logits / 0.3).sigmoid().tolist()]
    assert list(reports[0]["mean_gates"].values()) == wanted


def test_a_dense_run_is_not_taken_for_a_sparse_one():
    model = make_model()
    recorder = AttentionRecorder(model)
    model.config.text_config.nsa_enabled = False
    _, reports = answer(model, recorder)
    check(reports[0], "dense")
    with pytest.raises(WrongAttention, match="0 to 0 went through the sparse attention"):
        check(reports[0], "sparse")


def test_one_dense_layer_is_noticed():
    model = make_model()
    layer = model.model.language_model.layers[1].self_attn
    recorder = AttentionRecorder(model)
    layer._attend = lambda query, *rest: torch.zeros_like(query.transpose(1, 2))
    _, reports = answer(model, recorder)
    assert reports[0]["sparse_tokens_by_layer"] == [24, 0]
    with pytest.raises(WrongAttention, match="0 to 24 went through"):
        check(reports[0], "sparse")


def test_it_leaves_the_model_as_it_was():
    model = make_model()
    recorder = AttentionRecorder(model)
    before = [dict(vars(layer)) for layer in recorder.layers]
    first, _ = answer(model, recorder)
    assert [dict(vars(layer)) for layer in recorder.layers] == before
    second, _ = answer(model, AttentionRecorder(model))
    assert torch.equal(first, second)


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_closed_branch_has_no_part_in_the_output(branch):
    model = make_model()
    _, open_all = answer(model, AttentionRecorder(model))
    _, reports = answer(model, AttentionRecorder(model, (branch,)))
    gates = reports[0]["mean_gates"]
    assert [name for name in BRANCHES if gates[name]] == [branch]
    assert all(open_all[0]["mean_gates"].values())
    for layer in model.model.language_model.layers:  # a gate of about 0 by its bias does the same
        bias = layer.self_attn.g_proj_2.bias.data.view(-1, 3)
        for index, name in enumerate(BRANCHES):
            if name != branch:
                bias[:, index] = -1e4
    by_bias, _ = answer(model, AttentionRecorder(model))
    model = make_model()
    by_recorder, _ = answer(model, AttentionRecorder(model, (branch,)))
    assert torch.equal(by_bias, by_recorder)
