"""What passes through the modules of a model: hidden states and routing, by names of one scheme."""

import torch


def parts_of(model):
    """Returns the decoder's layers, the final norm, and each layer's attention and MLP."""
    body = model.transformer if hasattr(model, "transformer") else model.model
    layers = body.blocks if hasattr(body, "blocks") else body.layers
    norm = body.norm_f if hasattr(body, "norm_f") else body.norm
    return layers, norm


def attention_of(layer):
    """Returns the attention of a layer, None where it has two."""
    if hasattr(layer, "norm_attn_norm"):
        return layer.norm_attn_norm.attn
    attention = getattr(layer, "self_attn", None) or getattr(layer, "self_attention", None)
    return None if isinstance(attention, torch.nn.ModuleList) else attention


def mlp_of(layer):
    """Returns the MLP or the MoE layer."""
    names = ["block_sparse_moe", "feed_forward", "ffn", "mlp"]
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def router_of(module):
    """Returns the router within a MoE layer, None for an MLP."""
    routers = [getattr(module, name, None) for name in ("router", "gate")]
    return next((router for router in routers if router is not None), None)


def routing_of(output, router, mlp):
    """Returns logits [T, E], weights [T, K] and experts [T, K] of what a router returned."""
    kind = type(router).__name__
    if kind == "DbrxRouter":
        return (output, *mlp.route_tokens_to_experts(output))
    if kind == "Llama4Router":
        scores, logits = output
        indices = torch.topk(logits, router.top_k, dim=-1).indices
        return logits, scores.gather(1, indices), indices
    if kind == "JetMoeTopKGating":
        logits = output[-1]
        best, indices = logits.topk(router.top_k, dim=-1)
        return logits, best.softmax(dim=-1), indices
    return output


class Recorder:
    """Collects what passes through the modules of a model during one forward pass."""

    def __init__(self, model):
        self.arrays = {}
        self.handles = []
        layers, norm = parts_of(model)
        self.add(layers[0], lambda inputs, _: self.keep("hidden.0", inputs))
        for i, layer in enumerate(layers):
            self.watch(i, layer)
        self.add(norm, lambda _, output: self.keep("final_hidden", output))

    def watch(self, i, layer):
        """Records one layer."""
        mlp, attention = mlp_of(layer), attention_of(layer)
        self.add(layer, lambda _, output: self.keep(f"hidden.{i + 1}", output))
        self.add(mlp, lambda inputs, _: self.keep(f"mlp_in.{i}", inputs))
        self.add(mlp, lambda _, output: self.keep(f"mlp_out.{i}", output))
        if attention is not None:
            self.add(attention, lambda _, output: self.keep(f"attn_out.{i}", output))
        if (router := router_of(mlp)) is not None:
            self.add(router, lambda _, out: self.route(f"router.{i}", out, router, mlp))
        if hasattr(attention, "experts"):
            own = attention.experts.router
            self.add(own, lambda _, out: self.route(f"attn_router.{i}", out, own, mlp))

    def add(self, module, function):
        """Calls the function with the input and the output of a module."""

        def hook(_, args, kwargs, output):
            inputs = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
            function(inputs, output)

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def keep(self, name, value):
        """Stores one array."""
        tensor = value[0] if isinstance(value, tuple) else value
        self.arrays[name] = tensor.detach().clone()

    def route(self, name, output, router, mlp):
        """Stores the routing of one router."""
        logits, weights, indices = routing_of(output, router, mlp)
        combine = torch.zeros_like(logits).scatter_add(1, indices, weights)
        values = {"logits": logits, "weights": weights, "indices": indices, "combine": combine}
        for part, value in values.items():
            self.arrays[f"{name}.{part}"] = value.detach().clone()

    def stop(self):
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()
        return self.arrays
