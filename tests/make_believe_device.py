"""A make-believe accelerator: CPU memory under another device's name, as strict as CUDA about what may be mixed.

Nothing of it is fast. It makes what a GPU would refuse (tensors of two devices in one operation, a CPU generator for a
tensor on the device, NumPy on its memory) fail on a machine without one. For a process of its own: torch cannot forget
a device.
"""

from types import SimpleNamespace

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fake"
aten = torch.ops.aten
MIXES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class OnDevice(torch.Tensor):
    """A tensor on the device; `plain` is where its numbers are."""

    plain: torch.Tensor

    @staticmethod
    def __new__(cls, plain):
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            plain.size(),
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=torch.device(NAME, 0),
        )
        out.plain = plain
        return out

    def tolist(self):
        return self.plain.tolist()

    def __getitem__(self, at):
        return super().__getitem__(_indices(at))

    def __setitem__(self, at, value):
        super().__setitem__(_indices(at), value)

    def __repr__(self):
        return f"OnDevice({self.plain!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _indices(at):
    """Lists of numbers as tensors: torch would make them by a way that this device does not have."""
    if isinstance(at, tuple):
        return tuple(_indices(x) for x in at)
    return torch.tensor(at) if isinstance(at, list) else at


def _run(func, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    here = [isinstance(x, OnDevice) for x in tensors]
    asked = kwargs.get("device")
    if func in INDEXED:
        mixed = not isinstance(args[0], OnDevice)
    else:
        apart = [x for x in tensors if not isinstance(x, OnDevice) and x.dim()]  # one number may be anywhere
        mixed = any(here) and apart and func not in MIXES
    if mixed:
        raise RuntimeError(f"{func}: tensors on two devices: {[(tuple(x.shape), str(x.device)) for x in tensors]}")
    goal = torch.device(asked).type if asked is not None else NAME
    if kwargs.get("generator") is not None and goal == NAME:
        raise RuntimeError(f"{func}: a generator of the CPU for a tensor on {NAME}")
    if func is aten._fused_sdp_choice.default:
        return 0
    plain_args, plain_kwargs = tree_map(lambda x: x.plain if isinstance(x, OnDevice) else x, (args, kwargs))
    if asked is not None:
        plain_kwargs["device"] = "cpu"
    if func is aten._copy_from.default:
        plain_args[1].copy_(plain_args[0])
        return args[1]
    out = func(*plain_args, **plain_kwargs)
    if goal == NAME:
        out = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, out)
    elif func is aten._to_copy.default:
        return out
    for x in tensors:
        assert torch.Tag.inplace_view in func.tags or not isinstance(x, OnDevice) or x.shape == x.plain.shape, (
            f"{func} resized its argument"
        )
    return return_and_correct_aliasing(func, args, kwargs, out)


def _factory(func):
    return lambda *args, **kwargs: OnDevice(func(*args, **{**kwargs, "device": "cpu"}))


def register():
    module = SimpleNamespace(
        is_initialized=lambda: True,
        is_available=lambda: True,
        current_device=lambda: 0,
        device_count=lambda: 1,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda _: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
        get_rng_state=lambda _: torch.zeros(0),
        set_rng_state=lambda *_: None,
    )
    _setup_privateuseone_for_python_backend(NAME, module)
    _device_constructors()  # remembers torch.tensor itself, for `with torch.device(…)`
    made = torch.tensor  # which torch would copy by a way that this device does not have

    def tensor(*args, device=None, **kwargs):
        elsewhere = device is None or torch.device(device).type != NAME
        return made(*args, device=device, **kwargs) if elsewhere else made(*args, **kwargs).to(device)

    torch.tensor = tensor
    factories = torch.library.Library("aten", "IMPL")  # whose own way is to resize an empty tensor behind our back
    for name in ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace"):
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        factories.impl(name, _factory(func), "PrivateUse1")
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    return library, factories
