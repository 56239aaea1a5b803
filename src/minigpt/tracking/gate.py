"""The gate: which model is registered, and which of them is the champion. Decisions only.

Two models are compared in bits per byte, the one figure that means the same for any vocabulary. It
has a number (`held_out.MEASURE`): figures under another number are never compared.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.common import paths

# The figure that each limit bounds. For copied runs it is the 95th percentile: the longest of all
# is one text of two hundred, and varies with the seed.
LIMITS = {
    "max_perplexity": "perplexity",
    "max_copied_run": "copied_run_p95",
    "max_unk_share": "unk_share",
}
WAYS_ON = {
    None: "training has diverged: lower train.learning_rate",
    "gate.max_perplexity": "train for more epochs or on more text, or raise gate.max_perplexity",
    "gate.max_copied_run": "train for fewer epochs, on more text or with a higher model.dropout, "
    "or raise gate.max_copied_run",
    "gate.max_unk_share": "raise vocabulary.max_tokens or gate.max_unk_share",
}
MORE_TEXT = (
    "the vocabulary has every word that the other texts hold vocabulary.min_count times, so add "
    "more texts, or raise gate.max_unk_share"
)
REFUSED = "refused"  # the verdict on a version that is not registered
BY_HAND = "not promoted"  # the verdict on a better version that only a person may promote
FIGURES = ("bits_per_byte", "loss", "perplexity", "accuracy", "unk_share", "copied_run_p95")


def figures(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures that count; those of the samples alone if nothing is held out.

    Args:
        evaluation: The content of reports/evaluation.json.
    """
    flat = {**evaluation, **evaluation.get("samples", {})}
    return {name: float(flat[name]) for name in FIGURES if flat.get(name) is not None}


def measured_on(evaluation: Mapping[str, Any], vocabulary_sha256: str) -> str | None:
    """Returns a short digest of what the figures depend on beside the model.

    Figures under one measure can be compared if these are the same: the held-out reviews, the
    reviews from which the charges were learned, and the vocabulary.

    Args:
        evaluation: The content of reports/evaluation.json.
        vocabulary_sha256: Of the model's tokenizer.

    Returns:
        None if nothing is held out.
    """
    reviews = evaluation["held_out"]
    if not reviews["reviews"]:
        return None
    parts = (reviews["digest"], reviews["learned"], vocabulary_sha256)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def broken(measured: Mapping[str, float], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns the limits that a model breaks by itself; it is registered if there are none.

    Args:
        measured: The result of `figures`; a limit on an absent figure holds.
        limits: By the names of `LIMITS`; 0 switches one off.

    Returns:
        For each: figure, value, limit (its key in the configuration) and allowed, the largest. A
        figure that is not a finite number always breaks a limit, and its value is a text.
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
    """Returns what `broken` found as one line."""
    return "; ".join(
        f"{entry['figure']} is {entry['value']}, allowed is {entry['allowed']}"
        if entry["limit"] is None
        else f"{entry['figure']} is {entry['value']:.6g}, above {entry['allowed']:g}, which "
        f"{entry['limit']} allows"
        for entry in found
    )


def way_on(found: list[dict[str, Any]], *, is_full: bool) -> str:
    """Returns what a person can do about what `broken` found.

    Args:
        found: What `broken` found.
        is_full: Whether the vocabulary has as many entries as it may have, so that more would help.
    """
    ways = WAYS_ON if is_full else {**WAYS_ON, "gate.max_unk_share": MORE_TEXT}
    return "; ".join(dict.fromkeys(ways[entry["limit"]] for entry in found))


def notice(outcome: Mapping[str, Any]) -> str:
    """Returns what a person must not overlook, since a refusal fails no command.

    Args:
        outcome: The content of reports/gate.json.

    Returns:
        Some lines; nothing unless the model was refused.
    """
    if outcome.get("verdict") != REFUSED:
        return ""
    rule = "=" * 80
    return (
        f"\n{rule}\nNOT REGISTERED: the gate refused this model.\n"
        f"  why:  {outcome['reason']}\n"
        f"  next: {outcome['way_on']}\n"
        f"{rule}"
    )


def promotes(setting: str, folder: Path) -> bool:
    """Tells whether the gate may make a better version the champion.

    Args:
        setting: `gate.promote`: always, or workspace, which leaves out the experiments that DVC
            runs in copies of the project (`dvc exp run --temp` and `--queue`).
        folder: Where the stage runs.
    """
    return setting == "always" or not paths.is_copy(folder)


def decide(
    challenger: float | None, champion: str | None, theirs: float | None, needed: float
) -> tuple[str, str]:
    """Decides whether a model that broke no limit becomes the champion.

    Args:
        challenger: Its bits per byte; None if nothing is held out.
        champion: The champion's version; None if there is none.
        theirs: The champion's bits per byte on the same reviews; None if it could not be measured.
        needed: The bits per byte by which the challenger must be better; 0: any.

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
        return "not compared", f"version {champion} could not be measured"
    against = f"the champion's {theirs:.4f} (version {champion})"
    better = math.inf if math.isnan(theirs) else theirs - challenger
    wins = better > 0 and better >= needed
    if better > 0:
        gained = f"better by {better:.4f}, needed {needed:g}"
    else:
        gained = f"worse by {-better:.4f}" if better else "no better"
    reason = f"bits per byte {challenger:.4f} against {against}: {gained}"
    return "promoted" if wins else "kept", reason
