from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_export.errors import EnvironmentProblem, InputError, NotAuthorised, RemoteProblem, UsageError, VerifyMismatch
from qlora_export.publish.model_signature import (
    require_signer,
    sign,
    signature_holds,
    verify_signature,
)
from qlora_export.publish.signers import (
    KeySigner,
    KeyVerifier,
    SigstoreSigner,
    SigstoreVerifier,
    parse_signer,
    parse_verifier,
)

IGNORED = [Path("README.md")]
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def write_key(path: Path, key: PrivateKey, encryption: KeySerializationEncryption | None = None) -> KeySigner:
    """A private key as PEM, and its public half beside it."""
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return KeySigner(path)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> KeySigner:
    return write_key(tmp_path_factory.mktemp("keys") / "key.pem", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def verifier(signer: KeySigner) -> KeyVerifier:
    return KeyVerifier(signer.private_key.with_suffix(".pub"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published folder, not signed yet."""
    folder = tmp_path / "acme--bot@main"
    (folder / "qlora-export").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "qlora-export/report.json", "README.md", ".gitattributes"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def signature(folder: Path, signer: KeySigner) -> Path:
    path = folder / "model.sig"
    sign(folder, signer, path, IGNORED)
    return path


def test_a_signature_names_every_file_but_the_ignored(folder: Path, signature: Path) -> None:
    envelope = json.loads(signature.read_bytes())["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    names = [item["name"] for item in statement["predicate"]["resources"]]
    assert names == ["config.json", "model.safetensors", "qlora-export/report.json"]
    assert statement["subject"][0]["name"] == "acme--bot@main"
    assert str(folder.parent) not in json.dumps(statement)
    assert not list(folder.glob(".*.partial"))


def edit_card(folder: Path) -> Path:
    (folder / "README.md").write_text("edited on the Hub")
    (folder / ".gitattributes").unlink()
    return folder


def download(folder: Path) -> Path:
    notes = folder / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text("a commit and a date")
    return folder.rename(folder.with_name("my-copy"))


def link_as_the_cache_does(folder: Path) -> Path:
    snapshot, blobs = folder.with_name("snapshot"), folder.with_name("blobs")
    blobs.mkdir()
    for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    return snapshot


@pytest.mark.parametrize("change", [lambda folder: folder, edit_card, download, link_as_the_cache_does])
def test_what_people_and_the_hub_change_does_not_matter(
    folder: Path, signature: Path, verifier: KeyVerifier, change: Callable[[Path], Path]
) -> None:
    found = change(folder)
    verify_signature(found, found / signature.name, verifier, IGNORED)


@pytest.mark.parametrize("spelling", ["absolute", "relative"])
def test_ignored_paths_may_be_absolute_and_the_folder_relative(
    folder: Path, verifier: KeyVerifier, signer: KeySigner, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    place = folder if spelling == "absolute" else Path(folder.name)
    sign(place, signer, place / "model.sig", [place / "README.md"] if spelling == "absolute" else IGNORED)
    (folder / "README.md").write_text("edited")
    verify_signature(place, folder / "model.sig", verifier, [folder / "README.md"] if place == folder else IGNORED)


def change_file(folder: Path) -> None:
    (folder / "config.json").write_text("changed!")


def add_file(folder: Path) -> None:
    (folder / "qlora-export/evil.py").write_text("import os")


def remove_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def link_folder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "linked").symlink_to(folder.parent / "elsewhere")


def empty_signature(folder: Path) -> None:
    (folder / "model.sig").write_text("{}")


def lose_signature(folder: Path) -> None:
    (folder / "model.sig").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (change_file, r"model\.sig: signature mismatch: Hash mismatch for 'config\.json'$"),
        (add_file, r"signature mismatch: Extra files found in model .*: qlora-export/evil\.py$"),
        (remove_file, r"signature mismatch: Missing files in model .*: model\.safetensors$"),
        (link_folder, r"linked: a link to a folder is in no signature"),
        (empty_signature, r"model\.sig: no signature bundle \(KeyError"),
        (lose_signature, r"model\.sig: there is no signature"),
    ],
)
def test_harm_is_found_and_named(
    folder: Path, signature: Path, signer: KeySigner, verifier: KeyVerifier, harm: Callable[[Path], None], message: str
) -> None:
    harm(folder)
    with pytest.raises(VerifyMismatch, match=message):
        verify_signature(folder, signature, verifier, IGNORED)
    assert not signature_holds(folder, signature, signer, IGNORED)


def test_all_differences_are_named_at_once(folder: Path, signature: Path, verifier: KeyVerifier) -> None:
    change_file(folder)
    add_file(folder)
    with pytest.raises(VerifyMismatch, match=r"evil\.py; Hash mismatch for 'config\.json'"):
        verify_signature(folder, signature, verifier, IGNORED)


def test_another_key_is_another_signer(folder: Path, signature: Path, tmp_path: Path) -> None:
    other = write_key(tmp_path / "other.pem", ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(VerifyMismatch, match="Key mismatch"):
        verify_signature(folder, signature, KeyVerifier(tmp_path / "other.pub"), IGNORED)
    assert not signature_holds(folder, signature, other, IGNORED)


def test_a_signed_list_cannot_be_rewritten(folder: Path, signature: Path, verifier: KeyVerifier) -> None:
    change_file(folder)
    bundle = json.loads(signature.read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["serialization"]["ignore_paths"].append("config.json")
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    signature.write_text(json.dumps(bundle))
    with pytest.raises(VerifyMismatch, match="was changed, or is by another key"):
        verify_signature(folder, signature, verifier, IGNORED)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_signature_is_a_mismatch(
    folder: Path, signature: Path, verifier: KeyVerifier, data: st.DataObject
) -> None:
    good = signature.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    damaged = data.draw(st.sampled_from([good[:place], good[:place] + b"0" + good[place + 1 :], good[place:]]))
    copy = folder.with_name("damaged.sig")
    copy.write_bytes(damaged)
    try:
        verify_signature(folder, copy, verifier, [*IGNORED, Path("model.sig")])
    except VerifyMismatch:
        return
    assert _signed(damaged) == _signed(good)


def _signed(bundle: bytes) -> bytes:
    return base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"])


def test_a_signature_that_holds_can_be_kept(folder: Path, signature: Path, signer: KeySigner) -> None:
    first = signature.read_bytes()
    edit_card(folder)
    assert signature_holds(folder, signature, signer, IGNORED)
    assert signature.read_bytes() == first
    sign(folder, signer, signature, IGNORED)
    assert signature.read_bytes() != first


def test_of_a_sigstore_signature_the_files_are_compared(folder: Path, signature: Path) -> None:
    assert not signature_holds(folder, signature, SigstoreSigner(), IGNORED)
    bundle = json.loads(signature.read_bytes())
    bundle["verificationMaterial"] = {"certificate": {"rawBytes": ""}}
    signature.write_text(json.dumps(bundle))
    assert signature_holds(folder, signature, SigstoreSigner(), IGNORED)
    linked = link_as_the_cache_does(folder)
    assert signature_holds(linked, linked / "model.sig", SigstoreSigner(), IGNORED)
    change_file(folder)
    assert not signature_holds(folder, signature, SigstoreSigner(), IGNORED)


def test_the_tool_of_model_signing_verifies_it(folder: Path, signature: Path, verifier: KeyVerifier) -> None:
    edit_card(folder)
    options = ["--signature", str(signature), "--public_key", str(verifier.public_key)]

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = run()
    assert good.returncode == 0, good.stderr
    change_file(folder)
    assert run().returncode != 0


def test_a_link_is_not_signed(folder: Path, signer: KeySigner) -> None:
    (folder / "link.json").symlink_to(folder / "config.json")
    with pytest.raises(InputError, match="cannot be signed: .*link.json"):
        sign(folder, signer, folder / "model.sig", IGNORED)
    assert not (folder / "model.sig").exists()


def missing(path: Path) -> None:
    path.unlink(missing_ok=True)


def garbage(path: Path) -> None:
    path.write_text("-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n")


def with_password(path: Path) -> None:
    write_key(path, ec.generate_private_key(ec.SECP256R1()), BestAvailableEncryption(b"secret"))


def of_rsa(path: Path) -> None:
    write_key(path, rsa.generate_private_key(65537, 2048))


def of_a_rare_curve(path: Path) -> None:
    write_key(path, ec.generate_private_key(ec.SECP256K1()))


def the_public_half(path: Path) -> None:
    write_key(path, ec.generate_private_key(ec.SECP256R1()))
    path.with_suffix(".pub").replace(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "key.pem: cannot be read: No such file"),
        (garbage, "key.pem: no PEM key of the kind that is needed"),
        (with_password, "key.pem: the key has a password"),
        (of_rsa, "key.pem: not an elliptic curve key"),
        (of_a_rare_curve, "key.pem: Unsupported key for curve 'secp256k1'"),
        (the_public_half, "key.pem: no PEM key of the kind that is needed"),
    ],
)
def test_a_key_that_cannot_sign_is_found_before_any_work(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "key.pem")
    with pytest.raises(InputError, match=message) as caught:
        require_signer(KeySigner(tmp_path / "key.pem"))
    assert "openssl ecparam" in caught.value.hint
    assert "secret" not in caught.value.message


def test_a_private_key_does_not_verify(folder: Path, signature: Path, signer: KeySigner) -> None:
    with pytest.raises(InputError, match="key.pem: no PEM key of the kind that is needed") as caught:
        verify_signature(folder, signature, KeyVerifier(signer.private_key), IGNORED)
    assert "-pubout" in caught.value.hint


def test_without_the_package_there_is_a_hint(signer: KeySigner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    with pytest.raises(EnvironmentProblem, match="signatures need model-signing") as caught:
        require_signer(signer)
    assert caught.value.hint == "pip install 'qlora-export[sign]'"


def bare_environment(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No CI around, nothing cached, and a network that refuses."""
    for name in set(os.environ) - {"PATH"}:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")


def test_nobody_is_asked_who_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare_environment(monkeypatch, tmp_path)
    with pytest.raises(NotAuthorised, match="sigstore: this process has no identity to sign as"):
        require_signer(SigstoreSigner())
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    with pytest.raises(
        NotAuthorised, match="sigstore: GitHub: missing or insufficient OIDC token permissions"
    ) as caught:
        require_signer(SigstoreSigner())
    assert "id-token: write" in caught.value.hint


def test_sigstore_out_of_reach_is_worth_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("GITLAB_CI", "true")
    claims = base64.urlsafe_b64encode(json.dumps({"aud": "sigstore"}).encode()).decode().rstrip("=")
    monkeypatch.setenv("SIGSTORE_ID_TOKEN", f"e30.{claims}.e30")
    with pytest.raises(RemoteProblem, match="sigstore: "):
        require_signer(SigstoreSigner())


def test_who_signs(tmp_path: Path) -> None:
    assert parse_signer("sigstore") == SigstoreSigner()
    assert parse_signer("key:release.pem", tmp_path) == KeySigner(tmp_path / "release.pem")
    assert parse_signer("key:/etc/release.pem", tmp_path) == KeySigner(Path("/etc/release.pem"))
    workflow = "https://github.com/acme/bot/.github/workflows/release.yml@refs/tags/v1,2"
    issuer = "https://token.actions.githubusercontent.com"
    assert parse_verifier(f"sigstore:{workflow},{issuer}") == SigstoreVerifier(workflow, issuer)
    assert parse_verifier("key:release.pub", tmp_path) == KeyVerifier(tmp_path / "release.pub")


@pytest.mark.parametrize("text", ["", "key", "key:", "release.pem", "sigstore:", "gpg:me", "KEY:x"])
def test_who_signs_is_said_in_one_of_two_ways(text: str) -> None:
    with pytest.raises(UsageError, match="does not say who signs") as caught:
        parse_signer(text)
    assert "key:FILE or sigstore" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["", "key:", "sigstore", "sigstore:me@acme.com", "sigstore:,https://a", "sigstore:a,b"]
)
def test_who_is_expected_is_said_in_one_of_two_ways(text: str) -> None:
    with pytest.raises(UsageError, match="does not say whose signature is expected") as caught:
        parse_verifier(text)
    assert "sigstore:IDENTITY,ISSUER" in caught.value.hint
