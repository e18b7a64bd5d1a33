"""The Trainer of finetune.py: learning rates by part, the gates in its log, only whole results.

`VideoNSATrainer` overrides public methods of the Trainer, and one private one, with which it keeps
the library from cutting the batches of --sequence_parallel_size (finetuning_sharding.py). What it
writes is in finetuning_saving.py; what trains, in finetuning_model.py.
"""

import contextlib
import functools
import math
import time
from collections import Counter

import torch
import transformers
from transformers import EarlyStoppingCallback, Trainer

from commands.checkpoint_files import listed_files, upload
from commands.finetuning_answers import count_exact, sample_questions
from commands.finetuning_data import PIXELS, DataReport
from commands.finetuning_model import PARTS, part_of
from commands.finetuning_saving import WholeCheckpoints, complete_folder, prepare_folder
from commands.finetuning_sharding import check_equal_batches, mesh_group
from nsa_rules import BRANCHES

logger = transformers.utils.logging.get_logger("finetune")


class GateMeter:
    """Means of the gates over vision tokens and heads, per layer and branch.

    It sees the gates as the attention applies them, on their way into `attend_sparse`. Sums stay
    on the device until they are read, so that no step waits for them.
    """

    def __init__(self, language_model):
        self.attentions = [layer.self_attn for layer in language_model.layers]
        for index, attention in enumerate(self.attentions):
            attention.attend_sparse = functools.partial(
                self._attend_sparse, attention.attend_sparse, index
            )
        self._reset()

    def _reset(self):
        self.sums, self.counts = [0.0] * len(self.attentions), [0] * len(self.attentions)

    def _attend_sparse(self, attend_sparse, index, query, key, value, gates, plan):
        if self.attentions[index].training:
            self.sums[index] = self.sums[index] + gates.detach().float().sum((0, 1))
            self.counts[index] += gates.shape[0] * gates.shape[1]
        return attend_sparse(query, key, value, gates, plan)

    def read(self, accelerator) -> torch.Tensor:
        """[layers, 3] means over all processes since the last call; NaN where none was used."""
        device = accelerator.device
        zero = torch.zeros(3, device=device)
        sums = torch.stack([zero + total for total in self.sums])
        counts = torch.tensor(self.counts, device=device, dtype=torch.float)[:, None]
        total = accelerator.reduce(torch.cat([sums, counts], dim=1))
        self._reset()
        return (total[:, :3] / total[:, 3:]).cpu()


class VideoNSATrainer(Trainer):
    """The Trainer for batches of `Collator`, with finetune.py's arguments.

    papers: card and licence that go into every folder it saves, from `make_papers`.
    eval_answers: how many answers an evaluation generates, besides the loss.
    """

    def __init__(self, *args, papers, eval_answers=0, **kwargs):
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.papers, self.eval_answers = papers, eval_answers
        self.group = mesh_group(self.accelerator, self.args.sequence_parallel_size)
        if self.group is not None:
            self.base.shard_sequences(self.group)
        self.gates = GateMeter(self.base.model.language_model)
        self.report = DataReport(self.args.output_dir)
        self.seen, self.logs, self.since = Counter(), 0, time.perf_counter()
        self.add_callback(WholeCheckpoints(self.args, getattr(self, "hub_model_id", None)))
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        names = {id(p): name for name, p in (model or self.model).named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            for part in PARTS:
                own = [p for p in group["params"] if part_of(names[id(p)]) == part]
                if own:
                    groups.append({**group, "params": own, "lr": self.args.rate(part)})
        optimizer.param_groups[:] = groups
        return optimizer

    def _prepare_context_parallel_inputs(self, model, inputs):
        """Inputs as they are: the model shares them out itself (transformers 5.17 and 5.24)."""
        return contextlib.nullcontext, inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        stats = inputs.pop("stats")
        for note in self.report.add(stats.pop("notes")):
            logger.warning(note)
        if model.training:
            self.seen.update(stats)
        if self.label_smoother is not None:  # it compares these with the logits that there are
            inputs["labels"] = inputs["shift_labels"]
        if self.group is not None and not self.state.global_step:
            check_equal_batches(inputs, ("input_ids", "labels", *PIXELS), self.group)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.group is not None and num_items_in_batch is not None:
            # The Trainer takes it for the loss of a part of the batch, and adds up the parts.
            loss = loss / self.group.size()
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # it was resumed at its end
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """The loss over --eval_data, as the Trainer has it, and exact match of a sample of it."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.eval_answers:
            questions = sample_questions(self.eval_dataset, self.args.seed, self.eval_answers)
            counts = count_exact(self.base, self.processing_class, questions, self.args)
            counts = torch.tensor(counts, device=self.args.device, dtype=torch.float)
            exact, asked = self.accelerator.reduce(counts).tolist()
            output.metrics[f"{metric_key_prefix}_exact_match"] = exact / max(asked, 1)
            output.metrics[f"{metric_key_prefix}_answers"] = int(asked)
        output.metrics[f"{metric_key_prefix}_samples"] = output.num_samples
        return output

    def last_evaluation(self) -> dict:
        """The metrics of --eval_data at the end of the run; {} without it."""
        if self.eval_dataset is None:
            return {}
        last = next((one for one in reversed(self.state.log_history) if "eval_loss" in one), {})
        if last.get("step") == self.state.global_step and not self.args.load_best_model_at_end:
            return last
        return self.evaluate()

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs.update(self._measurements())
        super().log(logs, start_time)

    def _measurements(self):
        names = ("tokens", "attended", "dense")
        mine = torch.tensor([float(self.seen[name]) for name in names], device=self.args.device)
        mine = mine.double() / self.args.sequence_parallel_size  # a group's tokens count once
        tokens, attended, dense = self.accelerator.reduce(mine).tolist()
        seconds, self.since = time.perf_counter() - self.since, time.perf_counter()
        self.seen.clear()
        gates = self.gates.read(self.accelerator)
        listed = self.report.counts()
        means = zip(BRANCHES, gates.nanmean(0).tolist(), strict=True)
        measured = {f"gate_{branch}": mean for branch, mean in means} | {
            "keys_attended": attended / dense,
            "tokens_per_second": tokens / seconds,
            "skipped_samples": listed["skipped"],
            "shortened_samples": listed["shortened"],
        }
        if torch.cuda.is_available():
            measured["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.logs % self.args.gates_by_layer_every == 0:
            for layer, means in enumerate(gates.tolist()):
                for branch, mean in zip(BRANCHES, means, strict=True):
                    measured[f"gates_by_layer/{layer:02d}_{branch}"] = mean
        self.logs += 1
        return {name: value for name, value in measured.items() if not math.isnan(value)}

    def save_model(self, output_dir=None, **kwargs):
        """Writes a folder that loads by itself: weights, processor, the model's code and a card.

        kwargs: `_internal_call`, which the Trainer gives itself (read in transformers 5.17 and
        5.24): without it the folder is pushed, too.
        """
        folder = output_dir or self.args.output_dir
        prepare_folder(folder, self.args)
        # FSDP2 gives the model a class of its own; what is saved names its class and copies its
        # code, and both have to be the model's.
        own = type(self.base)
        model = next(one for one in own.__mro__ if not one.__module__.startswith("torch."))
        own.__name__, own.__module__ = model.__name__, model.__module__
        super().save_model(folder, **kwargs)
        if self.args.should_save:
            complete_folder(folder, not hasattr(self.model, "peft_config"), self.papers)

    def push_to_hub(self, commit_message="End of training"):
        """Pushes what loading needs of the output folder, which `save_result` has written."""
        if not self.is_world_process_zero():
            return
        args, folder = self.args, self.args.output_dir
        self.callback_handler.on_push_begin(args, self.state, self.control)
        access = {"token": args.hub_token, "revision": args.hub_revision}
        names, private = listed_files(folder), args.hub_private_repo
        upload(folder, self.hub_model_id, names, commit_message, private, **access)
