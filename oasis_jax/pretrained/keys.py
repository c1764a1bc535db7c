"""A config.json of another library, read key by key: what nobody asked for is refused by name."""

from collections.abc import Mapping
from typing import Any

from oasis_jax.errors import UserError

_MISSING = object()

# What says nothing about what a model computes in inference: how it was trained, stored, named or is generated from.
HARMLESS = frozenset(
    [
        "_name_or_path",
        "_attn_implementation",
        "_num_labels",
        "unsloth_fixed",
        "_attn_implementation_autoset",
        "architectures",
        "attn_implementation",
        "auto_map",
        "model_type",
        "attention_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "resid_dropout",
        "dropout",
        "activation_dropout",
        "layerdrop",
        "embedding_dropout",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "sep_token_id",
        "unk_token_id",
        "cls_token_id",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "transformers.js_config",
        "use_cache",
        "initializer_range",
        "init_std",
        "initializer_factor",
        "is_decoder",
        "is_encoder_decoder",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
        "pretraining_tp",
        "prefix",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "finetuning_task",
        "task_specific_params",
        "tokenizer_class",
        "torchscript",
        "tf_legacy_loss",
        "use_bfloat16",
        "pruned_heads",
        "chunk_size_feed_forward",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "reorder_and_upcast_attn",
        "n_ctx",
        "keys_to_ignore_at_inference",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "license",
    ]
)


class Keys:
    """The keys of a config.json, each to be taken once.

    Attributes:
      where: of the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values, self.where, self._taken = dict(values), where, set()

    def __contains__(self, key: str) -> bool:
        """Whether a key is written down, be it as null."""
        return key in self._values

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value of a key; null counts as absent. Raises UserError where a key without default is absent."""
        self._taken.add(key)
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise UserError(f"{self.where}: has no {key!r}")
        return default

    def whole(self, key: str, default: Any = _MISSING) -> int:
        """`take` of a whole number that is not negative."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53 or value % 1:
            raise self._wrong(key, value, "a whole number")
        return int(value)

    def number(self, key: str, default: Any = _MISSING) -> float:
        """`take` of a finite number."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise self._wrong(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        """`take` of true or false."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _MISSING) -> str:
        """`take` of a text."""
        value = self.take(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def numbers(self, key: str, default: Any = _MISSING) -> list[float]:
        """`take` of a list of finite numbers."""
        values = self.take(key, default)
        if not isinstance(values, list):
            raise self._wrong(key, values, "a list of numbers")
        return [Keys({f"{key}[{i}]": x}, self.where).number(f"{key}[{i}]") for i, x in enumerate(values)]

    def texts(self, key: str, default: Any = _MISSING) -> list[str]:
        """`take` of a list of texts."""
        values = self.take(key, default)
        if not isinstance(values, list) or not all(isinstance(x, str) for x in values):
            raise self._wrong(key, values, "a list of texts")
        return values

    def group(self, key: str) -> "Keys":
        """`take` of an object, as keys of its own; without any where it is absent."""
        value = self.take(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Keys(value, f"{self.where}: {key}")

    def _wrong(self, key: str, value: Any, wanted: str) -> UserError:
        return UserError(f"{self.where}: {key}={shortened(value)} is not {wanted}")

    @property
    def names(self) -> list[str]:
        """Of all keys that are not null."""
        return [key for key, value in self._values.items() if value is not None]

    def expect(self, key: str, *allowed: Any) -> None:
        """Raises UserError where a key is there with another value than these."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise UserError(
                f"{self.where}: {key}={shortened(value)} is not supported; allowed: {', '.join(map(repr, allowed))}"
            )

    def finish(self, harmless: frozenset[str] = HARMLESS) -> None:
        """Raises UserError for keys that nobody asked for; one that is null says nothing."""
        left = sorted(key for key in self.names if key not in self._taken and key not in harmless)
        if left:
            raise UserError(
                f"{self.where}: {left[0]}={shortened(self._values[left[0]])} is not understood"
                + (f", nor {', '.join(left[1:])}" if left[1:] else "")
                + "; what a key means has to be known before a model is trusted"
            )


def shortened(value: Any) -> str:
    """repr(value) on one line of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write whole numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"
