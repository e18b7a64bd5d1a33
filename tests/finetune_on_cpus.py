"""Several runs of finetune.py, one after the other, in the processes that torchrun started.

    torchrun --nproc_per_node 2 tests/finetune_on_cpus.py '[["--data", ...], ["--data", ...]]'

Runs with --fsdp are sharded, where accelerate would fall back to replicas on CPUs.
"""

import json
import sys

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

from paths import ROOT

sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
from commands import finetuning_arguments  # noqa: E402


class Arguments(finetuning_arguments.FinetuneArguments):
    def __post_init__(self):
        super().__post_init__()
        kinds = DistributedType
        PartialState().distributed_type = kinds.MULTI_GPU if self.fsdp else kinds.MULTI_CPU


finetuning_arguments.FinetuneArguments = Arguments
for argv in json.loads(sys.argv[1]):
    AcceleratorState._reset_state()
    trainer = finetune.main(argv)
    sharded = trainer.accelerator.distributed_type == DistributedType.FSDP
    assert sharded == ("--fsdp" in argv) and trainer.args.world_size == 2
