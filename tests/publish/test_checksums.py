from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.artifact import FileFacts, file_facts
from qlora_export.errors import InputError, Refused
from qlora_export.publish.checksums import checksums, read_checksums

DIGEST = hashlib.sha256(b"").hexdigest()
HOSTILE = [
    "/etc/passwd",
    "../up",
    "a/../../b",
    "a//b",
    "./a",
    "a/",
    "",
    "-",
    "a\nb",
    "a\\b",
    "a\0b",
    "a\x1b[31m",
    "a\u202eb",
]


def facts(*names: str) -> FileFacts:
    return {name: {"bytes": 0, "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in names}


def test_sha256sum_checks_what_is_written(tmp_path: Path) -> None:
    names = ["config.json", "onnx-int4/model.onnx", "with two  spaces", "*star", "-dash", " lead", "ünïcode.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "SHA256SUMS").write_bytes(checksums({name: file_facts(tmp_path / name) for name in names}))

    def check() -> subprocess.CompletedProcess[str]:
        command = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    good = check()
    assert good.returncode == 0, good.stderr
    assert good.stdout.count(": OK") == len(names)
    (tmp_path / "config.json").write_text("changed")
    assert "config.json: FAILED" in check().stdout


def test_the_order_of_the_files_does_not_matter() -> None:
    assert checksums(facts("a", "b/c")) == checksums(facts("b/c", "a"))
    assert checksums(facts("b", "a")).splitlines()[0].endswith(b"  a")


@given(st.text(max_size=12) | st.lists(st.text("ab./\\- \n*", max_size=4), max_size=4).map("/".join))
def test_a_name_comes_back_or_is_refused(name: str) -> None:
    files = facts() | {name: {"bytes": 0, "sha256": DIGEST}}
    try:
        content = checksums(files)
    except Refused:
        line = f"{DIGEST}  {name}\n".encode(errors="surrogatepass")
        with pytest.raises(InputError):
            read_checksums(line)
        return
    assert read_checksums(content) == {name: DIGEST}
    assert Path("/folder", name).resolve().is_relative_to("/folder")


@given(st.dictionaries(st.from_regex(r"[a-z]{1,3}(/[a-z .*-]{1,2}[a-z])?", fullmatch=True), st.binary(max_size=2)))
def test_files_come_back(contents: dict[str, bytes]) -> None:
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    written = checksums({name: {"bytes": 0, "sha256": sha256} for name, sha256 in expected.items()})
    assert not contents or read_checksums(written) == expected


@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from([DIGEST.encode(), b"  ", b" *", b"a", b"\n", b"\r", b"/"])).map(b"".join)
)
def test_anything_else_is_an_input_error(content: bytes) -> None:
    try:
        found = read_checksums(content)
    except InputError as error:
        assert "SHA256SUMS: line" in error.message
    else:
        assert sorted(content.splitlines()) == checksums({n: {"sha256": s} for n, s in found.items()}).splitlines()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(Refused, match="cannot stand in SHA256SUMS"):
        checksums({name: {"bytes": 0, "sha256": DIGEST}})
    with pytest.raises(InputError, match="SHA256SUMS: line [23]"):
        read_checksums(f"{DIGEST}  good\n{DIGEST}  {name}\n".encode())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{DIGEST} *binary", "line 3 is no sha256 with a name"),
        (f"{DIGEST.upper()}  a", "line 3 is no sha256 with a name"),
        (f"{DIGEST[:-1]}  a", "line 3 is no sha256 with a name"),
        ("", "line 3 is no sha256 with a name"),
        ("# comment", "line 3 is no sha256 with a name"),
        (f"{DIGEST}  one", "line 3: 'one' is there twice"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_checksums(f"{DIGEST}  one\n{DIGEST}  two\n{line}\n".encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 has no end"),
        (f"{DIGEST}  one\n{DIGEST}  tw".encode(), "line 2 has no end"),
        (f"{DIGEST}  one\n{DIGEST}  ".encode() + b"\xff\n", "line 2 is not UTF-8"),
    ],
)
def test_a_file_that_was_cut_short(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_checksums(content)
