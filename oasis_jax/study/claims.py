"""Published claims that more than one study tests, with their published figures, in terms of a study's outcomes."""

from collections.abc import Mapping

from oasis_jax.study.design import Claim

OASIS = "OASIS (2605.17887)"
UNIFIED_VIEW = "Unified View (2601.22966)"


def of_oasis(
    *,
    sink: str,
    eight_bits: str,
    formed: Mapping[str, float],
    method: str = "oasis",
    twin: str = "attnres_cumulative",
    token_softmax1: str = "softmax1",
    uncoupled: str = "",
) -> tuple[Claim, ...]:
    """What OASIS claims beside its twin, and what of it is left beside Softmax1 over tokens alone.

    Args:
      sink, eight_bits: the outcomes that stand for sinks and for what 8 bits cost.
      formed: how large a sink there has to be to be weakened; see `Claim.needs`.
      method, twin, token_softmax1, uncoupled: names of methods; "": the study has none.
    """
    claims = [
        Claim("OASIS has weaker sinks than its twin", OASIS, sink, method, twin, needs=formed),
        Claim("OASIS has a smaller max inf norm", f"{OASIS}: -9.26 %", "max_inf_norm", method, twin),
        Claim("OASIS has a smaller mean kurtosis", f"{OASIS}: -2.60 %", "avg_kurtosis", method, twin),
        Claim("OASIS loses less under W8A8", f"{OASIS}: perplexity -75.85 %", eight_bits, method, twin),
        Claim("OASIS gains over Softmax1 over tokens alone", OASIS, sink, method, token_softmax1),
    ]
    if uncoupled:
        claims.append(of_signal(sink, method, uncoupled))
    return tuple(claims)


def of_signal(sink: str, method: str = "oasis", uncoupled: str = "oasis_uncoupled") -> Claim:
    """That OASIS has weaker sinks than the same model without its inter-layer signal."""
    return Claim("The inter-layer signal weakens sinks", OASIS, sink, method, uncoupled)


def of_depth(outcomes: Mapping[str, str], method: str = "attnres", against: str = "residual") -> tuple[Claim, ...]:
    """The claim under OASIS' claims: a second normalizer, over depth, makes things worse.

    Args:
      outcomes: in words what becomes worse -> the outcome that stands for it.
    """
    source = "the claim under OASIS' claims"
    return tuple(
        Claim(f"A second normalizer, over depth, makes {what} worse", source, value, method, against, "higher")
        for what, value in outcomes.items()
    )
