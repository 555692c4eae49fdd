"""What `chameleon doctor` looks at: each check says what it found, and what to do about it."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from cluster_router.wire.errors import ChameleonError
from deploy.cli.version import installed

Verdict = Literal["ok", "warn", "fail"]
GIB = 2**30
NEEDED_MEMORY = 3 * GIB
"""An estimate for the default model: Ray, its processes, the weights in float32, KV cache."""
NEEDED_DISK = GIB
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PORTS = {8000: "HTTP of the service", 8265: "Ray's dashboard"}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `advice` is what to do unless the verdict is ok."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def diagnose(model: str) -> Iterator[Check]:
    """Every check in turn; none of them raises."""
    for check in (
        check_python, check_platform, check_torch, check_gpu, check_faiss, check_ray,
        check_cpu, check_compiler, check_memory, check_large_pages, check_shared_memory,
        check_files,
    ):  # fmt: skip
        yield _guarded(check)
    for port in PORTS:
        yield check_port(port)
    yield _guarded(check_cache)
    yield _guarded(lambda: check_model(model))


def _guarded(check: Callable[[], Check]) -> Check:
    """A check that breaks is itself a finding."""
    try:
        return check()
    except Exception as error:  # whatever a broken installation raises
        name = getattr(check, "__name__", "check").removeprefix("check_")
        return Check(name, "fail", f"{type(error).__name__}: {error}", "install again: see README")


def check_python() -> Check:
    """The interpreter's version."""
    found = platform.python_version()
    if found.startswith(("3.11.", "3.12.")):
        return Check("python", "ok", found)
    return Check("python", "fail", found, "make the environment with Python 3.11 or 3.12")


def check_platform() -> Check:
    """The operating system."""
    found = f"{platform.system()} {platform.machine()}"
    if platform.system() == "Linux":
        return Check("platform", "ok", found)
    return Check("platform", "warn", found, "only Linux is tested; use it, or a container")


def check_torch() -> Check:
    """PyTorch, imported."""
    return _imported("torch", "pip install -c constraints.txt -e '.[cpu]'")


def check_ray() -> Check:
    """Ray with Serve, imported."""
    return _imported("ray.serve", "pip install -c constraints.txt -e '.[cpu]'", "ray")


def check_gpu() -> Check:
    """CUDA devices."""
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        told = ", ".join(f"{one.name} {one.total_memory / GIB:.0f} GiB" for one in devices)
        return Check("gpu", "ok", f"CUDA {torch.version.cuda}: {told}")
    if Path("/proc/driver/nvidia/version").exists():
        return Check(
            "gpu",
            "warn",
            "there is an NVIDIA driver, but torch sees no device",
            "install a torch built for CUDA: pip install -e '.[gpu]'; see CUDA_VISIBLE_DEVICES",
        )
    return Check("gpu", "ok", "none: the engine runs on the CPU")


def check_faiss() -> Check:
    """FAISS, by a search."""
    import numpy as np

    try:
        import faiss
    except ImportError as error:
        return Check("faiss", "fail", str(error), "pip install faiss-cpu (or faiss-gpu)")
    index = faiss.IndexFlatIP(2)
    index.add(np.eye(2, dtype=np.float32))
    _, ids = index.search(np.array([[0, 1]], np.float32), 1)
    if ids[0, 0] != 1:
        return Check("faiss", "fail", "a search finds the wrong row", "install it again")
    kind = "faiss-gpu" if installed("faiss-gpu") else "faiss-cpu"
    return Check("faiss", "ok", f"{kind} {faiss.__version__}")


def check_cpu() -> Check:
    """Cores, and the instructions that decide the engine's dtype and speed."""
    import torch

    from lm_workers.device import usable_cores
    from lm_workers.models import auto_dtype

    able = torch.cpu.get_capabilities()
    names = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "arm_bf16")
    flags = [name for name in names if able.get(name)]
    dtype = str(auto_dtype("cpu")).removeprefix("torch.")
    cores = usable_cores()
    found = f"{cores} cores, {' '.join(flags) or 'no vector units'}; the engine runs in {dtype}"
    if platform.machine() == "x86_64" and not able.get("avx2"):
        return Check(
            "cpu", "warn", found, "expect it to be slow; a CPU with AVX2 is several times faster"
        )
    return Check("cpu", "ok", found)


def check_compiler() -> Check:
    """The compiled kernels, built if need be."""
    import torch

    from lm_workers.layers.compiler import CompileError
    from lm_workers.layers.native import NativeKernels

    try:
        NativeKernels(torch.float32, 1)
    except CompileError as error:
        return Check(
            "compiler",
            "warn",
            str(error),
            "apt-get install g++ (or set CXX); without, CPUs are slow",
        )
    return Check("compiler", "ok", "the kernels compile and load")


def check_memory() -> Check:
    """Memory that is free now."""
    free = _free_memory()
    found = f"{free / GIB:.1f} GiB free"
    if free >= NEEDED_MEMORY:
        return Check("memory", "ok", found)
    return Check(
        "memory",
        "warn",
        found,
        f"the default model takes {NEEDED_MEMORY // GIB} GiB; end other programs, or lower "
        "engine.kv_cache_tokens",
    )


def _free_memory() -> int:
    """Bytes that can be had: the machine's, or what a container's limit leaves."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        return min(free, int(most) - int(used.read_text()))
    return free


def check_large_pages(setting: Path = LARGE_PAGES) -> Check:
    """Whether the CPU's engine can have its weights in large pages."""
    if not setting.exists():
        return Check("large pages", "ok", "nothing to set on this system")
    chosen = setting.read_text().partition("[")[2].partition("]")[0]
    if chosen != "never":
        return Check("large pages", "ok", chosen)
    return Check(
        "large pages",
        "warn",
        chosen,
        f"echo madvise | sudo tee {setting}; without, an engine on a CPU is slower",
    )


def check_shared_memory() -> Check:
    """`/dev/shm`, where Ray keeps its objects."""
    size = shutil.disk_usage("/dev/shm").total
    if size >= GIB:
        return Check("/dev/shm", "ok", f"{size / GIB:.1f} GiB")
    return Check(
        "/dev/shm", "warn", f"{size / GIB:.2f} GiB", "start the container with --shm-size=2g"
    )


def check_files() -> Check:
    """How many files a process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= 4096:
        return Check("open files", "ok", f"{soft} allowed")
    return Check("open files", "warn", f"{soft} allowed", "ulimit -n 65536, for many clients")


def check_port(port: int) -> Check:
    """Whether a port that is needed is free."""
    name = f"port {port}"
    try:
        with socket.create_server(("127.0.0.1", port)):
            return Check(name, "ok", f"free, for {PORTS.get(port, 'the service')}")
    except OSError as error:
        advice = "a service may be running: chameleon clusters; else chameleon serve --port"
        if port != 8000:
            advice = "Ray may be running: ray status; it takes another port by itself"
        return Check(name, "warn", f"taken ({error.strerror}), for {PORTS.get(port)}", advice)


def check_cache() -> Check:
    """The folder of models and features: can it be written, and is there room."""
    from lm_workers.models.source import default_cache

    cache = default_cache()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not os.access(place, os.W_OK):
        return Check("cache", "fail", f"{cache} cannot be written", "set CHAMELEON_CACHE to one")
    free = shutil.disk_usage(place).free
    found = f"{cache}, {free / GIB:.1f} GiB free"
    if free >= NEEDED_DISK:
        return Check("cache", "ok", found)
    return Check("cache", "warn", found, "make room, or set CHAMELEON_CACHE to another disk")


def check_model(model: str) -> Check:
    """Whether the base model is there already; it is not fetched."""
    from lm_workers.models.source import SMOLLM2, default_cache, find_packaged, resolve_model

    if model == SMOLLM2.name:
        folder = find_packaged(SMOLLM2, default_cache())
        if folder is None:
            return Check("model", "warn", f"{model} is not here yet", "chameleon model fetch")
        return Check("model", "ok", f"{model} in {folder}")
    try:
        return Check("model", "ok", f"{model} in {resolve_model(model)}")
    except ChameleonError as error:
        return Check("model", "fail", str(error), f"chameleon model fetch {model}")


def _imported(module: str, advice: str, package: str | None = None) -> Check:
    package = package or module
    try:
        import_module(module)
    except Exception as error:  # a broken installation raises anything
        return Check(package, "fail", f"{type(error).__name__}: {error}", advice)
    return Check(package, "ok", installed(package) or "installed")
