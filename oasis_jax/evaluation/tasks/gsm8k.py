"""GSM8K (Cobbe et al., arXiv 2110.14168): questions answered in text, scored by the number that the text ends in."""

import dataclasses
import hashlib
import pathlib
from fractions import Fraction
from typing import Any, Literal

import jax
import numpy as np

from oasis_jax.config.schema import check_fields, check_minimum, field
from oasis_jax.data.pairs import Pair, read_pairs
from oasis_jax.decoding import Sampling, generate
from oasis_jax.errors import UserError
from oasis_jax.evaluation.tasks import gsm8k_prompts as prompts
from oasis_jax.evaluation.tasks.answers import EXTRACTIONS, strict
from oasis_jax.evaluation.tasks.progress import TaskProgress
from oasis_jax.evaluation.tasks.records import Records
from oasis_jax.evaluation.tasks.scores import score
from oasis_jax.evaluation.tasks.scoring import longest_text
from oasis_jax.pretrained import Pretrained
from oasis_jax.storage import fetched

# What a base model goes on with behind an answer; a text that spells an end token ends there, too.
_STOP = ("Question:", "</s>", "<|im_end|>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is asked, and how often."""

    gsm8k_file: str = field("", "questions and answers, a .jsonl file")
    gsm8k_train: str = field("", "a .jsonl file whose first pairs are the worked examples; '': eight fixed ones")
    gsm8k_prompt: Literal["cot", "boxed", "chat"] = field(
        "cot", "worked examples, a boxed answer, or the latter in chat"
    )
    shots: int = field(8, "worked examples before each question")
    samples: int = field(1, "texts a question")
    pass_at: int = field(1, "of so many drawn samples one is right")
    temperature: float = field(0.0, "0: the likeliest token")
    top_p: float = field(1.0, "draw from the likeliest with this probability together")
    max_new_tokens: int = field(256, "tokens of an answer at the most")
    limit: int = field(0, "only the first so many questions; 0: all")
    rows: int = field(8, "texts made at once")
    seed: int = field(0, "of what is drawn")

    def __post_init__(self) -> None:
        try:
            check_fields(self, "")
            least = dict(shots=0, samples=1, pass_at=1, max_new_tokens=1, limit=0, rows=1, seed=0)
            check_minimum(self, "", **least)
            _ = self.sampling
        except UserError as error:
            name, _, rest = str(error).removeprefix("sampling").removeprefix(".").partition(":")
            raise UserError(f"--{name.replace('_', '-')}:{rest}") from None
        if not self.gsm8k_file:
            raise UserError("--tasks: gsm8k needs --gsm8k-file FILE, its questions as .jsonl")
        if self.pass_at > self.samples:
            raise UserError(f"--pass-at: must be at most --samples, {self.samples}, got {self.pass_at}")
        if self.samples > 1 and not self.temperature:
            raise UserError(f"--samples: {self.samples} greedy texts are all the same; give a --temperature above 0")
        if self.gsm8k_train and self.gsm8k_prompt != "cot":
            raise UserError(f"--gsm8k-train: worked examples are of --gsm8k-prompt=cot, got {self.gsm8k_prompt}")
        if not self.gsm8k_train and self.shots > len(prompts.FIXED):
            raise UserError(f"--shots: there are {len(prompts.FIXED)} fixed ones; more need --gsm8k-train FILE")

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=float(self.temperature), top_p=float(self.top_p))


@dataclasses.dataclass(frozen=True)
class Task:
    """The questions, and how they are asked; read before a model is."""

    settings: Settings
    pairs: tuple[Pair, ...]
    wanted: tuple[Fraction, ...]
    shots: tuple[Pair, ...]
    identity: dict[str, Any]  # of files and settings, as the header of the generations says it

    @classmethod
    def of(cls, settings: Settings) -> "Task":
        """Reads the files.

        Raises:
          UserError: a line that cannot be read, an answer without a number behind "####", too few worked examples.
        """
        pairs, content = read_pairs(fetched(settings.gsm8k_file, "--gsm8k-file"), "--gsm8k-file")
        wanted = [_wanted(pair) for pair in pairs]
        shots, hashes = prompts.FIXED, {"gsm8k_file": hashlib.sha256(content).hexdigest()}
        if settings.gsm8k_train:
            shots, train = read_pairs(fetched(settings.gsm8k_train, "--gsm8k-train"), "--gsm8k-train")
            hashes["gsm8k_train"] = hashlib.sha256(train).hexdigest()
            if len(shots) < settings.shots:
                raise UserError(f"--shots: {settings.gsm8k_train!r} holds {len(shots)}, asked for are {settings.shots}")
            shots = shots[: settings.shots + 1]  # one more for a question that is itself among them
        asked = dataclasses.asdict(settings)
        names = "gsm8k_prompt", "samples", "temperature", "top_p", "max_new_tokens", "seed"
        asked = {name: asked[name] for name in names} | (
            {"shots": settings.shots} if asked["gsm8k_prompt"] == "cot" else {}
        )
        return cls(settings, tuple(pairs), tuple(wanted), tuple(shots), {"task": "gsm8k", **asked, "sha256": hashes})

    def run(self, model: Pretrained, path: pathlib.Path, title: str) -> dict[str, Any]:
        """Asks a model all questions that `path` has no text for yet, writes each text there, and scores all.

        Args:
          model: with a tokenizer.
          path: a .jsonl file; the first line says of which model and settings the others are.
          title: what the progress is called.

        Returns:
          "questions", "samples", "k", "prompt", "generations" (the file's name) and "scores": by extraction as
          `oasis_jax.evaluation.tasks.scores.score` says, with "none", the share of texts without an answer.

        Raises:
          UserError: a prompt that the model has no room for; `path` holds texts of something else.
        """
        asked = self._prompts(model)
        settings, count = self.settings, len(asked)
        with Records(path, {**self.identity, **_identity(model)}) as records:
            of = {(record["item"], record["sample"]): record for record in records.found}
            wanted = [(item, sample) for item in range(count) for sample in range(settings.samples)]
            todo = sorted((x for x in wanted if x not in of), key=lambda x: (len(asked[x[0]]), x))
            with TaskProgress(title, len(todo)) as progress:
                for start in range(0, len(todo), settings.rows):
                    batch = todo[start : start + settings.rows]
                    made = self._answer(model, [asked[item] for item, _ in batch], batch)
                    records.add(made)
                    of |= dict(zip(batch, made))
                    progress.done(len(batch))
        verdicts = [[of[item, sample] for sample in range(settings.samples)] for item in range(count)]
        return self._summary(verdicts) | {"generations": path.name}

    def _prompts(self, model: Pretrained) -> list[list[int]]:
        """The tokens of every prompt."""
        settings, asked = self.settings, []
        if model.tokenizer is None:
            raise UserError("--tasks: gsm8k needs a tokenizer, and this model came without one")
        begin = [] if model.begin_token is None else [model.begin_token]
        longest = longest_text(model.config)
        for pair in self.pairs[: settings.limit or None]:
            if settings.gsm8k_prompt == "chat":
                ids = prompts.chat(model, pair.question)
            else:
                few = settings.gsm8k_prompt == "cot"
                text = (
                    prompts.few_shot(pair.question, self.shots, settings.shots) if few else prompts.boxed(pair.question)
                )
                ids = [*begin, *model.tokenizer.encode(text).tolist()]
            if longest and len(ids) + settings.max_new_tokens > longest:
                raise UserError(
                    f"--gsm8k-file: {pair.where}: a prompt of {len(ids)} tokens and {settings.max_new_tokens} new ones "
                    f"do not fit the model's {longest}; take fewer --shots or --max-new-tokens"
                )
            asked.append(ids)
        return asked

    def _answer(self, model: Pretrained, rows: list[list[int]], places: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """One record a row: the text and its verdicts."""
        settings = self.settings
        seeds = [int(np.random.SeedSequence([settings.seed, *place]).generate_state(1)[0]) for place in places]
        options = dict(max_new_tokens=settings.max_new_tokens, sampling=settings.sampling, seed=seeds, stop=_STOP)
        return [
            self._record(item, sample, found.text) | {"tokens": len(found.tokens), "ended": found.ended}
            for (item, sample), found in zip(places, generate(model, rows, **options))
        ]

    def _record(self, item: int, sample: int, text: str) -> dict[str, Any]:
        answers = {name: extract(text) for name, extract in EXTRACTIONS.items()}
        return {
            "item": item,
            "sample": sample,
            "text": text,
            "wanted": str(self.wanted[item]),
            "answers": {name: None if answer is None else str(answer) for name, answer in answers.items()},
            "right": {name: answer == self.wanted[item] for name, answer in answers.items()},
        }

    def _summary(self, verdicts: list[list[dict[str, Any]]]) -> dict[str, Any]:
        names = ("strict", "flexible") if self.settings.gsm8k_prompt == "cot" else ("boxed", "flexible")
        texts = [record for row in verdicts for record in row]
        scores = {}
        for name in names:
            found = score([[record["right"][name] for record in row] for row in verdicts], self.settings.pass_at)
            scores[name] = found | {"none": sum(x["answers"][name] is None for x in texts) / len(texts)}
        own = {"questions": len(verdicts), "samples": self.settings.samples, "k": self.settings.pass_at}
        return own | {"prompt": self._prompt_in_words(), "scores": scores}

    def _prompt_in_words(self) -> str:
        if self.settings.gsm8k_prompt != "cot":
            return {"boxed": "zero-shot, boxed", "chat": "chat, boxed"}[self.settings.gsm8k_prompt]
        whose = "of a training file" if self.settings.gsm8k_train else "of this library's own"
        return f"{self.settings.shots} worked examples{f' {whose}' if self.settings.shots else ''}"


def _wanted(pair: Pair) -> Fraction:
    answer = strict(pair.answer)
    if answer is None:
        raise UserError(f"--gsm8k-file: {pair.where}: the answer has no number behind '####'")
    return answer


def _identity(model: Pretrained) -> dict[str, Any]:
    """Which model it is: what it came from, what was done to it, and a few numbers of every parameter."""
    leaves = sorted(jax.tree_util.tree_leaves_with_path(model.params), key=lambda leaf: jax.tree_util.keystr(leaf[0]))
    digest = hashlib.sha256()
    for path, x in leaves:
        few = np.asarray(jax.device_get(x[(0,) * (x.ndim - 1)][:64] if x.ndim else x), np.float32)
        digest.update(f"{jax.tree_util.keystr(path)}{x.shape}".encode() + few.tobytes())
    return {
        "model": model.card.get("name", ""),
        "parameters": digest.hexdigest(),
        "changes": list(model.card.get("changes", ())),
        "dtype": model.config.dtype,
        "begin_token": model.begin_token,
    }
