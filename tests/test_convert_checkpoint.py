"""Convert tiny stock checkpoints of every layout, and interrupt, starve and damage conversions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import convert_checkpoint
from commands import checkpoint_files
from convert_checkpoint import convert
from paths import ROOT

HIDDEN, HEADS, LAYERS = 112, 14, 2
GENERATION = {"eos_token_id": [1004, 1002], "repetition_penalty": 1.05, "temperature": 1e-6}
EMBEDDING = "model.language_model.embed_tokens.weight"
GATES = "model.language_model.layers.1.self_attn.g_proj_"


def stock_config(tied=False, **text):
    """A Qwen2.5-VL with groups of 7 heads and the vocabulary of the repository's tokenizer."""
    text_config = {
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_window_layers": LAYERS,
        "bos_token_id": None,
        "eos_token_id": 1004,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    return Qwen2_5_VLConfig(
        text_config={**text_config, **text},
        vision_config=vision_config,
        tie_word_embeddings=tied,
        image_token_id=1014,
        video_token_id=1015,
        vision_start_token_id=1011,
        vision_end_token_id=1012,
    )


def write_source(folder, layout="hub", tied=False, **text):
    """Write a stock checkpoint and return its model.

    "hub": as on the Hub, flat config, Hub keys, shards, image settings only, legacy template file.
    "library": nested config and in-library keys in one file, template in the tokenizer's config.
    "transformers5": as transformers 5 saves it, everything of the processor in one nested file.
    """
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(stock_config(tied, **text)).eval()
    shards = {"max_shard_size": "200KB"} if layout == "hub" else {}
    model.save_pretrained(folder, save_original_format=layout != "library", **shards)
    template = (ROOT / "chat_template.jinja").read_text()
    tokenizer = json.loads((ROOT / "tokenizer_config.json").read_text())
    tokenizer |= {"processor_class": "Qwen2_5_VLProcessor", "padding_side": "right"}
    image = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    image |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.3, 0.3]}
    image["image_processor_type"] = "Qwen2_5_VLImageProcessor"
    if layout == "hub":
        flatten_config(folder / "config.json")
        image |= {"min_pixels": 3136, "max_pixels": 12544}
        write(folder / "chat_template.json", {"chat_template": template})
    else:
        image["size"] = {"shortest_edge": 3136, "longest_edge": 12544}
    if layout == "library":
        tokenizer["chat_template"] = template
    if layout == "transformers5":
        (folder / "chat_template.jinja").write_text(template)
        video = {**image, "video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 5}
        write(
            folder / "processor_config.json", {"image_processor": image, "video_processor": video}
        )
    else:
        write(folder / "preprocessor_config.json", image)
    write(folder / "tokenizer_config.json", tokenizer)
    write(folder / "generation_config.json", GENERATION)
    shutil.copy(ROOT / "tokenizer.json", folder)
    return model


def flatten_config(path):
    """Rewrite a nested config.json as the Hub's Qwen2.5-VL files have it."""
    nested = json.loads(path.read_text())
    text = nested.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **nested, "torch_dtype": nested.pop("dtype"), "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat.pop("layer_types")
    write(path, flat)


def write(path, data):
    path.write_text(json.dumps(data))


def change_weights(folder, change):
    """Let `change` edit the dict of tensors of the first weight file."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def weights_of(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(folder):
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def run(*arguments, patch="", **variables):
    """Run the script in a process of its own, `patch` before its main()."""
    code = f"import sys\nimport convert_checkpoint as c\n{patch}\nsys.exit(c.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "Qwen-tiny"
    write_source(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", ["hub", "library", "transformers5"])
def test_every_layout_loads_and_answers_text_as_the_source(tmp_path, layout, tied):
    stock = write_source(tmp_path / "source", layout, tied)
    report = convert(tmp_path / "source", tmp_path / "out")
    model = load(tmp_path / "out")

    expected = set(stock.state_dict()) - ({"lm_head.weight"} if tied else set())
    assert set(report["copied"]) == expected
    assert len(report["added"]) == 4 * LAYERS
    assert set(weights_of(tmp_path / "out")) == expected | set(report["added"])
    ids = torch.randint(0, 1000, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("layout", ["hub", "library", "transformers5"])
def test_processor_files_become_ours(tmp_path, layout):
    write_source(tmp_path / "source", layout)
    convert(tmp_path / "source", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)

    assert type(processor).__name__ == "VideoNSAProcessor"
    assert type(processor.video_processor).__name__ == "VideoNSAVideoProcessor"
    assert processor.chat_template == (ROOT / "chat_template.jinja").read_text()
    assert processor.tokenizer.padding_side == "left"
    assert processor.image_processor.size["longest_edge"] == 12544
    assert list(processor.video_processor.image_mean) == [0.5, 0.4, 0.3]
    fresh = type(processor.video_processor)()
    assert processor.video_processor.max_frames == fresh.max_frames  # budgets are VideoNSA's own
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == GENERATION


def test_config_is_nested_complete_and_needs_our_code(source, tmp_path):
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "out")
    saved = json.loads((tmp_path / "out/config.json").read_text())
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)

    assert saved["model_type"] == config.model_type == "videonsa"
    assert saved["auto_map"]["AutoModel"] == "modeling_videonsa.VideoNSAForConditionalGeneration"
    assert saved["text_config"]["nsa_window_size"] == 256
    assert saved["dtype"] == "float32" and "dtype" not in saved["text_config"]
    assert config.text_config.rope_parameters["mrope_section"] == [2, 1, 1]
    assert config.text_config.num_attention_heads == HEADS
    assert config.video_token_id == 1015
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == 1004


def test_even_gates_share_by_their_bias_alone(source, tmp_path):
    convert(source, tmp_path / "third")
    convert(source, tmp_path / "half", gate_value=0.5, seed=1)
    third, half = weights_of(tmp_path / "third"), weights_of(tmp_path / "half")

    assert third[f"{GATES}2.weight"].shape == (3 * HEADS, HIDDEN)
    assert not third[f"{GATES}2.weight"].any()
    gates = torch.sigmoid(third[f"{GATES}2.bias"] / 0.3)
    torch.testing.assert_close(gates, torch.full((3 * HEADS,), 1 / 3))
    assert not half[f"{GATES}2.bias"].any()
    assert third[f"{GATES}1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not third[f"{GATES}1.bias"].any()
    assert not torch.equal(third[f"{GATES}1.weight"], half[f"{GATES}1.weight"])


def test_random_gates_are_the_papers(source, tmp_path):
    convert(source, tmp_path / "out", gates="random")
    weights = weights_of(tmp_path / "out")
    for part in "12":
        assert weights[f"{GATES}{part}.weight"].std().item() == pytest.approx(0.02, rel=0.05)
        assert not weights[f"{GATES}{part}.bias"].any()
    other_layer = weights[f"{GATES.replace('.1.', '.0.')}1.weight"]
    assert not torch.equal(weights[f"{GATES}1.weight"], other_layer)


def write_released(folder):
    """Write a checkpoint as the original release's: gates in it, two settings in its config."""
    write_source(folder)
    torch.manual_seed(1)
    shapes = {"1.weight": (HIDDEN, HIDDEN), "1.bias": (HIDDEN,)}
    shapes |= {"2.weight": (3 * HEADS, HIDDEN), "2.bias": (3 * HEADS,)}
    gates = {
        f"model.language_model.layers.{layer}.self_attn.g_proj_{name}": torch.randn(shape)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }
    change_weights(folder, lambda tensors: tensors.update(gates))
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["VideoNSAForConditionalGeneration"]
    text = stock_config().text_config.to_diff_dict() | {"block_counts": 20, "window_size": 96}
    write(folder / "config.json", {**config, "text_config": text})
    return gates


def test_gates_of_the_source_are_kept(tmp_path, capsys):
    gates = write_released(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", semantics="released")
    assert sorted(report["copied (gates)"]) == sorted(gates) and not report["added"]
    assert f"copied (gates) {4 * LAYERS}, missing 0" in capsys.readouterr().out
    weights = weights_of(tmp_path / "out")
    assert all(torch.equal(weights[key], gate) for key, gate in gates.items())

    model = load(tmp_path / "out")
    text = model.config.text_config
    assert text.nsa_semantics == "released"
    assert (text.nsa_num_selected_blocks, text.nsa_window_size) == (20, 96)
    card = (tmp_path / "out/README.md").read_text()
    assert "untrained" not in card and "`nsa_semantics`" in card and "released" in card


def test_semantics_are_said_of_kept_gates_alone(source, tmp_path):
    with pytest.raises(ValueError, match=r"has no gates .* leave --semantics away"):
        convert(source, tmp_path / "out", semantics="released")
    write_released(tmp_path / "released")
    with pytest.raises(ValueError, match="Give --semantics released for weights of the original"):
        convert(tmp_path / "released", tmp_path / "out")
    with pytest.raises(ValueError, match="which are kept: leave --gates and --gate-value away"):
        convert(
            tmp_path / "released", tmp_path / "out", semantics="paper", gates="even", gate_value=0.5
        )
    assert not (tmp_path / "out").exists()


def test_a_part_of_the_gates_is_no_source(source, tmp_path):
    add_a_gate(source)
    with pytest.raises(ValueError, match=r"7 missing \(\S+g_proj_1\.weight"):
        convert(source, tmp_path / "out", semantics="released")


def test_dtype_holds_for_every_tensor_and_the_config(source, tmp_path):
    convert(source, tmp_path / "auto")
    convert(source, tmp_path / "bfloat16", dtype="bfloat16")
    auto, half = weights_of(tmp_path / "auto"), weights_of(tmp_path / "bfloat16")
    assert {tensor.dtype for tensor in auto.values()} == {torch.float32}
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert torch.equal(half[EMBEDDING], auto[EMBEDDING].bfloat16())
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "bfloat16", trust_remote_code=True, dtype="auto"
    )
    assert model.dtype is torch.bfloat16


def test_gates_are_as_exact_as_the_embedding_where_parts_differ(tmp_path):
    write_source(tmp_path / "source", "library")

    def halve(tensors):
        for key in tensors:
            if key.startswith("model.language_model."):
                tensors[key] = tensors[key].bfloat16()

    change_weights(tmp_path / "source", halve)
    convert(tmp_path / "source", tmp_path / "out")
    weights = weights_of(tmp_path / "out")
    assert weights["model.visual.patch_embed.proj.weight"].dtype is torch.float32
    assert weights[f"{GATES}2.bias"].dtype is weights[EMBEDDING].dtype is torch.bfloat16
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_float16_refuses_what_it_cannot_hold(source, tmp_path):
    change_weights(source, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(1e6))
    with pytest.raises(ValueError, match="float16's range"):
        convert(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_leftovers_that_the_model_computes_are_ignored(tmp_path):
    write_source(tmp_path / "source", "library", tied=True)
    embedding = weights_of(tmp_path / "source")[EMBEDDING]

    def add(tensors):
        tensors["model.language_model.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = embedding.clone()

    change_weights(tmp_path / "source", add)
    convert(tmp_path / "source", tmp_path / "out")
    assert not set(weights_of(tmp_path / "out")) & {"lm_head.weight", "rotary_emb.inv_freq"}


def lose_a_shard(folder):
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def cut_a_shard(folder):
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_tensor(folder):
    change_weights(folder, dict.popitem)


def add_a_tensor(folder):
    change_weights(folder, lambda tensors: tensors.update({"model.layers.7.extra": torch.ones(2)}))


def add_what_only_sounds_computed(folder):
    key = "model.layers.0.self_attn.inv_freq_scale"
    change_weights(folder, lambda tensors: tensors.update({key: torch.ones(4)}))


def name_a_tensor_twice(folder):
    key = "model.language_model.norm.weight"  # in the library's names, beside the Hub's
    change_weights(folder, lambda tensors: tensors.update({key: torch.ones(HIDDEN)}))


def add_a_gate(folder):
    key = "model.layers.0.self_attn.g_proj_1.bias"
    change_weights(folder, lambda tensors: tensors.update({key: torch.ones(HIDDEN)}))


def quantise_a_tensor(folder):
    change_weights(
        folder, lambda tensors: tensors.update({tensors.popitem()[0]: torch.ones(4).char()})
    )


def halve_the_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "num_hidden_layers": 1})


def widen_the_mlp(folder):
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "intermediate_size": 65})


def keep_only_bin(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()


def be_another_model(folder):
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "model_type": "qwen2_vl"})


def lose_the_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def move_out(folder, name):
    """Leave a link to another folder in the place of a file."""
    other = folder.parent.parent / f"{folder.parent.name} elsewhere"
    other.mkdir(exist_ok=True)
    shutil.move(folder / name, other / name)
    (folder / name).symlink_to(other / name)


def link_a_shard_out(folder):
    move_out(folder, sorted(folder.glob("*.safetensors"))[0].name)


def link_the_tokenizer_out(folder):
    move_out(folder, "tokenizer.json")


def name_a_shard(folder, name):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {key: name for key in list(index["weight_map"])[:1]}
    write(path, index)


def name_a_shard_above(folder):
    (folder.parent.parent / "other.safetensors").touch()
    name_a_shard(folder, "../../other.safetensors")


def name_a_shard_by_its_path(folder):
    name_a_shard(folder, "/etc/hostname")


def lose_the_weight_map(folder):
    write(folder / "model.safetensors.index.json", {"metadata": {}})


def cut_the_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text()[:-5])


def list_the_preprocessor(folder):
    write(folder / "preprocessor_config.json", [])


def give_the_tokenizer_code(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"AutoTokenizer": ["other/repo--tokenization.Tok", None]}
    write(folder / "tokenizer_config.json", {**config, "auto_map": own})


def lose_the_template(folder):
    (folder / "chat_template.json").unlink()


def untie_the_head(folder):
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_shard, r"lacks model-\d+-of-\d+\.safetensors, which"),
        (cut_a_shard, r"model-\d+-of-\d+\.safetensors is damaged or incomplete"),
        (lose_a_tensor, r"1 missing \(\S+\)$"),
        (add_a_tensor, r"1 unexpected \(model\.language_model\.layers\.7\.extra\)$"),
        (add_what_only_sounds_computed, r"1 unexpected \(\S+inv_freq_scale\)$"),
        (name_a_tensor_twice, r"holds model\.\S*norm\.weight, but .* has it already"),
        (add_a_gate, r"has gates, which are kept, but .* Give --semantics released"),
        (quantise_a_tensor, "is I8; only BF16, F16, F32"),
        (halve_the_layers, r"12 unexpected \(\S+layers\.1\."),
        (widen_the_mlp, r"6 of another shape \(\S+ \[64, 112\] \(by config.json \[65, 112\]\)"),
        (keep_only_bin, "neither model.safetensors nor"),
        (be_another_model, "holds a qwen2_vl checkpoint"),
        (lose_the_tokenizer, "has no tokenizer"),
        (untie_the_head, "differs from its embedding"),
        (link_a_shard_out, r"model-\d+-of-\d+\.safetensors of .* leads to .*, outside of that"),
        (link_the_tokenizer_out, "tokenizer.json of .* leads to .*, outside of that folder"),
        (name_a_shard_above, r"\.\./\.\./other.safetensors of .* leads to .*, outside of that"),
        (name_a_shard_by_its_path, "/etc/hostname of .* leads to /etc/hostname, outside of that"),
        (lose_the_weight_map, "index.json has no weight_map of keys to files"),
        (cut_the_config, "config.json is not JSON"),
        (list_the_preprocessor, "preprocessor_config.json holds no JSON object"),
        (give_the_tokenizer_code, "needs code of its own .*other/repo--tokenization.Tok"),
        (lose_the_template, "has no chat template"),
    ],
)
def test_a_source_that_does_not_fit_stops_before_writing(source, tmp_path, damage, message):
    damage(source)
    with pytest.raises((ValueError, OSError), match=message):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_an_existing_folder_is_never_touched(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="not the result of this conversion"):
        convert(source, out)
    lose_a_shard(source)
    with pytest.raises(FileNotFoundError, match="lacks model-"):
        convert(source, out)
    assert bytes_of(out) == {"config.json": b"{}"}
    assert not (tmp_path / "out.partial").exists()


def test_a_second_run_finds_the_result_complete(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    convert(source, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert convert(source, out) is None
    assert "complete already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(FileExistsError):
        convert(source, out, seed=1)


SMALL_SHARDS = "c.SHARD_BYTES = 100_000"
KILL_IN_THIRD_SHARD = f"""
import os, signal, pathlib
{SMALL_SHARDS}
save, calls = c.save_file, []
def save_and_die(tensors, path, metadata):
    save(tensors, path, metadata)
    calls.append(path)
    if len(calls) == 3:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
c.save_file = save_and_die
"""


def test_a_kill_in_mid_conversion_loses_nothing(source, tmp_path, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    killed = run(source, out, patch=KILL_IN_THIRD_SHARD)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    done = {path.name: path.stat().st_mtime_ns for path in partial.glob("model-*.safetensors")}
    assert len(done) == 2
    assert not (partial / "config.json").exists()  # nobody loads it by mistake

    monkeypatch.setattr(convert_checkpoint, "SHARD_BYTES", 100_000)
    with pytest.raises(FileExistsError, match="other settings: seed 0"):
        convert(source, out, seed=1)
    convert(source, out)
    convert(source, tmp_path / "straight")
    assert not partial.exists()
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    straight = bytes_of(tmp_path / "straight")
    straight["README.md"] = straight["README.md"].replace(b"straight", b"out")
    assert bytes_of(out) == straight
    load(out)


def interrupt(source, out, monkeypatch):
    """Begin a conversion in small shards, of which the first two are written."""
    monkeypatch.setattr(convert_checkpoint, "SHARD_BYTES", 100_000)
    save, written = convert_checkpoint.save_file, []

    def save_two(tensors, path, metadata):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, "save_file", save_two)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out)


def test_weights_that_changed_meanwhile_are_not_mixed(source, tmp_path, monkeypatch):
    interrupt(source, tmp_path / "out", monkeypatch)
    sizes = [path.stat().st_size for path in sorted(source.glob("*.safetensors"))]
    change_weights(source, lambda tensors: next(iter(tensors.values())).add_(1))
    assert sizes == [path.stat().st_size for path in sorted(source.glob("*.safetensors"))]
    with pytest.raises(FileExistsError, match="begun with other settings: weights"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_not_of_this_conversion_is_noticed(source, tmp_path, monkeypatch):
    interrupt(source, tmp_path / "out", monkeypatch)
    shard = sorted((tmp_path / "out.partial").glob("model-*.safetensors"))[0]
    save_file({"model.visual.other": torch.ones(2)}, shard, {"format": "pt"})
    with pytest.raises(OSError, match="does not hold what was written to it: delete it, run again"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_folder_in_the_way_is_left_alone(source, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="begun with other settings"):
        convert(source, tmp_path / "out")
    assert bytes_of(partial) == {"mine.txt": b"mine"}


REPORT_PEAK = """
import pathlib, re
c.SHARD_BYTES = 20_000_000

def memory(kind):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(kind + r":\\s+(\\d+) kB", status)[1])

write = c.write_weights
def measured(*arguments):
    before = memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    write(*arguments)
    print("grown by", memory("VmHWM") - before, "kB")
c.write_weights = measured
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    write_source(tmp_path / "source", num_hidden_layers=40, intermediate_size=5000)
    size = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    assert size > 250e6
    result = run(tmp_path / "source", tmp_path / "out", patch=REPORT_PEAK)
    assert result.returncode == 0, result.stderr
    grown = 1024 * int(result.stdout.split("grown by ")[1].split()[0])
    assert grown < 60e6  # a shard is 20 MB


def test_a_hub_id_is_read_from_the_offline_cache_(tmp_path):
    snapshot = tmp_path / "hub/models--org--tiny/snapshots/0123abc"
    write_source(snapshot)
    blobs = tmp_path / "hub/models--org--tiny/blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):  # as the Hub's client keeps files
        shutil.move(path, blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: qwen\n---\n# Tiny\n")
    (snapshot / "LICENSE").write_text("terms")
    (tmp_path / "hub/models--org--tiny/refs").mkdir()
    (tmp_path / "hub/models--org--tiny/refs/main").write_text("0123abc")
    result = run("org/tiny", tmp_path / "out", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert result.returncode == 0, result.stderr
    assert "added 8 (even gates), missing 0, unexpected 0" in result.stdout
    card = tmp_path / "out/README.md"
    metadata = metadata_load(card)
    assert (metadata["license"], metadata["license_name"]) == ("other", "qwen")
    assert metadata["base_model"] == "org/tiny"
    assert "**The gates are untrained.**" in card.read_text()
    assert (tmp_path / "out/LICENSE").read_text() == "terms"


def test_errors_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert convert_checkpoint.main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "neither a folder nor a Hub id" in error
    arguments = ["--gates", "random", "--gate-value", "0.5", "a", "b"]
    assert convert_checkpoint.main(arguments) == 2
    assert "only even gates take one" in capsys.readouterr().err
    assert convert_checkpoint.main(["--gate-value", "1", "a", "b"]) == 2
    assert "must lie between 0 and 1" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_resumable(source, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise SafetensorError("I/O error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, "save_file", fail)
        assert convert_checkpoint.main([str(source), str(tmp_path / "out")]) == 2
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert convert_checkpoint.main([str(source), str(tmp_path / "out")]) == 0


def test_push_uploads_the_finished_folder_as_one_commit(source, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", repo_id))

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, **options):
            calls.append(("upload_folder", repo_id, Path(folder_path)))
            own = {path.name for path in Path(folder_path).iterdir()}
            assert set(allow_patterns) == own - {"conversion.json"}

    monkeypatch.setattr(checkpoint_files, "HfApi", Api)
    out = tmp_path / "out"
    convert(source, out, push_to_hub="me/tiny")
    assert calls == [("create_repo", "me/tiny"), ("upload_folder", "me/tiny", out)]
    convert(source, out, push_to_hub="me/tiny")  # after a failed upload, say
    assert len(calls) == 4


def test_loads_from_any_way_to_name_the_folder(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(source, out)
    (out / "inside").mkdir()
    for place, name in ((out, "."), (out, "./"), (out / "inside", ".."), (tmp_path, "out/")):
        monkeypatch.chdir(place)
        for folder in (name, Path(name)):
            assert AutoConfig.from_pretrained(folder, trust_remote_code=True).video_token_id == 1015
            AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            load(folder)


def test_files_carry_the_format_that_transformers_wants(source, tmp_path):
    convert(source, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # who may read the config may read the weights
    assert not list((tmp_path / "out").glob(".*"))
