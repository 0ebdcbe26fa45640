"""Signatures: with trusted keys only what one of them has signed is taken."""

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from app.errors import ConfigurationError, InvalidModel
from app.features.plan import NO_FEATURES
from app.repository.publish import publish
from app.repository.signing import SigningKey, TrustedKeys
from app.repository.store import open_repository
from app.repository.vault import Vault
from tests.tiny_models import contract, training, write_artifact, write_contract


def key_pair(
    folder: Path, name: str, kind: type[Ed25519PrivateKey | X25519PrivateKey] = Ed25519PrivateKey
) -> tuple[Path, bytes]:
    """A private key's file, and the public key, in the form in which openssl writes them."""
    key = kind.generate()
    path = folder / f"{name}.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return path, public


def trusting(folder: Path, *keys: bytes) -> TrustedKeys:
    path = folder / "trusted.pem"
    path.write_bytes(b"\n".join(keys))
    return TrustedKeys(path)


def publish_signed(folder: Path, key: Path | None) -> None:
    write_contract(folder / "models" / "tiny", contract("binary"))
    artifact = write_artifact(folder / "artifact", "binary", training("binary"))
    signing_key = None if key is None else SigningKey(key)
    asyncio.run(
        publish(
            folder / "models" / "tiny",
            artifact,
            NO_FEATURES,
            "tiny",
            isolated=False,
            signing_key=signing_key,
        )
    )


def vault(folder: Path, trusted: TrustedKeys | None) -> Vault:
    return Vault(folder / "vault", open_repository(str(folder / "models")), trusted)


def test_a_version_that_a_trusted_key_has_signed_is_taken(tmp_path: Path) -> None:
    _, other = key_pair(tmp_path, "other")
    key, public = key_pair(tmp_path, "ours")
    publish_signed(tmp_path, key)
    copy = vault(tmp_path, trusting(tmp_path, other, public)).take("tiny", 1)
    signed = (tmp_path / "models" / "tiny" / "1" / "manifest.sig").read_bytes()
    assert (copy.folder / "manifest.sig").read_bytes() == signed


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to ask")
def test_keys_and_signature_are_what_openssl_calls_ones(tmp_path: Path) -> None:
    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    openssl("genpkey", "-algorithm", "ed25519", "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", public)
    publish_signed(tmp_path, key)
    version = tmp_path / "models" / "tiny" / "1"
    verify = ["pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"]
    told = openssl(*verify, "-in", version / "manifest.json", "-sigfile", version / "manifest.sig")
    assert b"Verified Successfully" in told
    assert vault(tmp_path, trusting(tmp_path, public.read_bytes())).take("tiny", 1)


def openssl(*arguments: object) -> bytes:
    command = ["openssl", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def test_a_version_without_a_signature_is_refused(tmp_path: Path) -> None:
    publish_signed(tmp_path, None)
    _, public = key_pair(tmp_path, "ours")
    with pytest.raises(InvalidModel, match=r"manifest\.sig: is not there"):
        vault(tmp_path, trusting(tmp_path, public)).take("tiny", 1)


def test_a_copy_from_before_there_were_trusted_keys_is_refused_too(tmp_path: Path) -> None:
    publish_signed(tmp_path, None)
    copy = vault(tmp_path, None).take("tiny", 1)
    _, public = key_pair(tmp_path, "ours")
    with pytest.raises(InvalidModel, match=r"manifest\.sig: is not there"):
        vault(tmp_path, trusting(tmp_path, public)).take("tiny", 1, copy.sha256)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\0" * 1_024])
def test_another_signature_is_refused(tmp_path: Path, content: bytes) -> None:
    key, public = key_pair(tmp_path, "ours")
    publish_signed(tmp_path, key)
    (tmp_path / "models" / "tiny" / "1" / "manifest.sig").write_bytes(content)
    with pytest.raises(InvalidModel, match=r"manifest\.sig: no key of HIKYAKU_TRUSTED_KEYS"):
        vault(tmp_path, trusting(tmp_path, public)).take("tiny", 1)


def test_a_manifest_that_is_not_signed_is_not_even_read(tmp_path: Path) -> None:
    key, public = key_pair(tmp_path, "ours")
    publish_signed(tmp_path, key)
    (tmp_path / "models" / "tiny" / "1" / "manifest.json").write_bytes(b"{}")
    with pytest.raises(InvalidModel, match=r"manifest\.sig: no key of HIKYAKU_TRUSTED_KEYS"):
        vault(tmp_path, trusting(tmp_path, public)).take("tiny", 1)


def test_a_signature_of_a_key_that_is_not_trusted_is_refused(tmp_path: Path) -> None:
    key, _ = key_pair(tmp_path, "theirs")
    publish_signed(tmp_path, key)
    _, public = key_pair(tmp_path, "ours")
    with pytest.raises(InvalidModel, match=r"manifest\.sig: no key of HIKYAKU_TRUSTED_KEYS"):
        vault(tmp_path, trusting(tmp_path, public)).take("tiny", 1)


@pytest.mark.parametrize(
    "content",
    [b"", b"ssh-ed25519 AAAA", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"],
)
def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigurationError, match=r"trusted\.pem"):
        trusting(tmp_path, content)


def test_only_ed25519_keys_sign_and_are_trusted(tmp_path: Path) -> None:
    key, public = key_pair(tmp_path, "other", X25519PrivateKey)
    with pytest.raises(ConfigurationError, match="key 1: not an ed25519 key"):
        trusting(tmp_path, public)
    with pytest.raises(ConfigurationError, match="not an ed25519 key"):
        SigningKey(key)


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN PRIVATE KEY-----\n"])
def test_a_private_key_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "key.pem").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"key\.pem"):
        SigningKey(tmp_path / "key.pem")
