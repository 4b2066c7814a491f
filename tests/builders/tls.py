"""A certificate that nobody has signed but itself."""

import ssl
import subprocess
from pathlib import Path


def self_signed(folder: Path, *settings: str) -> tuple[Path, ssl.SSLContext]:
    """The certificate's file, and a server's context with it; `settings` are more of `openssl req`."""
    file = folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *settings]
    command += ["-keyout", f"{file}.key", "-out", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, f"{file}.key")
    return file, context
