"""Gated native sparse attention in a model that is not this one: it learns to repeat what it read.

    pip install kernels
    python tools/package_kernels.py out/gated-nsa
    python examples/gated_nsa.py

Every sample is random symbols, said twice. What comes next in the second half stands 31 tokens
back, outside the window, so the other branches have to find it. Takes seconds on a CPU; on a GPU
it runs through Triton.
"""

from pathlib import Path

import torch
from torch import nn

SYMBOLS, HALF, WIDTH, HEADS, KV_HEADS, SIZE = 16, 32, 64, 6, 2, 16


class Repeater(nn.Module):
    """One layer of sparse attention, three query heads to a key/value head, on packed samples."""

    def __init__(self, nsa):
        super().__init__()
        self.nsa = nsa
        self.symbols, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(2 * HALF, WIDTH)
        self.q, self.kv = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(WIDTH, 2 * KV_HEADS * SIZE)
        self.gates, self.out = nn.Linear(WIDTH, 3 * HEADS), nn.Linear(HEADS * SIZE, SYMBOLS)

    def forward(self, symbols):
        """Logits [samples, tokens, SYMBOLS] of the next symbol; symbols [samples, tokens]."""
        samples, tokens = symbols.shape
        places = torch.arange(tokens, device=symbols.device)
        x = (self.symbols(symbols) + self.places(places)).flatten(0, 1)
        q = self.q(x).unflatten(-1, (HEADS, SIZE))
        k, v = self.kv(x).unflatten(-1, (2, KV_HEADS, SIZE)).unbind(1)
        gates = self.nsa.gate_weights(self.gates(x), 1.0)
        lengths = torch.arange(samples + 1) * tokens
        sizes = {"block_size": 8, "num_selected": 4, "window_size": 8}
        o = self.nsa.nsa_attention(q, k, v, gates, lengths, lengths, **sizes)
        return self.out(o.flatten(1)).unflatten(0, (samples, tokens))


def train(nsa, device, steps=150):
    """Prints how many of the second half's symbols are foretold, and returns the share at last."""
    torch.manual_seed(0)
    model = Repeater(nsa).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        symbols = torch.randint(SYMBOLS, (4, HALF), device=device).repeat(1, 2)
        logits, wanted = model(symbols[:, :-1])[:, HALF:], symbols[:, HALF + 1 :]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        right = (logits.argmax(-1) == wanted).float().mean().item()
        if step % 30 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.2f}, {right:.0%} right", flush=True)
    return right


if __name__ == "__main__":
    from kernels import get_local_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(get_local_kernel(Path("out/gated-nsa")), device)
