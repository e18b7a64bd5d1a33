"""The vision tower equals the stock one: outputs, gradients, chunks, checkpoints, hidden states."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionBlock,
)
from videonsa import fused_videonsa as fused
from videonsa import vision_videonsa as vision
from videonsa.vision_videonsa import VideoNSAVisionTower

# Frames, height and width in patches; a window is 8 x 8 patches (4 x 4 tokens).
MEDIA = {
    "image": [(1, 16, 8)],
    "odd image": [(1, 10, 22)],
    "video": [(3, 8, 16)],
    "odd video": [(4, 14, 10)],
    "smaller than a window": [(2, 4, 6)],
    "several": [(1, 10, 12), (3, 8, 8), (2, 14, 10), (3, 8, 8)],
}


def towers(dtype=torch.float64, implementation="sdpa", **fields):
    """The stock tower and ours with the same random weights."""
    small = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 20,
        "num_heads": 2,
        "out_hidden_size": 24,
        "patch_size": 4,
        "window_size": 32,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    config = Qwen2_5_VLVisionConfig(**small | fields)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    stock = Qwen2_5_VisionTransformerPretrainedModel._from_config(config).to(dtype)
    with torch.no_grad():
        for name, weight in stock.named_parameters():
            if "norm" in name or "ln_q" in name or "bias" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    ours = VideoNSAVisionTower._from_config(copy.deepcopy(config)).to(dtype)
    ours.load_state_dict(stock.state_dict())
    return stock.eval(), ours.eval()


def pixels_of(tower, grid, seed=1):
    config = tower.config
    features = config.in_channels * config.temporal_patch_size * config.patch_size**2
    generator = torch.Generator().manual_seed(seed)
    patches = sum(t * h * w for t, h, w in grid)
    weight = tower.patch_embed.proj.weight
    pixels = torch.randn(patches, features, generator=generator)
    return pixels.to(weight.device, weight.dtype), torch.tensor(grid, device=weight.device)


def assert_close(actual, expected, rtol=1e-4, atol=1e-5, **kwargs):
    """In float64 the stock norm, and its rotary embedding, still round to float32."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, **kwargs)


def assert_outputs_equal(actual, expected):
    assert type(actual) is type(expected)
    assert_close(actual.last_hidden_state, expected.last_hidden_state)
    assert_close(actual.pooler_output, expected.pooler_output)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Takes the paths of the GPU, with the stock expressions in place of the kernels."""
    monkeypatch.setattr(vision, "_is_plain", lambda module, kind: type(module) is kind)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of queries that attention is called with."""
    shapes, original = [], vision.ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(*arguments):
        attention = original(*arguments)

        def counting(module, query, *rest, **kwargs):
            shapes.append(tuple(query.shape))
            return attention(module, query, *rest, **kwargs)

        return counting

    monkeypatch.setattr(vision.ALL_ATTENTION_FUNCTIONS, "get_interface", get_interface)
    return shapes


@pytest.mark.parametrize("grid", MEDIA.values(), ids=MEDIA)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_stock(grid, implementation):
    stock, ours = towers(implementation=implementation)
    inputs = pixels_of(stock, grid)
    with torch.no_grad():
        assert_outputs_equal(ours(*inputs), stock(*inputs))


@pytest.mark.parametrize("grid", [MEDIA["several"], MEDIA["odd video"]], ids=["several", "odd"])
def test_equals_stock_on_the_paths_of_the_gpu(grid, as_on_cuda):
    stock, ours = towers()
    inputs = pixels_of(stock, grid)
    with torch.no_grad():
        assert_outputs_equal(ours(*inputs), stock(*inputs))


def test_same_parameters_and_block_class():
    stock, ours = towers()
    names = [(name, x.shape) for name, x in stock.named_parameters()]
    assert [(name, x.shape) for name, x in ours.named_parameters()] == names
    assert all(type(block) is Qwen2_5_VLVisionBlock for block in ours.blocks)


def test_one_attention_call_for_each_length(calls):
    _, ours = towers()
    with torch.no_grad():
        ours(*pixels_of(ours, MEDIA["odd video"]))
    # 14 x 10 patches: windows of 8 x 8, 8 x 2, 6 x 8 and 6 x 2 patches in each of 4 frames
    windows = [(4, 2, 12, 16), (4, 2, 16, 16), (4, 2, 48, 16), (4, 2, 64, 16)]
    assert calls == [*windows, (4, 2, 140, 16), *windows]


def test_long_batches_of_windows_are_split(monkeypatch, calls):
    stock, ours = towers()
    inputs = pixels_of(stock, MEDIA["video"])
    with torch.no_grad():
        expected = stock(*inputs)
        calls.clear()
        monkeypatch.setattr(vision, "SEQUENCES_PER_CALL", 4)
        assert_outputs_equal(ours(*inputs), expected)
    assert calls[:2] == [(4, 2, 64, 16), (2, 2, 64, 16)]


@pytest.mark.parametrize("most", [1, 150, 300])
def test_chunks_equal_the_whole(monkeypatch, calls, most):
    _, ours = towers()
    inputs = pixels_of(ours, MEDIA["several"])
    with torch.no_grad():
        whole = ours(*inputs)
        calls.clear()
        monkeypatch.setattr(vision, "PATCHES_PER_CHUNK", most)
        assert_outputs_equal(ours(*inputs), whole)
    patches = sum(shape[0] * shape[2] for shape in calls)
    assert patches == 3 * len(inputs[0])
    assert max(shape[0] * shape[2] for shape in calls) <= max(most, 140)


def test_chunks_hold_whole_frames():
    frames = torch.tensor([0, 10, 20, 30, 100, 110])
    assert vision._chunks(frames, 110) == [(0, 5)]
    assert vision._chunks(frames, 20) == [(0, 2), (2, 3), (3, 4), (4, 5)]


@pytest.mark.parametrize("most", [40, 47])
@pytest.mark.parametrize("count", [1, 4, 5, 9, 10, 11, 12, 13, 100])
def test_chunks_are_as_few_as_possible_and_none_is_small(count, most):
    """For a frame or two at the end the host would take longer than the GPU."""
    chunks = vision._chunks(torch.arange(count + 1) * 10, most)  # of four frames
    sizes = [last - first for first, last in chunks]
    assert len(chunks) == -(-count // 4) and sum(sizes) == count
    assert max(sizes) <= 4 and max(sizes) - min(sizes) <= (1 if most == 40 else 2)
    assert [first for first, _ in chunks] == [0, *(last for _, last in chunks[:-1])]


def gradients(tower, inputs):
    pixels, grid = inputs
    pixels = pixels.clone().requires_grad_()
    output = tower(pixels, grid).pooler_output
    weights = dict(tower.named_parameters())
    upper = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    found = torch.autograd.grad(output, [pixels, *weights.values()], upper.view_as(output))
    return dict(zip(["pixels", *weights], found, strict=True))


@pytest.mark.parametrize("mlp", ["stock", "padded"])
def test_gradients_equal_stock(mlp, request, monkeypatch):
    if mlp == "padded":
        request.getfixturevalue("as_on_cuda")
    monkeypatch.setattr(vision, "PATCHES_PER_CHUNK", 1)  # must not matter
    stock, ours = towers()
    inputs = pixels_of(stock, MEDIA["several"])
    expected = gradients(stock, inputs)
    for name, actual in gradients(ours, inputs).items():
        assert_close(actual, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_checkpointing_changes_nothing_and_recomputes(calls):
    _, ours = towers()
    inputs = pixels_of(ours, MEDIA["odd video"])
    ours.train()
    expected = gradients(ours, inputs)
    plain = len(calls)
    calls.clear()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    actual = gradients(ours, inputs)
    assert len(calls) == 2 * plain
    for name, gradient in actual.items():
        assert_close(gradient, expected[name])


def test_blocks_run_once_a_call_where_gradients_flow_or_weights_are_sharded(monkeypatch):
    monkeypatch.setattr(vision, "PATCHES_PER_CHUNK", 1)
    _, ours = towers()
    inputs = pixels_of(ours, MEDIA["video"])
    count = []
    ours.blocks[0].register_forward_hook(lambda *_: count.append(1))
    assert ours(*inputs).pooler_output.requires_grad
    assert len(count) == 1
    count.clear()
    ours.requires_grad_(False)
    assert not ours(*inputs).pooler_output.requires_grad
    assert len(count) == 3
    count.clear()
    ours.blocks[1].norm1.weight.ds_id = 0  # as ZeRO-3 marks a weight that it shards
    ours(*inputs)
    assert len(count) == 1


def test_only_one_adapter_trains():
    from peft import LoraConfig, inject_adapter_in_model

    _, ours = towers()
    ours.requires_grad_(False)
    names = ["qkv", "gate_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), ours)
    ours(*pixels_of(ours, MEDIA["image"])).pooler_output.sum().backward()
    adapters = [x for name, x in ours.named_parameters() if "lora" in name]
    assert adapters and all(x.grad is not None and x.grad.any() for x in adapters)


def test_angles_that_mixed_precision_cast_are_computed_with_in_float32():
    """As FSDP casts a block's inputs; the stock tower computes with them in float32, too."""
    torch.manual_seed(0)
    _, ours = towers()
    attention = ours.blocks[0].attn.bfloat16()
    x = torch.randn(16, 2 * attention.head_dim, dtype=torch.bfloat16)
    angles = torch.randn(16, attention.head_dim)
    cast = angles.cos().bfloat16(), angles.sin().bfloat16()
    whole = vision.Sequences([(1, 16)], None, None)
    with torch.no_grad():
        actual = attention(x, sequences=whole, position_embeddings=cast)
        wide = attention(x, sequences=whole, position_embeddings=[y.float() for y in cast])
    assert torch.equal(actual, wide)


def test_lengths_given_for_the_stock_tower_do_not_reach_the_attention(monkeypatch):
    """Of all windows and frames together, which a call for windows of one length is not."""
    _, ours = towers()
    inputs, seen, library = pixels_of(ours, MEDIA["video"]), [], vision.ALL_ATTENTION_FUNCTIONS

    def get_interface(name, default):
        function = library.get_interface(name, default)
        return lambda *args, **kwargs: seen.append(kwargs) or function(*args, **kwargs)

    monkeypatch.setattr(
        vision, "ALL_ATTENTION_FUNCTIONS", SimpleNamespace(get_interface=get_interface)
    )
    ours(*inputs, max_seqlen=128, max_window_seqlen=64)
    assert seen and not any(name.startswith("max_") for kwargs in seen for name in kwargs)


def test_only_a_module_on_cuda_with_nothing_around_it_has_its_weight_read():
    class Linear:
        def __init__(self, **changed):
            self.weight = SimpleNamespace(is_cuda=True)
            self._forward_hooks, self._forward_pre_hooks = {}, {}
            vars(self).update(changed)

    class OnCuda(torch.Tensor):  # and of a kind of its own, as quantised in place
        is_cuda = True

    assert vision._is_plain(Linear(), Linear)
    assert not vision._is_plain(Linear(), torch.nn.Linear)
    for changed in (
        {"weight": SimpleNamespace(is_cuda=False)},
        {"weight": SimpleNamespace(is_cuda=True, ds_id=0)},
        {"forward": print},
        {"_forward_hooks": {0: print}},
        {"_forward_pre_hooks": {0: print}},
        {"weight": OnCuda(torch.zeros(2, 2, dtype=torch.int8))},
    ):
        assert not vision._is_plain(Linear(**changed), Linear), changed


def test_a_frozen_tower_keeps_nothing_for_a_backward():
    """Though a hook wants gradients of its input, as the library sets one where adapters train."""
    _, ours = towers()
    ours.requires_grad_(False)
    ours.patch_embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    assert not ours(*pixels_of(ours, MEDIA["image"])).pooler_output.requires_grad


def test_hidden_states_lie_as_stock_gives_them():
    stock, ours = towers()
    inputs = pixels_of(stock, MEDIA["odd video"])
    with torch.no_grad():
        expected = stock(*inputs, output_hidden_states=True).hidden_states
        actual = ours(*inputs, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected)
    for ours_at, stock_at in zip(actual, expected, strict=True):
        assert_close(ours_at, stock_at)


def test_return_dict_false():
    stock, ours = towers()
    inputs = pixels_of(stock, MEDIA["image"])
    with torch.no_grad():
        actual = ours(*inputs, return_dict=False)
        assert_close(actual, stock(*inputs, return_dict=False))


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [[(4, 16, 32)], [(3, 18, 26), (1, 46, 34)]], ids=str)
def test_real_widths_in_bfloat16(grid):
    """At most twice the stock tower's own error against float64, gradients of pixels too."""
    widths = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
    widths |= {"out_hidden_size": 3584, "window_size": 112, "depth": 4, "initializer_range": 0.02}
    stock, ours = (x.to("cuda", torch.bfloat16) for x in towers(**widths))
    exact = copy.deepcopy(stock).double()
    pixels, grid = pixels_of(stock, grid)
    assert fused._runs_fused(pixels)

    def run(tower):
        x = pixels.to(tower.dtype).requires_grad_()
        output = tower(x, grid).pooler_output
        weights = [tower.blocks[0].mlp.gate_proj.weight, tower.blocks[1].norm1.weight]
        upper = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)
        found = torch.autograd.grad(output, [x, *weights], upper.to(output.dtype))
        return [output.detach().double(), *(y.double() for y in found)]

    for actual, eager, true in zip(run(ours), run(stock), run(exact), strict=True):
        allowed = 2 * (eager - true).norm() + 2**-8 * true.norm()
        assert (actual - true).norm() <= allowed
    with torch.no_grad():
        chunked = ours(pixels, grid).pooler_output
    assert_close(chunked, run(ours)[0].bfloat16(), rtol=0.05, atol=0.1)
