"""Models that were trained elsewhere: in, measured, mended, out.

`load_pretrained(source)` reads a folder of safetensors, a GGUF file, a workdir or a hub's model as a `Pretrained`.
A family is one file in `families/` and one line in its table.
"""

from oasis_jax.pretrained.load import Pretrained, load_pretrained

__all__ = ["Pretrained", "load_pretrained"]
