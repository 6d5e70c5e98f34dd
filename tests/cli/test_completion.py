from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(sys.executable).parent / "qlora-export"


def completed(words: str, position: int) -> list[str]:
    asked = {"_QLORA_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    found = subprocess.run([SCRIPT], check=False, capture_output=True, text=True, env={**os.environ, **asked})
    assert found.stderr == ""
    return found.stdout.split()


def test_shells_complete_verbs_flags_and_choices() -> None:
    assert completed("qlora-export do", 1) == ["doctor"]
    assert "--adapter" in completed("qlora-export init --", 2)
    assert completed("qlora-export schema r", 2) == ["recipe", "report"]


def test_completion_can_be_shown_for_a_shell() -> None:
    asked = {**os.environ, "_QLORA_EXPORT_COMPLETE": "source_bash"}
    found = subprocess.run([SCRIPT], check=False, capture_output=True, text=True, env=asked)
    assert "complete -o default -F" in found.stdout
