"""Calls of a model shared out over 2 to 4 processes, compared with the same of one process.

    python tests/shard_on_cpus.py [NAME ...]
    python tests/shard_on_cpus.py --device cuda [NAME ...]

Prints a JSON object: for each number of processes, for each case (NAME alone, where it is given),
how far apart results are: the largest of all processes. The processes are forked after everything
is imported, and talk through gloo. Weights are float64, and so are the norms, which stock
Qwen2.5-VL computes in float32. On GPUs two processes are spawned, talk through NCCL, and run the
kernels in float32.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from videonsa import fused_videonsa  # noqa: E402
from videonsa.library_videonsa import cache_of  # noqa: E402

from commands.finetuning_data import PIXELS  # noqa: E402
from commands.finetuning_sharding import check_equal_batches  # noqa: E402
from tiny import VIDEO, Prompts, make_model  # noqa: E402

SIZES = {"cpu": (2, 3, 4), "cuda": (2,)}
# What four processes run; fewer run all.
CASES_OF_FOUR = "one_video padded_rows fewer_tokens_than_processes packed_samples an_answer"
MODELS = {
    "cpu": {"dtype": torch.float64},
    "cuda": {"dtype": torch.float32, "head_dim": 16, "nsa_block_size": 8, "nsa_window_size": 12},
}
MIXED = (3, ("video", 8, 4, 4), 9, ("image", 2, 2), 4)


def exact_norm(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def exact_add_norm(x, residual, weight, eps):
    return x + residual, exact_norm(x + residual, weight, eps)


fused_videonsa.rms_norm, fused_videonsa.add_rms_norm = exact_norm, exact_add_norm


class Models:
    """A model that shares sequences out, and one with the same weights that does not."""

    def __init__(self, device):
        self.device = device
        self.shared, self.alone = (make_model(**MODELS[device]).to(device) for _ in range(2))
        self.shared.shard_sequences()

    def batch(self, *rows):
        prompts = Prompts()
        batch = prompts.batch(*(prompts.row(*row) for row in rows), device=self.device)
        dtype = MODELS[self.device]["dtype"]
        return {k: v.to(dtype) if k.startswith("pixel") else v for k, v in batch.items()}

    def train(self, batch):
        """How far apart logits, and gradients averaged over the processes, are."""
        logits, labels = [], batch["input_ids"].masked_fill(batch["input_ids"] < 5, -100)
        for model in (self.shared, self.alone):
            model.zero_grad()
            outputs = model(**batch, labels=labels, use_cache=False)
            outputs.loss.backward()
            logits.append(outputs.logits)
        errors = {"logits": apart(*logits), "gradients": 0.0}
        pairs = zip(self.shared.named_parameters(), self.alone.parameters(), strict=True)
        for (name, mine), wanted in pairs:
            assert (mine.grad is None) == (wanted.grad is None), name
            if mine.grad is not None:
                dist.all_reduce(mine.grad)
                error = apart(mine.grad / dist.get_world_size(), wanted.grad)
                errors["gradients"] = max(errors["gradients"], error)
        return errors

    def generate(self, batch, draw=False, **kwargs):
        """How far apart scores and caches are, and whether tokens are the same."""
        both = []
        for model, seed in ((self.shared, dist.get_rank() if draw else 0), (self.alone, 0)):
            torch.manual_seed(seed)
            both.append(
                model.generate(
                    **batch,
                    max_new_tokens=5,
                    return_dict_in_generate=True,
                    output_logits=True,
                    **{
                        key: value[model] if key == "caches" else value
                        for key, value in kwargs.items()
                    },
                )
            )
        keys = [torch.stack([x.keys for x in cache_of(one).layers]) for one in both]
        return {
            "same tokens": float(not torch.equal(*(one.sequences for one in both))),
            "logits": apart(*(torch.stack(one.logits) for one in both)),
            "cache": apart(*keys),
        }


@torch.no_grad()
def apart(mine, wanted):
    """The largest difference, relative to the largest number."""
    return float((mine - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def case_one_video(models):
    return models.train(models.batch(MIXED))


def case_padded_rows(models):
    return models.train(models.batch((3, ("video", 4, 4, 2), 9), (20, ("video", 3, 2, 2), 5)))


def case_text_beside_a_video(models):
    return models.train(models.batch((7,), (3, ("video", 4, 2, 2), 5)))


def case_text_alone(models):
    return models.train(models.batch((7,), (4,)))


def case_one_vision_token(models):
    return models.train(models.batch((2, ("image", 1, 1), 1)))


def case_fewer_tokens_than_processes(models):
    """A call of two tokens: one process of three has no row of its own."""
    ids = torch.tensor([[VIDEO, 9]])
    batch = models.batch((("video", 1, 1, 1),))
    batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return models.train(batch | {"mm_token_type_ids": (ids == VIDEO) * 2})


def case_frames_of_different_sizes(models):
    return models.train(models.batch((("image", 6, 6), ("image", 1, 1), ("video", 1, 2, 2), 5)))


def case_packed_samples(models):
    first, second = (models.batch(row) for row in (MIXED, (4, ("video", 3, 2, 2), 5)))
    batch = {k: torch.cat([first[k], second[k]], dim=1) for k in ("input_ids", "mm_token_type_ids")}
    for key in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
        batch[key] = torch.cat([first[key], second[key]])
    for key in ("pixel_values", "image_grid_thw"):
        batch[key] = first[key]
    positions = []
    for one in (first, second):
        media = {k: v for k, v in one.items() if "grid" in k}
        place, _ = models.alone.model.get_rope_index(one["input_ids"], **media)
        text = torch.arange(place.shape[-1]).expand(1, 1, -1)
        positions.append(torch.cat([text, place]))
    return models.train(batch | {"position_ids": torch.cat(positions, dim=-1)})


def case_checkpointed_layers(models):
    for model in (models.shared, models.alone):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    errors = models.train(models.batch(MIXED))
    for model in (models.shared, models.alone):
        model.gradient_checkpointing_disable()
        model.eval()
    return errors


def case_hidden_states(models):
    batch = models.batch(MIXED)
    both = (model(**batch, output_hidden_states=True) for model in (models.shared, models.alone))
    mine, wanted = (torch.stack(outputs.hidden_states) for outputs in both)
    return {"hidden states": apart(mine, wanted)}


def case_an_answer(models):
    return models.generate(models.batch(MIXED))


def case_chunks_that_end_within_frames(models):
    return models.generate(models.batch(MIXED), prefill_chunk_size=7)


def case_beams(models):
    return models.generate(models.batch(MIXED), num_beams=2)


def case_a_static_cache(models):
    return models.generate(models.batch(MIXED), cache_implementation="static")


def case_sampling_with_seeds_of_their_own(models):
    return models.generate(models.batch(MIXED), draw=True, do_sample=True)


def case_a_second_turn(models):
    first, second = models.batch(MIXED), models.batch((6, ("video", 3, 2, 2), 5))
    both = []
    for model in (models.shared, models.alone):
        turn = model.generate(**first, max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, second["input_ids"]], dim=1)
        whole = second | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole.pop("mm_token_type_ids")
        both.append(
            model.generate(
                **whole,
                max_new_tokens=3,
                past_key_values=cache_of(turn),
                return_dict_in_generate=True,
                output_logits=True,
            )
        )
    return {"logits": apart(*(torch.stack(turn.logits) for turn in both))}


def case_work_is_shared(models):
    """Rows of a layer and patches of a block of the tower, as parts of all: above an even share."""
    batch, seen = models.batch((2, ("video", 24, 4, 4), 40)), {}
    parts = {
        "rows": (models.shared.model.language_model.layers[0], batch["input_ids"].shape[1]),
        "patches": (models.shared.model.visual.blocks[0], len(batch["pixel_values_videos"])),
    }
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name, whole=whole: seen.update(
                {name: (args or (kwargs["hidden_states"],))[0].shape[-2] / whole}
            ),
            with_kwargs=True,
        )
        for name, (module, whole) in parts.items()
    ]
    models.shared(**batch)
    for hook in hooks:
        hook.remove()
    return {name: part * dist.get_world_size() - 1 for name, part in seen.items()}


def case_different_prompts(models):
    """0 where a call is refused, in every process, that brings other tokens in one of them."""
    errors = {}
    changed = models.batch(MIXED)
    longer = models.batch((3 + (dist.get_rank() == 1), *MIXED[1:]))
    if dist.get_rank() == 1:
        changed["input_ids"][0, 0] = changed["input_ids"][0, 0] % 40 + 6
    for name, batch in (("another word", changed), ("another length", longer)):
        try:
            models.shared(**batch)
            errors[name] = 1.0
        except ValueError as error:
            errors[name] = float("Processes that share out a sequence" not in str(error))
    return errors


def case_different_media(models):
    """0 where a call is refused, in every process, that brings other pixels or grids in one."""
    errors = {}
    batch = models.batch((3, ("video", 8, 2, 4), 4))
    for name, turn in (
        ("pixel_values_videos", lambda pixels: pixels.flip(0)),
        ("video_grid_thw", lambda grid: grid[:, [0, 2, 1]]),
    ):
        try:
            changed = {name: turn(batch[name])} if dist.get_rank() == 1 else {}
            models.shared(**batch | changed)
            errors[name] = 1.0
        except ValueError as error:
            errors[name] = float("Processes that share out a sequence" not in str(error))
    return errors


def case_different_batches(models):
    """0 where the check of fine-tuning tells equal batches from those with other pixels."""
    batch, errors = models.batch(MIXED), {"equal": 0.0, "other pixels": 1.0}
    names, group = ("input_ids", "labels", *PIXELS), dist.group.WORLD
    check_equal_batches(batch, names, group)
    if dist.get_rank() == 1:
        batch["pixel_values_videos"] = batch["pixel_values_videos"].flip(0)
    try:
        check_equal_batches(batch, names, group)
    except ValueError as error:
        errors["other pixels"] = float(not str(error).startswith("pixel_values_videos differ"))
    return errors


CASES = {name.removeprefix("case_"): f for name, f in globals().items() if name.startswith("case_")}


def run(rank, size, folder, device, names):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{folder}/{size}", rank=rank, world_size=size)
    models, results = Models(device), {}
    for name in names:
        results[name] = CASES[name](models)
    gathered = [None] * size
    dist.all_gather_object(gathered, results)
    if rank == 0:
        worst = {
            name: {what: max(one[name][what] for one in gathered) for what in errors}
            for name, errors in results.items()
        }
        Path(folder, f"{size}.json").write_text(json.dumps(worst))
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[*CASES])
    parser.add_argument("--device", default="cpu", choices=[*SIZES])
    args = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn" if args.device == "cuda" else "fork")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES[args.device]:
            names = [n for n in args.names if size < 4 or n in CASES_OF_FOUR.split()]
            arguments = (size, folder, args.device, names)
            ranks = [context.Process(target=run, args=(rank, *arguments)) for rank in range(size)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            results[size] = json.loads(Path(folder, f"{size}.json").read_text())
    print(json.dumps(results))


if __name__ == "__main__":
    main()
