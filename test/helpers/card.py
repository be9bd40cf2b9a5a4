"""A GPU that is not there: tensors that say ``cuda:0``, compute on the CPU, and are as strict.

Under ``pretended`` torch makes such tensors wherever ``cuda`` is asked for. Their numbers are real.
What a card does not forgive is an error here: tensors of two devices in one operation, numpy on a
tensor of the card, gradients and moments of another layout than their parameter, a tensor used on a
stream that has not waited for the one that made it, or freed while another stream may use it. What
is copied to the host in the background holds rubbish until somebody has waited for it. Each call
that lets the host wait for the card is kept in ``Card.waits``.

Not pretended: kernels and their precision, memory, speed, compilers, NCCL.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from helpers.card_kernels import KERNELS, check_layouts
from helpers.card_streams import (
    DEVICE,
    Block,
    CardError,
    Event,
    Recorded,
    Stream,
    Streams,
    present,
    there,
)
from torch.utils import _foreach_utils as foreach
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["CardError", "pretended"]

_FACTORIES = [
    "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "tensor", "zeros",
]  # fmt: skip
_MIXING = ("aten.copy_", "aten.index", "aten._index_put_impl_")  # take tensors of the host, too
_WAITING = (
    "aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.masked_select",
    "aten.equal", "aten._unique", "aten.unique", "aten.bincount", "aten.histc",
)  # fmt: skip
_FUSED = ("aten._fused_adam_", "aten._fused_adamw_", "aten._fused_sgd_")

_to, _generator, _autocast, _load = torch.Tensor.to, torch.Generator, torch.autocast, torch.load


class Card(Streams):
    """The card, and what it does with its tensors.

    Attributes:
        ran: The operations on its tensors, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def to_host(self, tensor: CardTensor, *, background: bool) -> torch.Tensor:
        """A copy on the host, at once or in the background."""
        self.use([tensor.block], [])
        values = tensor.inner.detach().clone()
        if background:
            return self.copy_in_background(values)
        self.wait("copied to the host")
        return values

    def from_host(self, tensor: torch.Tensor, *, background: bool) -> CardTensor:
        """A copy on the card."""
        found = CardTensor(tensor.detach().clone())
        if not background:
            self.wait("copied from the host")
        elif not getattr(tensor, "pinned", False):
            self.wait("copied from memory that is not pinned")
        return found

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation on tensors of the card."""
        name = str(func).rpartition(".")[0]
        self.ran.append(name)
        flat, spec = tree_flatten((args, kwargs))
        cards = [x for x in flat if isinstance(x, CardTensor)]
        host = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, CardTensor)]
        if name not in _MIXING and any(tensor.ndim for tensor in host):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{DEVICE} and cpu! ({func})"
            )
        if name == "aten.copy_":
            return self._copy(*args, **kwargs)
        if name.startswith(_WAITING):
            self.wait(name)
        if name.startswith("aten.index") and _by_mask(args):
            self.wait(f"{name} by a mask, or by positions on the host")
        if name in _FUSED:
            check_layouts(args[:4] if "adam" in name else args[:3])
        written = [
            x
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tree_flatten(value)[0]
        ] + [kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs]
        self.use([x.block for x in cards], [x.block for x in written if isinstance(x, CardTensor)])
        inner_args, inner_kwargs = tree_unflatten([_inner(x) for x in flat], spec)
        if inner_kwargs.get("pin_memory") is not None:
            inner_kwargs.pop("pin_memory")
        found = KERNELS.get(name, func)(*inner_args, **inner_kwargs)
        same = {id(x.inner): x for x in cards}
        blocks = {x.inner.untyped_storage().data_ptr(): x.block for x in cards}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) in same:
                return same[id(x)]
            return CardTensor(x, blocks.get(x.untyped_storage().data_ptr()))

        return tree_map(wrapped, found)

    def _copy(self, target: Any, source: Any, _: bool = False) -> Any:
        """``Tensor.copy_``, between devices or on the card."""
        if not isinstance(target, CardTensor):
            return target.copy_(self.to_host(source, background=False))
        blocks = [x.block for x in (target, source) if isinstance(x, CardTensor)]
        if len(blocks) == 1 and source.ndim:
            self.wait("copied from the host")
        self.use(blocks, [target.block])
        target.inner.copy_(_inner(source))
        return target


def _there() -> Card:
    card = there()
    assert isinstance(card, Card)
    return card


class CardTensor(torch.Tensor):
    """A tensor of the card; ``inner`` has its numbers."""

    inner: torch.Tensor
    block: Block
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, block: Block | None = None) -> CardTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="cpu", requires_grad=False,
        )  # fmt: skip
        return made  # type: ignore[no-any-return]

    def __init__(self, inner: torch.Tensor, block: Block | None = None) -> None:
        assert not isinstance(inner, CardTensor)
        card = _there()
        if block is None:
            card.current.work()
            block = Block(card, card.current)
        self.inner, self.block = inner, block

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _there().run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def cpu(self, *_: Any) -> torch.Tensor:
        return _there().to_host(self, background=False)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, dtype: Any = None) -> CardTensor:
        _there().wait("a tensor of the host's numbers")
        return CardTensor(self.inner.new_tensor(_inner(data), dtype=dtype))

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu()")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, _: Any) -> CardTensor:
        return CardTensor(self.inner.clone())

    def pin_memory(self, *_: Any) -> torch.Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be")

    def record_stream(self, stream: Stream) -> None:
        self.block.uses.pop(stream, None)
        self.block.uses = Recorded(self.block.uses, stream)


class Generator:
    """``torch.Generator`` of the card, whose numbers are those of the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return object.__new__(cls) if torch.device(device).type == "cuda" else _generator(device)

    def __init__(self, device: Any = "cpu") -> None:
        self.device, self.inner = DEVICE, _generator()

    def manual_seed(self, seed: int) -> Generator:
        self.inner.manual_seed(seed)
        return self


@contextlib.contextmanager
def pretended(monkeypatch: Any) -> Iterator[Card]:
    """Let there be one GPU in the block; a fault that could not be raised is raised at its end."""
    card = Card()
    with present(card), monkeypatch.context() as patch:
        for name in _FACTORIES:
            patch.setattr(torch, name, _on_either(getattr(torch, name)))
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "autocast", _autocast_of)
        patch.setattr(torch, "load", _loaded)
        patch.setattr(torch.Tensor, "to", _moved)
        patch.setattr(torch.Tensor, "cuda", lambda self, *_: _moved(self, "cuda"))
        patch.setattr(torch.Tensor, "pin_memory", _pinned)
        # else modules would keep their own parameters, and lose what makes them the card's
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        grouped = foreach._group_tensors_by_device_and_dtype
        for name in ("torch.optim.optimizer", "torch.nn.utils.clip_grad"):
            module = sys.modules[name]
            patch.setattr(module, "_group_tensors_by_device_and_dtype", _grouping(grouped))
        for name, value in {
            "is_available": lambda: True, "device_count": lambda: 1,
            "current_device": card.number, "set_device": card.choose,
            "get_device_name": lambda *_: "a pretended card",
            "get_device_capability": lambda *_: (9, 0), "get_arch_list": lambda: ["sm_90"],
            "is_bf16_supported": lambda **_: True, "empty_cache": lambda: None,
            "mem_get_info": lambda *_: (70 * 10**9, 80 * 10**9), "is_initialized": lambda: True,
            "memory_reserved": lambda *_: 0, "memory_allocated": lambda *_: 0,
            "Stream": Stream, "Event": Event, "stream": card.on, "synchronize": card.wait_for_all,
            "current_stream": lambda *_: card.current, "default_stream": lambda *_: card.default,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        yield card


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, CardTensor | Generator) else x


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _on_either(factory: Any) -> Any:
    """A function of torch that makes a tensor, on the card where that is asked for."""

    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        generator = kwargs.get("generator")
        if generator is not None and isinstance(generator, Generator) != _is_cuda(device):
            raise RuntimeError(f"{factory.__name__}: the generator is of another device")
        kwargs = {name: _inner(value) for name, value in kwargs.items()}
        if not _is_cuda(device):
            found = factory(*args, device=device, **kwargs)
            if pin_memory:
                found.pinned = True
            return found
        if factory.__name__ == "tensor":
            _there().wait("a tensor of the host's numbers")
        return CardTensor(factory(*args, **kwargs))

    return made


def _moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.to``."""
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, background, layout = torch._C._nn._parse_to(*args, **kwargs)
    shape: dict[str, Any] = {} if layout is None else {"memory_format": layout}
    card = isinstance(tensor, CardTensor)
    if device is None or (device.type == "cuda") == card:
        return _to(tensor, dtype=dtype or tensor.dtype, copy=copy, **shape)
    if card:
        there = _there().to_host(tensor, background=background)
        assert dtype in (None, there.dtype), "two steps in one, which is not pretended"
        return there
    made = _there().from_host(_as(tensor, dtype, shape), background=background)
    return made.requires_grad_(tensor.requires_grad)


def _as(tensor: torch.Tensor, dtype: Any, shape: dict[str, Any]) -> torch.Tensor:
    """The tensor in a dtype and layout; pinned as before where that is the same one."""
    same = dtype in (None, tensor.dtype) and not shape
    return tensor if same else _to(tensor.detach(), dtype=dtype or tensor.dtype, **shape)


def _pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    made = tensor.clone()
    made.pinned = True
    return made


def _loaded(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
    found = _load(file, map_location="cpu", **kwargs)
    if not _is_cuda(map_location):
        return found
    return tree_map(lambda x: _moved(x, "cuda") if isinstance(x, torch.Tensor) else x, found)


def _autocast_of(device: str, dtype: Any = None, **kwargs: Any) -> Any:
    return _autocast("cpu" if device == "cuda" else device, dtype, **kwargs)


def _grouping(real: Any) -> Any:
    def grouped(lists: Any, with_indices: bool = False) -> Any:
        found = real(lists, with_indices)
        first = next(x for x in lists[0] if x is not None)
        if not isinstance(first, CardTensor):
            return found
        return {(DEVICE, dtype): value for (_, dtype), value in found.items()}

    return grouped


def _by_mask(args: Any) -> bool:
    if len(args) < 2 or not isinstance(args[1], list | tuple):
        return False
    masks = (torch.bool, torch.uint8)
    return any(
        isinstance(x, torch.Tensor) and (x.dtype in masks or not isinstance(x, CardTensor))
        for x in args[1]
    )
