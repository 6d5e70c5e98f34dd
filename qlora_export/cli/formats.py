"""`qlora-export formats`: what can be made."""

from __future__ import annotations

from qlora_export.cli.options import Json, finish


def formats(as_json: Json = False) -> None:
    """List the formats: what each is, its size, and the runtime that opens it."""
    from qlora_export.report.offers import offers, offers_data, offers_table
    from qlora_export.report.terminal import console_for_result

    found = offers()
    finish((offers_data(found), lambda: console_for_result().print(offers_table(found)), 0), as_json)
