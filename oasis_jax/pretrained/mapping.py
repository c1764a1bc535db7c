"""How a family's tensors lie beside ours: tables that are read in one direction by `load`, in the other by `export`."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from oasis_jax.model.parameters import ParameterSpec


class Layout(NamedTuple):
    """How one of our parameters lies in a file.

    Attributes:
      shape: (spec) -> the shape in the file.
      read: (array of that shape, spec) -> ours.
      write: (ours, spec) -> the file's.
      axis: of the file's array along which several parameters are joined.
    """

    shape: Callable[[ParameterSpec], tuple[int, ...]]
    read: Callable[[np.ndarray, ParameterSpec], np.ndarray]
    write: Callable[[np.ndarray, ParameterSpec], np.ndarray]
    axis: int = 0


def _sides(spec: ParameterSpec, inputs: int) -> tuple[int, int]:
    return math.prod(spec.shape[:inputs]), math.prod(spec.shape[inputs:])


def _linear(inputs: int) -> Layout:
    """torch.nn.Linear's [out, in]; ours has `inputs` leading axes that are summed over."""
    return Layout(
        lambda spec: _sides(spec, inputs)[::-1],
        lambda x, spec: x.T.reshape(spec.shape),
        lambda x, spec: x.reshape(_sides(spec, inputs)).T,
    )


def _conv1d(inputs: int) -> Layout:
    """GPT-2's [in, out]."""
    return Layout(
        lambda spec: _sides(spec, inputs),
        lambda x, spec: x.reshape(spec.shape),
        lambda x, spec: x.reshape(_sides(spec, inputs)),
        axis=1,
    )


LINEAR, LINEAR_FROM_HEADS = _linear(1), _linear(2)
CONV1D, CONV1D_FROM_HEADS = _conv1d(1), _conv1d(2)
VECTOR = Layout(
    lambda spec: (math.prod(spec.shape),), lambda x, spec: x.reshape(spec.shape), lambda x, spec: x.reshape(-1)
)
TABLE = Layout(lambda spec: spec.shape, lambda x, spec: x, lambda x, spec: x)


class Tensor(NamedTuple):
    """A tensor of a family's files.

    Attributes:
      name: in the file; "{layer}" stands for the number of the layer.
      layout: of every parameter it holds.
      parameters: ours, such as "layers/attention/query"; several lie in the tensor one after the other.
      place, per_layer: which of how many that a layer has of a kind, such as the second of two routers.
    """

    name: str
    layout: Layout
    parameters: tuple[str, ...]
    place: int = 0
    per_layer: int = 1

    @property
    def of_layers(self) -> bool:
        return "{layer}" in self.name


def tensor(name: str, layout: Layout, *parameters: str) -> Tensor:
    """A `Tensor`."""
    return Tensor(name, layout, parameters)


def spec_of(specs: Mapping, parameter: str) -> ParameterSpec:
    """The ParameterSpec of "layers/attention/query" in `oasis_jax.model.decoder.parameter_specs`."""
    found = specs
    for name in parameter.split("/"):
        found = found[name]
    return found


def file_specs(tensor: Tensor, specs: Mapping, vocab_size: int) -> list[ParameterSpec]:
    """The specs of a tensor's parameters as files have them: without the rows that pad our vocabulary."""
    found = []
    for parameter in tensor.parameters:
        spec = spec_of(specs, parameter)
        shape = tuple(vocab_size if axis == "vocab" else size for size, axis in zip(spec.shape, spec.axes))
        found.append(spec._replace(shape=shape))
    return found


def file_shape(tensor: Tensor, specs: list[ParameterSpec]) -> tuple[int, ...]:
    """The shape of a tensor in the file."""
    shapes = [tensor.layout.shape(spec) for spec in specs]
    axis = tensor.layout.axis
    joined = sum(shape[axis] for shape in shapes)
    return (*shapes[0][:axis], joined, *shapes[0][axis + 1 :])


def split(array: np.ndarray, tensor: Tensor, specs: list[ParameterSpec]) -> list[np.ndarray]:
    """Our parameters from a tensor of the file, without padding."""
    axis = tensor.layout.axis
    ends = np.cumsum([tensor.layout.shape(spec)[axis] for spec in specs])[:-1]
    return [tensor.layout.read(x, spec) for x, spec in zip(np.split(array, ends, axis), specs)]


def join(arrays: list[np.ndarray], tensor: Tensor, specs: list[ParameterSpec]) -> np.ndarray:
    """A tensor of the file from our parameters without padding; the inverse of `split`."""
    parts = [tensor.layout.write(x, spec) for x, spec in zip(arrays, specs)]
    return np.concatenate(parts, tensor.layout.axis) if len(parts) > 1 else parts[0]


def fit_vocabulary(array: np.ndarray, spec: ParameterSpec) -> np.ndarray:
    """Zero rows up to, or without those beyond, the vocabulary of a spec."""
    for axis, (name, size) in enumerate(zip(spec.axes, spec.shape)):
        if name == "vocab" and array.shape[axis] != size:
            extra = size - array.shape[axis]
            widths = [(0, extra if i == axis else 0) for i in range(array.ndim)]
            array = np.pad(array, widths) if extra > 0 else np.take(array, np.arange(size), axis)
    return array
