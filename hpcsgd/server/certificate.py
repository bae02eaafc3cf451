"""A server's certificate, made anew at each start: clients know it by its fingerprint."""

from __future__ import annotations

import datetime
import os
import ssl

_VALIDITY = datetime.timedelta(days=3650)  # not looked at: a certificate is as old as its server


def make_server_context() -> tuple[ssl.SSLContext, str]:
    """TLS 1.3 with a new self-signed certificate, and its SHA-256 fingerprint, in hexadecimal."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hpcsgd")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _VALIDITY)
        .not_valid_after(now + _VALIDITY)
        .sign(key, hashes.SHA256())
    )
    encoding, key_format = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private = key.private_bytes(encoding, key_format, serialization.NoEncryption())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no session is resumed
    _load(context, private + certificate.public_bytes(encoding))
    return context, certificate.fingerprint(hashes.SHA256()).hex()


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    """Load a key and its certificate, which `ssl` takes from files only: from one that is on no disk."""
    memory = os.memfd_create("certificate")
    try:
        os.write(memory, pem)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
