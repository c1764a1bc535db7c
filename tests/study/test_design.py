"""Studies that do not fit together are refused in words."""

import pytest
from study.study_toys import BASE, ERROR, toy_study

from oasis_jax.errors import UserError
from oasis_jax.study import Cell, Claim


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(methods={}), "at least one method"),
        (dict(methods={"a/b": ()}), "'a/b' names a folder"),
        (dict(seeds=(1, 1)), "one is there twice"),
        (dict(twins={"softmax1": "softmx"}), "did you mean 'softmax'"),
        (dict(methods={"a": (), "b": ("run.steps=9",)}), r"study.methods\['b'\]: sets run.steps"),
        (dict(methods={"a": (), "b": ("model.widht=9",)}), "did you mean 'model.width'"),
        (dict(claims=(Claim("x", "y", "squared_eror", "softmax1", "softmax"),)), "did you mean 'squared_error'"),
        (dict(claims=(Claim("x", "y", ERROR.value, "softmax2", "softmax"),)), "unknown name 'softmax2'"),
        (dict(claims=(Claim("x", "y", ERROR.value, "softmax1", "softmax", arms=("b",)),)), "allowed: all"),
    ],
)
def test_mistakes(fields, words):
    with pytest.raises(UserError, match=words):
        toy_study(**{"claims": ()} | fields)


def test_cells_and_their_configs():
    study = toy_study(
        arms={"begin": (), "none": ("data.begin_token=false",)},
        methods={"softmax": (), "slow": ("optimizer.learning_rate=0.5",)},
        factors=("optimizer.learning_rate",),
        claims=(),
    )
    assert list(study.cells())[:5] == [
        *(Cell(arm, method, 0) for arm in ("begin", "none") for method in ("softmax", "slow")),
        Cell("begin", "softmax", 1),
    ]
    config = study.config(Cell("none", "slow", 1))
    assert (config.run.seed, config.data.begin_token, config.optimizer.learning_rate) == (1, False, 0.5)
    assert config.model == BASE.model and study.baseline == study.twin("slow") == "softmax"


def test_a_config_that_cannot_be_names_its_cell():
    study = toy_study(methods={"a": (), "b": ("model.num_heads=3",)}, claims=())
    with pytest.raises(UserError, match="arm all, method b: model"):
        study.config(Cell("all", "b", 0))
