"""The signature of a published folder, model.sig, by OpenSSF model signing.

    model.sig   a Sigstore bundle: a DSSE envelope around an in-toto statement that lists every file with its sha256

Signed are all files of the folder but the signature, those the caller leaves out, and what git and the Hub's client
keep there for themselves. The statement carries the folder's last name, so a folder is staged under a name that may be
read. An ECDSA signature is random: signing twice gives two signatures, so one that holds is kept. Signing and verifying
each read the folder once.
"""

from __future__ import annotations

import ast
import base64
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from qlora_export.errors import InputError, VerifyMismatch
from qlora_export.publish.signers import (
    KeyVerifier,
    Signer,
    SigstoreSigner,
    Verifier,
    library,
    open_signer,
    open_verifier,
    public_key,
    sigstore_errors,
)

# Where the Hub's client notes what it downloaded into a folder; what git keeps there, model-signing leaves out itself.
CLIENT_NOTES = Path(".cache/huggingface")
MALFORMED = (LookupError, TypeError, AttributeError, RecursionError)


def require_signer(signer: Signer) -> None:
    """Raise what `sign` would raise for want of the package, the key or the identity; before any work."""
    open_signer(signer)


def sign(folder: Path, signer: Signer, signature: Path, ignored: Sequence[Path]) -> None:
    """Write the signature of all files in the folder but the ignored, which may be relative to it.

    Raises EnvironmentProblem without the package, InputError for a key that cannot sign or what is no plain file,
    NotAuthorised without an identity, RemoteProblem when Sigstore does not answer.
    """
    config = open_signer(signer).set_hashing_config(_hashing(folder, signature, ignored))
    partial = signature.with_name(f".{signature.name}.partial")
    partial.unlink(missing_ok=True)
    with sigstore_errors() if isinstance(signer, SigstoreSigner) else nullcontext():
        try:
            config.sign(folder, partial)
        except ValueError as error:
            raise InputError(f"{folder}: cannot be signed: {error}", "sign a folder of plain files") from None
    partial.replace(signature)


def verify_signature(folder: Path, signature: Path, identity: Verifier, ignored: Sequence[Path]) -> None:
    """Raise VerifyMismatch naming what differs unless the signature is by `identity` and about these very files.

    Links to files are read through, since the Hub's cache is made of them; a link to a folder would not be looked into.
    Raises EnvironmentProblem without the package, InputError for a key that cannot verify.
    """
    config = open_verifier(identity).set_hashing_config(_hashing(folder, signature, ignored).set_allow_symlinks(True))
    hint = "these are not the files that were signed, or somebody else signed them: do not use them"
    if not signature.is_file():
        raise VerifyMismatch(f"{signature}: there is no signature", "was the folder published with publish.sign?")
    if linked := next((path for path in sorted(folder.rglob("*")) if path.is_symlink() and path.is_dir()), None):
        raise VerifyMismatch(f"{linked}: a link to a folder is in no signature", hint)
    from cryptography.exceptions import InvalidSignature
    from sigstore.errors import VerificationError

    try:
        with redirect_stdout(sys.stderr):
            config.verify(folder, signature)
    except InvalidSignature:
        raise VerifyMismatch(f"{signature}: was changed, or is by another key", hint) from None
    except (ValueError, VerificationError) as error:
        raise VerifyMismatch(f"{signature}: {_in_words(str(error))}", hint) from None
    except MALFORMED as error:
        raise VerifyMismatch(f"{signature}: no signature bundle ({type(error).__name__}: {error})", hint) from None


def signature_holds(folder: Path, signature: Path, signer: Signer, ignored: Sequence[Path]) -> bool:
    """Whether the signature there is one that `signer` could have made of these files, so that it can be kept.

    A key's signature is verified in full. Whom Sigstore will name is known only once it has signed, so of such a
    signature only the list of files is compared; who made it is for those who verify.
    """
    if not signature.is_file():
        return False
    if isinstance(signer, SigstoreSigner):
        return _certified_files(signature) == _files(folder, signature, ignored)
    with tempfile.TemporaryDirectory() as place:
        trusted = Path(place) / "key.pub.pem"
        trusted.write_bytes(public_key(signer))
        try:
            verify_signature(folder, signature, KeyVerifier(trusted), ignored)
        except VerifyMismatch:
            return False
    return True


def _hashing(folder: Path, signature: Path, ignored: Sequence[Path]) -> Any:
    """Which files count, the same for signing and verifying."""
    left_out = [CLIENT_NOTES, _inside(folder, signature), *(_inside(folder, folder / path) for path in ignored)]
    config = library("hashing").Config().use_file_serialization(hashing_algorithm="sha256")
    return config.set_ignored_paths(paths=[path for path in left_out if path is not None])


def _inside(folder: Path, path: Path) -> Path | None:
    """A path as seen from the folder, whatever it links to; None when it lies elsewhere."""
    place = path.parent.resolve() / path.name
    return place.relative_to(folder.resolve()) if place.is_relative_to(folder.resolve()) else None


def _files(folder: Path, signature: Path, ignored: Sequence[Path]) -> dict[str, str]:
    """sha256 of every file that is to be signed."""
    found = _hashing(folder, signature, ignored).set_allow_symlinks(True).hash(folder)
    return {item.identifier: item.digest.digest_hex for item in found.resource_descriptors()}


def _certified_files(signature: Path) -> dict[str, str] | None:
    """sha256 of every file that a bundle with a certificate lists; None when it is no such bundle."""
    try:
        bundle: Any = json.loads(signature.read_bytes())
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        found = {item["name"]: item["digest"] for item in statement["predicate"]["resources"]}
        material = bundle["verificationMaterial"]
        return found if "certificate" in material or "x509CertificateChain" in material else None
    except (ValueError, *MALFORMED):
        return None


def _in_words(text: str) -> str:
    """What differs, which model-signing tells as the text of a Python list, as one sentence without the raw digests."""
    start, found, rest = text.partition(": [")
    try:
        items = [item.partition(": Expected ")[0] for item in ast.literal_eval(f"[{rest}")] if found else []
    except (ValueError, SyntaxError, AttributeError):
        return text
    return f"{start.lower()}: {'; '.join(items)}" if items else text
