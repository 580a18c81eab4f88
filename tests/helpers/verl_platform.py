"""A CPU as one of verl's platforms, chosen by VERL_PLATFORM=cpu; it has none of its own.

verl loads this as an external module, before any module that asks for the platform. Its engines are
entered for "cuda" and "npu" alone, which VERL_ENGINE_DEVICE=cuda gets around.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

OF_TORCH_CUDA = ["empty_cache", "synchronize"] + [
    f"{prefix}memory_{kind}" for prefix in ("", "max_") for kind in ("allocated", "reserved")
]


def nothing(*args, **kwargs) -> int:
    return 0


@PlatformRegistry.register(platform="cpu")
class Cpu(PlatformBase):
    device_name = "cpu"
    vendor_name = "none"
    device_module = SimpleNamespace(
        **dict.fromkeys(OF_TORCH_CUDA, nothing),
        get_device_name=lambda: "CPU",
        is_available=lambda: False,
        mem_get_info=lambda: (0, 0),
    )
    set_device = synchronize = manual_seed = manual_seed_all = nothing
    set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = nothing

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:  # what verl passes on to `Tensor.to`
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"  # Ray is told of as many as there are workers

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def nvtx_range(self, msg: str) -> nullcontext:
        return nullcontext()
