"""Inspect a checkpoint: how each MoE layer routes text, and which experts a prompt visits.

  moejax inspect --hf=mixtral-8x7b --html=mixtral.html
  moejax inspect --workdir=runs/tiny_moe --prompt="The people of the United States"
  moejax inspect --hf=mixtral-8x7b --data.files="texts/*.txt" --rows=4 --json

A released model needs no record of training: its folder is enough, and nothing is written there. It
routes rows of the speeches, or of --data.files. One that came without a tokenizer routes token ids,
--prompt="5 17 3". The page shows more than the table: tokens that experts prefer, what tells about
experts, which go together, and with --counterfactuals what other routing would cost. It works on
one device.
"""

from pathlib import Path

from absl import flags
from absl.flags import FlagValues

from moejax.cli.errors import UsageError
from moejax.cli.options import (
    define_hf,
    define_json,
    define_text,
    define_workdir,
    read_file_to_write,
    read_hf,
    read_prompts,
    read_text_places,
    read_workdir,
    refuse_several_processes,
)
from moejax.cli.printable import printable
from moejax.cli.tables import print_counterfactuals, print_table
from moejax.compilation_cache import keep_compilation_cache
from moejax.config import Config
from moejax.inference.load import LoadedRun, load_run
from moejax.inspection.analysis.trace_view import as_text
from moejax.inspection.checkpoint.measure import (
    Inspection,
    InspectionError,
    check_without_tokenizer,
    inspect_checkpoint,
    no_experts,
)
from moejax.inspection.checkpoint.page import FILE_NAME, note_of, render_inspection, summary_rows
from moejax.inspection.report.page import write_page
from moejax.interop.hf.load import read_config as read_released_config
from moejax.interop.hf.released import check_rows_are_outside, load_released
from moejax.interop.hf.text.folder import find_text
from moejax.strict_json import to_json
from moejax.training.run_directory.layout import read_config


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values)
    define_hf(values)
    define_text(values)
    define_json(values)
    flags.DEFINE_integer("step", None, "a saved step; default the newest", flag_values=values)
    flags.DEFINE_multi_string(
        "prompt",
        None,
        "a text to trace; repeat it for more; default the beginning of a validation row",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "rows",
        None,
        "validation rows to route, spread over the split; default what takes about a minute",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "counterfactuals",
        False,
        "also evaluate rows under other routing, which takes a pass for each change; by default a "
        "sixteenth of the rows",
        flag_values=values,
    )
    flags.DEFINE_string(
        "html",
        "",
        f"the page, FILE.html; default {FILE_NAME} in the run directory, and none with --hf",
        flag_values=values,
    )


def run(values: FlagValues, rest: list[str]) -> None:
    """Inspects, writes the page and prints the table and the traces."""
    refuse_several_processes("inspect")
    keep_compilation_cache()
    released = read_hf(values)
    folder = released or read_workdir(values)
    page = _page(values, folder, is_released=released is not None)
    loaded = _load(values, folder, is_released=released is not None)
    inspection = inspect_checkpoint(
        loaded,
        read_prompts(values),
        max_rows=values.rows,
        places=read_text_places(values),
        with_counterfactuals=values.counterfactuals,
    )
    if page is not None:
        write_page(page, render_inspection(inspection, loaded, folder.name))
    if values.json:
        written = {"page": None if page is None else str(page)}
        print(to_json(inspection.to_dict() | written))
    else:
        _print(inspection, loaded.config, page)


def _page(values: FlagValues, folder: Path, *, is_released: bool) -> Path | None:
    """Returns where the page is written; None if it is not."""
    if values.html:
        page = read_file_to_write(values.html, "--html")
        if is_released and page.is_relative_to(folder):
            raise UsageError(
                f"--html={values.html} is in the released model's folder, where nothing is "
                "written; name a file elsewhere"
            )
        return page
    return None if is_released else read_file_to_write(str(folder / FILE_NAME), "--workdir")


def _load(values: FlagValues, folder: Path, *, is_released: bool) -> LoadedRun:
    """Returns the model; a dense one is refused before its weights are read."""
    if not is_released:
        _refuse_dense(values.workdir, read_config(folder))
        return load_run(folder, values.step)
    if values.step is not None:
        raise UsageError(f"--step={values.step} goes with --workdir only; leave it out")
    config, _ = read_released_config(folder)
    _refuse_dense(values.hf, config)
    places = read_text_places(values)
    check_rows_are_outside(folder, places)
    if find_text(folder) is None:  # said before the weights are read, which may take long
        check_without_tokenizer(read_prompts(values), values.rows, places, values.counterfactuals)
    return load_released(folder)


def _refuse_dense(name: str, config: Config) -> None:
    if not config.num_moe_layers:
        raise InspectionError(no_experts(name))


def _print(inspection: Inspection, config: Config, page: Path | None) -> None:
    """Prints the table by layer, the traces, and the changed routing."""
    print_table(summary_rows(inspection.layers), f"Routing by MoE layer: {inspection.text}")
    if note := note_of(config):
        print(note)
    for found in inspection.traces:
        print(printable(as_text(found, "--json")), end="\n\n")
    if inspection.counterfactuals is not None:
        print_counterfactuals(inspection.counterfactuals)
    if page is not None:
        print(printable(f"page: {page}"))
