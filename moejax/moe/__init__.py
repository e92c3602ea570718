"""The subject: routers, dispatch, experts, balancing.

The path of a batch through one layer:

    x_BLD -> logits_BLE -> Routing -> capacity -> TokenChoice
          -> rows grouped by expert -> experts -> combine -> y_BLD

plus `RoutingStats`, sums from which losses and metrics are computed once they cover the whole
batch. `layer.py` shows the path; `router`, `dispatch`, `experts`, `expert_parallel` and `balancing`
are its parts.

Axis letters, used in names (`x_BLD`, `gate_up_EDPF`), einsum strings and docstrings alike:

    B  sequences of a batch          E  experts
    L  positions of a sequence       K  experts per token
    T  tokens, B * L                 C  slots per expert (capacity)
    D  model width                   R  rows grouped by expert
    F  hidden width of an expert     H  query heads
    V  vocabulary                    G  key and value heads
    N  layers                        A  width of a head

Inside `shard_map` a lower-case letter is this device's piece of the axis.
"""
