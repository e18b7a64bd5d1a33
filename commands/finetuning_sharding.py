"""--sequence_parallel_size: groups of processes that share out each conversation.

The groups are the "cp" dimension of accelerate's device mesh, which gives the processes of a group
the same batches, and shards the weights over all processes (FSDP2). The sharing itself is the
model's (sharding_videonsa.py): accelerate's own context parallelism knows neither its attention nor
the placeholders of images and videos, and is kept out.
"""

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig

from commands.processes import check_group_size


def parallelism_config(args) -> ParallelismConfig | None:
    """What accelerate is to lay out; None where each process has batches of its own.

    args: finetune.py's arguments. Raises ValueError where they do not allow a group of so many.
    """
    size, processes = args.sequence_parallel_size, args.world_size
    if size == 1:
        return None
    if args.deepspeed or not args.fsdp or (args.fsdp_config or {}).get("version") != 2:
        raise ValueError(
            f"--sequence_parallel_size is {size}, which needs weights in shards of FSDP2: add "
            "--fsdp true and an --fsdp_config with version 2, as in examples/recipes/fsdp2.yaml, "
            "and leave --deepspeed out."
        )
    check_group_size(size, processes)
    return ParallelismConfig(dp_shard_size=processes // size, cp_size=size)


def mesh_group(accelerator, size: int) -> "dist.ProcessGroup | None":
    """The group of this process, None where `size`, which was asked for, is 1.

    Raises ValueError where accelerate was told of another parallelism, by its environment.
    """
    there = accelerator.parallelism_config
    sizes = {} if there is None else {"cp": there.cp_size, "sp": there.sp_size, "tp": there.tp_size}
    if any(number != (size if name == "cp" else 1) for name, number in sizes.items()):
        raise ValueError(
            f"accelerate was configured for {sizes}: its own context, sequence and tensor "
            "parallelism do not know this attention. Unset ACCELERATE_USE_PARALLELISM_CONFIG, and "
            "use --sequence_parallel_size."
        )
    return accelerator.torch_device_mesh["cp"].get_group() if size > 1 else None


def check_equal_batches(inputs: dict, names: tuple[str, ...], group: "dist.ProcessGroup") -> None:
    """Raise ValueError where the tensors of these names differ between the processes of a group."""
    device = inputs["input_ids"].device
    sums = []
    for name in names:
        value = inputs.get(name, torch.zeros(0, device=device)).to(device).double().flatten()
        place = torch.arange(len(value), device=device) % 8191 + 1.0  # a swap shows, too
        sums += [value.new_tensor(len(value)), (value * place).sum()]
    mine = torch.stack(sums)
    every = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(every, mine, group=group)
    differ = [name for i, name in enumerate(names) for one in every if not same(one, mine, i)]
    if differ:
        raise ValueError(
            f"{', '.join(dict.fromkeys(differ))} differ between the processes that share out a "
            "batch. The data must be the same, in the same order, for all: check that they read "
            "the same files, and that nothing in the data set draws random numbers."
        )


def same(one, other, number):
    return torch.equal(one[2 * number : 2 * number + 2], other[2 * number : 2 * number + 2])
