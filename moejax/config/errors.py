"""How a configuration is refused."""


class ConfigError(ValueError):
    """A configuration that cannot work: the message names the key, the value, the constraint and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def divisors(number: int) -> str:
    """The divisors of `number`, for error messages: "1, 2, 4"."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
