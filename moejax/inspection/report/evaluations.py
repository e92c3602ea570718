"""Sections of a run's report from its evaluations: pairs of experts, settling, paths of tokens."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from moejax.inspection import html
from moejax.inspection.analysis.expert_profile import coactivation_ratio, coactivation_shares
from moejax.inspection.analysis.saturation import router_saturation
from moejax.inspection.analysis.token_flow import TokenFlow, token_flow
from moejax.inspection.figures import pairs as pair_figures
from moejax.inspection.figures.layers import draw_layers
from moejax.inspection.html import Markup
from moejax.inspection.report.health import figure_class, worst_in_words
from moejax.inspection.report.page import drawn_layers, figure, grid, left_out, table
from moejax.inspection.runs.run import Run

MAX_EVALUATIONS = 20  # of which saturation is drawn
MIN_EVALUATIONS = 3  # that a curve of it takes: the last point is always 1
MAX_ALL_PAIRS = 12  # layers whose pairs are all drawn
MAX_PAIR_LAYERS = 6  # drawn of deeper models: noise of many pairs does not compress
FLOW_COLUMNS = 4  # layers in one figure of flows
MAX_FLOW_FIGURES = 3
NOT_EVALUATED = "No evaluation has logged routing yet (train.eval_every)."


def coactivation(run: Run) -> Markup:
    """Returns which experts the same tokens visit, in the newest evaluation."""
    if not run.evaluations.steps:
        return html.paragraph(NOT_EVALUATED)
    pairs_NEE = run.evaluations.read()["coactivation"]
    return coactivation_of(pairs_NEE, _layers(run, len(pairs_NEE)))


def coactivation_of(pairs_NEE: Int[np.ndarray, "N E E"], layers: Sequence[int]) -> Markup:
    """Returns which experts the same tokens visit.

    Args:
      pairs_NEE: tokens that visit both experts of a pair, from `moe.by_token.coactivation`.
      layers: model layer of each MoE layer.
    """
    num_layers, num_experts, _ = pairs_NEE.shape
    is_pair_EE = ~np.eye(num_experts, dtype=bool)
    if not (pairs_NEE * is_pair_EE).any():
        return html.paragraph("No token visits two experts of a layer.")
    most = MAX_ALL_PAIRS if num_layers <= MAX_ALL_PAIRS else MAX_PAIR_LAYERS
    drawn = []
    for n in drawn_layers(num_layers, most):
        pairs_EE = pairs_NEE[n]
        image = pair_figures.draw_coactivation(pairs_EE)
        reading = _strongest_pair(pairs_EE)
        drawn.append(figure(f"Layer {layers[n]}", reading, image, kind="true-colors"))
    has_too_many = num_experts > pair_figures.MAX_EXPERTS
    return html.render(
        "report/coactivation",
        max_experts=pair_figures.MAX_EXPERTS if has_too_many else None,
        left_out=left_out(num_layers, most),
        figures=grid(drawn),
    )


def _strongest_pair(pairs_EE: np.ndarray) -> str:
    """Names the pair of experts that goes together most, relative to chance."""
    ratio_EE = coactivation_ratio(pairs_EE)
    ratio_EE = np.nan_to_num(ratio_EE)
    if not ratio_EE.any():
        return "All pairs are too rare to tell."
    strongest = int(ratio_EE.argmax())
    i, j = np.unravel_index(strongest, ratio_EE.shape)
    (shares_EE,) = coactivation_shares(pairs_EE[None])
    if shares_EE[i, j] < shares_EE[j, i]:  # of both directions, the larger share says more
        i, j = j, i
    share = shares_EE[i, j]
    ratio = ratio_EE[i, j]
    by_chance = share / ratio
    return f"Strongest: {share:.0%} of the tokens of {i} also visit {j}; by chance {by_chance:.0%}."


def settling(run: Run) -> Markup:
    """Returns saturation and churn over evaluations, by layer."""
    steps = run.evaluations.steps
    if len(steps) < 2:
        return html.paragraph(
            "Two evaluations or more show how routing settles (train.eval_every)."
        )
    chosen = [steps[i] for i in drawn_layers(len(steps), MAX_EVALUATIONS)]
    found = {step: run.evaluations.read(step) for step in chosen}
    experts_S = [arrays["experts"] for arrays in found.values()]
    newest = found[chosen[-1]]
    _, num_experts = newest["load"].shape
    layers = _layers(run, len(experts_S[0]))
    saturation_SN = router_saturation(experts_S, num_experts)
    if len(chosen) < MIN_EVALUATIONS:
        return _settled_in_words(chosen, saturation_SN, newest.get("churn"), layers)
    uniform = _uniform_saturation(newest["experts"], num_experts)
    drawn = [_saturation(chosen, saturation_SN, layers, uniform)]
    churn_N_at = {step: arrays["churn"] for step, arrays in found.items() if "churn" in arrays}
    if churn_N_at:  # the first evaluation of a run has none
        drawn.append(_churn(churn_N_at, layers))
    return html.render("report/settling", num_evaluations=len(chosen), figures=grid(drawn))


def _uniform_saturation(experts_NTK: np.ndarray, num_experts: int) -> float:
    """Returns K / E, the saturation of routing at random where loads are equal.

    K is what tokens visit in the mean: an index of `num_experts` stands for no expert.
    """
    is_visit_NTK = experts_NTK < num_experts
    num_visits_NT = is_visit_NTK.sum(axis=2)
    return float(num_visits_NT.mean()) / num_experts


def _saturation(
    steps: Sequence[int], saturation_SN: np.ndarray, layers: Sequence[int], uniform: float
) -> Markup:
    image = draw_layers(
        np.array(steps),
        saturation_SN,
        layers,
        "share of the last experts",
        reference=(uniform, "uniform: K / E"),
        is_measured=True,
    )
    reading = (
        "Of each token's experts at the last evaluation, the share that it had already. Rising "
        "early: routing was decided early. Routing at random shows K / E where loads are equal, "
        "and more where they are not."
    )
    return figure("Saturation", reading, image, kind=figure_class(layers))


def _churn(churn_N_at: Mapping[int, np.ndarray], layers: Sequence[int]) -> Markup:
    """Returns a figure of the layers' churn over the steps of evaluations."""
    steps_S = np.array(list(churn_N_at))
    churn_SN = np.stack(list(churn_N_at.values())).astype(np.float64)
    image = draw_layers(
        steps_S,
        churn_SN,
        layers,
        "share of a token's experts",
        worst=np.nanmax,
        is_measured=True,
    )
    reading = (
        "Of a token's experts at the evaluation before, the share that it no longer visits. Good: "
        "falling."
    )
    worst = worst_in_words(churn_SN, layers, np.nanmax)
    return figure("Churn", reading, image, value=worst, kind=figure_class(layers))


def _settled_in_words(
    steps: Sequence[int],
    saturation_SN: np.ndarray,
    churn_N: np.ndarray | None,
    layers: Sequence[int],
) -> Markup:
    """Returns saturation and churn between two evaluations: one number a layer makes no curve."""
    saturation_N = saturation_SN[0]
    rows = []
    for n, layer in enumerate(layers):
        saturation = f"{saturation_N[n]:.0%}"
        churn = "" if churn_N is None else f"{churn_N[n]:.0%}"
        rows.append([f"layer {layer}", saturation, churn])
    return html.render(
        "report/settled_in_words",
        first_step=f"{steps[0]:,}",
        last_step=f"{steps[-1]:,}",
        table=table(("", "saturation", "churn"), rows, "numbers"),
    )


def flow(run: Run) -> Markup:
    """Returns the paths of tokens from layer to layer, in the newest evaluation."""
    if not run.evaluations.steps:
        return html.paragraph(NOT_EVALUATED)
    arrays = run.evaluations.read()
    experts_NTK = arrays["experts"]
    _, num_experts = arrays["load"].shape
    layers = _layers(run, len(experts_NTK))
    windows = flow_windows(len(layers))
    if not windows:
        return html.paragraph("There is one MoE layer: no paths.")
    drawn = []
    for first, last in windows:
        window = slice(first, last + 1)
        found = _flow_of_first_experts(experts_NTK[window], num_experts)
        if not found.counts_MEE.any():
            return html.paragraph("No token visits an expert in each of some neighbouring layers.")
        image = pair_figures.draw_flow(found.counts_MEE, found.expected_MEE, layers[window])
        title = f"Layers {layers[first]} to {layers[last]}"
        drawn.append(figure(title, "", image))
    num_steps = len(windows) * (FLOW_COLUMNS - 1)
    return html.render(
        "report/flow",
        max_flows=pair_figures.MAX_FLOWS,
        is_partial=num_steps < len(layers) - 1,
        figures=grid(drawn),
    )


def _flow_of_first_experts(experts_NTK: np.ndarray, num_experts: int) -> TokenFlow:
    """Returns the paths of the tokens that have an expert in each of the layers."""
    first_NT1 = experts_NTK[:, :, :1]
    # Of tokens without an expert in some layer, bands would not fill their blocks.
    is_visit_NT1 = first_NT1 < num_experts
    has_expert_T = is_visit_NT1.all(axis=(0, 2))
    counted_NT1 = first_NT1[:, has_expert_T]
    return token_flow(counted_NT1, num_experts)


def flow_windows(num_layers: int) -> list[tuple[int, int]]:
    """Returns the first and last layer of each figure of flows.

    Windows share their ends; deep models show a few of them.
    """
    step = FLOW_COLUMNS - 1
    last_layer = num_layers - 1
    windows = []
    for first in range(0, last_layer, step):
        last = min(first + step, last_layer)
        windows.append((first, last))
    if not windows:
        return []
    return [windows[i] for i in drawn_layers(len(windows), MAX_FLOW_FIGURES)]


def _layers(run: Run, num_layers: int) -> list[int]:
    """Returns the model layers of the MoE layers, or their numbers if they are not logged."""
    if run.routing is None:
        return list(range(num_layers))
    return run.routing.layers.tolist()
