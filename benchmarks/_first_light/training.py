"""Whole training steps at 0.6 billion parameters, of one preset, on one device."""

import dataclasses
import pathlib
import time

import jax
import numpy as np

from _first_light.report import Report
from oasis_jax.commands.config_file import load_config
from oasis_jax.config import Config, MeshConfig
from oasis_jax.placement import make_mesh, place
from oasis_jax.training.state import new_state
from oasis_jax.training.step import make_step

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "oasis_600m.py"
VOCABULARY = 32768
BATCHES = (4, 2, 1)  # sequences a step: as many as fit, tried in this order
STEPS = 12
KERNELS = ("null_attention_forward", "null_attention_backward", "depth_route_forward", "depth_route_backward", "fmha")


def run(report: Report, toy: bool, preset: str) -> None:
    """One line: the time of a step, its memory, whether the loss is finite and falls, which kernels run. A batch that
    does not fit is a line as well, and half of it is tried.
    """
    for batch in BATCHES:
        config = config_of(preset, batch, toy)
        name = f"{preset}, {batch} x {config.data.sequence_length} tokens"
        try:
            report.say(name, **measure(config, report))
            return
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip()}"
            report.say(name, failed=text[:400])
            if "RESOURCE_EXHAUSTED" not in text or report.late(0.5):
                return


def config_of(preset: str, batch: int, toy: bool) -> Config:
    """configs/oasis_600m.py as one device trains it, with another method."""
    config = load_config(CONFIG)
    model = dataclasses.replace(config.model.with_preset(preset), vocab_size=VOCABULARY)
    data = dataclasses.replace(config.data, batch_size=batch)
    if toy:
        sizes = dict(num_layers=2, width=64, num_heads=4, num_kv_heads=2, mlp_dim=96, vocab_size=128)
        blocks = {"blocks": 2} if preset == "oasis_blocks" else {}
        model = dataclasses.replace(model, **sizes, **blocks, dtype="float32")
        data = dataclasses.replace(data, sequence_length=32)
    return dataclasses.replace(config, model=model, data=data, mesh=MeshConfig())


def measure(config: Config, report: Report) -> dict:
    """A run of a few steps over one random batch."""
    mesh, data = make_mesh(config.mesh), config.data
    step, state = make_step(config, mesh), new_state(config, mesh)
    shape = (data.batch_size, data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones(tokens[:, 1:].shape, np.float32)}
    batch = place(config, mesh).put(batch)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    facts = {"compile_s": time.perf_counter() - start}
    times, losses = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        times.append(1e3 * (time.perf_counter() - start))
        if report.late(0.9):
            break
    steady = float(np.median(times[2:] or times))
    text = compiled.as_text()
    facts |= {"step_ms": steady, "least_ms": min(times), "steps": len(times)}
    facts |= {"tokens_per_s": 1e3 * tokens[:, 1:].size / steady}
    facts |= {"parameters": sum(x.size for x in jax.tree.leaves(state.params))}
    facts |= _memory(compiled)
    facts |= {"first_loss": losses[0], "last_loss": losses[-1], "ok": bool(np.isfinite(losses).all())}
    return facts | {"kernels": {name: text.count(name) for name in KERNELS if name in text}}


def _memory(compiled) -> dict[str, float]:
    """What the program plans for beside its arguments and, where the device counts, the most that was in use at once;
    in GiB.
    """
    planned = {"temporary_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30}
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return planned if peak is None else planned | {"peak_gib": peak / 2**30}
