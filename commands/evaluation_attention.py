"""Records how many vision tokens a model's sparse attention computed: the proof of what ran."""

import sys

import torch
import torch.distributed as dist

from nsa_rules import BRANCHES


class WrongAttention(RuntimeError):
    """Vision tokens attended in another way than was asked for."""


class AttentionRecorder:
    """Counts, while it is entered, the vision tokens whose output `attend_sparse` computed.

    It wraps that method of each layer's attention, so what it counts was computed there: the
    configuration is not taken for a proof. It also closes the gates of the branches that are not
    in `branches`.
    """

    def __init__(self, model, branches=BRANCHES, group=None):
        self.group = group  # of processes that share prompts out: each computes a part of it
        self.layers = [layer.self_attn for layer in model.model.language_model.layers]
        self.open = torch.tensor([branch in branches for branch in BRANCHES])
        for layer in self.layers:
            if not hasattr(layer, "attend_sparse"):
                raise WrongAttention(
                    f"{type(layer).__name__} in {type(layer).__module__} has no attend_sparse, so "
                    "nothing proves what runs. Evaluate with the code that the checkpoint carries."
                )
        self.clear()

    def clear(self):
        """Forget what was counted."""
        self.tokens = [0] * len(self.layers)  # of each row of the batch
        self.functions, self.settings = set(), {}
        self.gates, self.rows = 0, 0  # sum over tokens and heads, by branch, and their number

    def __enter__(self):
        for index, layer in enumerate(self.layers):
            layer.attend_sparse = self._counting(index, layer)
        return self

    def __exit__(self, *error):
        for layer in self.layers:
            del layer.attend_sparse  # the class's own is found again

    def _counting(self, index, layer):
        attend_sparse, config = layer.attend_sparse, layer.config
        attention_functions = sys.modules[type(layer).__module__].attention_functions

        def counting(query, key, value, gates, plan):
            gates = gates * self.open.to(gates)
            output = attend_sparse(query, key, value, gates, plan)
            tokens = plan.cu_vision_queries.diff().cpu()
            if plan.shard is not None:  # a sample's are two chunks
                tokens = tokens.view(-1, 2).sum(1)
            self.tokens[index] = self.tokens[index] + tokens
            functions = attention_functions(config.nsa_backend, query.device)
            self.functions.add(functions.nsa_attention.__module__.rsplit(".", 1)[-1])
            self.settings = {
                "semantics": config.nsa_semantics,
                "block_size": config.nsa_block_size,
                "num_selected": config.nsa_num_selected_blocks,
                "window_size": config.nsa_window_size,
            }
            self.gates = self.gates + gates.detach().float().sum((0, 1)).cpu()
            self.rows += gates.shape[0] * gates.shape[1]
            return output

        return counting

    def reports(self, vision_tokens):
        """What was counted of each sample of a batch; vision_tokens: of each of their prompts.

        `functions`, `settings` and `mean_gates` are those that were applied to the batch; a closed
        branch has mean gate 0.
        """
        if self.group is not None:
            self._add_up()
        samples = len(vision_tokens)
        # A sample has several rows when it is answered by beam search; all of them must count.
        by_layer = [
            tokens.view(samples, -1).amin(1).tolist() if torch.is_tensor(tokens) else [0] * samples
            for tokens in self.tokens
        ]
        means = (self.gates / self.rows).tolist() if self.rows else [0.0] * len(BRANCHES)
        common = {
            "functions": sorted(self.functions),
            "settings": self.settings,
            "mean_gates": dict(zip(BRANCHES, (round(mean, 4) for mean in means), strict=True)),
        }
        return [
            {"vision_tokens": tokens, "sparse_tokens_by_layer": list(counted), **common}
            for tokens, counted in zip(vision_tokens, zip(*by_layer, strict=True), strict=True)
        ]

    def _add_up(self):
        """Adds what all processes of the group counted."""
        every = [None] * self.group.size()
        dist.all_gather_object(every, (self.tokens, self.gates, self.rows), group=self.group)
        tokens, gates, rows = zip(*every, strict=True)
        self.tokens = [sum(layer) for layer in zip(*tokens, strict=True)]
        self.gates, self.rows = sum(gates), sum(rows)


def check(report, attention):
    """Raise WrongAttention unless a sample's report is that of `attention`, sparse or dense."""
    tokens, by_layer = report["vision_tokens"], report["sparse_tokens_by_layer"]
    wanted = tokens if attention == "sparse" else 0
    if all(count == wanted for count in by_layer):
        return
    raise WrongAttention(
        f"{attention} attention was asked for, but of {tokens} vision tokens "
        f"{min(by_layer)} to {max(by_layer)} went through the sparse attention in each of "
        f"{len(by_layer)} layers, where {wanted} should have. The answers would be another "
        "model's; no score was written. Look at what replaces the attention, or ask for the other "
        "--attention."
    )
