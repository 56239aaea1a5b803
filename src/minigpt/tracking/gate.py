"""The gate: which model is registered, and which of them is the champion.  Decisions only.

Two models are compared in bits per byte, the one figure that means the same with any vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any

# The figure that each limit bounds.  Of the copied runs the 95th percentile: the longest of all is
# one review of two hundred, and jumps with the seed.
LIMITS = {
    "max_perplexity": "perplexity",
    "max_copied_run": "copied_run_p95",
    "max_unk_share": "unk_share",
}


def figures(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """What the gate looks at; where nothing is held out, only what the samples tell.

    Args:
        evaluation: as reports/evaluation.json has it.
    """
    flat = {**evaluation, **evaluation.get("samples", {})}
    wanted = ("bits_per_byte", "loss", "perplexity", "accuracy", "unk_share", "copied_run_p95")
    return {name: float(flat[name]) for name in wanted if flat.get(name) is not None}


def measured_on(evaluation: Mapping[str, Any]) -> dict[str, str | None]:
    """What the figures hang on beside the model: the same for two whose figures can be compared.

    Args:
        evaluation: as reports/evaluation.json has it.

    Returns:
        The digests of the reviews: `held_out`, which were measured, and `byte_unigram`, whose bytes
        were counted for the spelling of [UNK]; None where nothing is held out.
    """
    reviews = evaluation["held_out"]
    if not reviews["reviews"]:
        return {"held_out": None, "byte_unigram": None}
    return {"held_out": str(reviews["digest"]), "byte_unigram": str(reviews["byte_unigram"])}


def broken(measured: Mapping[str, float], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Says what is wrong with a model by itself; nothing, for one to be registered.

    Args:
        measured: by `figures`; a limit on one that is absent holds.
        limits: by the names of `LIMITS`, 0 for one that is off.

    Returns:
        For each: figure, value, limit (its key in the configuration) and allowed, the largest.  A
        figure that is no finite number is always wrong, and its value is a text.
    """
    found: list[dict[str, Any]] = [
        {"figure": name, "value": str(value), "limit": None, "allowed": "a finite number"}
        for name, value in measured.items()
        if not math.isfinite(value)
    ]
    for limit, name in LIMITS.items():
        value, allowed = measured.get(name, 0.0), limits[limit]
        if math.isfinite(value) and 0 < allowed < value:
            entry = {"figure": name, "value": value, "limit": f"gate.{limit}", "allowed": allowed}
            found.append(entry)
    return found


def explain(found: list[dict[str, Any]]) -> str:
    """What `broken` found, as a line to read."""
    return "; ".join(
        f"{entry['figure']} is {entry['value']}, allowed is {entry['allowed']}"
        if entry["limit"] is None
        else f"{entry['figure']} is {entry['value']:.6g}, above {entry['allowed']:g}, which "
        f"{entry['limit']} allows"
        for entry in found
    )


def decide(
    challenger: float | None, champion: str | None, theirs: float | None, needed: float
) -> tuple[str, str]:
    """Says whether a model that broke no limit takes the champion's place.

    Args:
        challenger: its bits per byte; None where nothing is held out.
        champion: the version in its place now; None where there is none.
        theirs: the champion's bits per byte on the same reviews; None where it has none.
        needed: bits per byte by which the challenger must be better; 0: any.

    Returns:
        The verdict (promoted, kept or not compared) and the reason, for a person.
    """
    if challenger is None:
        return "not compared", "nothing is held out (sequences.validation_fraction is 0)"
    if not math.isfinite(challenger):
        return "kept", f"bits per byte is {challenger}, not a finite number"
    if champion is None:
        return "promoted", f"bits per byte {challenger:.4f}; there was no champion"
    if theirs is None:
        return "not compared", f"the champion (version {champion}) could not be measured"
    against = f"the champion's {theirs:.4f} (version {champion})"
    better = math.inf if math.isnan(theirs) else theirs - challenger
    wins = better > 0 and better >= needed
    if better > 0:
        gained = f"better by {better:.4f}, needed {needed:g}"
    else:
        gained = f"worse by {-better:.4f}" if better else "no better"
    reason = f"bits per byte {challenger:.4f} against {against}: {gained}"
    return "promoted" if wins else "kept", reason
