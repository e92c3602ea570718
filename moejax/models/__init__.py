"""Complete models; each returns hidden states and `RoutingStats` stacked by MoE layer."""

from moejax.models.decoder import Decoder as Decoder
