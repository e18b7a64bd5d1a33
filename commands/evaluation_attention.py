"""Switches between sparse and dense attention, and a witness of what really ran."""

import sys

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLTextModel,
)

BRANCHES = ("compressed", "selected", "window")
SETTINGS = ("block_size", "num_selected", "window_size")


def make_dense(language_model):
    """Turn VideoNSA's language model into Qwen2.5-VL's in place; the gates are left out."""

    class Dense(type(language_model)):
        def forward(self, *args, nsa_vision=None, **kwargs):
            return Qwen2_5_VLTextModel.forward(self, *args, **kwargs)

    language_model.__class__ = Dense
    for layer in language_model.layers:
        layer.self_attn.__class__ = Qwen2_5_VLAttention


class WrongAttention(RuntimeError):
    """Vision tokens attended in another way than was asked for."""


class Witness:
    """Counts, while it is entered, the vision tokens that go through a model's sparse attention.

    It stands where the layers call the sparse function itself, so what it counts was computed by
    that function: neither the configuration nor the class of a layer is taken for a proof. It
    also closes the gates of the branches that are not in `branches`.
    """

    def __init__(self, model, branches=BRANCHES):
        self.code = sys.modules[type(model).__module__]
        self.layers = [layer.self_attn for layer in model.model.language_model.layers]
        self.open = torch.tensor([branch in branches for branch in BRANCHES])
        if not hasattr(self.code, "_attention_functions"):
            raise WrongAttention(
                f"{self.code.__name__} does not choose its attention by _attention_functions, so "
                "what runs cannot be witnessed. Evaluate with the checkpoint's own evaluation.py."
            )
        self.clear()

    def clear(self):
        """Forget what was counted."""
        self.tokens = [0] * len(self.layers)  # of each row of the batch
        self.functions, self.settings = set(), {}
        self.gates, self.rows = 0, 0  # sum over tokens and heads, by branch, and their number

    def __enter__(self):
        self.layer = None
        self.original = self.code._attention_functions
        self.code._attention_functions = self._functions
        self.hooks = [
            layer.register_forward_pre_hook(lambda *_, index=index: setattr(self, "layer", index))
            for index, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *error):
        self.code._attention_functions = self.original
        for hook in self.hooks:
            hook.remove()

    def _functions(self, backend, device):
        sparse, dense = self.original(backend, device)

        def counted(q, k, v, gates, cu_q, cu_k, **settings):
            gates = gates * self.open.to(gates)
            output = sparse(q, k, v, gates, cu_q, cu_k, **settings)
            self.tokens[self.layer] = self.tokens[self.layer] + cu_q.diff().cpu()
            self.functions.add(sparse.__module__.rsplit(".", 1)[-1])
            self.settings = {name: settings[name] for name in SETTINGS}
            self.gates = self.gates + gates.detach().float().sum((0, 1)).cpu()
            self.rows += gates.shape[0] * gates.shape[1]
            return output

        return counted, dense

    def reports(self, vision_tokens):
        """What was counted of each sample of a batch; vision_tokens: of each of their prompts.

        `functions`, `settings` and `mean_gates` are those that were applied to the batch; a closed
        branch has mean gate 0.
        """
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
