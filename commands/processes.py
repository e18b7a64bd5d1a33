"""Several processes that torchrun started a command in, which read each prompt together.

    torchrun --nproc_per_node 2 ask.py clip.mp4 "What happens?"

Each process has the model, on a GPU of its own; the first one alone prints. `join` makes them a
group, `load_shared` loads a model that shares its prompts out over it (sharding_videonsa.py),
`leave` ends it. In a process by itself they do nothing. torchrun ends all where one has failed.
"""

import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

from commands.model_loading import PreparedModel

TIMEOUT = datetime.timedelta(minutes=10)  # that one may be late at a call that all make together


def count() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def describe() -> str:
    """Of several processes ", the prompt shared out over 2 processes"; of one nothing."""
    return f", the prompt shared out over {count()} processes" if count() > 1 else ""


def join(device: str | None) -> str | None:
    """Make the processes a group; returns the device of this one, or `device` as it is for one.

    device: cpu, or cuda or None for GPUs. Raises ValueError for another one, and without a GPU for
    each process. All but the first print nothing on stdout from here on.
    """
    if count() == 1:
        return device
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu"):
        raise ValueError(
            f"--device {device} came with {count()} processes, and each takes a GPU of its own: "
            "leave --device out, or give cpu"
        )
    options = {}
    if device == "cuda":
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there:
            raise ValueError(
                f"process {number} has no GPU, of which there are {there}: start one process each, "
                f"with torchrun --nproc_per_node {there}"
            )
        device, options["device_id"] = f"cuda:{number}", torch.device("cuda", number)
        torch.cuda.set_device(number)
        turn_off_multicast()
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=TIMEOUT, **options)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, to the end
        logging.disable_progress_bar()
    return device


def turn_off_multicast() -> None:
    """Keep NCCL from multicast over NVLink, before a group is made, unless the environment says it.

    It needs services of the host that a container may not reach.
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


def check_group_size(size: int, there: int) -> None:
    """Raise ValueError where `there` processes are no whole number of groups of `size`."""
    if size < 1 or there % size:
        raise ValueError(
            f"--sequence_parallel_size is {size}, and {there} processes run, which are not groups "
            f"of {size}. Start a multiple of {max(size, 2)} with torchrun --nproc_per_node."
        )


def group_of(size: int) -> "dist.ProcessGroup | None":
    """The group of this process, where each `size` of all processes are one; None for a size of 1.

    Raises ValueError where there are not so many, or no whole number of groups.
    """
    if size == 1:
        return None
    check_group_size(size, dist.get_world_size() if dist.is_initialized() else 1)
    return dist.new_subgroups(size)[0]


def leave() -> None:
    """End the group, when all is done; after an error it would wait for the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def first_alone():
    """Let the first process go first, so that the others find the checkpoint's code there."""
    if count() > 1 and rank():
        dist.barrier()
    yield
    if count() > 1 and not rank():
        dist.barrier()


def load_shared(prepared: PreparedModel):
    """The model, which shares its prompts out over the processes, if there are several."""
    if count() == 1:
        return prepared.load()
    with first_alone():
        code = prepared.config.auto_map["AutoModelForImageTextToText"]
        get_class_from_dynamic_module(code, prepared.config.name_or_path)
    model = prepared.load()
    model.shard_sequences()
    return model
