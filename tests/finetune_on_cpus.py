"""Several runs of finetune.py, one after the other, in the processes that torchrun started.

    torchrun --nproc_per_node 2 tests/finetune_on_cpus.py '[["--data", ...], ["--data", ...]]'

Runs with --fsdp or --deepspeed are sharded, where accelerate would fall back to replicas on CPUs.
All processes have to call the same collectives in the same order: where they do not, GPUs hang,
which gloo may not.
"""

import functools
import json
import sys

import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

from paths import ROOT

sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
from commands import finetuning_arguments  # noqa: E402


def kind_of(args):
    kinds = DistributedType
    return kinds.DEEPSPEED if args.deepspeed else kinds.MULTI_GPU if args.fsdp else kinds.MULTI_CPU


class Arguments(finetuning_arguments.FinetuneArguments):
    def __post_init__(self):
        if self.deepspeed:
            import deepspeed

            deepspeed.init_distributed("gloo")
        super().__post_init__()
        PartialState().distributed_type = kind_of(self)


finetuning_arguments.FinetuneArguments = Arguments
calls = []


def record(name, collective):
    @functools.wraps(collective)
    def recorded(*args, **kwargs):
        output = args[0] if args else next(v for k, v in kwargs.items() if k.startswith("output"))
        calls.append((name, tuple(output.shape)))
        return collective(*args, **kwargs)

    return recorded


for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
    setattr(dist, name, record(name, getattr(dist, name)))
for name in ("all_gather_single", "reduce_scatter_single"):  # their names in torch 2.14
    if hasattr(dist, name):
        setattr(dist, name, record(name, getattr(dist, name)))

for argv in json.loads(sys.argv[1]):
    AcceleratorState._reset_state()
    calls.clear()
    trainer = finetune.main(argv)
    kind = trainer.accelerator.distributed_type
    wanted = DistributedType.FSDP if trainer.args.fsdp else kind_of(trainer.args)
    assert kind == wanted and trainer.args.world_size == 2
    gathered = [None, None]
    dist.all_gather_object(gathered, calls)
    assert gathered[0] == gathered[1], argv
    assert bool(calls) == (kind != DistributedType.MULTI_CPU)
