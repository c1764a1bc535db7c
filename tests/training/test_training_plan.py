"""What a plan says, and what it makes of a wrong --plan, without a compiler. Those that compile are in
tests/aot/test_plan.py.
"""

import importlib.util
import math
import pathlib
import types

import jax
import pytest

from oasis_jax.commands.config_file import load_config
from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.data import TOKENIZERS, load_corpus, train_batches
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.placement import make_mesh
from oasis_jax.training import plan as planning
from oasis_jax.training.collectives import Collective
from oasis_jax.training.gpu_targets import GPUS
from oasis_jax.training.plan import (
    Plan,
    Target,
    describe,
    make_plan,
    refused_bytes,
    suggestion,
    target,
    with_vocabulary,
)

GIB = 2**30
ROOT = pathlib.Path(__file__).parents[2]


def plan(parameters=1, optimizer=2, temporary=3, *, found=(), kind="cpu", **axes) -> Plan:
    """A plan of so many GiB for devices of 16 GiB."""
    shape = dict(data=1, fsdp=1, sequence=1, tensor=1) | axes
    size = shape["data"] * shape["fsdp"] * shape["sequence"] * shape["tensor"]
    device = types.SimpleNamespace(device_kind=kind, platform="tpu")
    mesh = types.SimpleNamespace(shape=shape, size=size, devices=types.SimpleNamespace(flat=[device]))
    hardware = Target("v5e:2x4", [device] * 8, 16.0)
    return Plan(hardware, mesh, parameters * GIB, optimizer * GIB, 0, int(temporary * GIB), found, 1e9, 4096)


WRONG = {
    "v5q:2x2": "(did you mean 'v5",
    "h10:8": "(did you mean 'h100'?)",
    "v5p": "got 'v5p'; hardware: v4, v5e, v5p",
    "v5p:4*4": "expected HARDWARE:SHAPE such as v5p:4x4x4 or h100:8, got 'v5p:4*4'",
    "h100:2x8": "expected h100:COUNT such as h100:8, got 'h100:2x8'",
    "h100:0": "at least one device",
    "": "got ''",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_target_is_told_in_one_line(text):
    with pytest.raises(UserError) as caught:
        target(text)
    message = str(caught.value)
    assert message.startswith("--plan: ") and WRONG[text] in message and "\n" not in message


def test_a_compiler_that_is_missing_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"v5p:2x2x1: no TPU compiler: python -m pip install 'jax\[tpu\]'"):
        target("v5p:2x2x1")


def test_a_plan_adds_up_and_fits_up_to_the_last_byte():
    fits = plan(4, 8, 4)
    assert fits.total == 16 * GIB and fits.fits
    assert not fits._replace(batch=1).fits
    assert not plan(found=None).fits  # refused by the compiler, however little it seems to need


def test_an_evaluation_counts_beside_the_training_step():
    """In training the optimizer's moments lie beside it; by itself it has the device alone."""
    fits = plan(3, 8, 1)._replace(evaluation=9 * GIB)
    assert fits.fits and fits.evaluations == {"evaluation": 9 * GIB}
    assert "  evaluation                9.00 GiB   together, fits in 16.00 GiB (56 %)" in describe(fits, Config())
    both = fits._replace(evaluated_while_training=True)
    assert both.training_fits and not both.fits
    text = describe(both, Config())
    assert "  together                 12.00 GiB   fits in 16.00 GiB (75 %)" in text
    assert (
        "  evaluation in training   17.00 GiB   together, with the optimizer beside it, DOES NOT FIT in 16.00 GiB "
        "(106 %)"
    ) in text
    assert "suggestion: the evaluation takes most: a larger mesh.tensor" in text
    assert not fits._replace(evaluation=17 * GIB).fits
    assert "evaluation" not in describe(plan(), Config())


def test_a_description_gives_every_figure():
    text = describe(plan(found=[Collective("all-gather", 12, 3 * 2**20)], kind="TPU v5 lite", fsdp=8), Config())
    for expected in (
        "8 devices (data=1 x fsdp=8",
        "together                  6.00 GiB   fits in 16.00 GiB (38 %)",
        "5.120e+11   a step; 1.000e+09 a token",
        "197 TFLOP/s 2.6 ms a step",
        "all-gather                3.00 MiB   a step, 12 times",
    ):
        assert expected in text
    assert "suggestion" not in text and "peak" not in describe(plan(), Config())
    assert "DOES NOT FIT" in describe(plan(temporary=14), Config()) and "suggestion: " in describe(
        plan(temporary=14), Config()
    )


@pytest.mark.parametrize(
    ("made", "config", "expected"),
    [
        (plan(6, 12, data=8), Config(), "mesh.fsdp=4 "),
        (plan(6, 12, fsdp=8), Config(), "take a larger topology"),
        (plan(6, 12, data=2, tensor=4), Config(), "take a larger topology"),
        (plan(8, 6, data=2, fsdp=2, tensor=2, sequence=3), Config(), "mesh.fsdp=4 "),
        (plan(temporary=20), Config(model=ModelConfig(preset="residual")), "model.remat=layer"),
        (plan(temporary=20), Config(model=ModelConfig(stack="unroll")), "model.remat=layer"),
        (
            plan(temporary=20),
            Config(),
            "accumulation_steps=2 ",
        ),  # a loop that recomputes everything whatever remat says
        (
            plan(temporary=20, fsdp=8),
            Config(data=DataConfig(batch_size=24)),
            "a larger mesh.tensor",
        ),  # three examples cannot be halved
        (
            plan(temporary=20, fsdp=8),
            Config(
                model=ModelConfig(remat="layer"),
                data=DataConfig(batch_size=32),
                optimizer=OptimizerConfig(accumulation_steps=2),
            ),
            "accumulation_steps=4 ",
        ),
        (
            plan(temporary=20, fsdp=8),
            Config(model=ModelConfig(remat="layer"), data=DataConfig(batch_size=8)),
            "a larger mesh.tensor or mesh.sequence",
        ),
    ],
)
def test_the_suggestion_follows_what_takes_the_memory(made, config, expected):
    assert expected in suggestion(made, config)


def test_a_refusal_of_the_compiler_is_read_as_bytes():
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    beside = (
        "E1000: Ran out of memory on HBM, the total memory required for HLO temporaries (74.00G) exceeds "
        "available HBM (15.75G)."
    )
    assert refused_bytes(used, 3 * GIB) == int(20.5 * GIB)
    assert refused_bytes(beside, 3 * GIB) == 77 * GIB
    assert refused_bytes("INTERNAL: a bug", 0) is None


def test_the_vocabulary_is_that_of_the_tokenizer():
    assert with_vocabulary(Config()).model.vocab_size == TOKENIZERS["bytes"].train([b"a"], 0).vocab_size
    assert with_vocabulary(Config(data=DataConfig(tokenizer="bpe", bpe_vocab_size=777))).model.vocab_size == 777
    assert with_vocabulary(Config(model=ModelConfig(vocab_size=99))).model.vocab_size == 99


def test_a_gpu_says_what_share_of_it_is_counted():
    hardware = Target("h100:8", plan().target.devices, 73.0)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in describe(plan(fsdp=8)._replace(target=hardware), Config())


@pytest.mark.parametrize("fields", [dict(), dict(tokenizer="bpe", begin_token=False)])
def test_the_abstract_batch_is_that_of_the_data(fields):
    data = DataConfig(sequence_length=16, batch_size=2, **fields)
    config = Config(data=data)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    real = next(
        train_batches(load_corpus(data, seed=0, tokenizer=TOKENIZERS["bytes"].train([b"a"], 0)).train, data, seed=0)
    )
    assert {name: (x.shape, x.dtype) for name, x in real.items()} == {
        name: (x.shape, x.dtype) for name, x in planning.abstract_batch(config, mesh).items()
    }


def test_targets_and_memories_do_not_clash():
    assert not planning.TPU_MEMORY.keys() & planning.GPUS.keys()


@pytest.mark.parametrize(
    ("name", "billions"), [("oasis_600m", 0.6), ("oasis_1b", 1), ("oasis_8b", 8), ("oasis_70b", 70)]
)
def test_large_configs_have_the_size_of_their_name(name, billions):
    config = with_vocabulary(load_config(str(ROOT / "configs" / f"{name}.py")))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(parameter_shapes(config.model)))
    assert 0.93 * billions <= count / 1e9 <= 1.08 * billions


def test_what_is_compiled_is_measured():
    """On a CPU, whose compiler counts bytes too: the arguments are exactly those of the shapes."""
    small = ModelConfig(preset="residual", num_layers=1, width=16, num_heads=2, vocab_size=17, mlp_dim=24)
    data = DataConfig(sequence_length=12, batch_size=3)
    config = Config(model=small, data=data, run=RunConfig(steps=4, eval_interval=2))
    lowered = []

    def lower_evaluation(config, mesh):
        shape = jax.ShapeDtypeStruct((1024, 1024), "float32")
        lowered.append(jax.jit(lambda x: x.sum()).lower(shape))
        return lowered[0]

    made = make_plan(config, Target("cpu", jax.devices("cpu")[:1], 16.0), lower_evaluation)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(parameter_shapes(small)))
    assert made.parameters == 4 * count and made.optimizer == pytest.approx(8 * count, abs=16)
    assert made.batch == 3 * 3 * 12 * 4 and made.temporary > 0 and made.fits
    assert 4 * 1024**2 < made.evaluation < 4 * 1024**2 + 2**16
    assert made.evaluated_while_training and len(lowered) == 1
    assert make_plan(config, made.target).evaluation is None


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_described_in_the_words_of_its_compiler(name):
    text = GPUS[name].description
    assert text.count("{") == text.count("}") == 2
    assert f"device_memory_size: {GPUS[name].memory}" in text and f'device_description_str: "{GPUS[name].name}"' in text


def test_vectors_have_the_size_of_their_task():
    config = Config(
        model=ModelConfig(preset="residual", inputs="vectors"), data=DataConfig(corpus="trigger", trigger_dim=5)
    )
    assert with_vocabulary(config).model.vector_dim == 7
    with pytest.raises(UserError, match=r"--plan: plans models of tokens, got model\.inputs=vectors"):
        planning.run_plan(config, "v5e:2x2")
