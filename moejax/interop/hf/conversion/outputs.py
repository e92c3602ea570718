"""What a model computes of given inputs, by the names of reference files.

`docs/families.md` says what such a file holds and how to write one.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.config import declared
from moejax.inference.layered import LayeredDecoder
from moejax.interop.hf.family import Family
from moejax.interop.hf.places import named_arrays
from moejax.interop.hf.save import their_tensors
from moejax.models import Decoder
from moejax.models.blocks import Block, Context
from moejax.moe.balancing.stats import RoutingStats
from moejax.moe.router.routing import Routing
from moejax.moe.token_info import TokenInfo
from moejax.training.state import split_model

Inputs = tuple[jax.Array, jax.Array, jax.Array]
"""Tokens, segments and positions, `[B, L]`; padding is of segment 0."""

Named = Iterator[tuple[str, Any]]
"""Arrays by name."""

LEFT, RIGHT = "lpad.", "rpad."
"""Prefixes of the arrays of inputs with padding."""


class Outputs:
    """A model's outputs on the inputs of a reference file.

    Args:
      model: the decoder.
      family: of which it is one.
      reference: arrays of the file, of which the inputs are read.
    """

    def __init__(self, model: Decoder, family: Family, reference: Mapping[str, np.ndarray]):
        self.model = model
        self.family = family
        self._reference = reference
        graphdef, state = nnx.split(model)

        @jax.jit
        def compute(state, *inputs):
            model = nnx.merge(graphdef, state)
            hidden_BLD, stats = model(*inputs, trace=True)
            return model.logits(hidden_BLD), hidden_BLD, stats

        self._compute = functools.partial(compute, state)
        self._balance_weight = declared()["moe.balance_weight"].value(model.config)

    def inputs(self, padding: str = "") -> Inputs:
        """Returns the tokens of the file, without padding or with it on a side."""
        tokens_BL = self._reference[f"{padding}input_ids"]
        mask_BL = self._reference.get(f"{padding}attention_mask", np.ones_like(tokens_BL))
        straight_BL = np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape)
        positions_BL = self._reference.get(f"{padding}position_ids", straight_BL)
        tokens, mask, positions = (
            jnp.asarray(x, jnp.int32) for x in (tokens_BL, mask_BL, positions_BL)
        )
        return tokens, mask, positions

    @functools.cache  # noqa: B019
    def run(self, padding: str = "") -> tuple[np.ndarray, np.ndarray, Any]:
        """Returns logits, hidden states after the last norm, and statistics with routing."""
        return jax.tree.map(np.asarray, self._compute(*self.inputs(padding)))

    def logits(self) -> Named:
        """Yields logits and the last hidden states; with padding, the logits of tokens only."""
        logits_BLV, hidden_BLD, _ = self.run()
        yield "logits", logits_BLV
        yield "final_hidden", hidden_BLD
        for padding in (LEFT, RIGHT):
            if {f"{padding}input_ids", f"{padding}attention_mask"} <= self._reference.keys():
                yield f"{padding}logits", self.run(padding)[0]

    def layers(self) -> Named:
        """Yields the residual stream around each layer, and what its two parts make of it."""
        tokens_BL, segments_BL, positions_BL = self.inputs()
        info = TokenInfo(segments_BL > 0, tokens_BL, positions_BL)
        context = Context(positions_BL, segments_BL, info)
        x_BLD = self.model.embed(tokens_BL)
        yield "hidden.0", x_BLD
        walked: Iterator[tuple[Block, Any]] = self.model.walk(context)
        for layer, (block, own) in enumerate(walked):
            graphdef, state = nnx.split(block)
            parts = _layer_program(graphdef, self.family.shared_beside)(state, x_BLD, own)
            x_BLD = parts.pop("hidden")
            yield f"hidden.{layer + 1}", x_BLD
            for name, array in parts.items():
                yield f"{name}.{layer}", array

    def routings(self) -> Iterator[tuple[str, Routing]]:
        """Yields the routing of each MoE layer, and of attention that has experts, by name."""
        layers = iter(self.model.config.moe_layers)
        for group in self.run()[2]:
            for n in range(len(group.routing.experts_TK)):
                layer = next(layers)
                yield f"router.{layer}", _layer_of(group.routing, n)
                if group.attention is not None:
                    yield f"attn_router.{layer}", _layer_of(group.attention.routing, n)

    def losses(self, padding: str = "") -> dict[str, float]:
        """Returns the losses of the reference by name, of inputs that are their own labels."""
        tokens_BL, segments_BL, _ = self.inputs(padding)
        logits_BLV, _, stats = self.run(padding)
        log_probs_BLV = jax.nn.log_softmax(logits_BLV[:, :-1])
        nats_BL1 = -jnp.take_along_axis(log_probs_BLV, tokens_BL[:, 1:, None], axis=-1)
        loss = _mean_of_targets(nats_BL1[..., 0], segments_BL[:, 1:] > 0)
        aux = self._balance_loss(stats, segments_BL)
        return self._named_losses(padding, float(loss), float(aux))

    def _balance_loss(self, stats: Sequence[RoutingStats], segments_BL: jax.Array) -> jax.Array:
        factor = self.model.config.attention.router_loss_factor
        return pooled_balance_loss(stats, segments_BL, factor)

    def _named_losses(self, padding: str, loss: float, aux: float) -> dict[str, float]:
        total = loss + self._balance_weight * aux
        return {
            f"{padding}aux_loss": aux,
            f"{padding}loss_lm": loss,
            f"{padding}loss_total": total,
        }

    def losses_and_gradients(self) -> Named:
        """Yields the losses of the labels, and their gradients by name of tensor."""
        graphdef, params, state = split_model(self.model)

        @jax.jit
        def losses(params):
            return self._losses_of_labels(nnx.merge(graphdef, params, state))

        both, pull_back, *_ = jax.vjp(losses, params)
        loss, aux = both
        yield from self._named_losses("", float(loss), float(aux)).items()
        pull_back = jax.jit(pull_back)
        one, zero = jnp.float32(1), jnp.float32(0)
        weight = jnp.float32(self._balance_weight)
        yield from self._by_tensor("grad", *pull_back((one, zero)))
        yield from self._by_tensor("gradtotal", *pull_back((one, weight)))

    def _losses_of_labels(self, model: Decoder) -> tuple[jax.Array, jax.Array]:
        """Returns the mean cross-entropy of the labels, and the balance loss."""
        tokens_BL, segments_BL, positions_BL = self.inputs()
        hidden_BLD, stats = model(tokens_BL, segments_BL, positions_BL, trace=True)
        targets_BL = jnp.asarray(self._reference["labels"])[:, 1:]
        nats_BL, _ = model.cross_entropy(hidden_BLD[:, :-1], jnp.maximum(targets_BL, 0))
        loss = _mean_of_targets(nats_BL, targets_BL >= 0)
        return loss, self._balance_loss(stats, segments_BL)

    def _by_tensor(self, prefix: str, gradients: nnx.State) -> Named:
        """Yields gradients by the names of the published tensors."""
        # What has no gradient, such as a selection bias, is as it was.
        of_state, gradients = jax.tree.map(np.asarray, (nnx.state(self.model), gradients))
        arrays = named_arrays(of_state) | named_arrays(gradients)
        for name, gradient in their_tensors(self.model.config, self.family, arrays):
            yield f"{prefix}.{name}", gradient

    def generate(self, padding: str, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Continues the prompts of the file greedily, with a cache.

        Returns:
          Tokens `[B, S]` and the logits `[S, B, V]` that they were chosen by.
        """
        prompts_BL = self._reference[f"{padding}gen.prompt"]
        mask_BL = self._reference.get(f"{padding}gen.attention_mask", np.ones_like(prompts_BL))
        batch, length = prompts_BL.shape
        lengths_B = mask_BL.sum(axis=1)
        tokens_BL = np.zeros((batch, length), np.int32)  # padded on the right
        for row, (prompt, is_token) in enumerate(zip(prompts_BL, mask_BL, strict=True)):
            tokens_BL[row, : lengths_B[row]] = prompt[is_token == 1]
        straight_BL = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BL.shape)
        is_token_BL = straight_BL < lengths_B[:, None]
        decoder = LayeredDecoder(self.model)
        cache = decoder.init_cache(batch, length + num_steps)
        x_BLD, cache = decoder.extend(
            jnp.asarray(tokens_BL), jnp.asarray(straight_BL), cache, jnp.asarray(is_token_BL)
        )
        last_B11 = jnp.asarray(lengths_B - 1)[:, None, None]
        x_B1D = jnp.take_along_axis(x_BLD, last_B11, axis=1)
        positions_B1 = jnp.asarray(lengths_B, jnp.int32)[:, None]
        tokens, logits = [], []
        for _ in range(num_steps):
            logits_BV = np.asarray(decoder.logits(x_B1D))[:, 0]
            chosen_B = logits_BV.argmax(axis=-1).astype(np.int32)
            tokens.append(chosen_B)
            logits.append(logits_BV)
            x_B1D, cache = decoder.extend(jnp.asarray(chosen_B)[:, None], positions_B1, cache)
            positions_B1 += 1
        return np.stack(tokens, axis=1), np.stack(logits)


@functools.lru_cache(maxsize=64)
def _layer_program(graphdef: nnx.GraphDef, shared_beside: bool) -> Callable[..., dict[str, Any]]:
    """Returns what computes a layer's parts, compiled once for layers of one kind."""

    @jax.jit
    def compute(state, x_BLD, context):
        block = nnx.merge(graphdef, state)
        mixed_BLD, _ = block.mix(x_BLD, context)
        inputs_BLD = block.ffn_inputs(x_BLD, block.add_mixed(x_BLD, mixed_BLD))
        if not block.is_moe:
            y_BLD = block.ffn(inputs_BLD)
        else:
            y_BLD, _ = block.moe(inputs_BLD, context.info)
            if shared_beside and block.moe.config.num_shared_experts:
                y_BLD -= block.moe.shared(inputs_BLD)
        after_BLD, _, _ = block(x_BLD, context)
        return {
            "attn_out": mixed_BLD,
            "mlp_in": inputs_BLD,
            "mlp_out": y_BLD,
            "hidden": after_BLD,
        }

    return compute


def _mean_of_targets(nats_BL: jax.Array, is_target_BL: jax.Array) -> jax.Array:
    return jnp.where(is_target_BL, nats_BL, 0.0).sum() / is_target_BL.sum()


def _layer_of(routing: Routing, n: int) -> Routing:
    """Returns the routing of one layer of several."""
    return jax.tree.map(lambda by_layer: by_layer[n], routing)


def pooled_balance_loss(
    stats: Sequence[RoutingStats], segments_BL: jax.Array, attention_weight: float
) -> jax.Array:
    """Returns the balance loss as the reference of most families has it.

    E times the sum over experts of choices a token and mean probability, tokens of all layers
    pooled before the product. Choices and probabilities are those of the softmax of the logits,
    whatever the router makes of them. Ours has one such loss a layer.

    Args:
      stats: by group of layers, with routing.
      segments_BL: 0 at padding.
      attention_weight: how often tokens of the routers of attention count.
    """
    is_token_T = segments_BL.reshape(-1) > 0
    load_E = probs_E = num_tokens = jnp.float32(0)
    num_experts = 0
    for group in stats:
        routers = [(1.0, group.routing)]
        if group.attention is not None:
            routers.append((attention_weight, group.attention.routing))
        for weight, routing in routers:
            num_layers, _, num_experts = routing.logits_TE.shape
            chosen_NTK = jax.lax.top_k(routing.logits_TE, routing.experts_TK.shape[-1])[1]
            chosen_NTE = jax.nn.one_hot(chosen_NTK, num_experts).sum(axis=2)
            probs_NTE = jax.nn.softmax(routing.logits_TE)
            weight_1T1 = weight * is_token_T[None, :, None]
            load_E += (chosen_NTE * weight_1T1).sum(axis=(0, 1))
            probs_E += (probs_NTE * weight_1T1).sum(axis=(0, 1))
            num_tokens += num_layers * weight_1T1.sum()
    if not stats:
        return jnp.float32(0)
    return num_experts * (load_E / num_tokens) @ (probs_E / num_tokens)
