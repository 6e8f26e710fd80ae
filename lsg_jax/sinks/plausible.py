"""Whether a criterion flags a plausible share of the visual tokens, in words."""

from __future__ import annotations

from lsg_jax.config import SinkConfig

IMPLAUSIBLE_SHARE = 0.25
"""A criterion that flags a larger share of an image's patches is implausible: sinks are few (paper.md, known failures)."""


def implausible(
    v_sinks: int, visual_tokens: int, sinks: SinkConfig, where: str, *, most: float = IMPLAUSIBLE_SHARE
) -> str | None:
    """What is wrong with the criterion of V-sinks, by what it flagged; None where nothing is.

    Args:
        where: the images of these tokens, such as "the first images".
        most: share of V-sinks above which the threshold is implausibly low.
    """
    by = f"by {sinks.criterion} at {sinks.vit_tau:g}"
    if visual_tokens and not v_sinks:
        return f"no V-sinks in {where} {by}, so there is nothing to gate; `lsg calibrate` looks for other settings of [sinks]"
    if v_sinks > most * visual_tokens:
        share = f"{100 * v_sinks / visual_tokens:.0f} % of the visual tokens of {where}"
        return f"{share} are V-sinks {by}: the threshold is implausibly low; `lsg calibrate` proposes another"
    return None
