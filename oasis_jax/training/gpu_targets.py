"""What XLA's GPU compiler has to know of a GPU that is not there."""

import functools
import importlib.util
import pathlib
import re

from oasis_jax.errors import UserError

_PLUGINS = ("xla_cuda12", "xla_cuda13")
_UNPRINTABLE = re.compile(rb"[^\t\n\r -~]")


def plugin_library() -> pathlib.Path | None:
    """The library of jax's CUDA plugin, None where it is not installed."""
    for plugin in _PLUGINS:
        try:
            spec = importlib.util.find_spec(f"jax_plugins.{plugin}")
        except ModuleNotFoundError:
            return None
        if spec is not None:
            return pathlib.Path(spec.submodule_search_locations[0]) / "xla_cuda_plugin.so"
    return None


@functools.cache
def gpu_descriptions() -> dict[str, str]:
    """{name: GpuTargetConfigProto as text}, what the installed CUDA plugin carries of each GPU it can compile for.

    Raises:
      UserError: the plugin is not installed.
    """
    path = plugin_library()
    if path is None:
        raise UserError(
            "no CUDA compiler: python -m pip install 'jax[cuda12-local]' nvidia-cuda-nvcc-cu12 (no GPU is needed)"
        )
    library, found = path.read_bytes(), {}
    # Ends of a description are looked for from the word outwards: one pattern for the whole takes minutes in a library
    # of this size.
    for match in re.finditer(rb"gpu_device_info \{", library):
        before = _UNPRINTABLE.split(library[max(0, match.start() - 4096) : match.start()])[-1]
        end = _UNPRINTABLE.search(library, match.end())
        text = (before + library[match.start() : end.start() if end else len(library)]).decode()
        name = re.search(r'device_description_str:\s*"([^"]+)"', text)
        if name:
            found[name[1]] = text
    return found


def memory_bytes(description: str) -> int:
    """The memory of the described GPU."""
    return int(re.search(r"device_memory_size:\s*(\d+)", description)[1])
