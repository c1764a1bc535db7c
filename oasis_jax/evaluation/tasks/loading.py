"""A model as tasks take it: loaded, split over devices, quantized."""

from oasis_jax.config import MeshConfig
from oasis_jax.evaluation import subjects
from oasis_jax.evaluation.quantization import parse_scheme, quantized
from oasis_jax.pretrained import Pretrained, load_pretrained, transplant_sink


def load_model(
    source: str,
    *,
    dtype: str | None = None,
    mesh: MeshConfig | None = None,
    begin_token: str = "auto",
    transplant: bool = False,
    quantize: str = "",
) -> Pretrained:
    """Loads a model for a task.

    Args:
      source, dtype, mesh: see `load_pretrained`.
      begin_token: what texts begin with: "auto", as the model's do; "none"; or the number of a token.
      transplant: its begin token becomes the null of its attention.
      quantize: a quantization scheme; where it needs calibration, on `subjects.calibration_batches`. "": float.

    Raises:
      UserError: see `load_pretrained`, `transplant_sink` and `quantized`; a begin token outside the vocabulary.
    """
    scheme = parse_scheme(quantize) if quantize else None  # before anything is loaded
    model = load_pretrained(source, dtype=dtype, mesh=mesh)
    model = model.replace(begin_token=subjects.begin_token(model, begin_token))
    model = transplant_sink(model) if transplant else model
    if scheme is None:
        return model
    return quantized(model, quantize, subjects.calibration_batches(model) if scheme.calibrated else ())
