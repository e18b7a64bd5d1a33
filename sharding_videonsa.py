"""One sequence over several processes, each with all of the model and a part of the tokens.

`model.shard_sequences(group)` names the processes. From then on each of them is called with the
same prompt or batch as the others, and returns the same as one process alone. Between:

- Each runs the vision tower on a range of the frames, and gathers the features of the others'.
- Each runs the language model on its rows, that is tokens; the attention gathers the keys and
  values of all rows, so that every process ends with the whole cache, and decodes alone. The last
  hidden states are gathered, too.

Later vision tokens see more keys than earlier ones. The vision stream of a sample is therefore cut
into 2 N chunks for N processes, of which process r takes chunks r and 2 N - 1 - r ("zigzag"); all
other rows are dealt in turn. A chunk's queries are the last of the keys up to its end, which is
what the attention takes anyway.

The backward of a gather adds up what all processes send back to its rows. Every process computes
the loss of the whole batch, so what it finds for a weight is N times its own part: the mean over
the group, as FSDP and DDP take it, is the gradient of one process. Nothing scales the loss.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .packing_videonsa import NSAPlan, send


def checked_group(config, group: "dist.ProcessGroup | None") -> "dist.ProcessGroup | None":
    """The group, by default that of all processes; None where it is one process.

    config: of the language model. Raises ValueError where sequences cannot be shared out.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "shard_sequences was called before torch.distributed.init_process_group. Start the "
            "script with torchrun, and make the group of processes first."
        )
    if config.nsa_semantics != "paper":
        raise ValueError(
            f"nsa_semantics is {config.nsa_semantics!r}, under which tokens see later ones: a "
            "sequence cannot be shared out over processes. Use one process, or weights with "
            "nsa_semantics 'paper'."
        )
    if not config.nsa_enabled:
        raise ValueError(
            "nsa_enabled is False: dense attention is not shared out over processes, each would "
            "read the whole prompt. Use one process, or nsa_enabled=True."
        )
    group = group or dist.group.WORLD
    return None if group.size() == 1 else group


class Shard(NamedTuple):
    """The rows of one process among the B * S new tokens of a call."""

    group: "dist.ProcessGroup"
    rows: torch.Tensor  # int64 [n]; all processes have equally many, a row may stand twice for that
    order: torch.Tensor  # int64 [B * S], where each row is among all processes' rows
    shape: tuple[int, int]  # (B, S)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, ...] to [1, n, ...], the rows of this process."""
        return x.flatten(0, 1)[self.rows][None]

    def take_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """int64 [..., B or 1, S] to [..., 1, n]."""
        whole = position_ids.expand(*position_ids.shape[:-2], *self.shape)
        return whole.flatten(-2)[..., self.rows].unsqueeze(-2)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[1, n, ...] of each process to [B, S, ...]."""
        return _Gather.apply(x[0], self.group)[self.order].unflatten(0, self.shape)

    def gather_heads(self, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[1, heads, n, D] each, as keys and values are, to [B, heads, S, D]; one call for all."""
        heads = [x.shape[1] for x in states]
        gathered = self.gather(torch.cat(states, dim=1).transpose(1, 2))
        return gathered.transpose(1, 2).split(heads, dim=1)

    def gather_outputs(self, outputs):
        """The outputs of a language model for [1, n, hidden], as those for [B, S, hidden]."""
        for name in ("last_hidden_state", "hidden_states"):
            if isinstance(value := outputs.get(name), tuple):
                outputs[name] = tuple(None if x is None else self.gather(x) for x in value)
            elif value is not None:
                outputs[name] = self.gather(value)
        return outputs


def shard_plan(
    plan: NSAPlan | None, samples: int, group: "dist.ProcessGroup", device: torch.device
) -> NSAPlan | None:
    """The part that this process runs of a plan on the CPU, itself on `device`; None stays None.

    samples: B, the batch rows of the plan.
    """
    if plan is None:
        return None
    size, rank = group.size(), group.rank()
    new, keys = plan.num_queries, plan.num_keys
    vision, text = _flat(plan.vision_queries, new), _flat(plan.text_queries, new)
    others = torch.ones(samples * new, dtype=torch.bool).index_fill(0, vision, False)
    others = others.nonzero()[:, 0]  # text and padding
    chunks = _zigzag(plan.cu_vision_queries, size)
    shares = [
        torch.cat([*(vision[first:last] for _, first, last in own), others[number::size]])
        for number, own in enumerate(chunks)
    ]
    rows, order = _even(shares, samples * new)

    vision_keys, seen = _flat(plan.vision_keys, keys), []
    starts, ends = plan.cu_vision_keys[:-1], plan.cu_vision_keys[1:]
    for sample, first, last in chunks[rank]:
        later = int(plan.cu_vision_queries[sample + 1]) - last  # queries of the sample after these
        end = int(ends[sample]) - later
        seen.append(vision_keys[int(starts[sample]) if last > first else end : end])
    num_vision = sum(last - first for _, first, last in chunks[rank])
    places = torch.isin(others[rank::size], text).nonzero()[:, 0] + num_vision
    is_own = torch.isin(text, others[rank::size])
    own_before = nn.functional.pad(is_own.cumsum(0), (1, 0))
    return NSAPlan(
        num_queries=rows.shape[1],
        num_keys=keys,
        vision_queries=(0, slice(0, num_vision)),
        vision_keys=_index(torch.cat(seen), keys, device),
        cu_vision_queries=_cumulative([last - first for _, first, last in chunks[rank]], device),
        cu_vision_keys=_cumulative([len(x) for x in seen], device),
        text_queries=(0, send(places, device)),
        text_positions=send(plan.text_positions[is_own], device),
        all_keys=tuple(send(x, device) if torch.is_tensor(x) else x for x in plan.all_keys),
        cu_text_queries=send(own_before[plan.cu_text_queries.long()].int(), device),
        cu_all_keys=send(plan.cu_all_keys, device),
        shard=Shard(group, send(rows[rank], device), send(order, device), (samples, new)),
    )


def _zigzag(cu_queries, size):
    """For each process the (sample, first, last) of its chunks of the packed queries."""
    chunks = [[] for _ in range(size)]
    spans = zip(cu_queries[:-1].tolist(), cu_queries[1:].tolist(), strict=True)
    for sample, (start, end) in enumerate(spans):
        bounds = [start + (end - start) * i // (2 * size) for i in range(2 * size + 1)]
        for rank, own in enumerate(chunks):
            for chunk in (rank, 2 * size - 1 - rank):
                own.append((sample, bounds[chunk], bounds[chunk + 1]))
    return chunks


def _even(shares, total):
    """Rows [processes, n] of shares of different lengths, and where each of the `total` rows is.

    What is missing at the end of a share is row 0 once more; nothing reads what becomes of it.
    """
    longest = max(map(len, shares))
    rows, order = torch.zeros(len(shares), longest, dtype=torch.long), torch.empty(total).long()
    for number, share in enumerate(shares):
        rows[number, : len(share)] = share
        order[share] = torch.arange(len(share)) + number * longest
    return rows, order


def _flat(index, length):
    """The rows of an `Index` into [B, length, ...], as numbers of B * length ones."""
    batch, position = index
    if isinstance(position, slice):
        return torch.arange(position.start, position.stop)
    return batch * length + position


def _index(rows, length, device):
    """The inverse of `_flat`, as (batch, position) tensors."""
    return send(rows // length, device), send(rows % length, device)


def _cumulative(lengths, device):
    return send(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int(), device)


def share_frames(frames: torch.Tensor, group: "dist.ProcessGroup | None") -> list | None:
    """For each process the (first, last) of its frames, of about as many patches each.

    frames int64 [frames + 1], cumulative patches, on the CPU. None without a group, and where there
    are fewer frames than processes: then each of them encodes all, because sharded weights (FSDP)
    want every process to call the tower.
    """
    if group is None or len(frames) - 1 < (size := group.size()):
        return None
    wanted = frames[-1] * torch.arange(1, size) // size
    bounds = [0, *torch.searchsorted(frames, wanted).tolist(), len(frames) - 1]
    for number in range(1, size):  # one frame each at least
        room = len(frames) - 1 - (size - number)
        bounds[number] = min(max(bounds[number], bounds[number - 1] + 1), room)
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def gather_parts(x: torch.Tensor, lengths: list[int], group: "dist.ProcessGroup") -> torch.Tensor:
    """[lengths[r], ...] of each process r to [sum(lengths), ...]."""
    longest = max(lengths)
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    parts = _Gather.apply(padded, group).split(longest)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


class _Gather(torch.autograd.Function):
    """[n, ...] of each process to [processes * n, ...] of all; the backward adds up."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        dtype = torch.promote_types(grad.dtype, torch.float32)  # sums as exact as one process's
        own = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:], dtype=dtype)
        # The later name is that of torch 2.14, which warns of the earlier one.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(own, grad.to(dtype).contiguous(), group=ctx.group)
        return own.to(grad.dtype), None


def _all_gather(x, group):
    """[n, ...] of each process to [processes * n, ...]."""
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gathered = x.new_empty(group.size() * len(x), *x.shape[1:])
    all_gather(gathered, x.contiguous(), group=group)
    return gathered


def check_same_call(
    group: "dist.ProcessGroup", tokens: torch.Tensor, cached: int, pixels: list, grids: list
) -> None:
    """Raise ValueError where the processes of a group were called with different inputs.

    tokens: ids [B, S] or embeddings [B, S, hidden].  cached: tokens in the cache.
    pixels, grids: of the images, of the videos; of a stream the first temporal step is compared.
    """
    shape = [*tokens.shape, 0][:3]
    pixels = [_start_of(x) for x in pixels]
    totals = [_checksum(tokens), sum(map(_checksum, grids)), sum(map(_checksum, pixels))]
    mine = torch.tensor([*shape, cached, *totals], dtype=torch.float64, device=tokens.device)
    every = _all_gather(mine, group).view(group.size(), -1).tolist()
    for rank, call in enumerate(every):
        # Pixels may differ by rounding: each process makes its own.
        if call[:-1] != every[0][:-1] or not math.isclose(call[-1], every[0][-1], rel_tol=1e-5):
            raise ValueError(
                f"process 0 of the group was called with {_describe(every[0])}, process {rank} "
                f"with {_describe(call)}. Processes that share out a sequence are all called with "
                "the same one: give them the same prompts or batches, in the same order."
            )


def _start_of(pixels):
    """A tensor as it is; the first step of a stream, which may be read once more."""
    return pixels if torch.is_tensor(pixels) else pixels[: pixels.overlap]


def _checksum(values):
    """Of a million numbers at most, evenly apart; a swap of two shows, too."""
    values = values.detach().flatten()
    values = values[:: len(values) // 2**20 + 1].double().nan_to_num().abs()
    place = torch.arange(len(values), device=values.device) % 8191 + 1.0
    return float((values * place).sum())


def _describe(call):
    rows, new, _, cached, total, grids, pixels = call
    return (
        f"{int(rows)} x {int(new)} tokens after {int(cached)} cached ones (checksum {total:.6g}, "
        f"of grids {grids:.6g}, of pixels {pixels:.6g})"
    )


def draw_alike(group: "dist.ProcessGroup", device: torch.device) -> None:
    """Let every process draw the random numbers of the group's first one from here on.

    So all of them sample the same answer, and their caches stay the same.
    """
    device = torch.device(device)
    generators = [(torch.get_rng_state, torch.set_rng_state)]
    if device.type == "cuda":
        generators.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    for get, put in generators:
        state = get().to(device)
        dist.broadcast(state, dist.get_global_rank(group, 0), group=group)
        put(state.cpu())
