"""Small made-up rows of every study, in the schemas that the studies write."""

import math

TASKS = (("cv_bench", "Count"), ("cv_bench", "Depth $ & <b>"), ("mmstar", "math"))
LAYERS = (0, 1, 2)
GROUPS = ("v_sink", "l_sink", "ordinary")


def sweep(coefficients=((0.0, 1.0), (0.5, 0.5), (1.0, 0.0), (1.0, 1.0))):
    rows = []
    for number, (benchmark, task) in enumerate(TASKS):
        for layer in LAYERS:
            for index, values in enumerate(coefficients):
                change = round(5 * math.sin(3 * number + 2 * layer + 1.7 * index) - 2, 3)
                if set(values) == {1.0}:
                    change = 9.0  # the base model, which must not win
                numbers = {"value": 40 + change, "change": change, "low": change - 1.5, "high": change + 1.5}
                if (task, layer) == ("math", 1):
                    numbers = dict.fromkeys(numbers)
                rows.append(
                    {"benchmark": benchmark, "task": task, "layer": layer, "coefficients": list(values)}
                    | {**numbers, "questions": 7}
                )
    return rows


def probe():
    rows = []
    for attribute, metric in (("count", "accuracy"), ("shapes", "f1")):
        for group in GROUPS:
            for layer in range(5):
                place = {"attribute": attribute, "layer": layer, "group": group, "metric": metric}
                if group == "l_sink" and layer == 2:
                    missing = dict.fromkeys(("mean", "std", "chance"))
                    rows.append({**place, **missing, "draws": 5, "train": 0, "test": 0, "reason": "no L-sink"})
                else:
                    numbers = {"mean": 0.5 + layer / 20, "std": 0.02, "chance": 0.25}
                    rows.append({**place, **numbers, "draws": 5, "train": 40, "test": 10})
    return rows


def counts():
    return [{"layer": layer, "group": group, "mean": 3.0 + layer, "std": 1.0} for layer in LAYERS for group in GROUPS]


def attention():
    shares = {"text": 0.5, "v_sink": 0.3, "l_sink": 0.05, "ordinary": 0.15}
    return [
        {"layer": layer, "head": head, "queries": queries, "group": group, "share": share + sign * (head - 0.5) / 10}
        for queries in ("prompt", "answer")
        for layer in LAYERS
        for head in (0, 1)
        for (group, share), sign in zip(shares.items(), (1, -1, 0, 0), strict=True)
    ]


def ratios(layers=LAYERS, groups=("v_sink", "rest")):
    return [
        {"benchmark": benchmark, "task": task, "layer": layer, "group": group}
        | {"mean": 0.2 + index / 2, "std": 0.05, "questions": 7}
        for benchmark, task in TASKS
        for layer in layers
        for index, group in enumerate(groups)
    ]


def gains():
    rows = []
    for benchmark, metric, base in (("mmstar", "mean_of_18", 33.27), ("mme", "total", 1510.0)):
        rows.append(_gain(benchmark, metric, "base", base, None))
        rows += [_gain(benchmark, metric, method, base + change, change) for method, change in (("var", -0.5), ("lsg", 2.0))]
    return rows


def _gain(benchmark, metric, method, value, change):
    low, high = (None, None) if change is None else (change - 1.0, change + 1.0)
    return {"benchmark": benchmark, "metric": metric, "method": method} | {
        "value": value,
        "change": change,
        "low": low,
        "high": high,
    }


def stack():
    numbers = {"value": 34.0, "change": 0.7, "low": -0.1, "high": 1.5}
    singles = [{"layer": layer, **numbers} for layer in LAYERS]
    return {"singles": singles, "steps": [{"layers": [2], **numbers}, {"layers": [2, 0], **numbers}]}


def losses():
    return [{"step": step, "layer": None, "loss": None if step == 3 else 2.0 / step} for step in range(1, 7)]


def result():
    """result.json of an evaluation of two methods beside the base model."""
    score = lambda value: {"value": value, "low": value - 2, "high": value + 2}
    entry = {
        "protocol": "paper",
        "questions": 7,
        "of": 10,
        "partial": True,
        "score": None,
        "unread": {"base": 0, "lsg": 2},
        "majority": {"accuracy": 25.0, "2D": None},
        "methods": {
            method: {"accuracy": score(value), "2D": score(value + 1)} for method, value in (("base", 50.0), ("lsg", 53.0))
        },
        "change": {"lsg": {"accuracy": score(3.0), "2D": {"value": None, "low": None, "high": None}}},
        "paired_test": {"lsg": {"better": 4, "worse": 1, "p_value": 0.375}},
    }
    return {
        "format": "lsg-eval-3",
        "model": "tiny",
        "backbone": "0" * 64,
        "methods": {"base": {"gate": None}, "lsg": {"gate": {"layers": list(LAYERS), "grouping": "v_sink_rest"}}},
        "settings": {"limit": 7},
        "benchmarks": {"cv_bench": entry},
        "ratios": [{"method": "lsg", **row} for row in ratios()],
    }
