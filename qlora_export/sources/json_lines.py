"""A line of JSON that others wrote, as a value whose texts a tokenizer can read."""

from __future__ import annotations

import json
from typing import Any

from qlora_export.errors import InputError


def value_of_line(line: str, place: str, hint: str) -> Any:
    """The value; raises InputError for what is no JSON, nested too deep, or holds half of a surrogate pair."""
    try:
        found = json.loads(line)
        # Escapes alone can spell what UTF-8 has no bytes for.
        if "\\u" in line:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):x}"
        raise InputError(f"{place} has half of a surrogate pair, {half}, which is no character", hint) from None
    except RecursionError:
        raise InputError(f"{place} is nested too deep for JSON", hint) from None
    except ValueError:
        raise InputError(f"{place} is not valid JSON", hint) from None
    return found
