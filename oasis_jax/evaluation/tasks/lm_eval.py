"""The language model evaluation harness (lm-eval) on models of this library; importing this registers "oasis_jax"."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from oasis_jax.config import MeshConfig
from oasis_jax.decoding import Sampling, generate
from oasis_jax.decoding.chat import render
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.evaluation.tasks.loading import load_model
from oasis_jax.evaluation.tasks.progress import TaskProgress
from oasis_jax.evaluation.tasks.scoring import Row, longest_text, score
from oasis_jax.pretrained import Pretrained

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise UserError(
        f"lm-eval: the harness is not installed ({error}); python -m pip install 'oasis_jax[lm-eval]'"
    ) from None

UNBOUNDED = 2048  # tokens that a model without a bound reads at once, as in the harness' own adapters
NEW_TOKENS = 256  # generated where a task does not say how many, likewise
BATCH_SIZE = 8
# What a task may say about generation, beside until, max_gen_toks and do_sample.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts to cache under; tokens of context, continuation

logger = logging.getLogger("lm_eval.oasis_jax")


@register_model("oasis_jax")
class HarnessModel(TemplateLM):
    """A model as the harness asks it, in its own placement and numerics.

    Texts begin with the model's begin token where it has one. An empty context is that token, else the bos_token_id of
    config.json, else the token between documents. As in the harness' adapter for transformers, rolling log-likelihoods
    put it before a text that has its own already (which then follows itself), and contexts that are too long lose their
    start.
    """

    backend = "causal"

    def __init__(self, model: Pretrained, *, batch_size: int | str = BATCH_SIZE, max_length: int | None = None):
        """Takes a loaded model.

        Args:
          model: with a tokenizer.
          batch_size: requests computed at once.
          max_length: tokens read at once; None: the model's context, `UNBOUNDED` where it has none.

        Raises:
          UserError: a model without a tokenizer or any token to begin with, a max_length beyond its context.
        """
        super().__init__()
        if model.tokenizer is None:
            raise UserError("lm-eval: tasks are texts, and this model came without a tokenizer")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"lm-eval: batch_size must be a number from 1 on, got {batch_size!r}")
        longest = longest_text(model.config)
        if max_length is not None and not 2 <= max_length <= (longest or max_length):
            raise UserError(f"lm-eval: max_length must be 2 to {longest or 'any length'}, got {max_length}")
        self.model, self.batch_size = model, int(batch_size)
        self.max_length = max_length or longest or UNBOUNDED
        tokens = (model.begin_token, model.source_config.get("bos_token_id"), model.tokenizer.separator_id)
        self._chat = False
        self._prefix = next((token for token in tokens if token is not None), None)
        if self._prefix is None:
            raise UserError("lm-eval: this model has no begin token and no separator; name one with --begin-token")

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessModel":
        """Loads the model that `--model_args` describes: the arguments of `load_model`, and max_length."""
        options = dict(arg_dict)
        known = ("source", "dtype", "mesh", "begin_token", "quantize", "max_length")
        for name in options:
            if name not in known:
                raise unknown_name("lm-eval: --model_args", name, known)
        if "source" not in options:
            raise UserError("lm-eval: --model_args: source is missing; it says where the model is")
        if "begin_token" in options:  # which the harness has read as Python, in a string
            begin = options["begin_token"]
            options["begin_token"] = "none" if begin is None else str(begin)
        mesh, length = options.pop("mesh", None), options.pop("max_length", None)
        model = load_model(options.pop("source"), mesh=mesh and MeshConfig(**mesh), **options)
        # Of what the harness adds only this is meant for us: where a model lies is said by the mesh.
        size = (additional_config or {}).get("batch_size")
        return cls(model, max_length=length, batch_size=BATCH_SIZE if size is None else size)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessModel":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int | None:
        return self.model.tokenizer.separator_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.card.get("source", "oasis_jax")).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the model's template, for the harness' records; from now on prompts are taken as what it made.

        Raises:
          UserError: the model has none, or another than the one it came with is asked for.
        """
        if not chat_template:
            return None
        if self.model.chat is None:
            raise UserError("lm-eval: --apply_chat_template: this model came without a chat template")
        if chat_template is not True:
            raise UserError(f"lm-eval: --apply_chat_template: only the model's own is known, not {chat_template!r}")
        self._chat = True
        return self.model.chat.text

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as one text. Without a generation prompt it ends in the last message, which is to be continued."""
        text = render(self.model, chat_history, answer=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def get_model_info(self) -> dict[str, Any]:
        """What results say about the model."""
        return {"model_config": repr(self.model.config), "model_card": dict(self.model.card)}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """The tokens of a text; behind a begin token where the model has one, unless told otherwise. Of a chat the
        template writes all special tokens, as such.
        """
        if self._chat:
            return self.model.tokenizer.encode_with_specials(string).tolist()
        ids, begin = self.model.tokenizer.encode(string).tolist(), self.model.begin_token
        return ids if begin is None or add_special_tokens is False else [begin, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        rows, places = [], []
        for place, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"lm-eval: a continuation of {len(continuation)} tokens does not fit into the {self.max_length} "
                    "that the model reads at once"
                )
            if continuation:
                rows.append(Row((context + continuation)[-(self.max_length + 1) :], len(continuation)))
                places.append(place)
        cut = sum(len(context) + len(text) > self.max_length + 1 for _, context, text in requests)
        if cut:
            logger.warning("%d of %d contexts lose their start to fit %d tokens", cut, len(requests), self.max_length)
        found = [(0.0, True)] * len(requests)
        with TaskProgress("log-likelihoods", len(rows), silent=disable_tqdm) as progress:
            scores = score(self.model, rows, batch_size=self.batch_size, on_scored=progress.done)
        for place, scored in zip(places, scores):
            found[place] = scored.total, bool(scored.greedy.all())
        for (texts, *_), answer in zip(requests, found):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of max_length that each have all the context that fits."""
        texts, windows, owner = [request.args[0] for request in requests], [], []
        for number, text in enumerate(texts):
            of_text = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            own = [(None, *make_disjoint_window(window)) for window in of_text]
            windows += own
            owner += [number] * len(own)
        totals = np.zeros(len(texts))
        for number, (nats, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[number] += nats
        for text, total in zip(texts, totals.tolist()):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals.tolist()

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts behind contexts, greedy where the task does not ask for sampling. What is drawn follows the seed that
        the harness gives numpy (`--seed`), and differs between requests.
        """
        first = int(np.random.randint(2**31 - len(requests)))
        numbered = [(*request.args, first + number) for number, request in enumerate(requests)]
        longest_first = lambda request: -len(request[0])
        grouped = Collator(numbered, sort_fn=longest_first, group_fn=lambda request: request[1], group_by="gen_kwargs")
        texts: list[str] = []
        with TaskProgress("generating", len(requests), silent=disable_tqdm) as progress:
            for batch in grouped.get_batched(n=self.batch_size):
                found = self._generate([context for context, *_ in batch], batch[0][1], [seed for *_, seed in batch])
                texts += found
                for (context, options, _), text in zip(batch, found):
                    self.cache_hook.add_partial("generate_until", (context, options), text)
                progress.done(len(batch))
        return grouped.get_original(texts)

    def _generate(self, contexts: list[str], options: Mapping[str, Any], seeds: list[int]) -> list[str]:
        stop, new, sampling = generation_options(options)
        room = self.max_length - new
        if room < 1:
            raise UserError(f"lm-eval: {new} new tokens leave no room for a context in {self.max_length} tokens")
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        # The last batch is filled up, so that no other program is compiled for it.
        extra = self.batch_size - len(prompts)
        prompts, seeds = prompts + prompts[-1:] * extra, seeds + seeds[-1:] * extra
        found = generate(self.model, prompts, max_new_tokens=new, sampling=sampling, stop=stop, seed=seeds)
        return [row.text for row in found[: len(contexts)]]


def generation_options(options: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
    """Stop strings, how many new tokens at most, and the sampling, from what a task says about generation.

    Raises:
      UserError: something that `generate` does not have.
    """
    given = normalize_gen_kwargs(dict(options), NEW_TOKENS)
    stop = [text for text in handle_stop_sequences(given.pop("until", None), eos=None) if text]
    new, drawn = given.pop("max_gen_toks"), given.pop("do_sample")
    for name in given:
        if name not in SAMPLING:
            raise unknown_name("lm-eval: generation_kwargs", name, ("until", "max_gen_toks", "do_sample", *SAMPLING))
    if not drawn:
        given = {"repetition_penalty": given.get("repetition_penalty", 1.0)}
    elif not given.get("temperature"):
        raise UserError("lm-eval: generation_kwargs: do_sample needs a temperature above 0")
    types = {"top_k": int}
    return stop, new, Sampling(**{name: types.get(name, float)(value) for name, value in given.items()})
