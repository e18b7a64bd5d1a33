"""A step over the cache's buffers gives what the layers give one by one; recorded, too."""

import copy
import gc

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, TextStreamer
from videonsa import decoding_videonsa
from videonsa.decoding_videonsa import DecodeStep, Recorder, run_step

from tiny import GROUPS, Prompts, make_model

GREEDY = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": list(range(5))}
CLOSE = {"atol": 5e-5, "rtol": 1e-4}


def rows_of(prompts):
    return [
        prompts.row(12),
        prompts.row(2, ("image", 2, 3), 3, ("video", 3, 2, 2), 1, ("image", 1, 2), 4),
        prompts.row(1, ("video", 2, 2, 4), 2, ("video", 5, 1, 3), 6),
    ]


def on(device, inputs):
    return {name: x.to(device) for name, x in inputs.items()}


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "reference"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("heads", GROUPS)
@torch.no_grad()
def test_a_step_gives_what_the_layers_give(heads, device, backend):
    model = make_model(*heads, head_dim=16, nsa_block_size=8, nsa_backend=backend).to(device)
    prompts = Prompts()
    inputs = on(device, prompts.batch(*rows_of(prompts)))  # padded
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache)
    text, cached = model.model.language_model, cache.get_seq_length()
    embeds = torch.randn(3, 1, text.config.hidden_size, device=device)
    positions = torch.tensor([40, 41, 42], device=device).view(1, 3, 1).expand(3, -1, -1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    plain = copy.deepcopy(cache)
    wanted = text(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask, past_key_values=plain
    ).last_hidden_state
    buffers = [layer.buffers for layer in cache.layers]
    valid = torch.zeros(3, buffers[0].keys.shape[1], dtype=torch.bool, device=device)
    valid[:, : cached + 1] = mask
    step = DecodeStep(
        [x.keys for x in buffers],
        [x.values for x in buffers],
        torch.tensor([cached], device=device),
        torch.tensor([cached + 1], device=device),
        valid,
    )
    torch.testing.assert_close(run_step(text, embeds, positions, step), wanted, **CLOSE)
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        layer.show(cached + 1)
        torch.testing.assert_close(layer.keys, other.keys, **CLOSE)
        torch.testing.assert_close(layer.values, other.values, **CLOSE)


def test_a_hook_keeps_every_step_from_being_recorded():
    text = make_model(nsa_backend="auto").model.language_model
    assert not Recorder(text).refused
    text(torch.full((1, 3), 9), output_hidden_states=True)  # leaves hooks of the library's own
    assert not Recorder(text).refused
    handle = text.layers[1].register_forward_hook(lambda *args: None)
    assert Recorder(text).refused
    handle.remove()
    assert not Recorder(text).refused


def test_layers_of_8_bits_keep_every_step_from_being_recorded(monkeypatch):
    """bitsandbytes' read on the host which features are outliers, in the middle of a step."""

    class Linear8bitLt(torch.nn.Linear):
        pass

    monkeypatch.setattr(decoding_videonsa, "DEVICES", ("cpu",))
    text = make_model(nsa_backend="auto").model.language_model
    assert not Recorder(text).refused
    text.layers[1].mlp.up_proj = Linear8bitLt(8, 8)
    said = []
    monkeypatch.setattr(decoding_videonsa.logger, "warning_once", said.append)
    assert Recorder(text).refused
    assert len(said) == 1 and said[0].startswith("Decoding is not recorded: bitsandbytes' layers")


def model_on(device):
    return make_model(head_dim=16, nsa_block_size=8, nsa_backend="auto").to(device)


class Replayed:
    """A graph that is not recorded, but computed again, to test on a CPU what is around it."""

    def __init__(self, recording, model):
        self.recording, self.model = recording, model
        recording.hidden_states = recording._step(model)

    def replay(self):
        self.recording.hidden_states.copy_(self.recording._step(self.model))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(decoding_videonsa, "DEVICES", ("cpu",))
        monkeypatch.setattr(
            decoding_videonsa._Recording,
            "_record",
            lambda self, model: setattr(self, "graph", Replayed(self, model)),
        )
    return request.param


@pytest.fixture
def recorded(monkeypatch):
    """Counts the recordings and the replayed steps."""
    counts = {"recorded": 0, "replayed": 0}
    made, replay = decoding_videonsa._Recording.__init__, decoding_videonsa._Recording.replay

    def making(self, *args):
        counts["recorded"] += 1
        made(self, *args)

    def replaying(self, *args):
        counts["replayed"] += 1
        return replay(self, *args)

    monkeypatch.setattr(decoding_videonsa._Recording, "__init__", making)
    monkeypatch.setattr(decoding_videonsa._Recording, "replay", replaying)
    return counts


def without_recording(monkeypatch):
    monkeypatch.setattr(decoding_videonsa, "RECORD_FROM", 10**9)


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 5},
    "beams": {"num_beams": 3},
    "sequences": {"do_sample": True, "num_return_sequences": 2},
    "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "chunked": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("way", WAYS)
def test_recorded_decoding_gives_the_same_tokens(way, device, recorded, monkeypatch):
    model, prompts = model_on(device), Prompts()
    inputs = on(device, prompts.batch(*rows_of(prompts)))

    def answer():
        torch.manual_seed(0)
        outputs = model.generate(
            **inputs, **GREEDY | WAYS[way], return_dict_in_generate=True, output_logits=True
        )
        return outputs.sequences, torch.stack(outputs.logits)

    tokens, logits = answer()
    assert recorded["replayed"] >= 9 and recorded["recorded"] == 1
    without_recording(monkeypatch)
    wanted, wanted_logits = answer()
    assert (logits - wanted_logits).abs().max() <= 3e-4 * wanted_logits.abs().max()
    assert torch.equal(tokens, wanted)


def test_a_recording_goes_on_where_the_cache_grew(device, recorded, monkeypatch):
    model, prompts = model_on(device), Prompts()
    inputs = on(device, prompts.batch(*rows_of(prompts)))
    monkeypatch.setattr("videonsa.cache_videonsa.SPARE", 4)
    monkeypatch.setattr("videonsa.generation_videonsa.MAX_RESERVED", 5)
    options = GREEDY | {"max_new_tokens": 24}
    tokens = model.generate(**inputs, **options)
    assert recorded["recorded"] > 2 and recorded["replayed"] > 12
    without_recording(monkeypatch)
    assert torch.equal(tokens, model.generate(**inputs, **options))


def test_what_a_step_returned_is_not_overwritten_by_the_next(device, recorded, monkeypatch):
    model, prompts, seen = model_on(device), Prompts(), []
    inputs = on(device, prompts.batch(*rows_of(prompts)))
    model.model.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
    model.generate(**inputs, **GREEDY)
    assert recorded["replayed"]
    kept, seen[:] = seen[1:], []
    without_recording(monkeypatch)
    model.generate(**inputs, **GREEDY)
    largest = max(float(x.abs().max()) for x in kept)
    for ours, wanted in zip(kept, seen[1:], strict=True):
        assert (ours - wanted).abs().max() <= 3e-4 * largest


class Stop(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.new_full(input_ids.shape[:1], input_ids.shape[1] >= self.length).bool()


class Interrupt(TextStreamer):
    """Ends `generate` from within, as Ctrl-C does."""

    def __init__(self, after):
        self.left = after

    def put(self, value):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def end(self):
        pass


def test_turns_follow_a_recorded_answer(device, recorded, monkeypatch):
    model, prompts = model_on(device), Prompts()
    inputs = on(device, prompts.batch(rows_of(prompts)[2]))

    def converse():
        cache = DynamicCache(config=model.config.text_config)
        ids, answers = inputs["input_ids"], []
        for turn in range(3):
            media = dict(inputs) if not turn else {}
            media |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            media.pop("mm_token_type_ids", None)
            stop = [Stop(ids.shape[1] + 8)] if turn == 1 else []
            ids = model.generate(**media, **GREEDY, past_key_values=cache, stopping_criteria=stop)
            answers.append(ids)
            if turn == 1:
                cache.crop(-2)
            ids = torch.cat([ids[:, :-1], ids.new_full((1, 3), 9)], 1)
        return answers

    answers = converse()
    assert recorded["recorded"] == 3
    without_recording(monkeypatch)
    for ours, wanted in zip(answers, converse(), strict=True):
        assert torch.equal(ours, wanted)


def test_an_interrupted_answer_leaves_a_usable_conversation(device, recorded):
    model, prompts = model_on(device), Prompts()
    inputs = on(device, prompts.batch(rows_of(prompts)[2]))
    cache = DynamicCache(config=model.config.text_config)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, **GREEDY, past_key_values=cache, streamer=Interrupt(8))
    assert recorded["replayed"]
    length = cache.get_seq_length()
    assert {layer.get_seq_length() for layer in cache.layers} == {length}
    whole = model.generate(**inputs, **GREEDY)
    ids = whole[:, : length + 1]
    more = model.generate(ids, **GREEDY, past_key_values=cache)
    assert torch.equal(more[:, : whole.shape[1]], whole)


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["hidden states", "eager", "offloaded", "static", "autocast"])
def test_what_cannot_be_recorded_runs_as_ever(option, recorded):
    model, prompts = model_on("cuda"), Prompts()
    options = {
        "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
        "offloaded": {"cache_implementation": "offloaded"},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }.get(option, {})
    if option == "eager":
        model.set_attn_implementation("eager")
    inputs = on("cuda", prompts.batch(rows_of(prompts)[2]))
    with torch.autocast("cuda", enabled=option == "autocast"):
        model.generate(**inputs, **GREEDY, **options)
    assert not recorded["replayed"]


@pytest.mark.gpu
def test_what_cannot_be_captured_is_said_and_runs_as_ever(recorded, monkeypatch, caplog):
    model, prompts = model_on("cuda"), Prompts()
    inputs = on("cuda", prompts.batch(rows_of(prompts)[2]))
    wanted = model.generate(**inputs, **GREEDY)
    mlp = model.model.language_model.layers[0].mlp
    forward = mlp.forward

    def waiting(x):
        float(x.sum())  # which a recording cannot do
        return forward(x)

    monkeypatch.setattr(mlp, "forward", waiting)
    assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
    model.generate(**inputs, **GREEDY | WAYS["sampled"])  # the GPU draws random numbers as ever


@pytest.mark.gpu
def test_recordings_keep_no_memory():
    model, prompts, seen = model_on("cuda"), Prompts(), []
    inputs = on("cuda", prompts.batch(rows_of(prompts)[2]))
    for _ in range(4):
        model.generate(**inputs, **GREEDY)
        gc.collect()  # what earlier tests left
        seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert seen[3] == seen[1]
