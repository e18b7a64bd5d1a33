"""Timestamps: what is written before a video's frames, and that the rest goes on as without."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

import clips
from commands.conversation import Conversation
from commands.finetuning_data import Conversations
from commands.forecast import forecast
from commands.model_loading import prepare_model
from finetuning import ROW, run, write_rows
from paths import ROOT

TOKEN = "<|video_pad|>"


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """12 s, whose stamps have one and two digits before the point."""
    return str(clips.write_clip(tmp_path_factory.mktemp("film") / "film.mp4", 120))


@pytest.fixture(scope="module")
def model():
    model = AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():  # so that answers vary with what is seen
        if weight.ndim == 2 and "embed" not in name:
            weight.data.normal_(0, 2 * weight.shape[1] ** -0.5)
    return model


def encode(processor, *videos, question="What?", **options):
    content = [*({"type": "video", "video": video} for video in videos)]
    content.append({"type": "text", "text": question})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


def text_of(processor, inputs):
    """The text, and each run of a video's tokens as their number."""
    pieces = processor.tokenizer.decode(inputs["input_ids"][0]).split(TOKEN)
    text, count = pieces[0], 0
    for piece in pieces[1:]:
        count += 1
        if piece:
            text, count = f"{text}[{count}]{piece}", 0
    return text


def test_each_step_has_its_time_as_in_qwen3_vl(processor, film):
    inputs = encode(processor, film, timestamps=True, fps=2, return_metadata=True)
    metadata = inputs["video_metadata"][0]
    times = Qwen3VLProcessor._calculate_timestamps(
        None, list(metadata.frames_indices), metadata.fps, 2
    )
    assert times[:2] == [0.25, 1.25] and len(times) == 12
    stamps = "".join(f"<{time:.1f} seconds>[15]" for time in times)
    text = text_of(processor, inputs)
    assert f"<|vision_start|>{stamps}<|vision_end|>What?" in text and "<10.2 seconds>" in text
    assert int((inputs["mm_token_type_ids"] == 2).sum()) == 12 * 15
    plain = encode(processor, film, fps=2)
    for name in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
        assert torch.equal(torch.as_tensor(inputs[name]), torch.as_tensor(plain[name]))


def test_times_are_those_in_the_file(processor, film):
    part = encode(processor, film, timestamps=True, fps=1, video_start=3, video_end=7)
    assert "<|vision_start|><3.5 seconds>[15]<5.5 seconds>[15]<|vision_end|>" in text_of(
        processor, part
    )
    frames = np.stack([clips.frame_image(n, 56, 84) for n in range(3)])  # the last stands for two
    odd = encode(processor, frames, timestamps=True, video_metadata=[{"fps": 0.5}])
    assert "<|vision_start|><1.0 seconds>[6]<4.0 seconds>[6]<|vision_end|>" in text_of(
        processor, odd
    )


def test_they_are_off_unless_the_checkpoint_or_the_call_says_so(processor, film, tmp_path):
    plain = encode(processor, film)
    assert "seconds" not in text_of(processor, plain)
    processor.save_pretrained(tmp_path / "plain")
    own = AutoProcessor.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    own.video_processor.timestamps = True
    own.save_pretrained(tmp_path / "timed")
    timed = AutoProcessor.from_pretrained(tmp_path / "timed", trust_remote_code=True)
    assert "<0.2 seconds>" in text_of(timed, encode(timed, film))
    assert torch.equal(encode(timed, film, timestamps=False)["input_ids"], plain["input_ids"])
    with pytest.raises(ValueError, match="timestamps is 'yes'; it must be True or False"):
        encode(processor, film, timestamps="yes")


def test_each_step_is_placed_like_a_video_of_its_own(processor, model, film):
    """As in Qwen3-VL: text, a step, text, ..., each past the largest position so far."""
    inputs = encode(processor, film, film, timestamps=True, fps=1)
    rows, columns = (inputs["video_grid_thw"][0, 1:] // 2).tolist()
    expected, start = [], 0
    ids = inputs["input_ids"][0].tolist()
    place = 0
    while place < len(ids):
        if ids[place] != processor.video_token_id:
            expected.append([start] * 3)
            place, start = place + 1, start + 1
            continue
        step = [[start, start + y, start + x] for y in range(rows) for x in range(columns)]
        expected += step
        place, start = place + len(step), start + max(rows, columns)
    media = {name: inputs[name] for name in ("video_grid_thw", "second_per_grid_ts")}
    positions, deltas = model.model.get_rope_index(inputs["input_ids"], **media)
    assert positions[:, 0].T.tolist() == expected
    assert int(deltas) == start - len(ids)


@pytest.mark.parametrize("lost", [1, 15, 16, 75])
def test_tokens_that_lack_are_missed(processor, model, film, lost):
    inputs = encode(processor, film, timestamps=True, fps=1)
    ids = inputs["input_ids"][0]
    places = (ids == processor.video_token_id).nonzero()[:, 0]
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[places[-lost:]] = False
    media = {name: inputs[name] for name in ("video_grid_thw", "second_per_grid_ts")}
    with pytest.raises(ValueError, match=r"where an image or video of the grid \[\d+, 6, 10\]"):
        model.model.get_rope_index(ids[keep][None], **media)


def test_streams_chunks_and_batches_answer_as_the_whole(processor, model, film, tmp_path):
    short = str(clips.write_clip(tmp_path / "short.mp4", 30))
    settings = {"timestamps": True, "fps": 1}
    whole = encode(processor, film, **settings)
    ask = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    answer = model.generate(**whole, **ask)
    stream = encode(processor, film, stream=True, **settings)
    assert torch.equal(stream["input_ids"], whole["input_ids"])
    assert torch.equal(model.generate(**stream, **ask), answer)
    assert torch.equal(model.generate(**whole, prefill_chunk_size=37, **ask), answer)
    other = model.generate(**encode(processor, short, **settings), **ask)

    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}],
            add_generation_prompt=True,
        )
    ] * 2
    both = processor(
        text=texts, videos=[film, short], padding=True, return_tensors="pt", **settings
    )
    answers = model.generate(**both, **ask)[:, both["input_ids"].shape[1] :]
    for row, alone in zip(answers, (answer, other), strict=True):
        assert row.tolist() == alone[0, -8:].tolist()


def test_a_conversation_counts_them(film, tmp_path):
    prepared = prepare_model(str(ROOT), "cpu")
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    lengths = []
    for timed in (False, True):
        processor.video_processor.timestamps = timed
        chat = Conversation(
            processor, prepared.load, prepared.forecast_memory, max_position_embeddings=10**6
        )
        turn = chat.prepare([film], "What?", lambda line: None)
        lengths.append(turn.prompt_tokens)
        assert chat.encode([turn])["input_ids"].shape[1] == turn.prompt_tokens
        assert turn.vision_tokens == 12 * 15
        assert forecast(prepared.config, turn.prompt_tokens).tokens == turn.forecast.tokens
    assert lengths[1] - lengths[0] == 10 * 9 + 2 * 10


def test_what_is_trained_is_what_is_asked(film, tmp_path):
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    processor.video_processor.timestamps = True
    conversation = [
        {"from": "human", "value": "<video>What?"},
        {"from": "gpt", "value": "from 1 s to 2 s"},
    ]
    row = {"video": film, "conversations": conversation}
    data = Conversations([str(write_rows(tmp_path / "rows.jsonl", [row]))], processor)
    item, prompt = data[0], encode(processor, film)["input_ids"][0]
    assert item["input_ids"][: len(prompt)].tolist() == prompt.tolist()
    labels = item["labels"]
    assert (labels[: len(prompt)] == -100).all()
    assert processor.tokenizer.decode(labels[labels != -100]) == "from 1 s to 2 s<|im_end|>"
    assert data.measured(0)["tokens"] == len(item["input_ids"])

    data.max_tokens = 150
    item = data[0]
    assert "over the limit of 150" in item["notes"][0][2]
    assert len(item["input_ids"]) == data.measured(0)["tokens"] <= 150


def test_training_with_them_keeps_them(folder, tmp_path):
    data = write_rows(folder / "timed.jsonl", [ROW])
    run(data, tmp_path / "tuned", timestamps=True, max_steps=1, save_strategy="steps", save_steps=1)
    tuned = AutoProcessor.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    assert tuned.video_processor.timestamps is True
