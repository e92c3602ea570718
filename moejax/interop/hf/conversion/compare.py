"""Compares what a released model computes here with what its reference computed of the same inputs.

That is how a conversion is proven. The reference's arrays are in one file, `docs/families.md`.
"""

import dataclasses
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.interop.hf.conversion.outputs import LEFT, RIGHT, Named, Outputs
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.family import Family
from moejax.models import Decoder

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
"""Largest differences, relative to the largest magnitude of an array."""

INPUTS = re.compile(
    r"(lpad\.|rpad\.)?(input_ids|attention_mask|position_ids|labels|gen\.prompt|gen\.attention_mask)"
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far an array is from the reference's.

    Attributes:
      name: of the array.
      absolute: the largest difference.
      relative: the same over the largest magnitude of the reference.
      tolerance: that `relative` must not exceed.
    """

    name: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def is_within(self) -> bool:
        """Whether the tolerance holds; NaN is not within any."""
        return self.relative <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What came out of a comparison.

    Attributes:
      differences: of the arrays that both have.
      experts_agree: whether every token selects the same experts, by router, such as `router.0`;
        empty without routing in the file.
      tokens_agree: whether greedy continuations are the same, by name.
      not_compared: names of arrays in the file that nothing here corresponds to.
      deviations: arrays that are otherwise here on purpose, and why.
    """

    differences: list[Difference]
    experts_agree: dict[str, bool]
    tokens_agree: dict[str, bool]
    not_compared: list[str]
    deviations: dict[str, str]

    @property
    def agrees(self) -> bool:
        """Whether everything that was compared is the same within its tolerance."""
        is_within = all(each.is_within for each in self.differences)
        return is_within and all(self.experts_agree.values()) and all(self.tokens_agree.values())


def read_reference(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a reference file by name.

    Raises:
      HfError: it cannot be read, or has no inputs.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            reference = dict(arrays)
    except PermissionError as error:
        raise HfError(f"{path} cannot be read; give this user the right to read it") from error
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise HfError(f"{path} is no file of arrays, NAME.npz ({error})") from error
    if "input_ids" not in reference:
        raise HfError(f"{path} has no input_ids; docs/families.md says how to write such a file")
    return reference


def compare(
    model: Decoder,
    family: Family,
    reference: Mapping[str, np.ndarray],
    *,
    tolerance: float = TOLERANCE,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
) -> Comparison:
    """Compares a model with a reference.

    Args:
      model: the decoder.
      family: of which it is one.
      reference: inputs and outputs by name.
      tolerance: for outputs, relative to the largest magnitude of an array.
      gradient_tolerance: likewise for gradients.

    Raises:
      HfError: inputs that the model cannot take.
    """
    _check_inputs(model, reference)
    deviations = {name: why for name, why in family.deviations.items() if name in reference}
    reference = {name: array for name, array in reference.items() if name not in deviations}
    outputs = Outputs(model, family, reference)
    differences = []
    for name, found in _outputs(outputs, reference):
        if name in reference:
            differences.append(_difference(name, found, reference, tolerance))
    gradients = outputs.losses_and_gradients() if "labels" in reference else ()
    for name, found in gradients:
        if name in reference:
            allowed = gradient_tolerance if name.startswith("grad") else tolerance
            differences.append(_difference(name, found, reference, allowed))
    experts_agree = dict(_selected_experts(outputs, reference))
    tokens_agree = {}
    for name, tokens_BS, logits_SBV in _continuations(outputs, reference):
        start = reference[name].shape[1] - tokens_BS.shape[1]
        tokens_agree[name] = np.array_equal(tokens_BS, reference[name][:, start:])
        logits_name = name.replace("tokens", "logits")
        if logits_name in reference:
            differences.append(_difference(logits_name, logits_SBV, reference, tolerance))
    compared = {each.name for each in differences} | tokens_agree.keys()
    compared |= {f"{router}.indices" for router in experts_agree}
    # Weights are those of `combine` in the order of indices.
    compared |= {f"{router}.weights" for router in experts_agree if f"{router}.combine" in compared}
    left = [name for name in reference if name not in compared and not INPUTS.fullmatch(name)]
    if not differences and not experts_agree and not tokens_agree:
        raise HfError(
            "the reference has no array that is known here, such as logits or gen.tokens; "
            f"it has {', '.join(reference)}"
        )
    return Comparison(differences, experts_agree, tokens_agree, left, deviations)


def _check_inputs(model: Decoder, reference: Mapping[str, np.ndarray]) -> None:
    """Raises `HfError` for token ids that the model does not have."""
    num_ids = model.config.vocab_size
    for name, ids in reference.items():
        if not name.endswith(("input_ids", "gen.prompt")):
            continue
        are_rows = ids.ndim == 2 and ids.size > 0 and np.issubdtype(ids.dtype, np.integer)
        if not are_rows or ids.min() < 0 or ids.max() >= num_ids:
            raise HfError(
                f"{name} of the reference must be rows of token ids from 0 to {num_ids - 1}, the "
                "model's; it is of another model"
            )


def _outputs(outputs: Outputs, reference: Mapping[str, np.ndarray]) -> Named:
    """Yields outputs of the forward pass by name."""
    yield from outputs.logits()
    if any(name.startswith(("hidden.", "attn_out.", "mlp_")) for name in reference):
        yield from outputs.layers()
    for router, routing in outputs.routings():
        num_experts = routing.logits_TE.shape[-1]
        combine_TE = np.zeros((len(routing.experts_TK), num_experts + 1))
        experts_TK, weights_TK = np.asarray(routing.experts_TK), np.asarray(routing.weights_TK)
        np.put_along_axis(combine_TE, experts_TK, weights_TK, axis=1)
        yield f"{router}.logits", routing.logits_TE
        yield f"{router}.combine", combine_TE[:, :num_experts]
    for padding in (LEFT, RIGHT):
        if {f"{padding}input_ids", f"{padding}attention_mask"} <= reference.keys():
            yield from outputs.losses(padding).items()


def _selected_experts(
    outputs: Outputs, reference: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, bool]]:
    """Yields for each router whether all tokens select the reference's experts."""
    for router, routing in outputs.routings():
        expected_TK = reference.get(f"{router}.indices")
        if expected_TK is not None:
            found_TK = np.sort(routing.experts_TK, axis=-1)
            yield router, np.array_equal(found_TK, np.sort(expected_TK, axis=-1))


def _continuations(
    outputs: Outputs, reference: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields greedy continuations: the name, tokens and logits."""
    for padding in ("", LEFT):
        name = f"{padding}gen.tokens"
        prompts_BL = reference.get(f"{padding}gen.prompt")
        if name in reference and prompts_BL is not None:
            num_steps = reference[name].shape[1] - prompts_BL.shape[1]
            if num_steps < 1:
                raise HfError(f"{name} must have tokens after those of {padding}gen.prompt")
            yield name, *outputs.generate(padding, num_steps)


def _difference(
    name: str, found: Any, reference: Mapping[str, np.ndarray], tolerance: float
) -> Difference:
    expected = np.asarray(reference[name], np.float64)
    found = np.asarray(found, np.float64)
    # The reference has outputs of some modules by token.
    is_by_token = found.ndim == expected.ndim + 1 and found.size == expected.size
    if found.shape != expected.shape and not is_by_token:
        raise HfError(
            f"{name} has the shape {expected.shape} in the reference and {found.shape} here; it is "
            "of another model"
        )
    found = found.reshape(expected.shape)
    if name in (f"{LEFT}logits", f"{RIGHT}logits"):
        is_token_BL = reference[name.replace("logits", "attention_mask")] == 1
        found, expected = found[is_token_BL], expected[is_token_BL]
    absolute = float(np.abs(found - expected).max(initial=0))
    largest = float(np.abs(expected).max(initial=0))
    relative = absolute / largest if largest else absolute
    return Difference(name, absolute, relative, tolerance)
