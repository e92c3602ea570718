"""Token choice by score: a score of the logits, bias and groups, then the top K.

Scores are softmax, sigmoid and sqrt-softplus. One function for most published routers; they differ
in the legal settings (`config.ROUTER_RULES`), in what makes the logits (`moe/router/modules.py`)
and in what updates the bias (`moe/balancing/state.py`).
"""

import dataclasses

import jax

from moejax.config import MoeConfig
from moejax.moe.router.routing import RouterInputs, Routing, Stream
from moejax.moe.router.scores import log_scores, probabilities, routing_by_scores
from moejax.moe.router.selection import select, selection_values


def route_scored(inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Sends each token to the K experts of highest score.

    `softmax_topk`: Shazeer et al. 2017 (section 2), GShard, Mixtral (renormalised), OLMoE (not).
    `switch`: Fedus et al. 2021, equation 2 (K = 1, the probability as weight). `sigmoid_topk`:
    DeepSeek-V3, section 2.1.2. `cosine`: Chi et al. 2022 (X-MoE). `dense`: all experts.

    Args:
      inputs: logits, mask and, if there is one, the selection bias.
      config: score function, normalisation, groups.
    """
    log_scores_TE = log_scores(inputs.logits_TE, config.score)
    ranking_TE = selection_values(
        inputs.logits_TE, log_scores_TE, inputs.bias_E, config, inputs.is_blocked_E
    )
    experts_TK = select(ranking_TE, inputs.mask_T, config.top_k, inputs.is_blocked_E)
    return routing_by_scores(inputs, log_scores_TE, ranking_TE, experts_TK, config)


def route_noisy(inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Adds normal noise to the logits in training, then routes by the noisy ones.

    Probabilities are those of the clean logits. In evaluation there is no noise.

    Source: Shazeer et al. 2017, equations 3 to 5 (learned scale, softmax after selection); Riquelme
    et al. 2021 (V-MoE, section 2.2: fixed scale 1/E, softmax before selection).
    """
    noisy_TE = inputs.logits_TE
    if inputs.is_training:
        draws_TE = inputs.draw(Stream.NOISE, jax.random.normal, noisy_TE.shape[-1])
        noisy_TE += inputs.noise * inputs.noise_scale_TE * draws_TE
    routing = route_scored(dataclasses.replace(inputs, logits_TE=noisy_TE), config)
    return dataclasses.replace(
        routing,
        logits_TE=inputs.logits_TE,
        probs_TE=probabilities(log_scores(inputs.logits_TE, config.score)),
        noisy_TE=noisy_TE,
        noise_scale_TE=inputs.noise * inputs.noise_scale_TE,
    )


def route_quantile(inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Selects by logit minus beta, where beta_e is the logit that expert e asks for.

    The bias is minus beta. It is state, computed once per step from the global batch
    (`state.update_quantiles`), so that no token's routing depends on a later token.

    Source: quantile balancing, 2026.
    """
    return route_scored(inputs, dataclasses.replace(config, select_by="logits"))
