"""Which gradients a fixture keeps: those of every kind of tensor, not of every tensor."""


def layer_of(name):
    """Returns the number of a tensor's layer, None for what stands outside the layers."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


def expert_of(name):
    """Returns the number of a routed expert's own tensor, None for others."""
    if ".experts." not in name:
        return None
    rest = name.split(".experts.")[1].split(".")[0]
    return int(rest) if rest.isdigit() else None


def is_fused(name, tensor):
    """Says whether a tensor holds all experts of a layer."""
    return tensor.ndim == 3 or ".experts.mlp." in name


def chosen_gradients(tensors, hottest, num_layers):
    """Returns the gradients to keep.

    All routers, norms and biases; attention of the first and the last sparse layer; each sparse
    layer's most used expert, or the last layer's whole tensor where one holds all experts.
    """
    sparse = sorted(hottest) or list(range(num_layers))
    kept = {}
    for name, tensor in tensors.items():
        layer = layer_of(name)
        expert = expert_of(name)
        if expert is not None:
            wanted = expert == hottest[layer]
        elif is_fused(name, tensor):
            wanted = layer == sparse[-1]
        elif "attn" in name or "self_attention" in name:
            wanted = tensor.ndim < 2 or layer in (sparse[0], sparse[-1]) or "router" in name
        else:
            wanted = True
        if wanted:
            kept[name] = tensor
    return kept


def is_router(name):
    """Says whether a published name is that of a router."""
    ends = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "mlp.gate.wg.weight")
    return ".router." in name or name.endswith(ends)
