"""Models that were trained elsewhere: in, measured, mended, out.

`load_pretrained(source)` reads a folder of safetensors, a GGUF file, a workdir or a hub's model as a `Pretrained`, and
`save_pretrained` writes one. `transplant_sink` and `rotate` take a token sink and channel sinks out of a model, without
training and exactly. A family is one file in `families/` and one line in its table.
"""

from oasis_jax.pretrained.load import Pretrained, load_pretrained
from oasis_jax.pretrained.rotation import rotate
from oasis_jax.pretrained.save import save_pretrained
from oasis_jax.pretrained.transplant import find_prefix, sink_heads, transplant_sink

__all__ = ["Pretrained", "find_prefix", "load_pretrained", "rotate", "save_pretrained", "sink_heads", "transplant_sink"]
