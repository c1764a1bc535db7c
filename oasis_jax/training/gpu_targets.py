"""What XLA's GPU compiler has to know of a GPU that is not there."""

import glob
import importlib.util
import pathlib
import re

from oasis_jax.errors import UserError

_PLUGINS = {"xla_cuda12": "cuda12", "xla_cuda13": "cuda13"}

_UNPRINTABLE = re.compile(rb"[^\t\n\r -~]")


def target_config(name: str) -> str:
    """The GpuTargetConfigProto, in text form, of the GPU whose description contains `name`, as the installed CUDA plugin carries it.

    Raises:
      UserError: the plugin is not installed, or knows no such GPU.
    """
    for plugin, extra in _PLUGINS.items():
        spec = importlib.util.find_spec(f"jax_plugins.{plugin}") if importlib.util.find_spec("jax_plugins") else None
        if spec:
            break
    else:
        raise UserError("--plan: GPUs need the CUDA compiler: python -m pip install 'jax[cuda12-local]' nvidia-cuda-nvcc-cu12 (no GPU is needed)")
    (library,) = glob.glob(f"{spec.submodule_search_locations[0]}/xla_cuda_plugin.so")
    configs = _configs(pathlib.Path(library).read_bytes())
    for description, config in configs.items():
        if name in description and "MIG" not in description:
            return config
    raise UserError(f"--plan: {extra} knows no GPU called {name}; it knows {', '.join(sorted(configs))}")


def _configs(library: bytes) -> dict[str, str]:
    """{description: text}: printable runs around every "gpu_device_info" in the plugin.

    Ends of a run are looked for from the word outwards: one pattern for the whole run takes minutes in a library of this size.
    """
    found = {}
    for match in re.finditer(rb"gpu_device_info \{", library):
        before = _UNPRINTABLE.split(library[max(0, match.start() - 4096) : match.start()])[-1]
        end = _UNPRINTABLE.search(library, match.end())
        text = (before + library[match.start() : end.start() if end else len(library)]).decode()
        description = re.search(r'device_description_str:\s*"([^"]+)"', text)
        if description:
            found[description[1].replace(" ", "_")] = text
    return found
