"""What a model is made of as text: its parameters, and what each of its sublayers reads and writes."""

import collections
import dataclasses
import itertools
import math
import re
import textwrap
from collections.abc import Sequence

from oasis_jax.commands.table import aligned
from oasis_jax.config import Config, ModelConfig
from oasis_jax.model.decoder import parameter_specs
from oasis_jax.model.parameters import ROLES, ParameterSpec
from oasis_jax.model.wiring import Step, schedule
from oasis_jax.training.plan import with_vocabulary


def describe(config: Config, width: int) -> str:
    """All that is printed, `width` columns wide."""
    sized = with_vocabulary(config)
    model = sized.model
    parts = [
        _summary(config, sized, width),
        parameters(model, width),
        roles(model, width),
        layers(model, width),
        steps(model, width),
    ]
    return "\n\n".join(parts)


def _summary(config: Config, sized: Config, width: int) -> str:
    """What the model is, in a few lines; a size that the data will set is marked."""
    model, data = sized.model, config.data
    if model.inputs == "vectors":
        size, asked, maker = f"vectors of {model.vector_dim}", config.model.vector_dim, f"corpus {data.corpus}"
    else:
        size, asked, maker = f"vocabulary {model.vocab_size:,}", config.model.vocab_size, f"{data.tokenizer} tokenizer"
    size += "" if asked else f", as the {maker} will have it"
    head = "head tied to the embedding" if model.inputs == "tokens" and model.tied_head else "head of its own"
    lines = [
        f"{model.preset}: {model.num_layers} layers of width {model.width}, {size}",
        f"attention: {model.normalizer}, {model.num_heads} heads of {model.head_size}, {model.key_heads} of keys "
        "and values",
        f"MLP: {model.mlp_size} wide, {'gated ' if model.mlp_gated else ''}{model.mlp_activation}; norm: "
        f"{model.norm}; {head}",
        f"other than by default: {', '.join(_changed(config.model)) or 'nothing'}",
    ]
    return "\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in lines)


def _changed(model: ModelConfig) -> list[str]:
    """["rope_theta=500000", ...]: fields that neither the preset nor a default gives; what the tables show at
    length is left out.
    """
    usual = ModelConfig(preset=model.preset)
    shown = ("preset", "num_layers", "width", "vocab_size", "vector_dim", "layer_pattern", "rope_scaling")
    found = []
    for field in dataclasses.fields(ModelConfig):
        value = getattr(model, field.name)
        if value != getattr(usual, field.name) and field.name not in shown:
            found.append(f"{field.name}={f'{value:g}' if isinstance(value, float) else str(value).lower()}")
    return found


# Parameters

Parameter = tuple[str, int, ParameterSpec]  # name, how many alike are stacked (0: not stacked), what one of them is


def listed(model: ModelConfig) -> list[Parameter]:
    """Every parameter as training holds it, those of all layers and of all routers stacked."""
    counts = {"layers": model.num_layers, "routers": len(schedule(model).routers)}

    def visit(name: str, part) -> list[Parameter]:
        if not isinstance(part, dict):
            return [(name, counts.get(name.partition(".")[0], 0), part)]
        return [found for key, value in part.items() for found in visit(f"{name}.{key}".lstrip("."), value)]

    return visit("", parameter_specs(model))


def _size(parameter: Parameter) -> int:
    _, count, spec = parameter
    return max(count, 1) * math.prod(spec.shape)


def parameters(model: ModelConfig, width: int) -> str:
    """The table of parameters; those of a stack below a line that says how many are stacked."""
    rows, last = [("parameter", "shape", "logical axes", "role", "values")], ""
    for parameter in listed(model):
        name, count, spec = parameter
        group, _, inner = name.partition(".")
        if count and group != last:
            rows.append((f"{group}: {count} stacked", "", "", "", ""))
        last = group
        shape, axes = " x ".join(map(str, spec.shape)) or "scalar", ", ".join(axis or "-" for axis in spec.axes)
        rows.append((f"  {inner}" if count else name, shape, axes, spec.role, f"{_size(parameter):,}"))
    total = sum(map(_size, listed(model)))
    return aligned([*rows, ("in all", "", "", "", f"{total:,}")], width, right=(4,))


def roles(model: ModelConfig, width: int) -> str:
    """How many parameters play each role, and what follows from it."""
    counts = collections.Counter()
    for parameter in listed(model):
        counts[parameter[-1].role] += _size(parameter)
    rows = [("role", "values", "share", "weight decay", "counted in FLOPs, quantized", "learning rate")]
    for name, role in ROLES.items():
        if counts[name]:
            answers = ("yes" if answer else "no" for answer in (role.decays, role.multiplies))
            share = f"{100 * counts[name] / counts.total():.2f} %"
            rows.append((name, f"{counts[name]:,}", share, *answers, role.group))
    return aligned(rows, width, right=(1, 2))


# Layers


def layers(model: ModelConfig, width: int) -> str:
    """Which keys the layers see, and how they know of positions; layers that are alike share a row."""
    alike: dict[ModelConfig, list[str]] = {}
    for index in range(model.period):
        alike.setdefault(model.layer(index), []).append(str(index))
    rows = [("layer l", "keys", "positions")]
    for layer, places in alike.items():
        which = "all" if len(alike) == 1 else f"l % {model.period} = {', '.join(places)}"
        keys = f"window of {layer.window:,}" if layer.window else "all before"
        rows.append((which, keys, _positions(layer)))
    return aligned(rows, width)


def _positions(layer: ModelConfig) -> str:
    found = [f"{layer.learned_positions:,} learned"] if layer.learned_positions else []
    if layer.rope_theta:
        share = f" on {layer.rotary_size} of {layer.head_size} channels" if layer.rope_fraction < 1 else ""
        scaling = f", {layer.rope_scaling.kind} x{layer.rope_scaling.factor:g}" if layer.rope_scaling else ""
        found.append(f"rotary, theta {layer.rope_theta:g}{share}{scaling}")
    if found and layer.position_offset:
        found.append(f"counted from {layer.position_offset}")
    return "; ".join(found) or "none"


# Steps


def steps(model: ModelConfig, width: int) -> str:
    """Step by step where a sublayer's source goes, and which sources the router reads that makes the next stream."""
    plan = schedule(model)
    if not plan.routers:
        rows = [("sublayer", "reads", "writes"), *((step.name, "stream", "stream + output") for step in plan.steps)]
        return f"{model.wiring} wiring: the stream starts as the embedding\n" + aligned(rows, width)
    coupled = ", coupled to the null mass of attention" if model.coupling else ""
    coupled += f" with beta {model.fixed_beta:g}" if model.fixed_beta else ""
    queries = "" if model.depth_normalizer == "uniform" else f"{model.router} "
    made = (
        "the stream + its output"
        if model.wiring == "cumulative"
        else f"its {'RMS-normalized ' if model.output_norm else ''}output"
    )
    title = [
        f"{model.wiring} wiring: {len(plan.routers)} {queries}routers ({model.depth_normalizer}{coupled}) over "
        f"{plan.num_slots} slots; slot 0 holds the embedding.",
        f"A sublayer reads the stream (the embedding, then what the router in the row above made) and writes {made}; "
        "the final norm reads the last stream.",
    ]
    rows = [("sublayer", "writes", "router", "its sources, oldest first")]
    for step in plan.steps:
        sources = shortened([source.name for source in step.sources])
        rows.append((step.name, _writes(step), shortened(step.routers), sources))
    return "\n".join([*(textwrap.fill(line, width) for line in title), aligned(rows, width)])


def _writes(step: Step) -> str:
    """The slot that takes the sublayer's source and, where there is one, the slot that takes the stream made
    from it.
    """
    slot = f"adds to slot {step.slot}" if step.members else f"slot {step.slot}"
    return slot if step.stream_slot is None else f"{slot}; stream: {step.stream_slot}"


def shortened(names: Sequence[str]) -> str:
    """Names with commas between; of three or more of a kind in a row the first and the last."""
    found = []
    for _, run in itertools.groupby(names, key=lambda name: re.sub(r"\d+|\.\w+", "", name)):
        alike = list(run)
        found += alike if len(alike) < 3 else [f"{alike[0]} .. {alike[-1]}"]
    return ", ".join(found)
