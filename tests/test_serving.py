"""The plug-in for vLLM, as far as it needs no vLLM: steps, pages, and the checkpoint to try it on.

serving/tests/ has the rest, for an environment that serving/make_cpu_environment.sh makes.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from videonsa.nsa_reference import nsa_attention

from paths import ROOT
from videonsa_serving.pages import cpu_layout, flash_layout, read_tokens
from videonsa_serving.step import make_step, vision_mask

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 6, 8
BRANCHES = {"block_size": 4, "num_selected": 3, "window_size": 5, "num_initial": 1, "num_local": 1}


def mask_of(text):
    """A mask written as letters: v is a vision token."""
    return np.array([letter == "v" for letter in text])


def medium(modality, offset, length, is_embed=None):
    place = SimpleNamespace(offset=offset, length=length, is_embed=is_embed)
    return SimpleNamespace(modality=modality, mm_position=place)


def test_the_mask_has_the_placeholders_of_the_modalities_that_attend_sparsely():
    stamped = torch.tensor([False, True, True])
    media = [medium("image", 1, 2), medium("video", 4, 3, stamped)]
    assert vision_mask(8, media, ["image", "video"]).tolist() == mask_of("tvvttvvt").tolist()
    assert vision_mask(8, media, ["video"]).tolist() == mask_of("tttttvvt").tolist()
    assert not vision_mask(8, media, []).any()


def test_a_step_of_text_alone_is_none():
    masks = [None, mask_of("tvvt"), mask_of("tt")]
    # One without a mask, one that is past its video, one of text.
    assert make_step(masks, [0, 3, 4, 6], [0, 3, 0]) is None


def test_a_step_has_the_rows_and_keys_of_every_request():
    """A chunk that ends inside a video, one that begins there, an answer's token, a whole text."""
    masks = [mask_of("tvvvvt"), mask_of("vvtvvt"), mask_of("tvt"), mask_of("tt")]
    step = make_step(masks, [0, 3, 7, 8, 10], [0, 1, 4, 0])
    assert step.vision_rows.tolist() == [1, 2, 3, 5, 6]
    assert step.vision_starts.tolist() == [0, 2, 5]
    assert step.key_starts.tolist() == [0, 2, 6]
    assert step.key_requests.tolist() == [0, 0, 1, 1, 1, 1]
    assert step.key_places.tolist() == [1, 2, 0, 1, 3, 4]
    assert step.text_rows.tolist() == [0, 4, 7, 8, 9]
    assert step.text_starts.tolist() == [0, 1, 2, 3, 5]
    assert step.text_requests.tolist() == [0, 1, 2, 3]
    assert step.text_lengths.tolist() == [1, 3, 5, 2]


def paged(layout, keys, values, block_table, requests, places):
    """A cache with these keys and values [M, K, D] written through views of its layout."""
    cache = torch.zeros(int(block_table.max()) + 1, KV_HEADS, PAGE, 2 * HEAD_DIM, dtype=keys.dtype)
    key_cache, value_cache = layout(cache)
    pages = block_table[requests, places // PAGE]
    key_cache[pages, places % PAGE] = keys
    value_cache[pages, places % PAGE] = values
    return cache


@pytest.mark.parametrize("layout", [cpu_layout, flash_layout])
def test_a_layout_is_views_of_the_whole_cache(layout):
    cache = torch.zeros(5, KV_HEADS, PAGE, 2 * HEAD_DIM)
    for part in layout(cache):
        assert part.shape == (5, PAGE, KV_HEADS, HEAD_DIM)
        part += 1
    assert (cache == 1).all()


def test_the_layouts_are_the_engines():
    """The bytes are where the operators that write keys and values put them."""
    cache = torch.arange(2 * KV_HEADS * PAGE * 2 * HEAD_DIM).view(2, KV_HEADS, PAGE, -1)
    token, head, dim = 3, 1, 4
    keys, values = flash_layout(cache)
    assert keys[1, token, head, dim] == cache[1, head, token, dim]
    assert values[1, token, head, dim] == cache[1, head, token, HEAD_DIM + dim]
    keys, values = cpu_layout(cache)
    page = cache[1, head].flatten()
    assert keys[1, token, head, dim] == page[dim * PAGE + token]
    assert values[1, token, head, dim] == page[PAGE * HEAD_DIM + token * HEAD_DIM + dim]


@pytest.mark.parametrize("layout", [cpu_layout, flash_layout])
def test_steps_of_any_size_compute_what_whole_prompts_do(layout):
    """Chunks of several prompts side by side, through pages in any order."""
    generator = torch.Generator().manual_seed(0)
    numbers = np.random.default_rng(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    masks = [numbers.random(length) < 0.7 for length in (61, 1, 40, 17)]
    tokens = [
        (randn(len(m), HEADS, HEAD_DIM), *(randn(len(m), KV_HEADS, HEAD_DIM) for _ in range(2)))
        for m in masks
    ]
    gates = [randn(len(m), HEADS, 3).sigmoid() for m in masks]
    table = torch.randperm(len(masks) * 8, generator=generator).view(len(masks), 8)
    requests = torch.cat([torch.full((len(m),), i) for i, m in enumerate(masks)])
    places = torch.cat([torch.arange(len(m)) for m in masks])
    keys, values = (torch.cat([own[i] for own in tokens]) for i in (1, 2))
    cache = paged(layout, keys, values, table, requests, places)

    computed, found = [0] * len(masks), [torch.zeros(0, HEADS, HEAD_DIM).double() for _ in masks]
    while any(done < len(m) for done, m in zip(computed, masks, strict=True)):
        running = [i for i, m in enumerate(masks) if computed[i] < len(m)]
        ends = [min(computed[i] + int(numbers.integers(1, 9)), len(masks[i])) for i in running]
        slices = [slice(computed[i], end) for i, end in zip(running, ends, strict=True)]
        starts = np.cumsum([0, *(s.stop - s.start for s in slices)])
        step = make_step([masks[i] for i in running], starts, [s.start for s in slices])
        pairs = list(zip(running, slices, strict=True))
        if step is not None:
            parts = {name: torch.from_numpy(x) for name, x in step._asdict().items()}
            seen = read_tokens(
                layout(cache), table[running], parts["key_requests"], parts["key_places"]
            )
            query, own = (
                torch.cat([x[i][s] for i, s in pairs]) for x in ([t[0] for t in tokens], gates)
            )
            rows = parts["vision_rows"]
            output = nsa_attention(
                query[rows],
                *seen,
                own[rows],
                parts["vision_starts"],
                parts["key_starts"],
                **BRANCHES,
            )
            of_row = dict(zip(rows.tolist(), output, strict=True))
            for (i, s), first in zip(pairs, starts[:-1].tolist(), strict=True):
                new = [of_row[r] for r in range(first, first + s.stop - s.start) if r in of_row]
                found[i] = torch.cat([found[i], *(x[None] for x in new)])
        for i, s in pairs:
            computed[i] = s.stop

    for mask, (query, key, value), own, output in zip(masks, tokens, gates, found, strict=True):
        if mask.any():
            starts = torch.tensor([0, mask.sum()], dtype=torch.int32)
            packed = (x[torch.from_numpy(mask)] for x in (query, key, value, own))
            torch.testing.assert_close(output, nsa_attention(*packed, starts, starts, **BRANCHES))


def test_the_wide_checkpoint_answers_as_the_repositorys(tmp_path):
    import widen_checkpoint

    widen_checkpoint.widen(tmp_path)
    logits = []
    for folder in (ROOT, tmp_path):
        model = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float64
        )
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        video = {"type": "video", "video": str(ROOT / "examples/clips/circle.mp4"), "fps": 1.0}
        question = {"type": "text", "text": "What colour is the shape?"}
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [video, question]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    text = model.config.text_config
    assert text.hidden_size // text.num_attention_heads == 32
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
