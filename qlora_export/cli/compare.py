"""`qlora-export compare`: every bit width and way to round, on the same tokens: size, cost, speed and drift."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qlora_export.cli.options import (
    Adapters,
    Base,
    Calibration,
    Device,
    Json,
    OntoName,
    Out,
    Output,
    ProtocolName,
    Settings,
    Text,
    Training,
    Workers,
    accelerator_name,
    finish,
    recipe_from,
    require_folders,
    run_options,
)

RecipePath = Annotated[Path | None, typer.Argument(help="A recipe; or use the flags instead.", metavar="[RECIPE]")]
Compared = Annotated[
    list[str] | None,
    typer.Option(
        "--formats",
        help="What to compare, as in nf4:calibrated,int8: FORMAT[:ROUNDING][@ONTO] with commas; repeat "
        "[default: one of every width, and all roundings of 4 bits].",
    ),
]
Csv = Annotated[Path | None, typer.Option("--csv", help="Also write the rows to this file.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", help="Also draw size against drift: .svg or .png; needs the extra [report].")
]
Html = Annotated[Path | None, typer.Option("--html", help="Also write a page with everything to this file.")]


def compare(
    recipe: RecipePath = None,
    formats: Compared = None,
    base: Base = None,
    adapter: Adapters = None,
    onto: OntoName = None,
    training: Training = None,
    text: Text = None,
    protocol: ProtocolName = None,
    calibration: Calibration = None,
    settings: Settings = None,
    out: Out = None,
    workers: Workers = None,
    device: Device = None,
    as_json: Json = False,
    output: Output = None,
    csv: Csv = None,
    plot: Plot = None,
    html: Html = None,
) -> None:
    """Build and measure an artifact of every bit width and rounding, and say which is the smallest that is good enough.

    The artifacts stay in compare-trial of the run folder, for the next comparison; `clean` removes them.
    """
    require_folders(output, csv, plot, html)
    if plot is not None:
        from qlora_export.report.comparison_plot import require_plot

        require_plot(plot)
    from qlora_export.pipeline.compare import compare as compare_formats
    from qlora_export.report.comparison import comparison_data, print_comparison, write_comparison_csv

    flags = {
        "--base": base,
        "--adapter": adapter,
        "--format": None if recipe else ["fp32"],
        "--onto": onto,
        "--training-quantization": training,
        "--text": text,
        "--protocol": protocol,
        "--calibration": calibration,
    }
    facts = recipe_from(recipe, flags, settings or [])
    options = replace(run_options(recipe, out, workers), accelerator=accelerator_name(device))
    found = compare_formats(facts, options, formats or [])
    if csv is not None:
        write_comparison_csv(found, csv)
    if plot is not None:
        from qlora_export.report.comparison_plot import write_comparison_plot

        write_comparison_plot(found, plot)
    data = comparison_data(found)
    if html is not None:
        from qlora_export.report.html.comparison_page import write_comparison_page

        write_comparison_page(data, html)
    finish((data, lambda: print_comparison(found), 0), as_json, output)
