"""A CUDA device that is not there: tensors that report `cuda:0`, `cuda:1` and so on, and compute on the CPU.

What would go wrong or slowly on a GPU shows on a machine without one: every operator on such a tensor is intercepted
and counted by stage, and one that mixes devices fails as it would on a GPU. Results are those of the CPU. What is not
shown: how long anything takes, how much memory it needs, and rounding of a GPU's kernels.

    def count(name):  # a function of a test module; its result must be picklable, without tensors
        model = on_gpu(...)
        counts = Counts()
        with counting(counts):
            answer(model, ..., stage=counts.stage)
        return counts.table()

    def test_it():
        table = in_process(count, "demo")

`in_process` runs a function in a fork of the test process, because torch has to be changed for good: a CPU build has no
device guard for CUDA, which a few lines of C++ register (compiled at test time; without a compiler, tests are skipped),
and some functions reach their kernels past any Python (see `_install`).

What is counted
    synchronisations  operators after which the host waits for the device: reading a value, copies in either direction
                      unless they are `non_blocking`, results whose size depends on values (nonzero, boolean indices)
    copies            from host to device, back, and between devices
    launches          kernels, roughly: one for each operator that is not a view, a few for those of `KERNELS`
Time passes on these devices too, in milliseconds of their own: `KERNEL` for each launch, on the device, in the order
of its stream, while the host needs `HOST` for each operator. CUDA events, streams and `synchronize` tell that time.

Copies from the host count as launches as well. A `non_blocking` copy from pageable memory to the device does not wait
for it: the driver stages the values at once. One to the host counts as no synchronisation, and must be followed by one.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>) }
"""
OUTSIDE = "outside"  # any stage
KERNEL, HOST = 1.0, 0.001  # milliseconds

# The host has to know a value, or the size of the result, before it can go on.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
KERNELS = {
    "aten::_unique2": 8,
    "aten::bincount": 4,
    "aten::masked_select": 6,
    "aten::nonzero": 4,
    "aten::sort": 5,
    "aten::topk": 4,
    "aten::_local_scalar_dense": 1,
}
BOOLEAN_INDEX = 5  # kernels: nonzero, then the index itself
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
UNLAUNCHED = {
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
}
WHOLE = {"aten::scaled_dot_product_attention"}  # composite operators that are one kernel on a GPU


@dataclass
class Counts:
    """What happened on the pretend devices, by stage. A nested stage interrupts the outer one.

    where: the operators that waited or copied, with the line of this package from which they came, if `traced`.
    """

    synchronisations: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    where: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    operators: Counter[tuple[str, str]] = field(default_factory=Counter)
    traced: bool = False
    _stages: list[str] = field(default_factory=lambda: [OUTSIDE])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stages.append(name)
        try:
            yield
        finally:
            self._stages.pop()

    def waited(self, what: str) -> None:
        self.synchronisations[self._stages[-1]] += 1
        self._note(what)

    def copied(self, what: str, *, waiting: bool) -> None:
        self.copies[self._stages[-1]] += 1
        self.launched(1, what)
        if waiting:
            self.waited(what)
        else:
            self._note(f"{what}, not waiting")

    def launched(self, kernels: int, what: str) -> None:
        self.launches[self._stages[-1]] += kernels
        if self.traced:
            self.operators[self._stages[-1], what] += kernels

    def table(self) -> dict[str, tuple[int, int]]:
        """(synchronisations, launches) by stage."""
        stages = sorted({*self.synchronisations, *self.launches})
        return {stage: (self.synchronisations[stage], self.launches[stage]) for stage in stages}

    def _note(self, what: str) -> None:
        if self.traced:
            self.where[self._stages[-1], what, _caller()] += 1


def _caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
    own = [frame for frame in frames if "mmtok_cli" in frame.filename]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


class PretendTensor(torch.Tensor):
    """A tensor that reports a CUDA device. held: the values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> PretendTensor:
        with torch.inference_mode():  # views of other tensors cannot be made there
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                layout=held.layout,
                device=device,
            )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held!r}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _intercept(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        # Lists become tensors on the device within C++, where nothing can be intercepted.
        listed = [
            torch.tensor(i) if isinstance(i, list) else i for i in (index if isinstance(index, tuple) else [index])
        ]
        return super().__getitem__(tuple(listed))

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda device type tensor to numpy")

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)


class PretendMode(TorchDispatchMode):
    """Intercepts operators that make tensors, which have no argument on a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _intercept(func, args, kwargs or {})


class Times:
    """Moments in milliseconds: up to which the host has come, and each device with the work of its default stream."""

    def __init__(self) -> None:
        self.host = 0.0
        self.devices: defaultdict[torch.device, float] = defaultdict(float)

    def run(self, kernels: int, device: torch.device, *after: torch.device) -> None:
        """The host launches kernels. after: other devices whose work they wait for."""
        self.host += HOST
        if kernels:
            begin = max(self.host, self.devices[device], *(self.devices[other] for other in after))
            self.devices[device] = begin + kernels * KERNEL

    def wait(self, device: torch.device) -> None:
        self.host = max(self.host, self.devices[device])


class PretendStream:
    """A stream beside a device's default stream, or that stream itself."""

    def __init__(self, device: torch.device, *, default: bool = False) -> None:
        self.device = _cuda(device)
        self.default = default
        self.moment = 0.0

    def reached(self) -> float:
        return max(_times.host, _times.devices[self.device] if self.default else self.moment)

    def wait_event(self, event: PretendEvent) -> None:
        assert not self.default
        self.moment = max(self.moment, event.moment)

    def record_event(self) -> PretendEvent:
        event = PretendEvent()
        event.record(self)
        return event


class PretendEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing
        self.device: torch.device | None = None
        self.moment = 0.0

    def record(self, stream: PretendStream) -> None:
        self.device, self.moment = stream.device, stream.reached()

    def elapsed_time(self, end: PretendEvent) -> float:
        """In milliseconds. Raises RuntimeError, as CUDA does, for events of different devices."""
        if not (self.timed and end.timed and self.device == end.device):
            raise RuntimeError("CUDA error: invalid resource handle")
        return end.moment - self.moment


@contextmanager
def counting(counts: Counts | None = None) -> Iterator[None]:
    """A context in which tensors can be made on pretend devices, and what happens on them is counted."""
    global _counts
    before, _counts = _counts, counts
    # These copy Python values to their device within C++, where nothing can be intercepted.
    torch.tensor, torch.as_tensor = partial(_from_python, _make_tensor), partial(_from_python, _as_tensor)
    try:
        with PretendMode():
            yield
    finally:
        _counts, torch.tensor, torch.as_tensor = before, _make_tensor, _as_tensor


def on_gpu(module: nn.Module, place: Callable[[str], int] = lambda name: 0) -> Any:
    """Move parameters and buffers of a module to pretend devices, in place. place: the device of each, by its name."""
    for path, part in module.named_modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                if value is not None:
                    held = value.held if isinstance(value, PretendTensor) else value.detach()
                    tensors[name] = PretendTensor(held, _cuda(place(f"{path}.{name}")))  # type: ignore[assignment]
    return module


def pretend(values: Tensor, device: int = 0) -> PretendTensor:
    """Values on a pretend device, without any copy that is counted."""
    return PretendTensor(values, _cuda(device))


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fork of this process that has pretend devices. Raises AssertionError if it fails.

    Skips the test where that is impossible: without a C++ compiler, and elsewhere than on Linux.
    """
    guard = compiled_guard()
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(there, guard, function, arguments))
    process.start()
    there.close()
    try:
        failed, result = here.recv()
    except EOFError:
        failed, result = True, "the process ended without a result"
    finally:
        process.join()
    assert not failed, result
    return result


def _child(results: Any, guard: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        _install(guard)
        results.send((False, function(*arguments)))
    except BaseException:
        results.send((True, traceback.format_exc()))


@lru_cache(maxsize=1)
def compiled_guard() -> Path:
    """The library that registers a device guard for CUDA. Skips the test where it cannot be compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("pretend CUDA devices need Linux and a C++ compiler")
    torch_home, directory = Path(torch.__file__).parent, _scratch()
    source, library = directory / "guard.cpp", directory / "guard.so"
    source.write_text(GUARD)
    libraries = torch_home / "lib"
    options = ["-shared", "-fPIC", "-std=c++17", f"-I{torch_home / 'include'}"]
    linked = [f"-L{libraries}", "-lc10", f"-Wl,-rpath,{libraries}"]
    done = subprocess.run(
        [compiler, *options, str(source), "-o", str(library), *linked], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"the device guard does not compile: {done.stderr[-300:]}")
    return library


def _scratch() -> Path:
    import atexit
    import tempfile

    directory = Path(tempfile.mkdtemp(prefix="pretend-cuda-"))
    owner = os.getpid()  # forks must not remove it
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(directory, ignore_errors=True))
    return directory


# ---------------------------------------------------------------------------------------------------------------------
# Changes to torch, in a process of its own

_counts: Counts | None = None
_times = Times()
_make_tensor, _as_tensor = torch.tensor, torch.as_tensor


def _install(guard: Path) -> None:
    ctypes.CDLL(str(guard))
    torch.cuda._lazy_init = lambda: None
    torch.cuda.Event, torch.cuda.Stream = PretendEvent, PretendStream
    torch.cuda.current_stream = partial(PretendStream, default=True)
    torch.cuda.synchronize = lambda device: _times.wait(_cuda(device))


def _from_python(make: Callable[..., Tensor], data: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    if isinstance(data, PretendTensor):
        return data.to(device=device or data.device, dtype=dtype or data.dtype)
    if isinstance(data, (list, tuple)):
        data = [each.item() if isinstance(each, Tensor) else each for each in data]
    values = make(data, dtype=dtype)
    if device is None or torch.device(device).type != "cuda":
        return values
    with PretendMode():
        return values.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


@dataclass(frozen=True)
class _Operator:
    """What is known of an operator by its schema. written: for each result, the name of the argument that it is."""

    name: str
    is_composite: bool
    is_view: bool
    written: tuple[str | None, ...]
    names: tuple[str, ...]


@cache
def _read(func: Any) -> _Operator:
    schema = func._schema
    by_alias = {
        frozenset(argument.alias_info.before_set): argument.name
        for argument in schema.arguments
        if argument.alias_info is not None
    }
    infos = [result.alias_info for result in schema.returns]
    return _Operator(
        name=schema.name,
        is_composite=torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        is_view=any(info is not None and not info.is_write for info in infos),
        written=tuple(
            by_alias.get(frozenset(info.before_set)) if info is not None and info.is_write else None for info in infos
        ),
        names=tuple(argument.name for argument in schema.arguments),
    )


def _cuda(device: int | torch.device) -> torch.device:
    """A device by its number, or with the number that it lacks; others than CUDA as they are."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def _intercept(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    operator = _read(func)
    values = tree_flatten((args, kwargs))[0]
    tensors = [value for value in values if isinstance(value, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    wanted = next((_cuda(value) for value in values if isinstance(value, torch.device)), None)
    if not ours and (wanted is None or wanted.type != "cuda"):
        return func(*args, **kwargs)
    if operator.name == "prim::device":
        return ours[0].device
    if operator.is_composite and operator.name not in WHOLE:
        with PretendMode():
            return func.decompose(*args, **kwargs)
    if operator.name == "aten::_to_copy":
        return _copied(func, args, kwargs, wanted or args[0].device)
    if operator.name == "aten::copy_":
        return _copied_into(func, args, kwargs)
    device = wanted or ours[0].device
    _refuse_mixed(operator, tensors, ours, args)
    _count(operator, args, device)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    return _wrapped(operator, result, args, kwargs, device)


def _copied(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Tensor:
    source = args[0]
    values = func(_held(source), *args[1:], **{**kwargs, "device": torch.device("cpu")})
    if values is _held(source):
        values = values.clone()
    _count_copy(source.device, device, waiting=not kwargs.get("non_blocking"), empty=not values.numel())
    return PretendTensor(values, device) if device.type == "cuda" else values


def _copied_into(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    target, source, *more = args
    func(_held(target), _held(source), *more, **kwargs)
    waiting = not (more[0] if more else kwargs.get("non_blocking"))
    _count_copy(source.device, target.device, waiting=waiting, empty=not target.numel())
    return target


def _count_copy(source: torch.device, target: torch.device, *, waiting: bool, empty: bool) -> None:
    if empty:
        return
    on_host = source.type != target.type
    device = source if target.type == "cpu" else target
    _times.run(1, device, *([] if on_host else [source]))
    if on_host and waiting:
        _times.wait(device)
    if _counts is None:
        return
    if source == target:
        _counts.launched(1, "copy")
    elif on_host:
        _counts.copied(f"{source.type} to {target.type}", waiting=waiting)
    else:
        _counts.copied(f"{source} to {target}", waiting=False)


def _refuse_mixed(operator: _Operator, tensors: list[Tensor], ours: list[PretendTensor], args: Any) -> None:
    """Raises RuntimeError as CUDA does; indices and single values may be on the host."""
    devices = {tensor.device for tensor in ours}
    on_host = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.dim()]
    if operator.name in INDEXING:
        on_host = [] if isinstance(args[0], PretendTensor) else on_host
    if len(devices) > 1 or on_host:
        found = ", ".join(sorted({str(tensor.device) for tensor in [*ours, *on_host]}))
        raise RuntimeError(f"Expected all tensors to be on the same device, but {operator.name} got {found}")


def _count(operator: _Operator, args: Any, device: torch.device) -> None:
    counts = _counts or Counts()
    kernels = 0 if operator.is_view or operator.name in UNLAUNCHED else KERNELS.get(operator.name, 1)
    waits = [operator.name.removeprefix("aten::")] if operator.name in WAITING or _has_open_size(operator, args) else []
    if operator.name in INDEXING:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                waits.append("boolean index")
                kernels += BOOLEAN_INDEX
            if index is not None and not isinstance(index, PretendTensor):
                _count_copy(torch.device("cpu"), device, waiting=True, empty=False)
    _times.run(kernels, device)
    if kernels:
        counts.launched(kernels, operator.name.removeprefix("aten::"))
    for what in waits:
        _times.wait(device)
        counts.waited(what)


def _has_open_size(operator: _Operator, args: Any) -> bool:
    """Whether it is repeat_interleave(repeats), which is as long as their sum; other forms come down to this one."""
    return operator.name == "aten::repeat_interleave" and len(args) == 1


def _wrapped(operator: _Operator, result: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
    def one(value: Any, number: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [one(each, -1) for each in value]
        if not isinstance(value, Tensor):
            return value
        written = operator.written[number] if 0 <= number < len(operator.written) else None
        if written is not None:
            place = operator.names.index(written)
            return args[place] if place < len(args) else kwargs[written]
        return PretendTensor(value, device)

    if isinstance(result, tuple):
        return tuple(one(value, number) for number, value in enumerate(result))
    return one(result, 0)
