"""Random checkpoints made with transformers, and what the two libraries make of them, module by module."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from oasis_jax.model.context import Context
from oasis_jax.model.head import embed
from oasis_jax.pretrained import Pretrained


class Modules(NamedTuple):
    """Where transformers has the parts of a family."""

    layers: str = "model.layers"
    attention_norm: str = "input_layernorm"
    attention_output: str = "self_attn"
    mlp_norm: str = "post_attention_layernorm"
    mlp_output: str = "mlp"
    final_norm: str = "model.norm"


MODULES = {
    "opt": Modules(
        "model.decoder.layers",
        "self_attn_layer_norm",
        "self_attn",
        "final_layer_norm",
        "fc2",
        "model.decoder.final_layer_norm",
    ),
    "gpt2": Modules("transformer.h", "ln_1", "attn", "ln_2", "mlp", "transformer.ln_f"),
}


class Pass(NamedTuple):
    """Logits [B, T, V], and what every module made [B, T, ...] in the order in which they ran."""

    logits: np.ndarray
    modules: dict[str, np.ndarray]


def random_checkpoint(folder: pathlib.Path, family: str, seed: int = 0, **keys) -> torch.nn.Module:
    """A model of random weights, gains and biases among them, saved in `folder`."""
    torch.set_num_threads(1)
    config = transformers.AutoConfig.for_model(family, **keys)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=random)
            if parameter.ndim > 1:
                inputs = parameter.shape[0] if family == "gpt2" and ".c_" in name else parameter.shape[-1]
                table = "embed" in name or "wte" in name or "wpe" in name
                parameter.copy_(drawn * (0.1 if table else 1.5 * inputs**-0.5))
            elif name.endswith("norm.weight") or (".ln_" in name and name.endswith("weight")):
                parameter.copy_(1 + 0.3 * drawn)
            else:
                parameter.copy_(0.3 * drawn)
    model.save_pretrained(folder)
    return model


def theirs(
    model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray | None = None, positions: np.ndarray | None = None
) -> Pass:
    """The pass of transformers."""
    more = {"attention_mask": mask, "position_ids": positions}
    more = {name: torch.tensor(value) for name, value in more.items() if value is not None}
    found: dict[str, np.ndarray] = {}
    with torch.no_grad(), _watched(model, found, ids.shape):
        logits = model(torch.tensor(ids), use_cache=False, **more).logits
    return Pass(logits.numpy(), found)


@contextlib.contextmanager
def _watched(model: torch.nn.Module, found: dict[str, np.ndarray], shape: tuple[int, int]) -> Iterator[None]:
    names = MODULES.get(model.config.model_type, Modules())
    multiplier = getattr(model.config, "residual_multiplier", 1.0)
    layers, handles = model.get_submodule(names.layers), []

    def keep(name: str, value, factor: float = 1.0) -> None:
        value = value[0] if isinstance(value, tuple) else value
        found[name] = (value.detach().reshape(*shape, -1) * factor).numpy()

    def before(_, args, kwargs):
        keep("embedding", args[0] if args else kwargs["hidden_states"])

    def watch(module: torch.nn.Module, name: str, factor: float = 1.0) -> None:
        handles.append(module.register_forward_hook(lambda _, __, output: keep(name, output, factor)))

    handles.append(layers[0].register_forward_pre_hook(before, with_kwargs=True))
    for index, layer in enumerate(layers):
        for part in ("attention_norm", "attention_output", "mlp_norm", "mlp_output"):
            factor = multiplier if part.endswith("output") else 1.0
            watch(layer.get_submodule(getattr(names, part)), f"layer {index}: {part}", factor)
        watch(layer, f"layer {index}: layer_output")
    watch(model.get_submodule(names.final_norm), "final_norm")
    yield
    for handle in handles:
        handle.remove()


_run = nnx.jit(lambda decoder, ids, context: decoder(ids, context))


def ours(
    model: Pretrained, ids: np.ndarray, mask: np.ndarray | None = None, positions: np.ndarray | None = None
) -> Pass:
    """This library's pass; padding is a segment of its own."""
    context = Context(
        positions=None if positions is None else jnp.asarray(positions, jnp.int32),
        segment_ids=None if mask is None else jnp.asarray(mask, jnp.int32),
    )
    with jax.default_matmul_precision("highest"):
        logits, statistics = _run(model.decoder(), jnp.asarray(ids, jnp.int32), context)
        found = {"embedding": embed(model.params, model.config, jnp.asarray(ids, jnp.int32), context)}
    parts = ("attention_norm", "attention_output", "mlp_norm", "mlp_output", "layer_output")
    for index in range(model.config.num_layers):
        found |= {f"layer {index}: {part}": statistics.taps[part][index] for part in parts}
    found["final_norm"] = statistics.taps["final_norm"][0]
    found = {name: np.asarray(value) for name, value in found.items()}
    return Pass(np.asarray(logits)[..., : model.config.vocab_size], found)


def relative(one: np.ndarray, other: np.ndarray, real: np.ndarray) -> float:
    """The largest difference at real tokens [B, T], over the largest value there."""
    return float(np.abs(one - other)[real].max() / np.abs(other)[real].max())


def first_departure(one: Pass, other: Pass, real: np.ndarray, tolerance: float) -> str | None:
    """The first module whose outputs differ by more, and by how much; None: there is none."""
    for name, value in other.modules.items():
        error = relative(one.modules[name], value, real)
        if not error <= tolerance:
            return f"{name} departs by {error:.1e}"
    return None


def perplexity(logits: np.ndarray, ids: np.ndarray, real: np.ndarray) -> float:
    """Of every real token after a real one."""
    wide = logits[:, :-1].astype(np.float64)
    highest = wide.max(-1, keepdims=True)
    normalizer = np.log(np.exp(wide - highest).sum(-1)) + highest[..., 0]
    losses = normalizer - np.take_along_axis(wide, ids[:, 1:, None], -1)[..., 0]
    return float(np.exp(losses[real[:, :-1] & real[:, 1:]].mean()))


def compare(one: Pass, other: Pass, ids: np.ndarray, real: np.ndarray, tolerance: float) -> Mapping[str, float]:
    """The relative errors of logits and perplexity; an AssertionError names the first module that departs."""
    # A hook sees modules in the order in which they end, which is that of the mathematics.
    found = {
        "logits": relative(one.logits, other.logits, real),
        "perplexity": abs(perplexity(one.logits, ids, real) / perplexity(other.logits, ids, real) - 1),
    }
    if not max(found.values()) <= tolerance:
        departure = first_departure(one, other, real, tolerance) or "only the head departs"
        raise AssertionError(f"{departure}; {found}")
    return found
