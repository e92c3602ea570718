"""What a model computes of given inputs, by the names of reference files.

`docs/families.md` says what such a file holds and how to write one.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.inference.layered import LayeredDecoder
from moejax.interop.hf.family import Family
from moejax.interop.hf.places import named_arrays
from moejax.interop.hf.save import their_tensors
from moejax.models import Decoder
from moejax.models.blocks import Block, Context
from moejax.moe.router.routing import Routing
from moejax.moe.token_info import TokenInfo

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
            if f"{padding}input_ids" in self._reference:
                yield f"{padding}logits", self.run(padding)[0]

    def layers(self) -> Named:
        """Yields the residual stream around each layer, and what its two parts make of it."""
        tokens_BL, segments_BL, positions_BL = self.inputs()
        info = TokenInfo(segments_BL > 0, tokens_BL, positions_BL)
        context = Context(positions_BL, segments_BL, info)
        x_BLD = self.model.embed(tokens_BL)
        yield "hidden.0", x_BLD
        for layer, (block, own) in enumerate(self.model.walk(context)):
            mixed_BLD, _ = block.mix(x_BLD, own)
            yield f"attn_out.{layer}", mixed_BLD
            inputs_BLD = block.ffn_inputs(x_BLD, block.add_mixed(x_BLD, mixed_BLD))
            yield f"mlp_in.{layer}", inputs_BLD
            yield f"mlp_out.{layer}", self._feed_forward(block, inputs_BLD, own)
            x_BLD, _, _ = block(x_BLD, own)
            yield f"hidden.{layer + 1}", x_BLD

    def routings(self) -> Iterator[tuple[int, Routing]]:
        """Yields the routing of each MoE layer with the number of the layer."""
        stats = self.run()[2]
        layers = iter(self.model.config.moe_layers)
        for group in stats:
            num_layers = len(group.routing.experts_TK)
            for n in range(num_layers):
                yield next(layers), jax.tree.map(lambda x, n=n: x[n], group.routing)

    def aux_loss(self, padding: str = "") -> float:
        """Returns the auxiliary loss of the reference.

        E times the sum over experts of choices a token and mean probability, tokens of all layers
        pooled before the product; probabilities are the softmax of the logits, whatever the router
        makes of them.
        """
        _, segments_BL, _ = self.inputs(padding)
        is_token_T = np.asarray(segments_BL).reshape(-1) > 0
        load_E, probs_E, num = 0.0, 0.0, 0
        for group in self.run(padding)[2]:
            logits_NTE = group.routing.logits_TE[:, is_token_T]
            experts_NTK = group.routing.experts_TK[:, is_token_T]
            num_experts = logits_NTE.shape[-1]
            load_E += np.bincount(experts_NTK.reshape(-1), minlength=num_experts)
            probs_E += np.asarray(jax.nn.softmax(logits_NTE)).sum(axis=(0, 1))
            num += logits_NTE.shape[0] * logits_NTE.shape[1]
        return len(load_E) * float((load_E / num) @ (probs_E / num))

    def loss_and_gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the mean cross-entropy of the labels, and its gradients by name of tensor."""
        graphdef, params, state = nnx.split(self.model, nnx.Param, ...)
        inputs = self.inputs()
        labels_BL = jnp.asarray(self._reference["labels"])
        targets_BL = labels_BL[:, 1:]
        is_target_BL = targets_BL >= 0

        @jax.jit
        def loss(params):
            model = nnx.merge(graphdef, params, state)
            hidden_BLD, _ = model(*inputs)
            nats_BL = model.cross_entropy(hidden_BLD[:, :-1], jnp.maximum(targets_BL, 0))
            return jnp.where(is_target_BL, nats_BL, 0.0).sum() / is_target_BL.sum()

        value, gradients = jax.value_and_grad(loss)(params)
        # What has no gradient, such as a selection bias, is as it was.
        state, gradients = jax.tree.map(np.asarray, (nnx.state(self.model), gradients))
        arrays = named_arrays(state) | named_arrays(gradients)
        return float(value), dict(their_tensors(self.model.config, self.family, arrays))

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

    def _feed_forward(self, block: Block, inputs_BLD: jax.Array, context: Context) -> jax.Array:
        """Returns what the module of the reference makes of the inputs."""
        if not block.is_moe:
            return block.ffn(inputs_BLD)
        y_BLD, _ = block.moe(inputs_BLD, context.info)
        if self.family.shared_beside:
            y_BLD -= block.moe.shared(inputs_BLD)
        return y_BLD
