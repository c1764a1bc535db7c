"""What a study is: methods x arms x seeds over one config, the numbers they are compared by, and the claims tested."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from oasis_jax.config import Config
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.overrides import apply_overrides, parse_overrides

if TYPE_CHECKING:
    import numpy as np

    from oasis_jax.pretrained import Pretrained

CELLS = "cells"  # the folder of cells in a study's
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

Assignments = tuple[str, ...]  # "section.field=value", as --set takes them


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A number of every cell.

    Attributes:
      value: a scalar measure such as "avg_kurtosis"; "quantized.SCHEME", the loss value under a scheme (perplexity, of
        vectors squared error), or "quantized.SCHEME.change", by what share it is above float's.
      title: short, for tables.
      direction: which is better.
      relative: methods are compared by ratios, on logarithms; False: by differences.
    """

    value: str
    title: str
    direction: Literal["lower", "higher", "none"] = "lower"
    relative: bool = True


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence that the study confirms, contradicts, or leaves open.

    Attributes:
      text: what is claimed.
      source: by whom, and the figure where one was published.
      outcome: the value of one of the study's outcomes.
      method, against: names of methods; compared seed by seed.
      direction: what is claimed of the method's outcome beside the other's.
      arms: in which it is tested; (): in every one.
      needs: outcome's value -> the smallest mean over the other method's seeds with which the claim can be tested at
        all, such as a sink to remove.
      untestable: why this study cannot answer it; "": it can.
    """

    text: str
    source: str
    outcome: str = ""
    method: str = ""
    against: str = ""
    direction: Literal["lower", "higher"] = "lower"
    arms: tuple[str, ...] = ()
    needs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    untestable: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A pretrained model whose forms a study measures, without training, and what they read.

    Attributes:
      model: see `oasis_jax.load_pretrained`.
      text: "stdlib", or a file or glob of .txt and .jsonl files.
      length: tokens of a sequence, a begin token not counted.
      parts: of the text, which a study's seeds number; each is spread over all of it.
      sequences: of each part.
      batch_size: sequences at a time.
    """

    model: str
    text: str = "stdlib"
    length: int = 128
    parts: int = 8
    sequences: int = 16
    batch_size: int = 8


class Form(NamedTuple):
    """What is done to a pretrained model before it is measured.

    Attributes:
      text: in words.
      make: (the model as it is, rows of calibration text [C, T]) -> the model that is measured.
    """

    text: str
    make: Callable[[Pretrained, np.ndarray], Pretrained]


class Cell(NamedTuple):
    """One training run of a study, or one form of a model on one part of a text."""

    arm: str
    method: str
    seed: int

    @property
    def path(self) -> str:
        """Its folder below the study's."""
        return f"{CELLS}/{self.arm}/{self.method}/seed{self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A matrix of runs, or, where there is a source, of the forms of one pretrained model and parts of a text.

    Attributes:
      title: of the report.
      base: the config of every cell; None where there is a source.
      source: of the model that every cell measures; None: cells are trained.
      methods: name -> what it sets otherwise, or the form; the first one is the baseline, whose seeds give the noise
        floor.
      arms: name -> what it sets otherwise, such as other data; methods are compared within an arm.
      seeds: run.seed of each repetition, or the numbers of the parts of the text, from 0 on.
      twins: method -> the method it is paired with in tables, where that is not the baseline.
      factors: fields outside the model that methods may set, such as "optimizer.weight_decay". Any other would make
        the comparison one of starts, data or budgets.
      measures, interventions, schemes: as `oasis_jax eval` takes them.
      eval_batches: held-out batches that a cell is measured on.
      outcomes: what the report's tables show.
      claims: what is tested, with one correction over all of them.
    """

    title: str
    base: Config | None = None
    source: Source | None = None
    methods: Mapping[str, Assignments | Form]
    seeds: tuple[int, ...]
    arms: Mapping[str, Assignments] = dataclasses.field(default_factory=lambda: {"all": ()})
    twins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    factors: tuple[str, ...] = ()
    measures: tuple[str, ...] = ("default",)
    interventions: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    eval_batches: int = 8
    outcomes: tuple[Outcome, ...]
    claims: tuple[Claim, ...] = ()

    def __post_init__(self) -> None:
        if not (self.methods and self.arms and self.seeds and self.outcomes):
            raise UserError("study: needs at least one method, arm, seed and outcome")
        for kind, names in (("methods", self.methods), ("arms", self.arms)):
            for name in names:
                if not NAME.fullmatch(name):
                    raise UserError(f"study.{kind}: {name!r} names a folder; letters, digits and _ . - are allowed")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"study.seeds: one is there twice, in {self.seeds}")
        for method, twin in self.twins.items():
            _check_name("study.twins", method, self.methods)
            _check_name(f"study.twins[{method!r}]", twin, self.methods)
        self._check_kind()
        self._check_factors()
        for claim in self.claims:
            self._check_claim(claim)

    def _check_kind(self) -> None:
        """Either all is trained, or nothing."""
        if (self.base is None) == (self.source is None):
            raise UserError("study: needs either base, the config of what is trained, or source, what is measured")
        if self.source and tuple(self.arms.values()) != ((),):
            raise UserError("study.arms: with a source there is one, without settings")
        if self.source and not set(self.seeds) <= set(range(self.source.parts)):
            raise UserError(
                f"study.seeds: number the parts of the text, 0 to {self.source.parts - 1}, got {self.seeds}"
            )
        for method, what in self.methods.items():
            if isinstance(what, Form) != (self.source is not None):
                wanted = "a Form of the source's model" if self.source else "settings; a Form goes with a source"
                raise UserError(f"study.methods[{method!r}]: must be {wanted}")

    def _check_factors(self) -> None:
        """A method may be another model, and nothing else unless the study says so."""
        for method, assignments in self.methods.items() if self.base else ():
            for section, values in parse_overrides(assignments).items():
                for name in values:
                    field = f"{section}.{name}"
                    if section != "model" and field not in self.factors:
                        raise UserError(
                            f"study.methods[{method!r}]: sets {field}, so that its runs would not start or go on as "
                            "the others do; name the field in study.factors if it is what is studied, or set it in "
                            "study.arms"
                        )

    def _check_claim(self, claim: Claim) -> None:
        if claim.untestable:
            return
        where = f"study.claims[{claim.text!r}]"
        values = [outcome.value for outcome in self.outcomes]
        for name in (claim.outcome, *claim.needs):
            _check_name(f"{where}.outcome", name, values)
        for name in (claim.method, claim.against):
            _check_name(f"{where}.method", name, self.methods)
        for name in claim.arms:
            _check_name(f"{where}.arms", name, self.arms)

    @property
    def baseline(self) -> str:
        return next(iter(self.methods))

    @property
    def repetitions(self) -> str:
        """What its seeds are, in words."""
        return "parts of the text" if self.source else "seeds"

    def words(self, method: str) -> str:
        """What a method sets, or what is done to the model."""
        what = self.methods[method]
        return what.text if isinstance(what, Form) else " ".join(what)

    def twin(self, method: str) -> str:
        """The method that this one is paired with."""
        return self.twins.get(method, self.baseline)

    def outcome(self, value: str) -> Outcome:
        return next(outcome for outcome in self.outcomes if outcome.value == value)

    def cells(self) -> Iterator[Cell]:
        """All cells, one seed of everything first: a study that is cut short has whole comparisons."""
        for seed in self.seeds:
            for arm in self.arms:
                for method in self.methods:
                    yield Cell(arm, method, seed)

    def identity(self, cell: Cell) -> str:
        """SHA-256 of all that makes a cell what it is, but for the folders in which a model or a text lies; raises
        UserError as `config` does.
        """
        if self.source:
            source = dataclasses.replace(self.source, model=_name(self.source.model), text=_name(self.source.text))
            settings = repr((source, self.words(cell.method)))
        else:
            config = self.config(cell)
            data = dataclasses.replace(config.data, pattern=_name(config.data.pattern))
            run = dataclasses.replace(config.run, init_from=_name(config.run.init_from))
            settings = repr(dataclasses.replace(config, data=data, run=run))
        return hashlib.sha256(settings.encode()).hexdigest()

    def config(self, cell: Cell) -> Config:
        """The config of a cell that is trained; raises UserError where it does not fit together."""
        assignments = (*self.arms[cell.arm], *self.methods[cell.method], f"run.seed={cell.seed}")
        try:
            return apply_overrides(self.base, assignments)
        except UserError as error:
            raise UserError(f"study, arm {cell.arm}, method {cell.method}: {error}") from None


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _check_name(where: str, name: str, allowed: Mapping | list[str]) -> None:
    if name not in allowed:
        raise unknown_name(where, name, allowed)
