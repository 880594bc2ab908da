"""A GPU that is not there: tensors that lie in RAM, say that they lie on cuda:0, and may meet no others.

What a program does to a tensor on a GPU that it may do only to one in RAM (numpy, Numba, an operation on both) is
refused as CUDA refuses it, and what is held on the device is counted. Arithmetic is that of the CPU: rounding, speed
and kernels of a real GPU are not what this tells of.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
# torch without CUDA has no guard to switch between its devices, nor has it one for the type of device that stands for
# them inside: one that torch knows by name only, and gives no streams.
STANDS_FOR = "ve"
GUARDS = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>);
C10_REGISTER_GUARD_IMPL(VE, NoOpDeviceGuardImpl<DeviceType::VE>);
}
"""
# Operations that take indices or a mask from RAM beside a tensor on a GPU (but no values); one copies between the two.
INDEXING = {"aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default", "aten._index_put_impl_.default"}
COPY = "aten.copy_.default"


class Held:
    """Bytes of tensors on the device: now, and at the most since `start`; kept: what an allocator would keep."""

    def __init__(self) -> None:
        self.now = self.peak = self.kept = 0
        self._storages: dict[int, int] = {}  # how many tensors look at each
        self._lock = threading.RLock()  # collected garbage gives back in the middle of taking

    def start(self) -> None:
        self.kept = max(self.kept, self.peak)
        self.left()
        self.peak = self.now

    def left(self) -> int:
        """Bytes that somebody still holds."""
        gc.collect()
        return self.now

    def take(self, tensor: torch.Tensor) -> tuple[int, int]:
        storage = tensor.untyped_storage()
        key, nbytes = storage.data_ptr(), storage.nbytes()
        with self._lock:
            self._storages[key] = self._storages.get(key, 0) + 1
            if self._storages[key] == 1:
                self.now += nbytes
                self.peak = max(self.peak, self.now)
        return key, nbytes

    def give_back(self, key: int, nbytes: int) -> None:
        with self._lock:
            self._storages[key] -= 1
            if not self._storages[key]:
                del self._storages[key]
                self.now -= nbytes


HELD = Held()


class OnGpu(torch.Tensor):
    """A tensor on the GPU that is not there; `inner` has its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        with torch.inference_mode(False):  # a view of what was made outside of it is not of inference, either
            made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=f"{STANDS_FOR}:0",
            )  # fmt: skip
        made.inner = inner
        weakref.finalize(made, HELD.give_back, *HELD.take(inner)).atexit = False
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner!r})"


def _inside(x: Any, tensors: list[torch.Tensor]) -> Any:
    """What stands for a tensor in RAM, in lists, too; all tensors are noted. No closure: it would be a cycle."""
    if isinstance(x, torch.Tensor):
        tensors.append(x)
        return x.inner if type(x) is OnGpu else x
    return [_inside(y, tensors) for y in x] if type(x) in (list, tuple) else x


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors: list[torch.Tensor] = []
    args, kwargs = [_inside(x, tensors) for x in args], {key: _inside(x, tensors) for key, x in kwargs.items()}
    there = any(isinstance(x, OnGpu) for x in tensors)
    name, looked_at = str(func), tensors
    if name in INDEXING:  # the tensor first, values last
        looked_at = [tensors[0], *(tensors[-1:] if "put" in name else [])]
    if there and name != COPY and any(x.dim() for x in looked_at if not isinstance(x, OnGpu)):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    out = there and (name != COPY or isinstance(tensors[0], OnGpu))
    names = _names(func)
    if "device" in names:
        named = dict(zip(names, args, strict=False)) | kwargs
        if named.get("device") is not None:
            out = torch.device(named["device"]).type in (GPU.type, STANDS_FOR)
            args, kwargs = [], named | ({"device": torch.device("cpu")} if out else {})
    with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
        result = func(*args, **kwargs)

    def outside(x: Any) -> Any:
        if not out or not isinstance(x, torch.Tensor) or x.device.type != "cpu":
            return x
        same = next((t for t in tensors if isinstance(t, OnGpu) and t.inner is x), None)
        return OnGpu(x) if same is None else same

    if type(result) is torch.Tensor:
        return outside(result)
    return type(result)(map(outside, result)) if isinstance(result, (list, tuple)) else result


@cache
def _names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


class _Everywhere(TorchDispatchMode):
    """Operations on no tensor of the GPU, which may make one. In the thread that enters it."""

    def __enter__(self) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) copies there with what is in force
        return super().__enter__()

    def __exit__(self, *about: Any) -> None:
        super().__exit__(*about)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def load_guards(folder: Path) -> bool:
    """Makes torch take the device for one, by a library that is built in `folder` and kept there. Before anything goes
    back through a model: autograd counts devices once. False where there is no compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        return False
    root = Path(torch.__file__).parent
    of = hashlib.sha256(f"{GUARDS}{torch.__version__}{root}".encode()).hexdigest()[:16]
    library = folder / f"guards-{of}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as name:
            source, built = Path(name) / "guards.cpp", Path(name) / "guards.so"
            source.write_text(GUARDS)
            places = ["-I", root / "include", source, "-o", built, "-L", root / "lib", "-lc10"]
            subprocess.run([compiler, *map(str, ["-std=c++20", "-shared", "-fPIC", *places])], check=True)
            built.replace(library)
    ctypes.CDLL(str(library))
    return True


@contextmanager
def pretend_gpu(patch: pytest.MonkeyPatch, free: int = 0, *, bf16: bool = False) -> Iterator[Held]:
    """Inside, `--device cuda` finds a GPU, in threads that begin inside, too. free: bytes of it; what was held once is
    not given back, but kept for other tensors, as torch does. bf16: whether it multiplies in that. The guards must have
    been loaded."""
    begun = HELD.left()
    HELD.peak = begun

    def reserved(*_: Any) -> int:
        HELD.kept = max(HELD.kept, HELD.peak)
        return HELD.kept - begun

    HELD.kept = begun
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)
    patch.setattr(torch.cuda, "set_device", lambda *_: None)
    patch.setattr(torch.cuda, "device_count", lambda: 2)  # they all call themselves the first
    patch.setattr(torch.cuda, "get_device_name", lambda *_: "none")
    patch.setattr(torch.cuda, "memory_reserved", reserved)
    patch.setattr(torch.cuda, "memory_allocated", lambda *_: HELD.now - begun)
    patch.setattr(torch.cuda, "mem_get_info", lambda *_: (free - reserved(), free))
    run = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with _Everywhere():
            run(thread)

    patch.setattr(threading.Thread, "run", run_there)
    with _Everywhere():
        yield HELD
