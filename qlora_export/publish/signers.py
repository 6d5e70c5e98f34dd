"""Who signs and who is trusted: an EC key in a PEM file, or an identity that Sigstore vouches for.

    key:FILE    key:PUBLIC.pem    sigstore    sigstore:IDENTITY,ISSUER

A key file is named in errors, its content never. model-signing and sigstore are imported only when somebody signs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from qlora_export.errors import EnvironmentProblem, InputError, NotAuthorised, RemoteProblem, UsageError

NEW_KEY = "a new key is made by `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"
PUBLIC_HALF = "the public half of a key is made by `openssl ec -in key.pem -pubout -out key.pub.pem`"
ISSUERS = "of GitHub's workflows the issuer is https://token.actions.githubusercontent.com"
CI_IDENTITY = "give the job an id token (GitHub: `id-token: write`, GitLab: SIGSTORE_ID_TOKEN), or sign with key:FILE"


@dataclass(frozen=True)
class KeySigner:
    """Signs with the EC private key in a PEM file."""

    private_key: Path


@dataclass(frozen=True)
class SigstoreSigner:
    """Signs as whom the CI job runs for, by its OpenID token; nobody keeps a key."""


@dataclass(frozen=True)
class KeyVerifier:
    """Trusts the EC public key in a PEM file."""

    public_key: Path


@dataclass(frozen=True)
class SigstoreVerifier:
    """Trusts one identity, vouched for by one OpenID issuer."""

    identity: str
    issuer: str


Signer = KeySigner | SigstoreSigner
Verifier = KeyVerifier | SigstoreVerifier


def parse_signer(text: str, folder: Path = Path()) -> Signer:
    """`key:FILE`, relative to `folder`, or `sigstore`; raises UsageError for anything else."""
    kind, _, place = text.partition(":")
    if text == "sigstore":
        return SigstoreSigner()
    if kind == "key" and place:
        return KeySigner(folder / Path(place).expanduser())
    raise UsageError(f"{text!r} does not say who signs", f"as in key:FILE or sigstore; {NEW_KEY}")


def parse_verifier(text: str, folder: Path = Path()) -> Verifier:
    """`key:PUBLIC.pem`, relative to `folder`, or `sigstore:IDENTITY,ISSUER`; raises UsageError for anything else."""
    kind, _, place = text.partition(":")
    if kind == "key" and place:
        return KeyVerifier(folder / Path(place).expanduser())
    identity, _, issuer = place.rpartition(",")
    if kind == "sigstore" and identity and issuer.startswith("https://"):
        return SigstoreVerifier(identity, issuer)
    raise UsageError(
        f"{text!r} does not say whose signature is expected",
        f"as in key:PUBLIC.pem or sigstore:IDENTITY,ISSUER; {ISSUERS}",
    )


def library(module: str) -> Any:
    """A module of model_signing; raises EnvironmentProblem when it is not installed whole."""
    try:
        return import_module(f"model_signing.{module}")
    except ImportError as error:
        raise EnvironmentProblem(
            f"signatures need model-signing, which cannot be imported: {error}", "pip install 'qlora-export[sign]'"
        ) from None


def open_signer(signer: Signer) -> Any:
    """model-signing's configuration for a signer.

    Raises InputError for a key that cannot sign, NotAuthorised without an identity, RemoteProblem without Sigstore.
    """
    config = library("signing").Config()
    if isinstance(signer, SigstoreSigner):
        token = _ambient_token()
        with sigstore_errors():
            return config.use_sigstore_signer(identity_token=token)
    with _key_errors(signer.private_key, NEW_KEY):
        return config.use_elliptic_key_signer(private_key=signer.private_key)


def open_verifier(verifier: Verifier) -> Any:
    """model-signing's configuration for whom to trust; raises InputError for a key that cannot verify."""
    config = library("verifying").Config()
    if isinstance(verifier, SigstoreVerifier):
        with sigstore_errors():
            return config.use_sigstore_verifier(identity=verifier.identity, oidc_issuer=verifier.issuer)
    with _key_errors(verifier.public_key, PUBLIC_HALF):
        return config.use_elliptic_key_verifier(public_key=verifier.public_key)


def public_key(signer: KeySigner) -> bytes:
    """The public half of a private key, as PEM; raises as `open_signer` does."""
    open_signer(signer)
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    private = load_pem_private_key(signer.private_key.read_bytes(), None)
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@contextmanager
def sigstore_errors() -> Iterator[None]:
    """Failures of Sigstore's services, as ours."""
    from requests import RequestException
    from sigstore.errors import Error
    from sigstore.oidc import ExpiredIdentity, IdentityError, IssuerError

    try:
        yield
    except (IdentityError, ExpiredIdentity) as error:
        raise NotAuthorised(f"sigstore: the identity token is refused: {error}", "run the job again") from None
    except (Error, IssuerError, RequestException) as error:
        raise RemoteProblem(f"sigstore: {error}", "run the same command again later") from None


def _ambient_token() -> str:
    """The OpenID token of the CI job; without one Sigstore would open a browser."""
    from sigstore.oidc import IdentityError, detect_credential

    try:
        token = detect_credential()
    except IdentityError as error:
        raise NotAuthorised(f"sigstore: {error}", CI_IDENTITY) from None
    if token is None:
        raise NotAuthorised("sigstore: this process has no identity to sign as", CI_IDENTITY)
    return token


@contextmanager
def _key_errors(path: Path, hint: str) -> Iterator[None]:
    """What is wrong with a key file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", hint) from None
    except TypeError:
        raise InputError(f"{path}: the key has a password", f"give one without; {hint}") from None
    except AttributeError:
        raise InputError(f"{path}: not an elliptic curve key", hint) from None
    except ValueError as error:
        wrong = str(error) if "curve" in str(error) else "no PEM key of the kind that is needed"
        raise InputError(f"{path}: {wrong}", hint) from None
