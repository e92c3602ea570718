"""One tiny model: its configuration, and how published files spell it."""

from dataclasses import dataclass, field

COMMON = {
    "vocab_size": 131,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """One tiny model.

    Attributes:
        model_type: the reference's name of the architecture.
        own: the keys of the configuration beyond `COMMON`; None takes one of `COMMON` out.
        add: keys that published files have besides, some of which only the publisher's code reads.
        drop: keys that published files do not have.
        rename: keys that published files call otherwise.
        bias_scale: the deviation of selection biases, which must change selections.
        is_loadable: whether the reference loads the published layout and configuration.
    """

    model_type: str
    own: dict
    add: dict = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    rename: dict = field(default_factory=dict)
    bias_scale: float = 0.3
    is_loadable: bool = True

    def settings(self):
        """Returns the keyword arguments of the reference's configuration."""
        merged = COMMON | self.own
        absent = {"rms_norm_eps", "num_attention_heads", "hidden_size", "num_hidden_layers"}
        absent |= {"num_key_value_heads", "max_position_embeddings"}
        return {k: v for k, v in merged.items() if v is not None or k not in absent}


def plain_rope(theta, **more):
    """Returns the rope parameters of unscaled frequencies."""
    return {"rope_type": "default", "rope_theta": theta, **more}
