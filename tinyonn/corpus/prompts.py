"""Where a sample's prompt ends: its first tokens, from which the experts for the whole sample are chosen."""

from __future__ import annotations

from tinyonn.corpus.tokens import UNLABELLED, Int32


def prompt_length(labels_T: Int32, limit: int) -> int:
    """How many of a sample's first tokens are its prompt.

    Parameters
    ----------
    labels_T : int [T]
        -100 where a token is not labelled.
    limit : int
        Most tokens of the prompt of a text.

    Returns
    -------
    int
        Tokens before the first labelled one if the sample begins unlabelled (a chat), else ``min(limit, T // 2)``.
    """
    labelled = labels_T != UNLABELLED
    if labelled[0]:
        return min(limit, len(labels_T) // 2)
    return int(labelled.argmax()) if labelled.any() else len(labels_T)
