"""`qlora-export verify`: whether a published model is still what was released."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_export.cli.options import Json, finish

if TYPE_CHECKING:
    from qlora_export.publish.verify import Verification


def verify(
    place: Annotated[str, typer.Argument(help="A folder, or a model on the Hub.", metavar="DIR|OWNER/NAME[@REV]")],
    sample: Annotated[
        str, typer.Option("--sample", help="Read a random share only, as in 5%; opens nothing.")
    ] = "100%",
    text: Annotated[Path | None, typer.Option("--text", help="The text of the drift check: repeat its sample.")] = None,
    signer: Annotated[
        str | None, typer.Option("--signer", help="Check the signature: key:PUBLIC.pem or sigstore:IDENTITY,ISSUER.")
    ] = None,
    opens: Annotated[bool, typer.Option("--open/--no-open", help="Open every artifact in its runtime.")] = True,
    as_json: Json = False,
) -> None:
    """Compare a published model, or a folder, with what was released; exit 10 when anything differs."""
    from qlora_export.publish.hub.process import Client
    from qlora_export.publish.verify import Wanted, parse_share
    from qlora_export.publish.verify import verify as compare

    found = compare(place, Wanted(parse_share(sample), opens, text, signer), Client())
    data = {"schema": 1, "exit_code": 0, **asdict(found)}
    finish((data, lambda: _show(found), 0), as_json)


def _show(found: Verification) -> None:
    from qlora_export.report.terminal import size

    commit = f" at commit {found.commit}" if found.commit else ""
    print(f"{found.place}{commit}: {found.files} of {found.listed} files agree, {size(found.bytes)} read")
    print(f"signature: {found.signature}")
    for name, proof in found.opened.items():
        measured = f", {proof.nll:.5f} nats a token as released ({proof.nll_released:.5f})" if proof.nll else ""
        print(f"{name}: opens{measured}")
