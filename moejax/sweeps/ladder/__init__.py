"""Ladders: the arms of a sweep at several budgets of compute, and the law that their losses follow.

A rung is a budget in FLOPs of training. One rule of the recipe gives the shape of the model and of
the batch at a budget; every arm trains as many steps as the budget pays for. Over the rungs the
loss of an arm follows a power law, which is fitted, tested on the top rung, and projected.
"""
