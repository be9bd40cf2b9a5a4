"""Copies between the host and a GPU that run beside what the GPU computes.

Each direction has a stream of CUDA of its own, and the host's memory is pinned, as the GPU reads
and writes only such memory by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_cuda: Any = torch.cuda  # whose streams and events torch has not typed


class Copies:
    """Ways to and from one device, for whoever computes on its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: tuple[Any, Any] | None = None
        if device.type == "cuda":
            self._streams = _cuda.Stream(device), _cuda.Stream(device)

    def bring(self, tiles: Sequence[torch.Tensor], size: int) -> torch.Tensor:
        """Tiles of one shape as a batch on the device, filled up with zeros to ``size`` of them."""
        pin = self._streams is not None and tiles[0].device.type == "cpu"
        batch = torch.zeros(
            (size, *tiles[0].shape), dtype=tiles[0].dtype, device=tiles[0].device, pin_memory=pin
        )
        torch.stack(list(tiles), out=batch[: len(tiles)])
        if self._streams is None or not pin:
            return batch.to(self._device)
        inward, computing = self._streams[0], _cuda.current_stream(self._device)
        with _cuda.stream(inward):
            there = batch.to(self._device, non_blocking=True)
        computing.wait_stream(inward)
        there.record_stream(computing)  # its memory is in use until that has come to its end
        return there

    def take(
        self, scores: torch.Tensor, finite: torch.Tensor | None, *, found_too: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, Callable[[], None]]:
        """Have what was computed on the host.

        Args:
            scores: Scores on the device.
            finite: A few truth values there, which always go to the host; or None.
            found_too: Whether the scores go there, too; else they stay where they are.

        Returns:
            Both, and what waits until they are there.
        """
        if self._streams is None:
            return scores.cpu() if found_too else scores, finite, lambda: None
        outward, computing = self._streams[1], _cuda.current_stream(self._device)
        outward.wait_stream(computing)
        with _cuda.stream(outward):  # what is copied so is pinned
            if finite is not None:
                finite.record_stream(outward)
                finite = finite.to("cpu", non_blocking=True)
            if found_too:
                scores.record_stream(outward)
                scores = scores.to("cpu", non_blocking=True)
            there = _cuda.Event()
            there.record(outward)
        return scores, finite, there.synchronize
