"""Quantization schemes by name: what is rounded, and how."""

import dataclasses
from collections.abc import Sequence

from oasis_jax.errors import UserError, unknown_name
from oasis_jax.evaluation.quantization.quantizers import Format


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What is rounded, and how.

    Attributes:
      weights: format of the weights of linear layers, symmetric; None: they stay as they are.
      activations: format of the inputs of linear layers; None: they stay as they are.
      group: how many terms of the contraction share a scale; 0: all.
      per_tensor: one scale a tensor, activations asymmetric. Else weights have a scale per output channel, activations
        one per token, symmetric.
      static: what is known of whole tensors of activations are running ranges from calibration. Else ranges are taken
        as they come, over a batch.
      everywhere: also the embedding table, attention scores, probabilities, context, residual sums and depth mixtures
        (the reference of arXiv 2605.17887, after arXiv 2306.12929).
      clip: per token: the share of the largest magnitude that becomes the highest code.
      scales: of groups: "" float32, "e8m0" powers of two, "e4m3" below one of the whole tensor, which of activations
        comes from calibration.
      site: the part of the model that is rounded, by names of tensors or their parts; "": all of it.
      mse, gptq, awq, smooth, rotate, float_head, integer, sink_float: the options of `OPTIONS`.
    """

    weights: Format | None
    activations: Format | None
    group: int = 0
    per_tensor: bool = False
    static: bool = False
    everywhere: bool = False
    clip: float = 1.0
    scales: str = ""
    site: str = ""
    mse: bool = False
    gptq: bool = False
    awq: bool = False
    smooth: bool = False
    rotate: bool = False
    float_head: bool = False
    integer: bool = False
    sink_float: bool = False

    @property
    def reads_inputs(self) -> bool:
        """Whether weights and factors follow from the inputs of their layers."""
        return self.smooth or self.gptq or self.awq

    @property
    def calibrated(self) -> bool:
        """Whether it reads calibration batches."""
        return self.static or self.reads_inputs

    def rounds(self, name: str) -> bool:
        """Whether a tensor of this name lies in the part that is rounded: its name has the site's parts in a row."""
        return not self.site or f".{self.site}." in f".{name}."


SCHEMES = {
    "w8a8_tensor": Scheme(Format(8), Format(8), per_tensor=True, static=True, everywhere=True),
    "w16a8_tensor": Scheme(None, Format(8), per_tensor=True),
    "w16a8_tensor_static": Scheme(None, Format(8), per_tensor=True, static=True),
    "w16a6_tensor": Scheme(None, Format(6), per_tensor=True),
    "w16a8": Scheme(None, Format(8)),
    "w16a4": Scheme(None, Format(4)),
    "w8a8": Scheme(Format(8), Format(8)),
    "w6a6": Scheme(Format(6), Format(6)),
    "w4a8": Scheme(Format(4), Format(8)),
    "w4a4_g32": Scheme(Format(4), Format(4), group=32),
    "w4a4_g128": Scheme(Format(4), Format(4), group=128),
    "w4a4_token": Scheme(Format(4), Format(4), clip=0.9),
    "w4a16_g128": Scheme(Format(4), None, group=128),
    "nvfp4": Scheme(Format(4, floating=True), Format(4, floating=True), group=16, static=True, scales="e4m3"),
    "mxfp4": Scheme(Format(4, floating=True), Format(4, floating=True), group=32, scales="e8m0"),
    "fp8": Scheme(Format(8, floating=True), Format(8, floating=True)),
}
# The fields of Scheme that "scheme+option" sets.
OPTIONS = {
    "mse": "weights are clipped to the range of 100 that has the least squared error",
    "gptq": "codes of weights by GPTQ, on inputs of calibration that the float model gives",
    "awq": "AWQ: inputs are divided by, weights multiplied with the power of 20 of their sizes that costs least",
    "smooth": "SmoothQuant on every linear layer, which divides its input by its factors as it runs; with calibration",
    "rotate": "inputs of linear layers are turned as they run, and weights with them: signs and Hadamard blocks",
    "float_head": "the head stays in float",
    "integer": "products of linear layers on the codes themselves, int8 or E4M3, in place of simulated ones",
    "sink_float": "activations of a row's first token stay in float and no range has seen them, the head's input apart",
}


def parse_scheme(text: str) -> Scheme:
    """'w8a8_tensor+mse+float_head' as a Scheme, 'w16a8_tensor@mlp.down' as one that rounds a part of the model alone.

    Raises:
      UserError: a name there is not, an option that has no meaning, a site without a name. Whether the model has such
        a site is known only where it is measured.
    """
    name, *options = text.split("+")
    name, at, site = name.partition("@")
    if at and not all(site.split(".")):
        raise UserError(f"--quantize: {text}: behind @ comes the name of tensors, such as @mlp.down or @layer3")
    if name not in SCHEMES:
        raise unknown_name("--quantize", name, SCHEMES)
    for option in options:
        if option not in OPTIONS:
            raise unknown_name(f"--quantize: option of {name}", option, OPTIONS)
    scheme = dataclasses.replace(SCHEMES[name], site=site, **dict.fromkeys(options, True))
    _check(text, scheme)
    return scheme


def _check(text: str, scheme: Scheme) -> None:
    """Raises UserError for options that do not go with the scheme or with one another."""
    left = "activations" if scheme.activations is None else "weights" if scheme.weights is None else ""
    if scheme.integer and left:
        raise UserError(f"--quantize: {text}: {left} stay in float, so there is no integer product; leave out +integer")
    for option in ("mse", "gptq", "awq"):
        if getattr(scheme, option) and scheme.weights is None:
            why = "no range of theirs is clipped" if option == "mse" else "there is nothing to choose"
            raise UserError(f"--quantize: {text}: weights stay in float, so {why}; leave out +{option}")
    if scheme.mse and scheme.scales:
        raise UserError(f"--quantize: {text}: scales are {scheme.scales}, not of a clipped range; leave out +mse")
    if scheme.awq and scheme.smooth:
        raise UserError(f"--quantize: {text}: +awq and +smooth both say what inputs are divided by; leave out one")
    if scheme.sink_float and (scheme.integer or scheme.activations is None):
        why = "products are of integers" if scheme.integer else "all activations stay in float"
        raise UserError(f"--quantize: {text}: {why}, so a token cannot be left out; leave out +sink_float")


def parse_schemes(names: Sequence[str]) -> dict[str, Scheme]:
    """Schemes by name; raises UserError for one there is not or one given twice."""
    if repeated := [name for index, name in enumerate(names) if name in names[:index]]:
        raise UserError(f"--quantize: {repeated[0]!r} is given twice")
    return {name: parse_scheme(name) for name in names}


SCALES = {"": "a scale", "e8m0": "a power of two", "e4m3": "an E4M3 scale"}


def describe(scheme: Scheme) -> str:
    """How a linear layer is computed, in words."""
    weight = "weight in float"
    if scheme.weights is not None:
        group = f" and group of {scheme.group}" if scheme.group else ""
        scales = "one scale a tensor" if scheme.per_tensor else f"{SCALES[scheme.scales]} per output channel{group}"
        scales += " below one of the tensor" if scheme.scales == "e4m3" else ""
        fit = "least squared error of 100 ranges" if scheme.mse else "min-max"
        weight = f"weight {scheme.weights}, {scales}, {fit}{', GPTQ' if scheme.gptq else ''}"
    how = {"smoothed": scheme.smooth, "scaled by AWQ": scheme.awq, "rotated": scheme.rotate}
    how = "".join(f"; {text}" for text, chosen in how.items() if chosen)
    sums = "int32" if scheme.integer and not scheme.weights.floating else "float32"
    kind = f"product on the codes, {sums} sums" if scheme.integer else "product simulated in float32"
    return f"{weight}; input {describe_activation(scheme)}{how}; {kind}"


def describe_activation(scheme: Scheme) -> str:
    """How an activation is rounded, in words."""
    if scheme.activations is None:
        return "in float"
    if not scheme.per_tensor:
        group = f" and group of {scheme.group}" if scheme.group else ""
        text = f"{scheme.activations}, {SCALES[scheme.scales]} per token{group}, as it comes"
        text += " below one of the tensor, from calibration" if scheme.scales == "e4m3" else ""
        text += f", clipped to {scheme.clip:g} of the largest" if scheme.clip != 1 else ""
    else:
        ranges = "from calibration" if scheme.static else "as it comes, over a batch"
        text = f"{scheme.activations}, one scale and zero point a tensor, {ranges}"
    return f"{text}, the first token in float" if scheme.sink_float else text
