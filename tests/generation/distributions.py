"""What the tests of the samplers and of the loop share."""

from typing import Any

import numpy as np

from minigpt.config import SamplingConfig
from minigpt.generation.sampling import USUAL_TOP_K


def sampled(max_tokens: int, **knobs: Any) -> SamplingConfig:
    return SamplingConfig(max_tokens=max_tokens, **knobs)


def distribution(logits: np.ndarray, s: SamplingConfig) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that are kept, in the order of drawing, and the probability of each."""
    scaled = logits.astype("float64") / s.temperature
    ids = np.argsort(-scaled, kind="stable")[: s.top_k or None]
    ids = ids if 0 < s.top_k <= USUAL_TOP_K else np.sort(ids)
    p = np.exp(scaled[ids] - scaled[ids].max())
    p /= p.sum()
    above = np.array([p[p > share].sum() for share in p])
    p[(above >= s.top_p) | (p < s.min_p * p.max())] = 0
    return ids, p / p.sum()


def drawn(logits: np.ndarray, uniforms: np.ndarray, s: SamplingConfig) -> int:
    """One token, in float64: by rejection where top_p cuts, from R uniform numbers."""
    ids, p = distribution(logits, s.model_copy(update={"top_p": 1.0}))
    kept = distribution(logits, s)[1] > 0
    for uniform in uniforms:
        at = int(np.searchsorted(np.cumsum(p), uniform * p.sum(), side="right"))
        if kept[at]:
            return int(ids[at])
        p[p <= p[at]] = 0
    return int(ids[p.argmax()])
