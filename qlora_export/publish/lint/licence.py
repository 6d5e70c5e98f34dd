"""The licence of a release: there is one, and it does not promise more than the base's allows.

Well-known Hub ids are put into classes, from permissive to non-commercial. A release may move to a stricter class, or
within one; only a restricted licence (Llama, Gemma, OpenRAIL) is a text of its own, which stays. Of what is not known
here nothing is promised: it must be the base's own id, or `other` over a permissive base. No legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qlora_export.errors import Problem
from qlora_export.publish.lint.contents import Contents
from qlora_export.publish.lint.rules import finding

PERMISSIVE, COPYLEFT, RESTRICTED, NON_COMMERCIAL = range(4)
CLASSES = {
    PERMISSIVE: re.compile(
        r"mit|apache-2\.0|bsd(-.*)?|isc|zlib|unlicense|cc0-1\.0|wtfpl|bsl-1\.0|postgresql|ncsa|afl-3\.0|artistic-2\.0"
        r"|cc-by-\d\.\d|cdla-permissive-\d\.\d|odc-by|pddl|ms-pl|ecl-2\.0"
    ),
    COPYLEFT: re.compile(
        r"a?gpl(-\d\.\d)?|lgpl(-.*)?|mpl-2\.0|epl-\d\.0|eupl-1\.[12]|osl-3\.0|gfdl|cc-by-sa-\d\.\d|odbl"
    ),
    RESTRICTED: re.compile(
        r"openrail(\+\+)?|.+-openrail-m|bigscience-bloom-rail-1\.0|llama\d.*|gemma|deepfloyd-if-license"
    ),
    NON_COMMERCIAL: re.compile(r"cc-by-n[cd]-.*|fair-noncommercial-research-license|apple-amlr|intel-research"),
}
LICENCE_FILE = re.compile(r"LICEN[CS]E(\.(md|txt))?")
CARD = "README.md"


def licence_problems(contents: Contents, stated: str | None, base: str | None) -> Iterator[Problem]:
    """A finding where no licence is stated, or one that the base's does not allow."""
    if not stated:
        if not any(LICENCE_FILE.fullmatch(name) for name in contents.names):
            what = "no licence is stated, and there is no LICENSE file"
            yield finding("licence", CARD, what, "set publish.card.license to the base's licence")
        return
    if base and not allowed(stated, base):
        what = f"the licence {stated} is not known to be as strict as the base's, {base}"
        yield finding("licence", CARD, what, f"set publish.card.license: {base}")


def allowed(stated: str, base: str) -> bool:
    """Whether a model may be released under `stated` when its base is under `base`, as far as the ids tell."""
    if stated.lower() == base.lower():
        return True
    target, source = _class_of(stated), _class_of(base)
    if source == PERMISSIVE and stated.lower() == "other":
        return True
    if target is None or source is None:
        return False
    return target > source or (target == source != RESTRICTED)


def _class_of(identifier: str) -> int | None:
    return next((place for place, known in CLASSES.items() if known.fullmatch(identifier.lower())), None)
