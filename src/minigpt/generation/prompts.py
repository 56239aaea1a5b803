"""Prompts as token ids, and what is wrong with one."""

import logging
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from minigpt.common.errors import InputError
from minigpt.config import DEFAULT_PROMPTS
from minigpt.data.interface import Tokenizer

log = logging.getLogger(__name__)


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], key: str = "the prompt"
) -> list[npt.NDArray[np.int32]]:
    """Encodes prompts.

    Args:
        tokenizer: The model's.
        prompts: Texts.
        key: Where they stand, for the message.

    Returns:
        The token ids of each prompt, behind the separator if the tokenizer has one.

    Raises:
        InputError: There is no prompt, one is not valid Unicode or has no token that the model
            knows, or one is empty and the tokenizer has no separator.
    """
    if not prompts:
        raise InputError(f"{key}: there is no prompt: give at least one")
    try:
        texts = pa.array(prompts, pa.string())
    except UnicodeEncodeError:
        raise InputError(f"{key} is not valid Unicode: write it in UTF-8") from None
    ids, offsets = tokenizer.encode(texts)
    rows = [ids[start:end] for start, end in pairwise(offsets)]
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) == 0 and tokenizer.separator is None:
            raise InputError(f"{key} {prompt!r} is empty: write at least one word")
        if len(row) and np.all(row == tokenizer.unknown):
            raise InputError(f"{key} {prompt!r} has no word that the model knows: use other words")
    if tokenizer.separator is None:
        return rows
    return [np.insert(row, 0, tokenizer.separator) for row in rows]


def known(tokenizer: Tokenizer, prompts: Sequence[str], key: str) -> list[str]:
    """Leaves out the default prompts that a corpus of the user's own does not know.

    If none is left, texts begin from nothing, where the model has learned how documents begin.

    Args:
        tokenizer: The model's.
        prompts: The configured prompts.
        key: The key of the configuration.

    Raises:
        InputError: A prompt that is not a default has no known token, or no prompt is left.
    """
    kept = []
    for prompt in prompts:
        try:
            encode(tokenizer, [prompt], key)
            kept.append(prompt)
        except InputError as error:
            if prompt not in DEFAULT_PROMPTS:
                raise
            log.warning("%s; this default prompt is left out, set %s to your own", error, key)
    if kept:
        return kept
    if tokenizer.separator is None:
        raise InputError(f"{key}: the corpus knows none of the default prompts: set your own")
    log.warning("%s: no prompt is left, so texts begin from nothing", key)
    return [""]
