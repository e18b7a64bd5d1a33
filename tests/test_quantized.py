"""Weights of 8 and 4 bits: what is quantised, what never is, and that it is the same after a save.

Each library's tests are skipped where it is not installed; two kinds of torchao's need a GPU.
"""

import json
import random
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache
from videonsa import call_checks_videonsa
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.float8_videonsa import takes_float8
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

import ask
import finetune
import make_clips
import publish
from commands.checkpoint_files import CODE_FILES, listed_files
from commands.evaluation_manifest import weights_digest
from commands.evaluation_model import load_model
from commands.finetuning_flags import refuse_quantised
from commands.model_loading import prepare_model
from commands.quantized_loading import (
    LOAD_IN,
    PACKAGES,
    loading_of,
    loading_options,
    quantization_config,
)
from convert_checkpoint import convert
from finetuning import ROW, flags, losses, run, write_rows
from measure_tiny import answer_all
from paths import ROOT
from tiny import Prompts, config_fields, stock_twin

ON_A_CPU = [name for name in LOAD_IN if name not in ("int4", "float8-dynamic")]
KEPT = {"g_proj_1", "g_proj_2", "lm_head"}
TOWER = {"qkv", "proj", "gate_proj", "up_proj", "down_proj", "0", "2"}
LANGUAGE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def need(name):
    pytest.importorskip(PACKAGES[name][1])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint whose widths every library takes, and whose blocks the kernels."""
    fields = config_fields(heads=4, kv_heads=2, head_dim=64, nsa_block_size=8)
    fields["text_config"]["intermediate_size"] = 512
    fields["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128}
    torch.manual_seed(0)
    model = VideoNSAForConditionalGeneration._from_config(VideoNSAConfig(**fields))
    folder = tmp_path_factory.mktemp("wide")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder, name=None, **options):
    quantised = loading_options(name)
    return VideoNSAForConditionalGeneration.from_pretrained(
        folder, **{"dtype": torch.bfloat16, **quantised, **options}
    )


def linear_layers(model):
    """{name: whether it is quantised} of everything that is or was a linear layer."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "in_features") and weight is not None:
            plain = type(module) is nn.Linear and type(weight) is nn.Parameter
            found[name] = not (plain and weight.is_floating_point())
    return found


def quantised_parts(model):
    """(parts of the language model, parts of the tower) that are quantised, by their last names."""
    layers = [name for name, quantised in linear_layers(model).items() if quantised]
    tower = {name.rpartition(".")[2] for name in layers if ".visual." in name}
    return {name.rpartition(".")[2] for name in layers if ".visual." not in name}, tower


def logits(model):
    prompts = Prompts()
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 4), 4, ("image", 2, 2), 5))
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", ON_A_CPU)
def test_the_language_model_is_quantised_and_nothing_else(name, wide):
    need(name)
    model = load(wide, name)
    assert quantised_parts(model) == (LANGUAGE, set())
    assert len(linear_layers(model)) == 2 * 9 + 1 + 2 * 5 + 2  # of two layers each, head and merger
    others = [weight for weight in model.parameters() if type(weight) is nn.Parameter]
    assert {weight.dtype for weight in others} == {torch.bfloat16}
    error = (logits(model) - logits(load(wide))).norm() / logits(load(wide)).norm()
    assert 0 < error < 1


@pytest.mark.parametrize("name", ON_A_CPU)
def test_what_a_user_lists_comes_on_top(name, wide):
    need(name)
    config = quantization_config(name)
    field = "llm_int8_skip_modules" if name in ("4bit", "8bit") else "modules_to_not_convert"
    setattr(config, field, [r"model.language_model.layers.\d+.mlp"])
    model = load(wide, quantization_config=config)
    assert quantised_parts(model) == ({"q_proj", "k_proj", "v_proj", "o_proj"}, set())


@pytest.mark.parametrize("name", ["4bit", "8bit", "int8", "float8"])  # quanto would compile for it
def test_the_tower_is_quantised_where_that_is_asked_for(name, wide, tmp_path):
    need(name)
    model = load(wide, name, quantize_vision_tower=True)
    assert quantised_parts(model) == (LANGUAGE, TOWER)
    assert logits(model).isfinite().all()
    model.save_pretrained(tmp_path)
    assert quantised_parts(load(tmp_path)) == (LANGUAGE, TOWER)
    assert quantised_parts(load(tmp_path, quantize_vision_tower=True)) == (LANGUAGE, TOWER)


@pytest.mark.parametrize("saved", [False, True])
def test_a_saved_tower_is_loaded_as_it_was_saved(saved, wide, tmp_path):
    fields = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    config = VideoNSAConfig.from_pretrained(wide).to_dict() | fields
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantize_vision_tower": saved}))
    for given in (None, saved):  # None: not given
        options = {} if given is None else {"quantize_vision_tower": given}
        assert VideoNSAConfig.from_pretrained(tmp_path, **options).quantize_vision_tower == saved
    with pytest.raises(ValueError, match=f"is {not saved}, .* saved with {saved}: .* Leave"):
        VideoNSAConfig.from_pretrained(tmp_path, quantize_vision_tower=not saved)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_what_is_saved_loads_the_same(name, wide, tmp_path):
    need(name)
    model = load(wide, name)
    if name.startswith("quanto"):
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert quantised_parts(again) == (LANGUAGE, set())
    assert torch.equal(logits(again), logits(model))


def test_what_is_kept_has_the_dtype_that_was_asked_for(wide):
    need("4bit")
    for options in ({}, loading_options("4bit")):
        model = load(wide, dtype=torch.float16, **options)
        gates = [weight for name, weight in model.named_parameters() if ".g_proj_" in name]
        assert {weight.dtype for weight in [*gates, model.lm_head.weight]} == {torch.float16}


def test_weights_without_gates_are_refused(wide, tmp_path):
    need("4bit")
    model = load(wide)
    weights = {name: x for name, x in model.state_dict().items() if ".g_proj_" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"has no gates .* Convert it first"):
        load(tmp_path, "4bit")
    _, info = load(tmp_path, output_loading_info=True)  # unquantised, as ever: new ones, announced
    assert len(info["missing_keys"]) == 2 * 4


def test_unknown_names_and_libraries_that_are_not_there_are_said(monkeypatch):
    with pytest.raises(ValueError, match="--load_in is '5bit'; choose from 4bit, 8bit, int8"):
        quantization_config("5bit")
    monkeypatch.setitem(PACKAGES, "quanto-int8", ("optimum-quanto", "nowhere.quanto"))
    with pytest.raises(ImportError, match="needs optimum-quanto: pip install optimum-quanto"):
        quantization_config("quanto-int8")


def test_what_a_cpu_cannot_multiply_is_refused(tmp_path):
    for name in ("int4", "float8-dynamic"):
        with pytest.raises(ValueError, match=f"--load_in {name} needs a GPU: on a CPU use int8"):
            prepare_model(str(ROOT), "cpu", load_in=name)
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match=f"--load_in {name} needs a GPU"):
                convert(tmp_path, tmp_path / "out", load_in=name)


@pytest.mark.parametrize("name", ["8bit", "int8"])
def test_the_tiny_checkpoint_answers_the_same_in_8_bit(name):
    need(name)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    for options in ({}, loading_options(name)):
        model = AutoModelForImageTextToText.from_pretrained(
            ROOT, trust_remote_code=True, dtype=torch.float32, **options
        )
        answers = []
        for clip in ("circle", "shapes", "digit"):
            video = {"type": "video", "video": str(ROOT / f"examples/clips/{clip}.mp4")}
            for question in ("What colour is the shape?", "What happens?"):
                turn = [video, {"type": "text", "text": question}]
                inputs = processor.apply_chat_template(
                    [{"role": "user", "content": turn}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
                answers.append(model.generate(**inputs, max_new_tokens=8).tolist())
        if not options:
            expected = answers
    assert answers == expected


def test_ask_loads_quantised_and_forecasts_it():
    need("8bit")
    whole, small = (prepare_model(str(ROOT), "cpu", load_in=name) for name in (None, "8bit"))
    sizes = [model.forecast_memory(1000, 900, 8).weights for model in (whole, small)]
    assert sizes[1] < 0.8 * sizes[0]
    with pytest.raises(ValueError, match="multiples of 64, and hidden_size 224 is none"):
        prepare_model(str(ROOT), "cpu", load_in="4bit")
    assert quantised_parts(small.load()) == (LANGUAGE, set())
    with pytest.raises(SystemExit):
        ask.parse_arguments(["a.mp4", "?", "--load-in", "5bit"])
    assert ask.parse_arguments(["a.mp4", "?", "--load_in", "8bit"]).load_in == "8bit"


@pytest.mark.parametrize("name", ["4bit", "int8"])
def test_a_conversion_may_end_quantised(name, wide, tmp_path, capsys):
    need(name)
    source, out = make_source(wide, tmp_path / "source"), tmp_path / "out"
    assert convert(source, out, load_in=name)["added"]
    assert quantised_parts(load(out)) == (LANGUAGE, set())
    assert logits(load(out)).isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert {"README.md", "tokenizer.json", "modeling_videonsa.py"} <= set(listed_files(out))
    publish.check_loads(out, listed_files(out))
    assert convert(source, out, load_in=name) is None
    assert "nothing to convert" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="not the result of this conversion"):
        convert(source, out, load_in=name, gate_value=0.5)
    with pytest.raises(ValueError, match="does not save quanto's weights"):
        convert(source, tmp_path / "other", load_in="quanto-int8")


def make_source(wide, folder):
    """A Qwen2.5-VL of these sizes, without gates."""
    model = load(wide)
    stock_twin(model).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / name, folder / name)
    image = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    image |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.3, 0.3]}
    image |= {"image_processor_type": "Qwen2_5_VLImageProcessor", "max_pixels": 12544}
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, "min_pixels": 3136}))
    return folder


def test_digests_tell_quantised_weights_apart(wide):
    for name in ("4bit", "int8"):
        need(name)
    digests = {weights_digest(load(wide, name)) for name in (None, "4bit", "8bit", "int8")}
    assert len(digests) == 4


def test_adapters_train_over_4_bits_and_merge_into_whole_weights(folder, tmp_path):
    """Gates train whole beside them; the run goes on from its checkpoint as if never stopped."""
    need("4bit")
    pytest.importorskip("peft")
    data = write_rows(folder / "quantised.jsonl", [ROW])
    settings = {"load_in": "4bit", "lora_r": 4, "merge_lora": True, "gate_lr": 1e-3}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    trainer = run(data, tmp_path / "out", max_steps=4, **settings)
    bits = [name for name, x in trainer.base.named_parameters() if x.dtype == torch.uint8]
    assert {name.replace(".base_layer", "").split(".")[-2] for name in bits} == LANGUAGE
    trained = {name: x for name, x in trainer.model.named_parameters() if x.requires_grad}
    assert {x.dtype for x in trained.values()} == {torch.float32}
    assert all("lora_" in name or ".g_proj_" in name for name in trained)
    seen = losses(trainer)
    assert seen[-1] < seen[0]
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    again = run(data, tmp_path / "out", max_steps=4, resume_from_checkpoint="last", **settings)
    assert losses(again)[-2:] == pytest.approx(seen[-2:], rel=1e-5)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert quantised_parts(merged) == (set(), set())
    assert not hasattr(merged.config, "quantization_config")
    whole = AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True)
    changed = [
        name
        for (name, one), other in zip(merged.named_parameters(), whole.parameters(), strict=True)
        if not torch.equal(one.float(), other.float())
    ]
    assert {name.split(".")[-2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "g_proj_1", "g_proj_2")
    }


def test_flags_that_do_not_train_quantised_are_refused(folder, tmp_path, wide):
    need("4bit")
    data = write_rows(folder / "quantised.jsonl", [ROW])
    with pytest.raises(ValueError, match="without --lora_r: quantised weights do not train"):
        run(data, tmp_path, load_in="4bit")
    with pytest.raises(ValueError, match="--load_in is 'int4'; adapters train over 4bit or 8bit"):
        run(data, tmp_path, load_in="int4", lora_r=4)


def saved_by(method, folder):
    """The configuration of a checkpoint at the root's sizes that a library has quantised."""
    config = VideoNSAConfig.from_pretrained(ROOT, dtype=torch.bfloat16)
    config.quantization_config = {"quant_method": method, "load_in_4bit": True}
    config.name_or_path = str(folder)
    return config


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("bitsandbytes", {"load_in": "8bit"}, "quantised already: leave --load_in 8bit away"),
        ("bitsandbytes", {"lora_r": 0}, "do not train. Add adapters with --lora_r"),
        ("torchao", {"merge_lora": True}, "quantised by torchao, .* Leave --merge_lora out"),
        ("torchao", {"bf16": False}, "quantised in bfloat16, .* computes in float32: add --bf16"),
        ("bitsandbytes", {"fp16": True, "bf16": False}, "computes in float16: add --bf16"),
    ],
)
def test_flags_that_a_quantised_checkpoint_does_not_train_with(method, settings, message, tmp_path):
    settings = {"model_name_or_path": tmp_path, "lora_r": 4, "bf16": True} | settings
    settings = {name: value for name, value in settings.items() if value is not False}
    model_args, _, args = finetune.parse(flags("data.json", tmp_path / "out", **settings))
    with pytest.raises(ValueError, match=message):
        refuse_quantised(saved_by(method, tmp_path), model_args, args)
    refuse_quantised(VideoNSAConfig.from_pretrained(ROOT), model_args, args)


def test_a_quantised_checkpoint_keeps_its_dtype_and_takes_no_other_name(tmp_path):
    config = saved_by("bitsandbytes", tmp_path)
    assert loading_of(None, config, "cpu", torch.float32) == {"dtype": torch.bfloat16}
    with pytest.raises(ValueError, match="is quantised already: leave --load_in 8bit away"):
        loading_of("8bit", config, "cpu", torch.float32)


def test_commands_load_what_was_saved_in_4_bits_and_leave_an_adapter_beside_it(wide, tmp_path):
    """Transformers gives the biases of such a checkpoint another dtype, and its weights not."""
    need("4bit")
    peft = pytest.importorskip("peft")
    saved, adapter = tmp_path / "saved", tmp_path / "adapter"
    saved.mkdir()
    for name in CODE_FILES:
        shutil.copyfile(ROOT / name, saved / name)
    load(wide, "4bit").save_pretrained(saved)
    prepared = prepare_model(str(saved), "cpu")
    assert "in bfloat16, weights as bitsandbytes saved them" in prepared.describe()
    assert logits(prepared.load()).isfinite().all()
    tuned = peft.get_peft_model(
        prepared.load(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(adapter)
    evaluated = load_model(str(adapter), None, {}, device_map="cpu")
    assert torch.equal(logits(evaluated), logits(tuned.eval()))
    assert not torch.equal(logits(evaluated), logits(prepared.load()))
    with pytest.raises(ValueError, match="dtype is torch.float32, and .* in torch.bfloat16"):
        load_model(str(saved), None, {}, device_map="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="quantised already: leave --load_in 8bit away"):
        load_model(str(saved), None, {}, device_map="cpu", load_in="8bit")


def test_a_quantised_cache_is_refused_for_several_chunks(wide, monkeypatch):
    """It would give back other keys to the second chunk than the first one wrote."""
    model, prompts = load(wide), Prompts()
    inputs = prompts.batch(prompts.row(3, ("video", 8, 4, 4), 4))
    monkeypatch.setattr(call_checks_videonsa, "QuantizedCache", DynamicCache)  # takes no library
    with pytest.raises(ValueError, match="a QuantizedCache rounds"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=64)
    assert model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=256).shape[0] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOAD_IN)
def test_on_a_gpu_quantised_weights_answer_and_load_again(name, wide, tmp_path):
    need(name)
    prompts = Prompts()
    inputs = prompts.batch(prompts.row(3, ("video", 8, 4, 4), 4), device="cuda")
    with torch.no_grad():
        whole = load(wide, device_map="cuda")(**inputs).logits
        for tower in (False, True):
            model = load(wide, name, device_map="cuda", quantize_vision_tower=tower)
            seen = model(**inputs).logits
            assert 0 < (seen - whole).norm() / whole.norm() < 1
            assert model.generate(**inputs, max_new_tokens=6).shape[0] == 1
        if not name.startswith("quanto"):
            model.save_pretrained(tmp_path)
            assert torch.equal(load(tmp_path, device_map="cuda")(**inputs).logits, seen)


@pytest.mark.gpu
def test_on_a_gpu_float8_layers_multiply_in_float8(wide):
    """All of the language model's, by float8_videonsa.py."""
    need("float8-dynamic")
    model = load(wide, "float8-dynamic", device_map="cuda")
    x = torch.zeros(1, dtype=torch.bfloat16, device="cuda")
    layers = {
        name.rpartition(".")[2]
        for name, layer in model.model.language_model.named_modules()
        if takes_float8(layer, x)
    }
    assert layers == LANGUAGE


@pytest.mark.gpu
def test_on_a_gpu_the_tiny_checkpoint_answers_in_float8():
    """As in 16 bit, up to one answer of twenty."""
    need("float8-dynamic")
    whole, rounded = (answers_about_stories(name, 8) for name in (None, "float8-dynamic"))
    assert len(whole) > 60
    same = sum(one == other for one, other in zip(whole, rounded, strict=True))
    assert same >= 0.95 * len(whole)


def answers_about_stories(name, count):
    """The root checkpoint's answers about clips that it has never seen."""
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(
        ROOT,
        trust_remote_code=True,
        dtype=torch.bfloat16,
        device_map="cuda",
        **loading_options(name),
    )
    answers = []
    for index in range(count):
        rng = random.Random(f"1000/{index}")
        story = make_clips.make_story(rng, 8)
        video = {"type": "video", "video": make_clips.render(story).permute(0, 3, 1, 2), "fps": 2.0}
        asked = [make_clips.ask(rng, story, kind) for kind in make_clips.KINDS]
        parts = [[video, {"type": "text", "text": pair[0]}] for pair in asked if pair is not None]
        conversations = [[{"role": "user", "content": content}] for content in parts]
        answers += answer_all(model, processor, conversations)
    return answers
