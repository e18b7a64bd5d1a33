"""What a checkpoint carries: exactly what loading it needs, and nothing that runs it.

The converter, the Trainer's saves, every push to the Hub and tools/publish.py read these lists.
Commands (ask.py, finetune.py, ...) live in the repository and take the checkpoint by --model.
"""

# Every file of code that `trust_remote_code` reaches, and the packages it needs.
CODE_FILES = (
    "configuration_videonsa.py",
    "modeling_videonsa.py",
    "fused_videonsa.py",
    "vision_videonsa.py",
    "nsa_reference.py",
    "nsa_kernels.py",
    "nsa_kernels_choice.py",
    "nsa_kernels_compressed.py",
    "nsa_kernels_dense.py",
    "nsa_kernels_primitives.py",
    "nsa_kernels_selected.py",
    "nsa_kernels_window.py",
    "processing_videonsa.py",
    "video_plan_videonsa.py",
    "video_reader_videonsa.py",
    "pixel_stream_videonsa.py",
    "requirements.txt",
)
REQUIRED_FILES = (*CODE_FILES, "config.json", "generation_config.json", "README.md")
# Patterns of all that goes to the Hub: what a checkpoint may have besides, in the usual names.
HUB_FILES = (
    *REQUIRED_FILES,
    "LICENSE",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
