"""Fine-tuning through finetune.py: its data, what trains, what it logs, saves and resumes."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import clips
import finetune
import make_clips
import tiny
from commands import finetuning_model
from commands.checkpoint_files import REQUIRED_FILES
from commands.finetuning_data import REPORT, Collator, Conversations, key_visits
from commands.finetuning_model import part_of
from commands.finetuning_rows import read_set, to_messages
from commands.finetuning_saving import COMPLETE, whole_checkpoints
from nsa_reference import BRANCHES
from paths import ROOT

ROW = {
    "video": "videos/000000.mp4",
    "conversations": [
        {"from": "human", "value": "<video>\nWhat happens?"},
        {"from": "gpt", "value": "A shape moves."},
    ],
}
TEXT_ROW = {
    "messages": [
        {"role": "user", "content": "What is an <image> tag?"},
        {"role": "assistant", "content": "A tag."},
    ]
}
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two clips of 4 s, their questions in clips.jsonl, some with new_kind.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    write_clips(folder, "new_kind.jsonl", make_clips.NEW_KINDS)
    write_clips(folder, "clips.jsonl", make_clips.KINDS)
    Image.new("RGB", (120, 90), "red").save(folder / "red.png")
    return folder


def write_clips(folder, name, kinds):
    with pytest.MonkeyPatch.context() as patch:
        argv = ["--out", folder, "--seed", 5, "--count", 2, "--frames", 8]
        argv += ["--kinds", ",".join(kinds)]
        patch.setattr(sys, "argv", ["make_clips.py", *map(str, argv)])
        make_clips.main()
    (folder / "clips.jsonl").rename(folder / name)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(
        ROOT, trust_remote_code=True, dtype=torch.float32
    )


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mixed_rows(folder):
    """Six rows, half of them text alone: with batches of one, processes differ in what they see."""
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()[:6]]
    rows[1] = rows[2] = rows[4] = TEXT_ROW
    return write_rows(folder / "mixed.jsonl", rows)


def flags(data, out, **settings):
    settings = {"model_name_or_path": ROOT, "data": data, "output_dir": out} | settings
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": "true"} | settings
    settings = {"logging_steps": 1, "learning_rate": 1e-3, "save_strategy": "no"} | settings
    argv = []
    for name, value in settings.items():
        argv += [f"--{name}"] + ([] if value is True else [str(value)])
    return argv


def run(data, out, **settings):
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return finetune.main(flags(data, out, **settings))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def losses_on_disk(out):
    history = json.loads((Path(out) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def start(script, argv, processes=None):
    """Runs a script as users do; `processes` of them with torchrun."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in (*command, script, *argv)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


# The data.


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


def test_labels_follow_a_template_of_other_words(processor, folder):
    processor = copy.copy(processor)
    processor.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{% if c.type == 'video' %}"
        "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    data = Conversations([str(write_rows(folder / "one.jsonl", [ROW]))], processor)
    labels = data[0]["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == "A shape moves.<|endoftext|>"


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


def test_what_cannot_be_read_is_skipped_counted_and_listed(folder, tmp_path):
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

    with pytest.raises(RuntimeError, match="3 rows in a row cannot be used.*--data_root"):
        run(write_rows(folder / "broken.jsonl", rows), tmp_path / "none", max_steps=1)


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


# The loss and what trains.


@pytest.fixture
def batch(processor, model, folder):
    """Two conversations of different lengths, the second text alone."""
    write_rows(folder / "two.jsonl", [ROW, TEXT_ROW])
    data = Conversations([str(folder / "two.jsonl")], processor)
    return Collator(processor, model.config)([data[0], data[1]])


def test_the_loss_of_labelled_rows_is_that_of_all_logits(model, batch):
    del batch["stats"]
    assert len(batch["logits_to_keep"]) < batch["input_ids"].shape[1] / 2
    output = model(**batch)
    assert output.logits.shape[1] == len(batch["logits_to_keep"])
    whole = {k: v for k, v in batch.items() if k not in ("logits_to_keep", "shift_labels")}
    torch.testing.assert_close(output.loss, model(**whole).loss, rtol=1e-6, atol=0)


def test_the_loss_of_text_is_stock_qwens(processor, model, folder):
    data = Conversations([str(write_rows(folder / "text.jsonl", [TEXT_ROW]))], processor)
    batch = Collator(processor, model.config)([data[0]])
    twin = tiny.stock_twin(model)
    stock = twin(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")})
    del batch["stats"]
    torch.testing.assert_close(model.eval()(**batch).loss, stock.loss, rtol=1e-6, atol=0)


def gradients_of_one_step(folder, tmp_path, **settings):
    """{name: largest gradient} after the backward pass of one step, without an update."""
    found = {}

    class Watching(finetune.VideoNSATrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[name] = parameter.grad.clone()
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "VideoNSATrainer", Watching)
        trainer = run(
            write_rows(folder / "one.jsonl", [ROW]), tmp_path / "out", max_steps=1, **settings
        )
    return trainer, found


def test_gradients_reach_every_branch_and_part(folder, tmp_path):
    trainer, grads = gradients_of_one_step(folder, tmp_path, train="vision,merger,llm,gates")
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == set(grads) == {name for name, _ in trainer.model.named_parameters()}
    # Nothing reads the last layer's vision rows: its gates never learn, here or in any model.
    for layer in range(trainer.model.config.text_config.num_hidden_layers - 1):
        attention = f"model.language_model.layers.{layer}.self_attn"
        for branch in range(3):
            # Of a trained gate that is shut for good, no gradient may be left.
            assert grads[f"{attention}.g_proj_2.weight"][branch::3].any(1).float().mean() > 0.5
        for name in ("g_proj_1", "q_proj", "k_proj", "v_proj"):
            assert grads[f"{attention}.{name}.weight"].any(), name
    assert all(g.any() for name, g in grads.items() if ".visual." in name and "weight" in name)


@pytest.mark.parametrize(
    "checkpointing",
    [
        {},
        {"gradient_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": '{"use_reentrant": true}',
        },
    ],
    ids=["plain", "checkpointing", "reentrant"],
)
def test_only_what_is_named_trains(folder, tmp_path, checkpointing):
    before = load_file(ROOT / "model.safetensors")
    trainer, grads = gradients_of_one_step(
        folder, tmp_path, train="merger,gates", warmup_steps=0, **checkpointing
    )
    assert {part_of(name) for name in grads} == {"merger", "gates"}
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {part_of(n) for n in after if not torch.equal(after[n], before[n].float())}
    assert changed == {"merger", "gates"}


def test_parts_have_their_own_learning_rates(folder, tmp_path):
    trainer = run(
        folder / "clips.jsonl", tmp_path, max_steps=1, train="vision,merger,llm,gates",
        learning_rate=1e-5, gate_lr=1e-3, vision_lr=1e-6, merger_lr=1e-4, weight_decay=0.1,
    )  # fmt: skip
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    seen = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            seen.setdefault(part_of(name), set()).add(group["initial_lr"])
            if name.endswith(".bias"):
                assert group["weight_decay"] == 0, name
            elif parameter.ndim > 1:
                assert group["weight_decay"] == 0.1, name
    assert not names
    assert seen == {"llm": {1e-5}, "gates": {1e-3}, "vision": {1e-6}, "merger": {1e-4}}


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_over_a_frozen_tower_with_checkpointing(folder, tmp_path, reentrant):
    outputs = []
    original = finetuning_model.run_frozen_tower_without_graph

    def watch(visual):
        original(visual)
        visual.merger.register_forward_hook(lambda *a: outputs.append(a[-1].requires_grad))
        visual.patch_embed.register_forward_hook(lambda *a: outputs.append(a[-1].grad_fn))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning_model, "run_frozen_tower_without_graph", watch)
        trainer, grads = gradients_of_one_step(
            folder, tmp_path, lora_r=2, gradient_checkpointing=True,
            gradient_checkpointing_kwargs=json.dumps({"use_reentrant": reentrant}),
        )  # fmt: skip
    assert outputs and not any(outputs)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == set(grads)
    assert {name.rsplit(".", 3)[-3] for name in trained} == {"lora_A", "lora_B", "modules_to_save"}
    assert all(g.any() for name, g in grads.items() if "lora_B" in name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_in_the_vision_tower_with_checkpointing(folder, tmp_path, reentrant):
    _, grads = gradients_of_one_step(
        folder, tmp_path, lora_r=2, train="vision,gates", lora_modules="qkv",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=json.dumps({"use_reentrant": reentrant}),
    )  # fmt: skip
    adapters = {name: g for name, g in grads.items() if "lora_B" in name}
    assert len(adapters) == 3 and all(".visual.blocks." in name for name in adapters)
    assert all(g.any() for g in adapters.values())


@pytest.mark.parametrize("adapters", [{}, {"lora_r": 2}], ids=["all", "lora"])
def test_what_trains_is_float32_and_the_rest_bfloat16(folder, tmp_path, adapters):
    seen = set()

    class Watching(finetune.VideoNSATrainer):
        def training_step(self, model, *args, **kwargs):
            seen.update((p.requires_grad, p.dtype) for p in model.parameters())
            return super().training_step(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "VideoNSATrainer", Watching)
        # A new kind of question: of those it knows, the loss would be all rounding.
        data = folder / "new_kind.jsonl"
        trainer = run(data, tmp_path, max_steps=3, bf16=True, **adapters)
    assert seen == {(True, torch.float32), (False, torch.bfloat16)}
    exact = run(data, tmp_path / "exact", max_steps=3, **adapters)
    assert losses(trainer) == pytest.approx(losses(exact), rel=0.05)
    if not adapters:
        weights = load_file(tmp_path / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_log_has_the_gates_and_what_is_attended(folder, tmp_path, model, processor):
    trainer = run(
        write_rows(folder / "one.jsonl", [ROW]), tmp_path, max_steps=2, learning_rate=0,
        gates_by_layer_every=2,
    )  # fmt: skip
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    data = Conversations([str(folder / "one.jsonl")], processor)
    batch = Collator(processor, model.config)([data[0]])
    stats, used = batch.pop("stats"), []
    layers = model.model.language_model.layers
    hooks = [
        layer.self_attn.g_proj_2.register_forward_hook(lambda *a: used.append(a[-1]))
        for layer in layers
    ]
    model(**batch)
    [hook.remove() for hook in hooks]
    gates = (torch.stack(used) / 0.3).sigmoid().unflatten(-1, (-1, 3)).mean((1, 2))
    assert gates.shape == (len(layers), 3)
    for branch, name in enumerate(BRANCHES):
        assert first[f"gate_{name}"] == pytest.approx(float(gates.mean(0)[branch]), rel=1e-5)
        for layer in range(len(layers)):
            logged = first[f"gates_by_layer/{layer:02d}_{name}"]
            assert logged == pytest.approx(float(gates[layer, branch]), rel=1e-5)
    assert not any("by_layer" in name for name in second)
    assert first["keys_attended"] == stats["attended"] / stats["dense"]
    assert first["tokens_per_second"] > 0 and first["skipped_samples"] == 0


def test_padding_does_not_change_what_is_learned(folder, tmp_path):
    """Two conversations in one batch give the gradient of two batches of one.

    Their answers are equally long, since each batch's loss is a mean over its tokens.
    """
    longer = copy.deepcopy(ROW)
    longer["conversations"][0]["value"] += " Say what the shape does in the video."
    data = write_rows(folder / "pair.jsonl", [ROW, longer])
    one = run(data, tmp_path / "one", max_steps=1, per_device_train_batch_size=2)
    two = run(
        data, tmp_path / "two", max_steps=1, per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    norms = [t.state.log_history[0]["grad_norm"] for t in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_new_kind_of_question_is_learned(folder, tmp_path):
    trainer = run(
        folder / "new_kind.jsonl", tmp_path, max_steps=25, learning_rate=2e-3,
        per_device_train_batch_size=2, gate_lr=1e-4, lr_scheduler_type="constant",
    )  # fmt: skip
    first, last = losses(trainer)[0], sum(losses(trainer)[-3:]) / 3
    assert last < 0.5 < first


# Saving and resuming.


@pytest.mark.parametrize("adapters", [{}, {"lora_r": 2, "lora_dropout": 0.2}], ids=["all", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path, adapters):
    settings = adapters | {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "warmup_steps": 2,
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "gate_lr": 1e-2,
        "gradient_checkpointing": True,
    }  # fmt: skip
    data = folder / "clips.jsonl"
    whole = run(data, tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = run(data, tmp_path / "again", resume_from_checkpoint="last", **settings)
    assert losses(again) == losses(whole) and len(losses(whole)) == 6
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [one.name for one in whole_checkpoints(tmp_path / "whole")] == [
        "checkpoint-3", "checkpoint-6",
    ]  # fmt: skip


def test_resuming_from_other_weights_is_an_error(folder, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lora_r": 2}
    checkpoint = tmp_path / "checkpoint-1"
    run(folder / "clips.jsonl", tmp_path, **settings)
    modules = "q_proj,k_proj,v_proj,o_proj,up_proj"
    with pytest.raises(ValueError, match="the checkpoint lacks 8 weights .* has 0 others"):
        run(folder / "clips.jsonl", tmp_path, **settings, lora_modules=modules,
            resume_from_checkpoint=checkpoint)  # fmt: skip
    weights = load_file(checkpoint / "adapter_model.safetensors")
    gate = next(name for name in weights if name.endswith("layers.1.self_attn.g_proj_2.weight"))
    weights[gate.replace("layers.1", "layers.9")] = weights.pop(gate)
    save_file(weights, checkpoint / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint lacks 1 weights .* has 1 others"):
        run(folder / "clips.jsonl", tmp_path, **settings, resume_from_checkpoint=checkpoint)


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import finetune
from transformers import TrainerState
save = TrainerState.save_to_json
def die(self, path):
    if self.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, path)
TrainerState.save_to_json = die
finetune.main()
"""


def test_a_kill_during_a_save_leaves_the_last_whole_checkpoint(folder, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT)))
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    argv = flags(folder / "clips.jsonl", tmp_path / "out", **settings)
    assert start(script, argv).returncode == -signal.SIGKILL
    assert [path.name for path in whole_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    half = tmp_path / "out" / "checkpoint-2"
    assert (half / "model.safetensors").exists() and (half / "optimizer.pt").exists()
    with pytest.raises(ValueError, match=f"no file {COMPLETE}.* is .*checkpoint-1"):
        run(folder / "clips.jsonl", tmp_path / "out", **settings, resume_from_checkpoint=half)
    again = run(folder / "clips.jsonl", tmp_path / "out", **settings, resume_from_checkpoint="last")
    assert again.state.global_step == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if "ch" in path.name[:2]) == [
        "chat_template.jinja", "checkpoint-3",
    ]  # fmt: skip
    never_killed = run(folder / "clips.jsonl", tmp_path / "new", max_steps=3)
    assert losses(again) == losses(never_killed)


def logits_of(model, batch):
    return model.eval()(**{k: v for k, v in batch.items() if k != "stats"}).logits


def test_what_is_saved_loads_by_itself(folder, tmp_path, batch):
    out = tmp_path / "out"
    trainer = run(folder / "clips.jsonl", out, max_steps=2, save_strategy="steps", save_steps=2)
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["use_cache"] and config.get("use_cache", True)
    for saved in (out, out / "checkpoint-2"):
        moved = tmp_path / f"moved_{saved.name}"
        shutil.copytree(saved, moved)
        model = AutoModelForImageTextToText.from_pretrained(moved, trust_remote_code=True)
        assert torch.equal(logits_of(model, batch), logits_of(trainer.model, batch))
        processor = AutoProcessor.from_pretrained(moved, trust_remote_code=True)
        assert type(processor).__name__ == "VideoNSAProcessor"


def test_adapters_load_with_their_gates_and_merge(folder, tmp_path, batch, model):
    import peft

    out = tmp_path / "out"
    trainer = run(folder / "clips.jsonl", out, max_steps=3, lora_r=2, gate_lr=1e-2, merge_lora=True)
    expected = logits_of(trainer.model, batch)
    base = AutoModelForImageTextToText.from_pretrained(
        ROOT, trust_remote_code=True, dtype=torch.float32
    )
    adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
    assert torch.equal(logits_of(adapted, batch), expected)
    merged = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    torch.testing.assert_close(logits_of(merged, batch), expected, rtol=1e-4, atol=1e-4)

    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    gates = {n: p for n, p in trained.items() if ".g_proj_" in n}
    assert gates and not torch.equal(expected, logits_of(model, batch))
    for name, gate in gates.items():
        plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert torch.equal(merged.get_parameter(plain), gate), name
        assert torch.equal(adapted.get_parameter(name), gate), name
        last = f".layers.{model.config.text_config.num_hidden_layers - 1}." in name
        assert torch.equal(model.get_parameter(plain), gate) == last, name


class Hub:
    """Stands for the Hub: commits go to a folder, as `HfApi.upload_folder` would make them."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.commits = folder, []
        repo = SimpleNamespace(repo_id="someone/tuned")
        monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **kwargs: repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload)
        monkeypatch.setattr(HfApi, "run_as_future", self.run)

    @staticmethod
    def run(api, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def upload(
        self, *, repo_id, folder_path, commit_message, path_in_repo="", allow_patterns="*",
        delete_patterns=None, **access,
    ):  # fmt: skip
        assert repo_id == "someone/tuned"
        self.commits.append(commit_message)
        source, target = Path(folder_path), self.folder / path_in_repo
        names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        there = [str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()]
        for name in filter_repo_objects(there, allow_patterns=delete_patterns or []):
            (target / name).unlink()
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)


def names_in(folder):
    return {path.name for path in Path(folder).iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({}, True),
        ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}, True),
        ({"lora_r": 2}, False),
        ({"lora_r": 2, "save_strategy": "steps", "save_steps": 1}, False),
        ({"lora_r": 2, "merge_lora": True}, True),
        ({"lora_r": 2, "merge_lora": True, "save_strategy": "steps", "save_steps": 1}, True),
        ({"lora_r": 2, "merge_lora": True, "hub_strategy": "all_checkpoints",
          "save_strategy": "epoch"}, True),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_folder_and_the_hub_hold_what_was_trained(
    folder, tmp_path, monkeypatch, batch, settings, whole
):
    import peft

    out, repo = tmp_path / "out", tmp_path / "hub"
    hub = Hub(repo, monkeypatch)
    trainer = run(
        folder / "clips.jsonl", out, max_steps=2, gate_lr=1e-2, push_to_hub=True, **settings
    )
    expected = logits_of(trainer.model, batch)
    saves = {"steps": 2, "epoch": 1, "no": 0}[settings.get("save_strategy", "no")]
    saves *= 2 if "hub_strategy" in settings else 1
    assert len(hub.commits) == saves + 1 and hub.commits[-1] == "End of training"
    for place in (out, repo, *whole_checkpoints(out)[-1:]):
        names = names_in(place)
        adapter = {"adapter_config.json", "adapter_model.safetensors"}
        if place.parent == out and "lora_r" in settings or not whole:
            assert adapter < names and not {"config.json", "model.safetensors"} & names
        else:
            assert not adapter & names and set(REQUIRED_FILES) | {"model.safetensors"} < names
        source = ROOT if adapter < names else place
        loaded = AutoModelForImageTextToText.from_pretrained(
            source, trust_remote_code=True, dtype=torch.float32
        )
        if adapter < names:
            loaded = peft.PeftModel.from_pretrained(loaded, place)
        logits = logits_of(loaded, batch)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
        assert type(processor).__name__ == "VideoNSAProcessor"
        card = (place / "README.md").read_text()
        assert str(folder) not in card and str(ROOT) not in card and str(tmp_path) not in card
        assert "`clips.jsonl`" in card
    assert not {"data_report.jsonl", "training_args.bin", COMPLETE} & names_in(repo)


# Several processes.


def sharded(**settings):
    layers = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]
    config = {"version": 2, "transformer_layer_cls_to_wrap": layers} | settings
    config |= {"cpu_ram_efficient_loading": False, "state_dict_type": "SHARDED_STATE_DICT"}
    return {"fsdp": True, "fsdp_config": json.dumps(config)}


ALL_PARTS = {"train": "vision,merger,llm,gates", "max_steps": 3, "learning_rate": 1e-4}
ADAPTERS = {"lora_r": 2, "merge_lora": True, "max_steps": 3, "gradient_checkpointing": True}
CASES = {
    "replicated": (ALL_PARTS, {"ddp_backend": "gloo"}),
    "sharded": (ALL_PARTS, sharded(activation_checkpointing=True)),
    "sharded adapters": (ADAPTERS, sharded()),
}


@pytest.fixture(scope="module")
def two_processes(folder, tmp_path_factory):
    """The output folder of each case, and a folder resumed from the last one's middle."""
    root, mixed = tmp_path_factory.mktemp("two"), mixed_rows(folder)
    save = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
    argvs = [
        flags(mixed, root / name, **save, **settings, **parallel)
        for name, (settings, parallel) in CASES.items()
    ]
    resume = {"resume_from_checkpoint": root / "sharded adapters" / "checkpoint-2"}
    argvs.append(flags(mixed, root / "resumed", **save, **ADAPTERS, **sharded(), **resume))
    done = start(ROOT / "tests" / "finetune_on_cpus.py", [json.dumps(argvs)], processes=2)
    assert done.returncode == 0, done.stderr[-5000:]
    return root


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_that_accumulates(folder, tmp_path, two_processes, name):
    one = run(
        mixed_rows(folder), tmp_path, gradient_accumulation_steps=2,
        per_device_train_batch_size=1, **CASES[name][0],
    )  # fmt: skip
    assert losses_on_disk(two_processes / name) == pytest.approx(losses(one), rel=1e-4)
    before = load_file(ROOT / "model.safetensors")
    mine, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, two_processes / name))
    for key, weight in mine.items():
        moved = (weight - before[key].float()).abs().max()
        assert (theirs[key] - weight).abs().max() <= 0.02 * moved, key
    model = AutoModelForImageTextToText.from_pretrained(
        two_processes / name, trust_remote_code=True
    )
    assert type(model).__name__ == "VideoNSAForConditionalGeneration"


def test_sharded_adapters_resume(two_processes):
    assert losses_on_disk(two_processes / "resumed") == losses_on_disk(
        two_processes / "sharded adapters"
    )


# The command.


def test_a_dry_run_measures_and_trains_nothing(folder, tmp_path, capsys):
    data = write_rows(folder / "dry.jsonl", [ROW, {**ROW, "video": "gone.mp4"}, TEXT_ROW])
    assert run(data, tmp_path, dry_run=True, per_device_train_batch_size=2, max_tokens=70) is None
    printed = capsys.readouterr().out
    assert "3 conversations" in printed
    assert "1 would be skipped, 1 give up frames" in printed
    assert "gone.mp4" in printed
    assert "Tokens a conversation:" in printed and "GiB" in printed
    assert "6 steps of 2 conversations (3 epochs)" in printed
    assert [path.name for path in tmp_path.iterdir()] == [REPORT]


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        finetune.parse(["--help"])
    printed = capsys.readouterr().out
    assert finetune.__doc__ in printed and "set.json%50" in printed


def test_settings_come_from_a_file_and_flags_override_it(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {ROOT}\ndata: [{folder}/clips.jsonl%50, {folder}/new_kind.jsonl]\n"
        f"output_dir: {tmp_path}\nlearning_rate: 1.0e-5\ngate_lr: 0.001\nbf16: false\n"
        "lr_scheduler_kwargs: {min_lr: 1.0e-7}\nlr_scheduler_type: cosine_with_min_lr\n"
        "gradient_checkpointing: true\nmax_tokens: null\n"
    )
    model_args, data_args, args = finetune.parse([str(recipe), "--learning_rate", "2e-5"])
    assert args.learning_rate == 2e-5 and args.gate_lr == 1e-3 and not args.bf16
    assert args.gradient_checkpointing and args.lr_scheduler_kwargs == {"min_lr": 1e-7}
    assert len(data_args.data) == 2 and data_args.max_tokens is None
    with pytest.raises(ValueError, match="--unheard_of"):
        finetune.parse([str(recipe), "--unheard_of", "1"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": "gate"}, "--train is 'gate'"),
        ({"train": "gates", "lora_r": 4}, "--lora_r 4 adapts"),
        ({"merge_lora": True}, "no adapter to merge"),
        ({"lora_r": 4, "fsdp_config": '{"activation_checkpointing": true}', "fsdp": True},
         "--gradient_checkpointing instead"),
    ],
)  # fmt: skip
def test_settings_that_contradict_are_refused(folder, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        run(folder / "clips.jsonl", tmp_path, **settings)


def test_recipes_are_settings_that_parse(tmp_path):
    recipes = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        own = recipe.read_text().replace("deepspeed:", "run_name:")  # it is not installed here
        (tmp_path / recipe.name).write_text(own)
        argv = [tmp_path / recipe.name, *flags("x.json", "out", bf16="false")]
        _, data_args, args = finetune.parse([str(part) for part in argv])
        assert data_args.max_tokens and args.save_total_limit == 2
