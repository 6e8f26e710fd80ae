"""Warnings about the sinks of images: too many, none, and dimensions that do not stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lsg_jax.config import SinkConfig
from lsg_jax.sinks.criteria import PROMINENT, Reading
from lsg_jax.sinks.plausible import IMPLAUSIBLE_SHARE, implausible

Readings = tuple[Reading, ...]
"""Every criterion of one stage, `vit` or `llm`."""

Seen = Mapping[str, Any]
"""What `sinks._observe` returns for one image, on the host."""


def in_force(readings: Readings) -> int:
    """Index of the criterion that the configuration chooses."""
    return next(index for index, reading in enumerate(readings) if reading.in_force)


def image_warnings(entry: dict[str, Any], tokens: int) -> list[str]:
    """Warnings about one image: no sinks, or too many. `entry` is its part of sinks.json."""
    warnings = []
    v_sinks, l_sinks = entry["v_sinks"], entry["l_sinks"]
    if v_sinks is not None and not v_sinks:
        warnings.append("no V-sink in this image")
    if v_sinks and len(v_sinks) > IMPLAUSIBLE_SHARE * tokens:
        many = "every visual token is" if len(v_sinks) == tokens else f"{len(v_sinks)} of {tokens} visual tokens are"
        warnings.append(f"{many} flagged as V-sink: the threshold is implausibly low")
    if l_sinks is not None and not any(l_sinks) and len(v_sinks or []) < tokens:
        warnings.append("no L-sink in this image at any layer")
    if high := [layer for layer, where in enumerate(l_sinks or []) if len(where) > IMPLAUSIBLE_SHARE * tokens]:
        warnings.append(f"more than {IMPLAUSIBLE_SHARE:.0%} of the visual tokens are flagged as L-sinks in layers {high}")
    if no_rest := [layer for layer, where in enumerate(entry["ordinary"]) if not where]:
        warnings.append(f"every token is a sink in layers {no_rest}: none is ordinary")
    return warnings


def verdicts(seen: Sequence[Seen], stage: str, readings: Readings) -> list[dict[str, Any]]:
    """`share` and `verdict` of each criterion of a stage over all images; see the module docstring of `analysis.sinks`."""
    rows = []
    for reading, share in zip(readings, _shares(seen, stage, readings).max(0).tolist(), strict=True):
        verdict = "flags too many" if share > IMPLAUSIBLE_SHARE else "applies" if share else "flags none"
        unknown = reading.unknown is not None
        rows.append({"share": None if unknown else round(share, 5), "verdict": "unknown" if unknown else verdict})
    return rows


def _shares(seen: Sequence[Seen], stage: str, readings: Readings) -> np.ndarray:
    """Mean share of the visual tokens that each criterion flags: [layers, or 1 for the features; criteria]."""
    shares: np.ndarray = np.mean([s[stage]["masks"].mean(-1) for s in seen], axis=0).reshape(-1, len(readings))
    return shares


def run_warnings(seen: Sequence[Seen], vit: Readings, llm: Readings) -> list[str]:
    """Warnings about the run: unknown criteria, dimensions that do not stand out, and criteria that flag too many tokens."""
    warnings = []
    for kind, stage, readings in (("V-sink", "vit", vit), ("L-sink", "llm", llm)):
        if readings[in_force(readings)].unknown:
            field = "criterion" if stage == "vit" else "llm_criterion"
            warnings.append(
                f"no {kind} dimensions are known for this model: set sinks.{stage}_dims (`lsg calibrate` finds them), "
                f"or another sinks.{field}"
            )
        elif stage == "vit":
            marked = np.concatenate([s["vit"]["masks"][in_force(vit)] for s in seen])
            sinks = SinkConfig(criterion=vit[in_force(vit)].criterion, vit_tau=vit[in_force(vit)].tau)
            # of too many, each image is warned of
            warnings += filter(None, [implausible(int(marked.sum()), marked.size, sinks, "these images", most=1.0)])
        warnings += _hidden_dims(seen, kind, stage, readings)
        share = _shares(seen, stage, readings)
        for index, reading in enumerate(readings):
            high = np.flatnonzero(share[:, index] > IMPLAUSIBLE_SHARE)
            if len(high) and not reading.in_force:
                where = "of the features" if stage == "vit" else f"in layers {high.tolist()}"
                warnings.append(
                    f"criterion {reading.criterion} at {reading.tau:g} would flag up to {share[:, index].max():.0%} "
                    f"of the visual tokens {where}: it says little here"
                )
    return warnings


def _hidden_dims(seen: Sequence[Seen], kind: str, stage: str, readings: Readings) -> list[str]:
    """A warning about the sink dimensions that stand out in no token of any image (`criteria.PROMINENT`); L-sinks: text too."""
    used = readings[in_force(readings)]
    if used.criterion not in ("dim_abs", "dim_rms") or not used.dims:
        return []
    largest = np.max([s[stage]["prominence"].reshape(-1, len(used.dims)).max(0) for s in seen], axis=0)
    low = [f"{dim} ({value:.1f} times)" for dim, value in zip(used.dims, largest, strict=True) if value < PROMINENT]
    if not low:
        return []
    return [
        f"{kind} dimensions {', '.join(low)} do not reach {PROMINENT:g} times the median of a token anywhere in these images: "
        "they may be of another model; `lsg calibrate` finds this model's"
    ]
