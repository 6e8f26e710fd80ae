"""A plan as plain text."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """Every topology with its programs, what fits, and what the study costs; then what all of it rests on."""
    slices = result["topologies"]
    parts = [_model(result), *map(_slice, slices)]
    if len(slices) > 1:
        parts.append(_side_by_side(slices))
    return "\n\n".join([*parts, _assumptions(result)])


def _model(result: dict[str, Any]) -> str:
    model = result["model"]
    source = f", {model['from']}" if "from" in model else ""
    return f"model: {model['parameters'] / 1e9:.2f} billion parameters, {model['dtype']}{source}"


def _slice(found: dict[str, Any]) -> str:
    device, mesh = found["device"], found["mesh"]
    what = "chips" if device["per_chip"] == 1 else f"devices ({device['per_chip']} a chip)"
    lines = [
        f"{found['name']}: {found['devices']} {what} on {found['hosts']} hosts; each {device['hbm_gib']:g} GiB, "
        f"{device['tflops']:g} TFLOP/s, {device['hbm_gbps']:g} GB/s of memory, {device['ici_gbps']:g} GB/s from its neighbours",
        f"mesh: training {_mesh(mesh['training'])}; answering {_mesh(mesh['answering'])}",
        "",
        *_aligned([_MEMORY, *map(_memory, found["programs"])]),
        "",
        *_aligned([_WORK, *(_work(entry) for entry in found["programs"] if "flops" in entry)]),
    ]
    notes = [
        f"{_name(entry)}: does not fit, {entry['memory_gib']['peak']:.2f} GiB a chip are {entry['over_gib']:.2f} too many: "
        f"{entry['advice']}"
        for entry in found["programs"]
        if not entry["fits"]
    ]
    notes += [
        f"{_name(entry)}: {entry['collectives']['collective-permute']:.0f} collective-permutes: products were cut to pieces "
        "that go from chip to chip"
        for entry in found["programs"]
        if entry.get("storm")
    ]
    if largest := found["largest_batch"]:
        fits = (
            f"{largest['rows']} rows, {largest['peak_gib']:.2f} GiB a chip" if largest["rows"] else "none was found that fits"
        )
        notes.append(f"largest training batch with remat {largest['remat']}: {fits}")
    lines += ["", *notes] if notes else []
    if found["recipe"]:
        rows = [["the study", "", "hours", "chip-hours"]]
        rows += [[r["part"], r["runs"], _number(r["hours"]), _number(r["chip_hours"])] for r in found["recipe"]]
        lines += ["", *_aligned(rows)]
    return "\n".join(lines)


_MEMORY = ["GiB a chip", "rows", "weights", "trained", "other", "temporaries", "peak", "fits"]


def _memory(entry: dict[str, Any]) -> list[str]:
    memory = entry["memory_gib"]
    weights, trained = memory.get("weights", 0.0), memory.get("trained and optimiser", 0.0)
    temporaries = memory.get("temporaries")
    other = None if temporaries is None else memory["peak"] - weights - trained - temporaries
    shown = [f"{value:.2f}" if value is not None else "-" for value in (weights, trained, other, temporaries, memory["peak"])]
    return [_name(entry), str(entry["rows"]), *shown, "yes" if entry["fits"] else "NO"]


_WORK = ["work of a chip", "TFLOP", "x forward", "GB memory", "GB received", "collectives"]
_WORK += ["MXU s", "HBM s", "ICI s", "expected s"]


def _work(entry: dict[str, Any]) -> list[str]:
    seconds = entry["seconds"]
    return [
        _name(entry),
        _number(entry["flops"] / 1e12),
        f"{entry['times_forward']:.2f}" if "times_forward" in entry else "-",
        _number(entry["hbm_bytes"] / 1e9),
        _number(sum(entry["received_bytes"].values()) / 1e9),
        f"{sum(entry['collectives'].values()):.0f}",
        *(_number(seconds[name]) for name in ("mxu", "hbm", "ici", "expected")),
    ]


def _side_by_side(slices: list[dict[str, Any]]) -> str:
    """The training step that is to be taken on each topology: how it scales."""
    rows = [["topology", "chips", "rows", "remat", "peak GiB", "TFLOP", "GB received", "expected s", "rows a second"]]
    for found in slices:
        for entry in found["programs"]:
            if entry.get("take"):
                expected = entry["seconds"]["expected"]
                received = sum(entry["received_bytes"].values())
                numbers = entry["flops"] / 1e12, received / 1e9, expected, entry["rows"] / expected
                named = found["name"], str(found["devices"]), str(entry["rows"]), entry["remat"]
                rows.append([*named, f"{entry['memory_gib']['peak']:.2f}", *map(_number, numbers)])
    return "\n".join(_aligned(rows))


def _assumptions(result: dict[str, Any]) -> str:
    assumed, versions = result["assumptions"], result["versions"]
    sources = sorted({f"{s['device']['name']}: {s['device']['source']}" for s in result["topologies"]})
    return "\n".join(
        [
            f"Of one chip and one run of a program (a step, or a batch), as compiled by libtpu {versions['libtpu']} for jax "
            f"{versions['jax']}; no TPU was run. trained: with optimiser; temporaries: activations and gathered weights; "
            "MXU, HBM, ICI: seconds at peak rates; * marks the policy to take.",
            f"expected: the longest of the three at {assumed['utilisation']:.0%} utilisation. {assumed['records']} records "
            f"({assumed['records_from']}), {assumed['questions']} questions ({assumed['questions_from']}), answers of "
            f"{assumed['max_new_tokens']} tokens. Starting, compiling, reading data and saving are not counted.",
            f"peak rates: {'; '.join(sources)}",
        ]
    )


def _name(entry: dict[str, Any]) -> str:
    remat = f", remat {entry['remat']}" if "remat" in entry else ""
    return entry["program"] + remat + (" *" if entry.get("take") else "")


def _mesh(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"


def _number(value: float) -> str:
    """Three figures."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
