"""The truth for capacity: choices ask for slots one after the other, in a loop.

Tokens come as `experts_TK`, lists of expert ids; ids from `num_experts` on need no slot.
"""

import math


def turns(weights_TK, order):
    """(token, rank) of every choice of a group in the order in which they are served."""
    tokens, ranks = range(len(weights_TK)), range(len(weights_TK[0]))
    if order == "position":
        return [(t, k) for t in tokens for k in ranks]
    if order == "weight":
        tokens = sorted(tokens, key=lambda t: (-float(weights_TK[t][0]), t))
    return [(t, k) for k in ranks for t in tokens]


def apply_capacity(
    experts_TK, ranking_TE, weights_TK, limit, *, num_experts, num_groups, order, overflow
):
    """Final experts of all choices; None where a choice is dropped. Groups are equal runs of
    tokens.
    """
    size = len(experts_TK) // num_groups
    final = []
    for start in range(0, num_groups * size, size):
        here = slice(start, start + size)
        final += _admit_group(
            [list(map(int, row)) for row in experts_TK[here]],
            ranking_TE[here],
            weights_TK[here],
            limit,
            num_experts,
            order,
            overflow,
        )
    return final


def _admit_group(experts_LK, ranking_LE, weights_LK, limit, num_experts, order, overflow):
    taken = dict.fromkeys(range(num_experts), 0)
    final_LK = [list(row) for row in experts_LK]  # what a token holds, or still wants

    def has_room(e):
        return e >= num_experts or taken[e] < limit

    for t, k in turns(weights_LK, order):
        wanted = experts_LK[t][k]
        if not has_room(wanted):
            others = final_LK[t]
            open_ = [
                e
                for e in range(len(ranking_LE[t]))
                if has_room(e) and e not in others and ranking_LE[t][e] > -math.inf
            ]
            if overflow == "next" and open_:
                final_LK[t][k] = max(open_, key=lambda e: (float(ranking_LE[t][e]), -e))
            else:
                final_LK[t][k] = None
        if final_LK[t][k] in taken:
            taken[final_LK[t][k]] += 1
    return final_LK
