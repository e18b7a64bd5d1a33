"""Forecasts that know how much memory a CPU has.

`forecast` asks a GPU for its free memory; on the CPU, that of the host is what a prompt may fill.
A server refuses by it what would not fit.
"""

import psutil

from commands.forecast import forecast
from commands.model_loading import PreparedModel


def with_host_memory(prepared: PreparedModel) -> PreparedModel:
    """The same model, its forecasts on the CPU against the memory that is free when they are made.

    Called before the weights are read: what this process has taken since then counts as free, since
    the weights are part of every forecast.
    """
    if prepared.device != "cpu":
        return prepared
    before = _own_memory()

    def forecast_memory(prompt_tokens, vision_tokens, new_tokens, processes=1):
        return forecast(
            prepared.config,
            prompt_tokens,
            vision_tokens=vision_tokens,
            new_tokens=new_tokens,
            dtype=prepared.dtype,
            available=psutil.virtual_memory().available + max(_own_memory() - before, 0),
            processes=processes,
        )

    return prepared._replace(forecast_memory=forecast_memory)


def _own_memory() -> int:
    """Bytes that this process alone holds; pages of files that it reads can be given up."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)
