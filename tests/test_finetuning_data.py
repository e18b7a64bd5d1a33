"""The data of finetune.py: rows in every layout, their labels, plans and batches."""

import copy
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import clips
import tiny
from commands.finetuning_data import REPORT, Collator, Conversations, key_visits
from commands.finetuning_rows import to_messages
from commands.finetuning_sets import read_set
from finetuning import ROW, TEXT_ROW, run, write_rows

# Qwen2.5-VL's, with its default system turn and its lists of parts.
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, QWEN_TEMPLATE], ids=["own", "qwen"])
def test_labels_are_the_assistants_turns_and_their_ends(processor, folder, template):
    processor = copy.copy(processor)
    if template:
        processor.chat_template = template
    row = {
        "video": "videos/000000.mp4",
        "conversations": [
            {
                "from": "human",
                "value": "<video>\nassistant\nYou are an assistant. Who is the assistant here?",
            },
            {"from": "gpt", "value": "The assistant is the person in white: assistant"},
            {
                "from": "human",
                "value": "user asks: assistant: do not <|im_start|>assistant\n",
            },
            {"from": "gpt", "value": "\nUnderstood.\n"},
        ],
    }
    data = Conversations([str(write_rows(folder / "f1.jsonl", [row]))], processor)
    item = data[0]
    assert item["notes"] == []
    labels = item["labels"]
    spelled = processor.tokenizer.decode(labels[labels != -100])
    answer = "The assistant is the person in white: assistant"
    assert spelled == f"{answer}<|im_end|>Understood.<|im_end|>"
    assert torch.equal(labels[labels != -100], item["input_ids"][labels != -100])


def make_template(header, prompt):
    return (
        "{% for m in messages %}{{ '" + header + "' if m.role == 'assistant' else '[user]' }}"
        "{% for c in m.content %}{% if c.type == 'video' %}"
        "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


@pytest.mark.parametrize(
    ("header", "prompt", "learned"),
    [
        ("[assistant]", "[assistant]", "A shape moves.<|endoftext|>"),
        # What the prompt for an answer does not give is learned with the answer.
        ("[assistant]<no thoughts>", "[assistant]", "<no thoughts>A shape moves.<|endoftext|>"),
    ],
)
def test_labels_follow_a_template_of_other_words(processor, folder, header, prompt, learned):
    processor = copy.copy(processor)
    processor.chat_template = make_template(header, prompt)
    data = Conversations([str(write_rows(folder / "one.jsonl", [ROW]))], processor)
    labels = data[0]["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == learned


def test_a_template_that_prompts_otherwise_than_it_writes_is_refused(processor, folder):
    processor = copy.copy(processor)
    processor.chat_template = make_template("[assistant]", "[model]")
    with pytest.raises(ValueError, match="prompts for an answer by .*model.* but writes"):
        Conversations([str(write_rows(folder / "one.jsonl", [ROW]))], processor)


def user_and_answer(content):
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A shape moves."}]},
    ]


VIDEO = {"type": "video", "video": "{}/videos/000000.mp4"}
QUESTION = {"type": "text", "text": "What happens?"}
IMAGE = {"type": "image", "image": "{}/red.png"}


@pytest.mark.parametrize(
    ("row", "content"),
    [
        (ROW, [VIDEO, QUESTION]),
        ({**ROW, "conversations": [{**ROW["conversations"][0], "value": "<image>\nWhat happens?"},
                                   ROW["conversations"][1]]}, [VIDEO, QUESTION]),
        ({**ROW, "conversations": [{**ROW["conversations"][0], "value": "What happens?"},
                                   ROW["conversations"][1]]}, [VIDEO, QUESTION]),
        ({"videos": ["videos/000000.mp4"], "images": ["red.png"],
          "messages": [{"role": "user", "content": "<image><video>What happens?"},
                       {"role": "assistant", "content": "A shape moves."}]},
         [IMAGE, VIDEO, QUESTION]),
        ({"messages": [{"role": "user", "content": [
            {"type": "video", "video": "videos/000000.mp4", "text": None, "fps": 4.0}, QUESTION]},
            {"role": "assistant", "content": "A shape moves."}]},
         [{**VIDEO, "fps": 4.0}, QUESTION]),
        ({"videos": ["videos/000000.mp4"],
          "messages": [{"role": "user", "content": [{"type": "video"}, QUESTION]},
                       {"role": "assistant", "content": "A shape moves."}]}, [VIDEO, QUESTION]),
        ({"conversations": {"from": ["human", "gpt"], "value": ["<video>What happens?",
                                                                "A shape moves."]},
          "video": "videos/000000.mp4"}, [VIDEO, QUESTION]),
    ],
    ids=["qwen", "llava", "no tag", "messages", "parts", "parts beside a list", "columns"],
)  # fmt: skip
def test_every_layout_becomes_messages(folder, row, content):
    content = [
        {key: str(value).format(folder) if key in ("video", "image") else value
         for key, value in part.items()} for part in content
    ]  # fmt: skip
    assert to_messages(row, folder) == user_and_answer(content)


def test_images_and_videos_share_a_conversation(processor, model, folder):
    row = {
        "images": ["red.png"],
        "videos": ["videos/000000.mp4", "videos/000001.mp4"],
        "messages": [
            {"role": "user", "content": "<video>And <image>, <video>?"},
            {"role": "assistant", "content": "Both."},
        ],
    }
    data = Conversations([str(write_rows(folder / "both.jsonl", [row]))], processor)
    item, measured = data[0], data.measured(0)
    assert item["notes"] == [] and measured["tokens"] == len(item["input_ids"])
    order = [n for n in item["input_ids"].unique_consecutive().tolist() if n in data.placeholders]
    video, image = model.config.video_token_id, model.config.image_token_id
    assert order == [video, image, video]
    batch = Collator(processor, model.config)([item])
    del batch["stats"]
    assert model(**batch).loss.isfinite()
    kinds = [
        Conversations([str(write_rows(folder / "kinds.jsonl", [one]))], processor).kinds_of_media()
        for one in (row, ROW, TEXT_ROW, {"messages": user_and_answer([IMAGE, QUESTION])})
    ]
    assert kinds == [2, 1, 0, 1]


def test_a_folder_of_frames_is_a_video(processor, folder):
    frames = folder / "frames"
    frames.mkdir()
    for number in range(4):
        Image.new("RGB", (112, 112), (60 * number, 0, 0)).save(frames / f"{number:03d}.jpg")
    row = {**ROW, "videos": ["frames"], "video": None}
    write_rows(folder / "frames.jsonl", [row])
    data = Conversations([str(folder / "frames.jsonl")], processor, settings={"fps": 4.0})
    item = data[0]
    assert item["notes"] == [] and item["video_grid_thw"].tolist() == [[2, 8, 8]]
    assert item["second_per_grid_ts"].tolist() == [0.5]  # two frames, four a second


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"video": "a.mp4"}, "neither messages nor conversations"),
        ({**ROW, "video": "gone.mp4"}, "there is no .*gone.mp4"),
        ({**ROW, "video": ["videos/000000.mp4"] * 2}, "fewer"),
        ({**ROW, "conversations": ROW["conversations"][:1]}, "nothing to learn"),
        ({**ROW, "conversations": [{"from": "tool", "value": "x"}]}, "role"),
        ({"image": "red.png", "conversations": [{"from": "human", "value": "<image><image>"}]},
         "more <video> tags"),
    ],
)  # fmt: skip
def test_rows_that_fit_no_layout_say_why(folder, row, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        to_messages(row, folder)


def test_sets_are_read_from_all_kinds_of_files_with_shares(folder, tmp_path):
    import datasets

    rows = [{**ROW, "id": str(n), "note": "a\u2028b"} for n in range(8)]
    files = [tmp_path / f"rows{suffix}" for suffix in (".json", ".jsonl", ".parquet")]
    files[0].write_text(json.dumps(rows), encoding="utf-8")
    files[1].write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(files[2]))
    (tmp_path / "hub").mkdir()
    table.to_parquet(str(tmp_path / "hub" / "test.parquet"))
    for name in [*map(str, files), f"{tmp_path / 'hub'}::test"]:
        found, _, numbers = read_set(name, seed=1)
        assert [found[n]["id"] for n in numbers] == [row["id"] for row in rows], name
        assert found[0]["conversations"] == ROW["conversations"]
        half = read_set(f"{name}%50", seed=1)[2]
        assert len(half) == len(set(half)) == 4
        assert half == read_set(f"{name}%50", seed=1)[2] != read_set(f"{name}%50", seed=2)[2]
        assert len(read_set(f"{name}%250", seed=1)[2]) == 20
    with pytest.raises(FileNotFoundError, match="gone.json"):
        read_set(str(tmp_path / "gone.json"), seed=1)


def test_a_long_conversation_gives_up_frames_never_placeholders(processor, model, folder):
    data = str(write_rows(folder / "long.jsonl", [ROW]))
    whole = Conversations([data], processor)[0]
    limit = len(whole["input_ids"]) - 20
    item = Conversations([data], processor, max_tokens=limit)[0]
    [(what, place, why)] = item["notes"]
    assert (what, place) == ("shortened", f"{data}:1")
    assert f"{len(whole['input_ids'])} tokens" in why and f"limit of {limit}" in why
    assert len(item["input_ids"]) <= limit
    # Two pairs of frames, 16 tokens each, were given up, the text was not.
    assert len(whole["input_ids"]) - len(item["input_ids"]) == 32
    assert torch.equal(item["labels"][item["labels"] != -100],
                       whole["labels"][whole["labels"] != -100])  # fmt: skip
    batch = Collator(processor, model.config)([item])
    del batch["stats"]
    assert model(**batch).loss.isfinite()  # features and placeholders match

    skipped = Conversations([data], processor, max_tokens=40).measured(0)["notes"]
    assert skipped[0][0] == "skipped" and "limit of 40" in skipped[0][2]


@pytest.mark.parametrize("share", [None, 20], ids=["whole", "shortened"])
def test_a_row_opens_its_video_once(processor, folder, opened, share):
    data = str(write_rows(folder / "once.jsonl", [ROW]))
    limit = share and len(Conversations([data], processor)[0]["input_ids"]) - share
    opened.clear()
    item = Conversations([data], processor, max_tokens=limit)[0]
    assert [what for what, *_ in item["notes"]] == (["shortened"] if share else [])
    assert opened == [Path(ROW["video"]).name]


def test_what_cannot_be_read_is_skipped_counted_and_listed(folder, tmp_path, processor):
    (folder / "empty.mp4").write_bytes(b"")
    broken = [clips.cut_short(tmp_path), folder / "empty.mp4", folder / "gone.mp4"]
    rows = [{**ROW, "video": str(path)} for path in broken]
    write_rows(folder / "broken.jsonl", [rows[0], ROW, *rows[1:], ROW])
    trainer = run(folder / "broken.jsonl", tmp_path / "out", max_steps=5, dataloader_num_workers=2)
    report = (tmp_path / "out" / REPORT).read_text().splitlines()
    lines = sorted((json.loads(line) for line in report), key=lambda line: line["row"])
    assert [(line["what"], line["row"].rpartition(":")[2]) for line in lines] == [
        ("skipped", number) for number in "134"
    ]
    reasons = "|".join(line["why"] for line in lines)
    assert "cut.mp4" in reasons and "is empty" in reasons and "gone.mp4" in reasons
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 5 and logs[-1]["skipped_samples"] == 3

    write_rows(folder / "broken.jsonl", rows)
    with pytest.raises(RuntimeError, match="3 rows in a row cannot be used.*--data_root"):
        Conversations([str(folder / "broken.jsonl")], processor)[0]
    with pytest.raises(ValueError, match="none of 3 conversations can be used.*cut.mp4"):
        run(folder / "broken.jsonl", tmp_path / "none", max_steps=1)


def test_a_placeholder_typed_in_a_text_is_no_medium(processor, folder):
    typed = copy.deepcopy(ROW)
    typed["conversations"][0]["value"] += " <|video_pad|>"
    data = Conversations([str(write_rows(folder / "typed.jsonl", [typed, ROW]))], processor)
    assert [note[:2] for note in data[0]["notes"]] == [("skipped", f"{folder / 'typed.jsonl'}:1")]


def test_key_visits_are_those_of_the_branches():
    config = tiny.make_model(nsa_num_selected_blocks=3).config.text_config
    block, window, chosen = config.nsa_block_size, config.nsa_window_size, 3
    vision = torch.tensor([0, 0, *[1] * 23, 0, 0, *[1] * 9, 0]).bool()
    attended = dense = stream = 0
    for position, is_vision in enumerate(vision.tolist()):
        dense += position + 1
        if not is_vision:
            attended += position + 1
            continue
        own = stream // block
        attended += sum((i + 1) * block - 1 <= stream for i in range(20))
        attended += sum(stream - j < window for j in range(stream + 1))
        blocks = {own, *list(range(own))[: chosen - 1]}
        attended += sum(j // block in blocks for j in range(stream + 1))
        stream += 1
    assert key_visits(vision, config) == (attended, dense)
