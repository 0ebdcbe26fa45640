"""Signatures of manifests: ed25519, detached, in manifest.sig."""

from pathlib import Path

from app.errors import ConfigurationError, InvalidModel

_END = b"-----END PUBLIC KEY-----"


class SigningKey:
    """A private key, from a PEM file as `openssl genpkey -algorithm ed25519` writes it.

    Raises `ConfigurationError` naming the file when there is no such key in it.
    """

    def __init__(self, path: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(_content(path), password=None)
        except (ValueError, TypeError) as exc:  # TypeError: it is encrypted
            raise ConfigurationError(f"{path}: no unencrypted private key in PEM: {exc}") from exc
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError(f"{path}: not an ed25519 key")
        self._key = key

    def sign(self, manifest: bytes) -> bytes:
        """The signature of a manifest's content, 64 bytes."""
        return self._key.sign(manifest)


class TrustedKeys:
    """Public keys, from a file of PEM blocks as `openssl pkey -pubout` writes them.

    Raises `ConfigurationError` naming the file when another thing is in it, or no key at all.
    """

    def __init__(self, path: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        self._keys: list[Ed25519PublicKey] = []
        *blocks, rest = _content(path).split(_END)
        for number, block in enumerate(blocks, start=1):
            try:
                key = load_pem_public_key(block + _END + b"\n")
            except ValueError as exc:
                raise ConfigurationError(f"{path}: key {number}: {exc}") from exc
            if not isinstance(key, Ed25519PublicKey):
                raise ConfigurationError(f"{path}: key {number}: not an ed25519 key")
            self._keys.append(key)
        if not self._keys or rest.strip():
            raise ConfigurationError(f"{path}: not a list of public keys in PEM")

    def require(self, manifest: bytes, seal: bytes | None, what: str) -> None:
        """Raises `InvalidModel` naming `what` unless one of the keys has signed that content."""
        from cryptography.exceptions import InvalidSignature

        if seal is None:
            raise InvalidModel(f"{what}: is not there, and HIKYAKU_TRUSTED_KEYS asks for it")
        for key in self._keys:
            try:
                key.verify(seal, manifest)
            except InvalidSignature:
                continue
            return
        raise InvalidModel(f"{what}: no key of HIKYAKU_TRUSTED_KEYS has signed this manifest")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigurationError(f"{path}: {exc.strerror}") from exc
