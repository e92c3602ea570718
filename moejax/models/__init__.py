"""Complete models; each returns logits and `RoutingStats` stacked by MoE layer."""

from moejax.models.decoder import Decoder as Decoder
