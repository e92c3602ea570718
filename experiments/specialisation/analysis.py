"""Do experts follow the token, its form, or the domain?

  python experiments/specialisation/analysis.py [--from-results]

Reads the sweep in `runs/specialisation`, which `sweep.py` describes, routes all validation rows
through each last checkpoint, and writes the results, the figure and the tables of
`docs/specialisation.md`. With --from-results, figure and tables are made from `results.json` only.
"""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

from moejax.data import Corpus
from moejax.data.labels import Labels
from moejax.inspection import open_run
from moejax.inspection.analysis.attributes import Attribute, attributes_of
from moejax.inspection.analysis.expert_profile import (
    domain_specialisation,
    vocabulary_specialisation,
)
from moejax.inspection.analysis.expert_similarity import linear_cka, output_cosine
from moejax.inspection.analysis.expert_weights import expert_outputs
from moejax.inspection.analysis.information import expert_information, information_table
from moejax.inspection.analysis.saturation import router_saturation
from moejax.inspection.analysis.trace import route_corpus
from moejax.inspection.figures.style import BLUE, GREY, ORANGE, PNG_DPI, PURPLE, STYLE
from moejax.sweeps.store.named_arms import named_arms

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of a backend
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
SWEEP, RESULTS = ROOT / "runs/specialisation", HERE / "results.json"
PAGE = ROOT / "docs/specialisation.md"
MARKS = ("<!-- measured: written by experiments/specialisation/analysis.py -->\n", "<!-- end -->")
NUM_PERMUTATIONS = {"tokens": 10, "documents": 100}
BITS = "bits above chance"
PASSAGE_TOKENS = 128  # of each domain, on which outputs of experts are compared

Results = dict[str, dict[str, dict[str, Any]]]  # by condition and seed

QUESTIONS: tuple[tuple[str, str, str], ...] = (
    ("token", "", "tokens"),
    ("previous token", "", "tokens"),
    ("next token", "", "tokens"),
    ("character class", "", "tokens"),
    ("position in word", "", "tokens"),
    ("word in sentence", "", "tokens"),
    ("position in context", "", "tokens"),
    ("position in row", "", "tokens"),
    ("domain", "", "tokens"),
    ("domain", "", "documents"),
    ("document", "", "tokens"),
    ("token", "domain", "tokens"),
    ("domain", "token", "tokens"),
    ("domain", "token", "documents"),
    ("document", "token", "tokens"),
    ("document", "domain", "tokens"),
    ("character class", "domain", "tokens"),
    ("domain", "character class", "tokens"),
    ("previous token", "token", "tokens"),
)
"""Attribute, its condition or none, and what chance permutes."""


def read_sweep() -> Results:
    """Returns what is measured of each arm, by condition and seed."""
    conditions = runpy.run_path(str(HERE / "sweep.py"))["CONDITIONS"]
    results: Results = {}
    for found in named_arms(SWEEP, conditions):
        print(f"{found.name}, seed {found.seed}", flush=True)
        by_seed = results.setdefault(found.name, {})
        by_seed[str(found.seed)] = measure(found.workdir)
        jax.clear_caches()
    return results


def measure(workdir: Path) -> dict[str, Any]:
    """Returns the last evaluation of a run, and what its experts specialise in."""
    run = open_run(workdir)
    measured: dict[str, Any] = {}
    for key in run.keys:
        if key.startswith("eval/"):
            measured[key] = run.last(key)
    if not run.is_dense:
        measured |= analyse(run)
    return measured


def analyse(run) -> dict[str, Any]:
    """Returns what the experts of a run specialise in."""
    model = run.load()
    corpus = model.corpus()
    labels = corpus.labels("validation")
    routed = route_corpus(model, corpus)
    domains_T = labels.domain_of_document[routed.documents_T]
    num_experts = routed.num_experts
    information = answer_questions(model, routed, domains_T, labels)
    vocabulary = vocabulary_specialisation(
        routed.tokens_T, routed.experts_NTK, model.tokenizer.vocab_size, num_experts
    )
    by_domain = domain_specialisation(
        domains_T, routed.experts_NTK, len(labels.domains), num_experts
    )
    share_NDE = by_domain.share_NDE / by_domain.uniform_N[:, None, None]
    outputs_NETD = expert_outputs(model.model, passages(corpus, labels))
    return {
        "layers": list(routed.layers),
        "tokens": len(routed.tokens_T),
        "documents": len(np.unique(routed.documents_T)),
        "information": information_table(information, routed.layers),
        "vocabulary": {"mean": vocabulary.mean_N.tolist(), "chance": vocabulary.chance_N.tolist()},
        "domains": {
            "names": list(labels.domains),
            "tokens": by_domain.tokens_D.tolist(),
            "share_over_uniform": share_NDE.round(4).tolist(),
        },
        "saturation": saturation(run, num_experts),
        "output_cka": [mean_of_pairs(linear_cka(outputs_ETD)) for outputs_ETD in outputs_NETD],
        "output_cosine": [mean_of_pairs(output_cosine(x_ETD)) for x_ETD in outputs_NETD],
    }


def answer_questions(model, routed, domains_T: np.ndarray, labels: Labels) -> list[Any]:
    """Returns the information of each of `QUESTIONS`."""
    of_tokens = attributes_of(
        routed.tokens_T, routed.rows_T, routed.positions_T, model.tokenizer.piece
    )
    attributes = {attribute.name: attribute for attribute in of_tokens}
    attributes["domain"] = Attribute("domain", domains_T, labels.domains)
    attributes["document"] = Attribute("document", routed.documents_T)
    answers = []
    for name, given, over in QUESTIONS:
        answer = expert_information(
            attributes[name],
            routed.experts_NTK,
            routed.num_experts,
            given=attributes.get(given),
            over=over,
            documents_T=routed.documents_T if over == "documents" else None,
            num_permutations=NUM_PERMUTATIONS[over],
        )
        answers.append(answer)
    return answers


def saturation(run, num_experts: int) -> dict[str, Any]:
    """Returns how much of the last routing each evaluation had; nothing without evaluations."""
    steps = run.evaluations.steps
    probes = [run.evaluations.read(step)["experts"] for step in steps]
    if not probes:
        return {}
    return {"steps": list(steps), "share": router_saturation(probes, num_experts).tolist()}


def passages(corpus: Corpus, labels: Labels) -> np.ndarray:
    """Returns one passage of each domain.

    It is the beginning of the first validation row whose passage belongs to one document.
    """
    found: dict[int, np.ndarray] = {}
    for row in corpus.rows("validation"):
        first_document = row["documents"][0]
        domain = int(labels.domain_of_document[first_document])
        is_one_document = (row["segments"][:PASSAGE_TOKENS] == 1).all()
        if is_one_document:
            found.setdefault(domain, row["tokens"][:PASSAGE_TOKENS])
        if len(found) == len(labels.domains):
            break
    return np.stack([found[domain] for domain in sorted(found)])


def mean_of_pairs(of_pairs_EE: np.ndarray) -> float:
    """Returns the mean over pairs of different experts."""
    return float(of_pairs_EE[~np.eye(len(of_pairs_EE), dtype=bool)].mean())


def by_seed(
    results: Results, condition: str, question: tuple[str, str, str], column: str
) -> np.ndarray:
    """Returns a column of the information table, `[seeds, layers]`."""
    values = []
    for found in results[condition].values():
        by_layer = []
        for row in found["information"]:
            if (row["attribute"], row["given"], row["over"]) == question:
                by_layer.append(row[column])
        values.append(by_layer)
    return np.array(values)


def spread(values: np.ndarray, form: str = "{:.3f}") -> str:
    """Returns the mean over seeds and layers, and the range of seeds."""
    seeds = values.reshape(len(values), -1).mean(axis=1)
    return f"{form.format(seeds.mean())} ({form.format(seeds.min())} to {form.format(seeds.max())})"


def name_of(question: tuple[str, str, str]) -> str:
    """Returns the name of a question in tables and the figure."""
    name, given, over = question
    if given:
        name += f" given {given}"
    if over == "documents":
        name += ", documents permuted"
    return name


def information_rows(results: Results) -> Iterator[str]:
    """Yields the rows of the table of each attribute's information."""
    yield "| attribute | bits | of these chance | 0 chance, 1 all | before training |"
    yield "|---|---|---|---|---|"
    for question in QUESTIONS:
        bits = by_seed(results, "moe", question, "information")
        chance = by_seed(results, "moe", question, "baseline")
        adjusted = by_seed(results, "moe", question, "adjusted")
        before = by_seed(results, "untrained", question, "adjusted")
        cells = (
            name_of(question),
            f"{bits.mean():.3f}",
            f"{chance.mean():.3f}",
            spread(adjusted),
            spread(before),
        )
        yield f"| {' | '.join(cells)} |"


def layer_rows(results: Results) -> Iterator[str]:
    """Yields the rows of the table by layer."""
    layers = first_result(results)["layers"]
    yield f"| bits above chance, by layer | {join_cells(layers, '{}')} |"
    yield f"|---|{'---|' * len(layers)}"
    for question in (
        ("token", "domain", "tokens"),
        ("domain", "token", "tokens"),
        ("domain", "token", "documents"),
    ):
        excess_N = by_seed(results, "moe", question, "excess").mean(axis=0)
        yield f"| {name_of(question)} | {join_cells(excess_N, '{:.3f}')} |"
    for name, read in LAYER_ROWS.items():
        values_SN = np.array([read(found) for found in results["moe"].values()])
        yield f"| {name} | {join_cells(values_SN.mean(axis=0), '{:.2f}')} |"


def busiest_share(found: dict[str, Any]) -> np.ndarray:
    """Returns the share of a domain's busiest expert over the uniform share, `[layers]`."""
    share_NDE = found["domains"]["share_over_uniform"]
    return np.max(share_NDE, axis=2).mean(axis=1)


LAYER_ROWS = {
    "vocabulary specialisation": lambda found: found["vocabulary"]["mean"],
    "the same by chance": lambda found: found["vocabulary"]["chance"],
    "busiest expert of a domain, over uniform": busiest_share,
    "outputs of two experts, cosine": lambda found: found["output_cosine"],
    "outputs of two experts, linear CKA": lambda found: found["output_cka"],
}


def saturation_rows(results: Results) -> Iterator[str]:
    """Yields the rows of the table of how much of the last routing each evaluation had."""
    first = first_result(results)
    steps = first["saturation"]["steps"]
    yield f"| step | {join_cells(steps, '{}')} |"
    yield f"|---|{'---|' * len(steps)}"
    share_RSN = np.array([found["saturation"]["share"] for found in results["moe"].values()])
    for n, layer in enumerate(first["layers"]):
        share_S = share_RSN[:, :, n].mean(axis=0)
        yield f"| layer {layer} | {join_cells(share_S, '{:.2f}')} |"


def loss_rows(results: Results) -> Iterator[str]:
    """Yields the rows of the table of losses by domain, of the MoE and the dense model."""
    names = first_result(results)["domains"]["names"]
    yield f"| nats per token | all | {' | '.join(names)} |"
    yield f"|---|{'---|' * (len(names) + 1)}"
    keys = ["eval/loss", *(f"eval/loss/{name}" for name in names)]
    for condition in ("moe", "dense"):
        rows = []
        for found in results[condition].values():
            rows.append([found[key] for key in keys])
        seeds = f"{len(rows)} seeds" if len(rows) > 1 else "1 seed"
        cells = join_cells(np.mean(rows, axis=0), "{:.3f}")
        yield f"| {condition}, {seeds} | {cells} |"


def first_result(results: Results) -> dict[str, Any]:
    """Returns the result of the first seed of the MoE."""
    return next(iter(results["moe"].values()))


def join_cells(values: np.ndarray, form: str) -> str:
    """Returns the cells of a row of a table."""
    return " | ".join(form.format(value) for value in values)


def tables(results: Results) -> str:
    """Returns all tables as Markdown."""
    parts = (information_rows, layer_rows, saturation_rows, loss_rows)
    return "\n\n".join("\n".join(part(results)) for part in parts) + "\n"


LOOKS = {
    ("token", "", "tokens"): ("#111111", "-"),
    ("token", "domain", "tokens"): (BLUE, "-"),
    ("domain", "token", "tokens"): (ORANGE, "-"),
    ("domain", "", "tokens"): ("#E69F00", "--"),
    ("character class", "", "tokens"): ("#56B4E9", "--"),
    ("previous token", "token", "tokens"): (PURPLE, "-."),
}
"""Questions that are drawn: colour and dash of each."""


def draw(results: Results) -> None:
    """Draws the information of attributes by layer.

    Lines are means of the seeds with their range; dotted lines are from before training.
    """
    num_seeds = len(results["moe"])
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
        draw_column(left, results, "excess", BITS)
        draw_column(right, results, "adjusted", "0: chance, 1: all of it")
        lines, names = left.get_legend_handles_labels()
        lines += [
            Patch(color=GREY, alpha=0.3, linewidth=0),
            Line2D([], [], color=GREY, ls=":", lw=1),
        ]
        names += [f"range of {num_seeds} seeds", "the same before training"]
        figure.legend(lines, names, loc="outside lower center", ncols=3)
        figure.savefig(HERE / "figure.png", dpi=PNG_DPI, facecolor="white")


def draw_column(axes: Axes, results: Results, column: str, label: str) -> None:
    """Draws a column of the information table, for the questions of `LOOKS`."""
    layers = first_result(results)["layers"]
    for question, (color, dashes) in LOOKS.items():
        values_SN = by_seed(results, "moe", question, column)
        before_SN = by_seed(results, "untrained", question, column)
        before_N = before_SN.mean(axis=0)
        mean_N = values_SN.mean(axis=0)
        low_N = values_SN.min(axis=0)
        high_N = values_SN.max(axis=0)
        axes.plot(layers, mean_N, dashes, color=color, label=name_of(question))
        axes.fill_between(layers, low_N, high_N, color=color, alpha=0.15, linewidth=0)
        axes.plot(layers, before_N, ":", color=color, lw=1)
    axes.set(xlabel="layer", ylabel=label, xticks=layers, ylim=(0, None))


def main() -> None:
    """Reads the sweep, unless it is in `results.json`; then makes tables and figure."""
    if "--from-results" not in sys.argv[1:]:
        RESULTS.write_text(json.dumps(read_sweep()) + "\n")
    results: Results = json.loads(RESULTS.read_text())
    draw(results)
    start, end = MARKS
    before, _, rest = PAGE.read_text().partition(start)
    PAGE.write_text(before + start + tables(results) + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
