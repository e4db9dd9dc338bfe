"""Processes that share an evaluation, as `torchrun` or `accelerate launch` start them.

Each process runs some of the batches, and all of them then get the results of all batches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from chunkwise_lora.errors import ChunkWiseError

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for the others. The launcher ends all processes when one of them fails."""


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work. By default it is alone."""

    index: int = 0
    """The number of this process, from 0."""
    count: int = 1
    """Number of processes, whose default group of `torch.distributed` must be initialised if there are several."""

    @classmethod
    @contextmanager
    def launched(cls) -> Iterator[Processes]:
        """The processes that a launcher started, as its environment variables tell. Without a launcher it is one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        distributed.init_process_group("gloo", timeout=PATIENCE)
        try:
            yield cls(distributed.get_rank(), distributed.get_world_size())
        finally:
            distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: `device`, or a GPU of its own if that is `cuda` and there are several processes.

        Raises:
            ChunkWiseError: This machine has fewer GPUs than processes.
        """
        if device.type != "cuda" or self.count == 1:
            return device
        local, gpus = int(os.environ.get("LOCAL_RANK", self.index)), torch.cuda.device_count()
        if local >= gpus:
            raise ChunkWiseError(f"there are {gpus} GPUs for {local + 1} processes or more; start one process per GPU")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def share_of(self, pieces: Sequence[T]) -> Sequence[T]:
        """The pieces of work that this process does."""
        return pieces[self.index :: self.count]

    def gathered(self, results: Sequence[T]) -> list[T]:
        """The results of all pieces, in their order, from those of this process. All processes must call this."""
        if self.count == 1:
            return list(results)
        shares: list[list[T]] = [[] for _ in range(self.count)]
        distributed.all_gather_object(shares, list(results))
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]


ALONE = Processes()
