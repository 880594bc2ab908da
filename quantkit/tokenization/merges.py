"""From "join the best neighbours" to a list of merges.

SentencePiece and tiktoken keep one number per token: of all neighbours whose join is a token they join the best, the
leftmost among equals. tokenizer.json keeps a list of pairs, first is best. Every token needs exactly one pair there:
what happens inside the span that a token ends up covering is what would happen if that span stood alone, because no
join crossed its edges. So the pair is the last join of the token alone, and a second pair for it could never be met.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

Text = TypeVar("Text", str, bytes)


def joined(text: Text, order: Mapping[Text, float], parts: int = 1) -> list[int]:
    """Where `text` is still cut, ascending, when its characters (of str) or bytes have been joined down to that many
    parts, or as far as it goes. `order` holds the tokens, the best lowest."""
    bounds = list(range(len(text) + 1))
    costs = [order.get(text[i : i + 2], math.inf) for i in range(len(text) - 1)]  # of joining part i and the next
    while len(costs) >= parts and costs:
        best = min(costs)
        if best == math.inf:
            break
        i = costs.index(best)
        del bounds[i + 1], costs[i]
        if i:
            costs[i - 1] = order.get(text[bounds[i - 1] : bounds[i + 1]], math.inf)
        if i < len(costs):
            costs[i] = order.get(text[bounds[i] : bounds[i + 2]], math.inf)
    return bounds[1:-1]


def last_pair(token: Text, order: Mapping[Text, float]) -> tuple[Text, Text] | None:
    """The pair that is joined last on the way to `token`, which is in `order`; None if no joins lead there."""
    cuts = joined(token, order, parts=2)
    return (token[: cuts[0]], token[cuts[0] :]) if len(cuts) == 1 else None
