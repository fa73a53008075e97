"""A test certificate authority and the keys of a federation, by the package cryptography, which Flower brings.

For rehearsals and small trials: whoever holds ca.key can make certificates that the nodes believe. A real deployment takes the
server's certificate from its organisation's authority; the keys of the clients stay as they are, better made at each site.
"""

import datetime
import importlib
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtail.errors import ConfigError

DAYS = 365


def _part(name: str) -> Any:
    try:
        return importlib.import_module(f"cryptography.{name}")
    except ImportError as error:
        raise ConfigError(f'--tls needs the package cryptography ({error}): pip install "fedtail[flower]"') from error


def _write(path: Path, content: bytes, secret: bool = False) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def make(folder: Path, names: Sequence[str], clients: int) -> None:
    """Makes ca.crt, ca.key, server.crt, server.key, and client-K with client-K.pub for each client, in a new folder.

    Args:
        folder: where.
        names: host names and IP addresses that nodes reach the server by; 127.0.0.1 and localhost are always among them.
        clients: number of clients.
    """
    x509, hashes, keys = (_part(n) for n in ("x509", "hazmat.primitives.hashes", "hazmat.primitives.serialization"))
    ec = _part("hazmat.primitives.asymmetric.ec")
    pem, none = keys.Encoding.PEM, keys.NoEncryption()
    folder.mkdir(mode=0o700)
    now = datetime.datetime.now(datetime.UTC)

    def name(text: str) -> Any:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def builder(subject: str, key: Any) -> Any:
        return (
            x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("fedtail test authority"))
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=DAYS))
        )  # fmt: skip

    ca, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    identity = x509.SubjectKeyIdentifier.from_public_key(ca.public_key())
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity)
    usage = dict.fromkeys(("digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
                           "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False)  # fmt: skip
    root = builder("fedtail test authority", ca).add_extension(x509.BasicConstraints(True, 0), critical=True)
    root = root.add_extension(x509.KeyUsage(**{**usage, "key_cert_sign": True, "crl_sign": True}), critical=True)
    root = root.add_extension(identity, critical=False)
    hosts = list(dict.fromkeys([*names, "127.0.0.1", "localhost"]))
    leaf = builder(hosts[0], server).add_extension(
        x509.SubjectAlternativeName([_host(x509, h) for h in hosts]), critical=False
    )
    leaf = leaf.add_extension(x509.BasicConstraints(False, None), critical=True).add_extension(issuer, critical=False)
    leaf = leaf.add_extension(x509.KeyUsage(**{**usage, "digital_signature": True}), critical=True)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    for stem, key, certificate in (("ca", ca, root), ("server", server, leaf)):
        _write(folder / f"{stem}.crt", certificate.sign(ca, hashes.SHA384()).public_bytes(pem))
        _write(folder / f"{stem}.key", key.private_bytes(pem, keys.PrivateFormat.PKCS8, none), True)
    for number in range(clients):
        _node_key(folder / f"client-{number}", ec.generate_private_key(ec.SECP384R1()), keys)


def _node_key(path: Path, key: Any, keys: Any) -> None:
    """Writes a SuperNode's key, and beside it its public half, as ssh-keygen does."""
    _write(path, key.private_bytes(keys.Encoding.PEM, keys.PrivateFormat.OpenSSH, keys.NoEncryption()), True)
    public = key.public_key().public_bytes(keys.Encoding.OpenSSH, keys.PublicFormat.OpenSSH)
    _write(path.with_suffix(".pub"), public + b"\n")


def _host(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)
