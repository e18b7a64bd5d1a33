"""Write the files of the repository's tiny checkpoint, untrained, from a seed.

    python tools/make_tiny_checkpoint.py [--out FOLDER] [--seed 0]

Configuration, tokenizer, chat template, processor and generation files, and fp16 weights. The
folder defaults to the repository's root; tools/train_tiny.py then trains the weights.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from videonsa import ROOT
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

import make_clips

VOCABULARY = 1024
# Qwen2's: contractions, words with their leading space, single digits, punctuation, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ADDED = (  # as in Qwen2.5-VL, in its vocabulary but not hidden by skip_special_tokens
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
SYSTEM = "You are a helpful assistant."
ENGLISH = """
The quick brown fox jumps over the lazy dog while the cat sleeps in the warm afternoon sun.
What do you see in this video? There is a person who walks along a street and talks to a friend.
Please describe the picture in one sentence. The image shows a small house next to a large tree.
How long does it take before the train arrives? It takes about twenty minutes, maybe a little more.
Someone opens the door, looks around the room, and then sits down at the table to read a book.
Can you tell me where the children are playing? They are playing in the park behind the school.
Why is the man running? He is running because he wants to catch the last bus of the evening.
First the water boils, then she adds the rice, and after that she puts in some salt and pepper.
A woman wearing a black coat is standing in front of a shop and waiting for another customer.
The camera moves slowly from one side to the other and shows mountains, rivers and a wide valley.
At the beginning of the film the sky is clear; toward the end it starts to rain quite heavily.
Which answer is correct? Answer with the option's letter from the given choices directly.
I think that you should have known about this before we started, but it is never too late to learn.
They would like to go home now, since nothing else can be done until tomorrow morning.
We made these things ourselves with our own hands, and we hope that people will use them well.
Every word that was written here has been chosen so that common pieces of English get a place.
It does not matter how many times you try; what matters is that you keep going and never give up.
When the music stops, everybody must find a chair; whoever is left without one has to leave.
The number of people in the world is growing, and so is the amount of food that they need.
Only a few of them came back, though most had said that they would return within a year.
After the meeting she went straight to her office, closed the window and called her mother.
Could this be the same place as the one we saw earlier? Yes, both show the old bridge at night.
Blue, green, red, yellow, orange, purple, black, white, brown, grey and pink are colours.
One, two, three, four, five, six, seven, eight, nine and ten are numbers that we count with.
The model reads each frame, finds the important parts, and gives a short answer to the question.
Long videos have thousands of frames, so the attention over them must be sparse to stay quick.
A token attends to a few blocks that were selected, to a window of its neighbours, and to means.
"""
COUNT_FIRST = """
the of and to a in is it you that he was for on are with as I his they be at one have this from or
had by hot but some what there we can out other were all your when up use word how said an each she
which do their time if will way about many then them would write like so these her long make thing
see him two has look more day could go come did my sound no most number who over know water than
call first people may down side been now find any new work part take get place made live where after
back little only round man year came show every good me give our under name very through just form
much great think say help low line before turn cause same mean differ move right boy old too does
tell sentence set three want air well also play small end put home read hand port large spell add
even land here must big high such follow act why ask men change went light kind off need house
picture try us again animal point mother world near build self earth father head stand own page
should country found answer school grow study still learn plant cover food sun four thought let keep
eye never last door between city tree cross since hard start might story saw far sea draw left late
run while press close night real life few stop open seem together next white children begin got walk
example ease paper often always music those both mark book letter until mile river car feet care
second group carry took rain eat room friend began idea fish mountain north once base hear horse cut
sure watch colour face wood main enough plain girl usual young ready above ever red list though feel
talk bird soon body dog family direct pose leave song measure state product black short class wind
question happen complete ship area half rock order fire south problem piece told knew pass farm top
whole king size heard best hour better true during hundred am remember step early hold west ground
interest reach fast five sing listen six table travel less morning ten simple several toward war lay
against pattern slow centre love person money serve appear road map science rule govern pull cold
notice voice fall power town fine certain fly unit lead cry dark machine note wait plan figure star
box noun field rest correct able pound done beauty drive stood contain front teach week final gave
green oh quick develop sleep warm free minute strong special mind behind clear tail produce fact
street inch nothing course stay wheel full force blue object decide surface deep moon island foot
yet busy test record boat common gold possible plane age dry wonder laugh thousand ago ran check
game shape yes miss brought heat snow bed bring sit perhaps fill east weight language among
"""

IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
CONFIG = {
    "architectures": ["VideoNSAForConditionalGeneration"],
    "auto_map": {
        "AutoConfig": "configuration_videonsa.VideoNSAConfig",
        "AutoModel": "modeling_videonsa.VideoNSAForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_videonsa.VideoNSAForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_videonsa.VideoNSAForConditionalGeneration",
        "AutoProcessor": "processing_videonsa.VideoNSAProcessor",
        "AutoVideoProcessor": "processing_videonsa.VideoNSAVideoProcessor",
    },
    # The file is fp16 to stay small; a CPU runs it in float32.
    "dtype": "float32",
    "model_type": "videonsa",
    "text_config": {
        "bos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": 224,
        # Not Qwen's 0.02: so narrow a model began with weights too small to learn much of.
        "initializer_range": 0.05,
        "intermediate_size": 320,
        "max_position_embeddings": 4096,
        "max_window_layers": 4,
        "model_type": "videonsa_text",
        "nsa_block_size": 16,
        "nsa_gate_temperature": 0.3,
        "nsa_num_selected_blocks": 4,
        "nsa_window_size": 32,
        "num_attention_heads": 14,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        # Time has the quick half of the frequencies, since a second is looked up and a place in a
        # grid of four by four tokens is not.
        "rope_parameters": {
            "mrope_section": [4, 2, 2],
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
    },
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 3,
        "fullatt_block_indexes": [2],
        "hidden_act": "silu",
        "hidden_size": 96,
        "in_channels": 3,
        # With 0.02 the tower hardly began to learn, see docs/tiny_checkpoint.md.
        "initializer_range": 0.07,
        "intermediate_size": 192,
        "model_type": "qwen2_5_vl",
        "num_heads": 4,
        "out_hidden_size": 224,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
}
TOKEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "eos_token_id": "<|im_end|>",
    "pad_token_id": "<|endoftext|>",
}
CHAT_TEMPLATE = """\
{#- Turns are <|im_start|>role, a new line, the content, <|im_end|> and a new line. -#}
{%- if messages and messages[0].role != "system" -%}
{{- "<|im_start|>system\\nSYSTEM<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
{{- "<|im_start|>" + message.role + "\\n" -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "video" or "video" in part -%}
{{- "<|vision_start|><|video_pad|><|vision_end|>" -}}
{%- elif part.type in ("image", "image_url") or "image" in part -%}
{{- "<|vision_start|><|image_pad|><|vision_end|>" -}}
{%- elif "text" in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
""".replace("SYSTEM", SYSTEM)


def corpus():
    """The text that the tokenizer's merges are learned from."""
    yield from ENGLISH.split("\n")
    yield from (" " + word for word in COUNT_FIRST.split())
    # Often, as in every prompt.
    yield from 100 * ["system\n", "user\n", "assistant\n", SYSTEM]
    rng = make_clips.random.Random("tokenizer")
    for _ in range(400):
        story = make_clips.make_story(rng, 16)
        for kind in make_clips.KINDS + make_clips.NEW_KINDS:
            yield from make_clips.ask(rng, story, kind) or ()


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE in Qwen2.5-VL's form, with its added tokens and VOCABULARY entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(ADDED),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(ADDED))
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"{tokenizer.get_vocab_size()} tokens came out, not {VOCABULARY}.")
    return tokenizer


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(out: Path, seed: int, config: dict = CONFIG):
    """Write every file of the untrained checkpoint into the folder `out`; config: like CONFIG."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": CONFIG["text_config"]["max_position_embeddings"],
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "processor_class": "VideoNSAProcessor",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")

    ids = {name: tokenizer.token_to_id(token) for name, token in TOKEN_IDS.items()}
    config = {**config, **ids}
    config["text_config"] = {
        **config["text_config"],
        "eos_token_id": ids["eos_token_id"],
        "pad_token_id": ids["pad_token_id"],
    }
    write_json(out / "config.json", config)
    write_json(
        out / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [ids["eos_token_id"], ids["pad_token_id"]],
            "max_new_tokens": 64,
            "pad_token_id": ids["pad_token_id"],
        },
    )
    write_processor(out)
    weights = out / "model.safetensors"
    save_file(make_weights(config, seed), weights, metadata={"format": "pt"})
    weights.chmod(0o644)


def write_processor(out: Path):
    """The files of the image and the video processor."""
    patches = {
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "merge_size": 2,
        "patch_size": 14,
        # 112x112, the size of the clips: four by four tokens.
        "size": {"longest_edge": 12544, "shortest_edge": 784},
        "temporal_patch_size": 2,
    }
    auto_map = {"AutoProcessor": CONFIG["auto_map"]["AutoProcessor"]}
    write_json(
        out / "preprocessor_config.json",
        {
            "auto_map": auto_map,
            **patches,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "VideoNSAProcessor",
        },
    )
    auto_map = {**auto_map, "AutoVideoProcessor": CONFIG["auto_map"]["AutoVideoProcessor"]}
    write_json(
        out / "video_preprocessor_config.json",
        {
            "auto_map": auto_map,
            **patches,
            "fps": make_clips.SAMPLED_FPS,
            "max_frames": 64,
            "processor_class": "VideoNSAProcessor",
            "video_processor_type": "VideoNSAVideoProcessor",
        },
    )


def make_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Random fp16 weights from the seed, by the model's own initialisation."""
    torch.manual_seed(seed)
    config = VideoNSAConfig(**copy.deepcopy(config))  # which changes its arguments
    model = VideoNSAForConditionalGeneration(config)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    state.pop("lm_head.weight")  # tied to the embeddings
    return state


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT, help="folder (default: the repository)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    args = parser.parse_args()
    write_checkpoint(args.out, args.seed)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"{args.out}: untrained checkpoint, weights {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
